"""DirMoE: relaxed Bernoulli gates choose the experts, a Dirichlet draw weighs them (arXiv 2602.09001)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

from probmoe_ext.ops import route_dirmoe
from probmoe_ext.routers.base import ExpertsPerToken, Router
from probmoe_ext.routers.calibration import calibrate_concentration, calibrate_ratio, mean_simpson
from probmoe_ext.routers.registry import register_router
from probmoe_ext.routers.topk import chosen, weights_at

DEFAULT_EXCESS = 0.05
"""Where the prior's Simpson index lies by default, between that of its mean (0) and 1."""

SPARSITY_OF = ("token", "mean")


@register_router("dirmoe")
class DirMoERouter(Router):
    """Gates ``z`` say which experts, a Dirichlet draw ``theta`` how much of each; both are learnt.

    The model's own gate gives the logits of ``z = sigmoid((logits + bias + Logistic) / temperature)``; a bias of each
    expert is learnt beside it, since a gate made for softmax knows no zero. Two heads on the hidden state give
    concentrations ``alpha_lo = floor + softplus(.)`` of closed and ``alpha_hi = alpha_lo + floor + softplus(.)`` of
    open gates, for each expert. In training ``theta ~ Dir(q)``, ``q = concentration (z alpha_hi +
    (1 - z) alpha_lo)``, and the ``k_max`` largest entries of ``r = z theta / sum(z theta)`` are the weights. In
    evaluation the experts with a positive logit are taken, their number clamped to the band, and weighted by the
    posterior's mean.

    Two losses join the backward pass by themselves: ``kl``, the mean over the tokens of the posterior's divergence from
    the prior ``Dir(p)``, ``p = prior_concentration (z prior_hi + (1 - z) prior_lo)``; and ``sparsity``, the square of
    ``sum(z) - target``. The paper's is the mean of each token's square, which is that of the expected number plus the
    variance of ``sum(z)``: alone, it stops below the target, by some 0.15 gates at the default temperature. With
    ``sparsity_of="mean"`` it is the square of the mean over the tokens, which is least where the expected number is the
    target, and leaves each token its own. The prior is calibrated: ``prior_lo`` is 1, ``prior_hi`` the ratio that puts
    ``mass`` on k experts, and the concentration has ``simpson`` as the expected Simpson index. The heads start at the
    prior, so that the first ``kl`` is 0 but for the rounding of the heads' dtype.

    ``temperature``, ``concentration`` and ``prior_concentration`` are attributes that a schedule may set; they have no
    part in evaluation.

    Args:
        num_experts: ``E``, at least 2.
        k: Experts per token; with a band ``(k_min, k_max)`` their number varies in evaluation.
        hidden_size: ``H``, the width of the hidden states.
        normalize: Whether the kept weights are divided by their sum in training (in evaluation they always are).
        temperature: Of the gates, positive.
        target: Open gates per token that ``sparsity`` asks for; None for k, or the middle of a band.
        mass: Expected mass of the prior on the active experts, above 0 and below 1.
        simpson: Expected Simpson index of the prior with k active experts; None for a twentieth of the way from that of
            its mean to 1.
        kl_weight: Coefficient of ``kl``, at least 0.
        sparsity_weight: Coefficient of ``sparsity``, at least 0; at 0 nothing asks for the target.
        sparsity_of: ``"token"``, each token's square, or ``"mean"``, the square of the mean.
        gate_bias: What the biases start at; None for the logit of ``target / E``.
        floor: Least value of ``alpha_lo`` and of ``alpha_hi - alpha_lo``, above 0 and below 1.

    Raises:
        ValueError: If an option or ``k`` is not allowed.
    """

    has_loss = True

    def __init__(
        self,
        num_experts: int,
        k: ExpertsPerToken,
        *,
        hidden_size: int,
        normalize: bool = True,
        temperature: float = 0.5,
        target: float | None = None,
        mass: float = 0.9,
        simpson: float | None = None,
        kl_weight: float = 0.01,
        sparsity_weight: float = 0.01,
        sparsity_of: Literal["token", "mean"] = "token",
        gate_bias: float | None = None,
        floor: float = 0.01,
    ) -> None:
        super().__init__(
            num_experts,
            k,
            hidden_size=hidden_size,
            normalize=normalize,
            temperature=temperature,
            target=target,
            mass=mass,
            simpson=simpson,
            kl_weight=kl_weight,
            sparsity_weight=sparsity_weight,
            sparsity_of=sparsity_of,
            gate_bias=gate_bias,
            floor=floor,
        )
        if not 1e-6 <= temperature <= 1e6:
            raise ValueError(f"temperature of router 'dirmoe' must be from 1e-6 to 1e6, got {temperature}")
        for name, weight in (("kl_weight", kl_weight), ("sparsity_weight", sparsity_weight)):
            if not 0 <= weight < math.inf:
                raise ValueError(f"{name} of router 'dirmoe' must be finite and at least 0, got {weight}")
        if sparsity_of not in SPARSITY_OF:
            raise ValueError(
                f"sparsity_of of router 'dirmoe' must be one of {', '.join(SPARSITY_OF)}; got {sparsity_of!r}"
            )
        if not 0 < floor < 1:
            raise ValueError(f"floor of router 'dirmoe' must be above 0 and below 1, got {floor}")
        self.normalize = normalize
        self.temperature = temperature
        self.target = (self.k_min + self.k_max) / 2 if target is None else target
        if not 0 <= self.target <= self.num_experts:
            raise ValueError(f"target of router 'dirmoe' must be from 0 to E = {self.num_experts}, got {target}")
        self.kl_weight = kl_weight
        self.sparsity_weight = sparsity_weight
        self.sparsity_of = sparsity_of
        self.floor = floor
        # The prior is that of k_max active experts: it only has a ratio if some are inactive.
        active = min(self.k_max, self.num_experts - 1)
        self.prior_lo, self.prior_hi = 1.0, calibrate_ratio(mass, active, self.num_experts)
        if self.prior_hi <= self.prior_lo + floor:
            raise ValueError(
                f"mass of router 'dirmoe' must exceed the share {active / self.num_experts:.3g} that {active} of "
                f"{self.num_experts} experts have anyway, got {mass}"
            )
        least = mean_simpson(active, self.num_experts, self.prior_hi)
        index = least + DEFAULT_EXCESS * (1 - least) if simpson is None else simpson
        self.concentration = self.prior_concentration = calibrate_concentration(
            index, active, self.num_experts, self.prior_hi
        )
        share = min(max(self.target / self.num_experts, 0.5 / self.num_experts), 1 - 0.5 / self.num_experts)
        self.start = math.log(share / (1 - share)) if gate_bias is None else gate_bias
        if not math.isfinite(self.start):
            raise ValueError(f"gate_bias of router 'dirmoe' must be finite, got {gate_bias}")
        self.gate_bias = nn.Parameter(torch.empty(self.num_experts))
        self.heads = nn.Linear(hidden_size, 2 * self.num_experts)
        self.open_gates = torch.zeros(())
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Bring the gates to their start, and the heads to the prior: the same for every token."""
        excess, low = self.prior_hi - self.prior_lo - self.floor, self.prior_lo - self.floor
        with torch.no_grad():
            self.gate_bias.fill_(self.start)
            self.heads.weight.zero_()
            for part, value in zip(self.heads.bias.split(self.num_experts), (excess, low), strict=True):
                part.fill_(value + math.log(-math.expm1(-value)))  # the inverse of softplus

    def concentrations(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """``(alpha_hi, alpha_lo)``, each ``[T, E]`` in float32, for hidden states ``[T, H]``."""
        excess, low = F.softplus(self.heads(hidden_states).float()).split(self.num_experts, dim=-1)
        alpha_lo = low + self.floor
        return alpha_lo + excess + self.floor, alpha_lo

    def forward(self, hidden_states: torch.Tensor, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Route ``[T, E]`` logits by hidden states ``[T, H]`` to weights and indices ``[T, k_max]``."""
        alpha_hi, alpha_lo = self.concentrations(hidden_states)
        gates = logits.float() + self.gate_bias.float()
        weights, indices, kl, open_gates = self._route(gates, alpha_hi, alpha_lo, self.k, self.normalize)
        weights = weights.to(logits.dtype)
        if self.training:
            excess = open_gates - self.target
            tokens: int | torch.Tensor = max(len(logits), 1)
            if self.token_mask is not None:  # padding counts for nothing
                kl, excess, open_gates = (torch.where(self.token_mask, x, 0) for x in (kl, excess, open_gates))
                tokens = self.token_mask.sum().clamp(min=1)
            by_token = self.sparsity_of == "token"
            penalty = excess.square().sum() / tokens if by_token else (excess.sum() / tokens).square()
            weights = self.join_loss(weights, self.kl_weight * kl.sum() / tokens, "kl")
            weights = self.join_loss(weights, self.sparsity_weight * penalty, "sparsity")
            self.open_gates = open_gates.detach().sum() / tokens
        return weights, indices

    def weights_for(
        self,
        hidden_states: torch.Tensor,
        logits: torch.Tensor,
        indices: torch.Tensor,
        scores: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The weights of given experts ``[T, K]``, with the losses left out.

        In training their entries of ``r``, from a draw of gates and ``theta`` over all experts: from the state of the
        generator in which :meth:`forward` chose them, the weights that it returned. In evaluation their shares of the
        posterior's mean, with just their gates open.
        """
        alpha_hi, alpha_lo = self.concentrations(hidden_states)
        if self.training:
            # In double precision, since the shares of closed gates may be small.
            gates = logits.double() + self.gate_bias.double()
            r, places, *_ = self._route(gates, alpha_hi.double(), alpha_lo.double(), self.num_experts, False)
            dense = gates.new_zeros(len(gates), self.num_experts + 1).scatter(-1, places, r)[..., :-1]
        else:
            dense = alpha_hi
        dense = dense * chosen(indices, self.num_experts, dense.dtype)
        return weights_at(indices, dense, self.normalize or not self.training).to(logits.dtype)

    def _route(
        self, gates: torch.Tensor, alpha_hi: torch.Tensor, alpha_lo: torch.Tensor, k: ExpertsPerToken, normalize: bool
    ) -> tuple[torch.Tensor, ...]:
        return route_dirmoe(
            gates,
            alpha_hi,
            alpha_lo,
            k,
            temperature=self.temperature,
            concentration=self.concentration,
            prior=(self.prior_concentration, self.prior_hi, self.prior_lo),
            training=self.training,
            normalize=normalize,
        )


def dirmoe_routers(model: nn.Module) -> Iterator[DirMoERouter]:
    """The DirMoE routers of a model, in the order of its modules."""
    return (module for module in model.modules() if isinstance(module, DirMoERouter))


def set_temperature(model: nn.Module, temperature: float) -> None:
    """Set the gates' temperature of every DirMoE router.

    Args:
        model: A model with routers in it, or a router.
        temperature: From 1e-6 to 1e6.

    Raises:
        ValueError: If the temperature is out of range.
    """
    if not 1e-6 <= temperature <= 1e6:
        raise ValueError(f"temperature must be from 1e-6 to 1e6, got {temperature}")
    for router in dirmoe_routers(model):
        router.temperature = temperature


def set_concentration(model: nn.Module, concentration: float) -> None:
    """Set the concentration of posterior and prior of every DirMoE router.

    Args:
        model: A model with routers in it, or a router.
        concentration: Positive.

    Raises:
        ValueError: If it is not positive and finite.
    """
    if not 0 < concentration < math.inf:
        raise ValueError(f"concentration must be positive and finite, got {concentration}")
    for router in dirmoe_routers(model):
        router.concentration = router.prior_concentration = concentration
