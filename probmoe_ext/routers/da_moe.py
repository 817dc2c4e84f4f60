"""DA-MoE: as many experts as a token's importance in the attention of its layer asks for."""

from __future__ import annotations

import torch

from probmoe_ext.ops import route_top_k
from probmoe_ext.ops.arguments import single
from probmoe_ext.routers.base import ExpertsPerToken, Router
from probmoe_ext.routers.registry import register_router
from probmoe_ext.routers.topk import probabilities_at


@register_router("da_moe")
class DAMoERouter(Router):
    """The ``K`` largest logits of a token, with ``K = k_min + round((k_max - k_min) * I / (1 + I))``.

    ``I`` is the importance of the token in the attention of its layer, averaged over the heads, and relative to what
    uniform attention would give it: with the weight ``A[q, i]`` of key ``i`` for query ``q``, which attends to ``n[q]``
    keys, it is ``n[i] * A[i, i]``, by the token's own query, or with ``causal=False`` the mean of ``n[q] * A[q, i]``
    over the queries that attend to it, padding excepted. Uniform attention gives 1, the middle of the band.

    Aghdam et al. 2024 (DA-MoE, arXiv 2409.06669) introduced that attention decides the number of experts. How
    importance is measured and mapped to a number is a choice made here, and not that paper's equations: a measure that
    depends neither on the position nor on the length, and a map that depends on no other token. The paper's models are
    encoders, where all queries judge: ``causal=False``. In a decoder that would look at later tokens, and a token that
    is generated with a cache could be judged by itself alone; the default judges it so always, so that generation
    chooses what a pass over the whole text does.

    The number has no gradient; the gate learns by the weights of the chosen experts, their softmax. The model must
    return attention weights (``attn_implementation="eager"``).

    Args:
        num_experts: ``E``.
        k: The band ``(k_min, k_max)``; one number is plain top-k.
        normalize: Whether the weights of a token are divided by their sum.
        causal: Whether only the token's own query judges it.

    Raises:
        ValueError: If ``k`` is out of range.
    """

    needs = frozenset({"attention"})

    def __init__(self, num_experts: int, k: ExpertsPerToken, *, normalize: bool = False, causal: bool = True) -> None:
        super().__init__(num_experts, k, normalize=normalize, causal=causal)
        self.normalize = normalize
        self.causal = causal

    def importance(self, attention: torch.Tensor) -> torch.Tensor:
        """``I``, ``[batch * length]`` in float32 or wider, of attention weights ``[batch, heads, length, keys]``."""
        attention = single(attention.detach()).mean(1)
        attended = attention > 0
        relative = attention * attended.sum(-1, keepdim=True)
        length, keys = attention.shape[1:]
        if not self.causal:
            if self.token_mask is not None:
                attended = attended & self.token_mask.view(-1, length, 1)
            # With a cache the last keys are those of the tokens at hand.
            relative, attended = relative[..., keys - length :], attended[..., keys - length :]
            return ((relative * attended).sum(1) / attended.sum(1).clamp(min=1)).flatten()
        if keys == length:
            return relative.diagonal(dim1=1, dim2=2).flatten()
        # The last key that a token attends to is its own, wherever a cache has it.
        places = torch.arange(keys, device=attention.device)
        own = torch.where(attended, places, 0).amax(-1, keepdim=True)
        return relative.gather(-1, own).flatten()

    def forward(self, hidden_states: torch.Tensor, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Route ``[T, E]`` logits to weights and indices ``[T, k_max]``; the hidden states are not used.

        Raises:
            ValueError: If there are no attention weights, or of another number of tokens.
        """
        attention = self.attention
        tokens = attention.shape[0] * attention.shape[2]
        if tokens != len(logits):
            raise ValueError(f"router 'da_moe' got the attention of {tokens} tokens for {len(logits)} hidden states")
        importance = self.importance(attention)
        count = self.k_min + ((self.k_max - self.k_min) * importance / (1 + importance)).round()
        _, order = route_top_k(logits.detach(), self.k_max)
        used = torch.arange(self.k_max, device=logits.device) < count.unsqueeze(-1)
        indices = torch.where(used, order, self.num_experts)
        return self.weights_for(hidden_states, logits, indices), indices

    def weights_for(
        self,
        hidden_states: torch.Tensor,
        logits: torch.Tensor,
        indices: torch.Tensor,
        scores: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The softmax probabilities of given experts ``[T, K]``, divided by their sum if ``normalize``."""
        return probabilities_at(indices, logits, self.normalize)
