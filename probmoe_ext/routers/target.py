"""What routers have in common that let each token use any number of experts, and steer the mean to a target."""

from __future__ import annotations

from typing import Any

import torch

from probmoe_ext.routers.base import ExpertsPerToken, Router


class TargetRouter(Router):
    """A router of tokens that use from 0 to ``E`` experts; ``k`` is what they are to use on average.

    Notes in training how many were used, for :meth:`begin_pass` to act upon. The mean is over all layers whose routers
    know each other (``peers``) and are of the same class, else over the router's own; in a distributed run it is that
    of the process's own tokens. What is noted are integers, which no cast of the model rounds.

    Args:
        num_experts: ``E``.
        k: Experts per token to use on average, one number; the results have ``E`` slots.
        **options: As in :class:`Router`.

    Raises:
        ValueError: If ``k`` is a band, or out of range.
    """

    adapts = True

    active: torch.Tensor
    """Experts used in the last training pass, over all tokens that count."""

    tokens: torch.Tensor
    """The tokens of that pass that count."""

    def __init__(self, num_experts: int, k: ExpertsPerToken, **options: Any) -> None:
        super().__init__(num_experts, k, **options)
        self.one_k()
        self.register_buffer("active", torch.zeros((), dtype=torch.int64))
        self.register_buffer("tokens", torch.zeros((), dtype=torch.int64))

    @property
    def width(self) -> int:
        """``E``: a token may use every expert."""
        return self.num_experts

    @property
    def leaves_slots_unused(self) -> bool:
        """True: slots beyond what a token uses carry index ``E``."""
        return True

    def note_used(self, used: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Note how many experts are used.

        Args:
            used: ``[T, E]`` bool, in any order of the experts.

        Returns:
            ``used`` without the tokens that do not count, and the number of those that do.
        """
        tokens = self.tokens.new_tensor(len(used))
        if self.token_mask is not None:
            used, tokens = used & self.token_mask.unsqueeze(-1), self.token_mask.sum()
        with torch.no_grad():
            self.active.copy_(used.sum())
            self.tokens.copy_(tokens)
        return used, tokens

    def excess(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Experts used beyond the target, and tokens, int64 scalars, in the last pass over all layers."""
        routers = [router for router in self.peers if type(router) is type(self)] or [self]
        excess = torch.stack([router.active - router.k_max * router.tokens for router in routers])
        return excess.sum(), torch.stack([router.tokens for router in routers]).sum()
