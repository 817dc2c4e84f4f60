"""A short test of an installation: every operator family against the plain-torch reference, and a swapped model."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from probmoe_ext import ops, reference

ROWS, EXPERTS, BAND, SEED = 6, 12, (2, 4), 7
TOLERANCE = {torch.float64: 1e-8, torch.float32: 5e-4}
"""Relative and absolute: a wrong kernel is off by far more, a right one by far less."""

Case = Callable[[Any, "Inputs"], Tensor | tuple[Tensor, ...]]


@dataclass(frozen=True)
class Outcome:
    """One line of the self-test.

    Attributes:
        name: what was tested.
        device: where.
        reason: why it failed; None if it is right.
        seconds: how long it took.
    """

    name: str
    device: str
    reason: str | None
    seconds: float


@dataclass(frozen=True)
class Inputs:
    """Leaves, the same for operators and reference: logits, other logits, and two positive arguments ``[ROWS, E]``."""

    logits: Tensor
    other: Tensor
    alpha: Tensor
    beta: Tensor

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        """What gradients are taken of."""
        return self.logits, self.other, self.alpha, self.beta

    @property
    def chosen(self) -> Tensor:
        """Three experts a row, fixed."""
        return torch.arange(3, device=self.logits.device).repeat(ROWS, 1) * 3 + 1


def _dirmoe(m: Any, x: Inputs) -> tuple[Tensor, ...]:
    numbers = {"temperature": 0.7, "concentration": 2.0, "prior": (1.5, 2.0, 0.5)}
    outputs: tuple[Tensor, ...] = m.route_dirmoe(x.logits, x.alpha, x.beta, 3, **numbers, training=True, seed=SEED)
    return outputs


FAMILIES: dict[str, tuple[Case, ...]] = {
    "subset law": (
        lambda m, x: m.subset_log_partition(x.logits, BAND),
        lambda m, x: m.subset_cardinality(x.logits, BAND),
        lambda m, x: m.subset_marginals(x.logits, BAND),
        lambda m, x: m.subset_entropy(x.logits, BAND),
        lambda m, x: m.subset_covariance_vp(x.logits, x.other, BAND),
        lambda m, x: m.subset_pairwise(x.logits, BAND),
        lambda m, x: m.subset_kl(x.logits, x.other, BAND),
        lambda m, x: m.subset_log_prob(x.logits, x.chosen, 3),
    ),
    "subset samples": (
        lambda m, x: m.subset_sample(x.logits, BAND, SEED),
        lambda m, x: m.subset_mode(x.logits, BAND),
        lambda m, x: m.subset_indicator(x.logits, BAND, SEED),
    ),
    "Gumbel": (
        lambda m, x: m.gumbel_top_k(x.logits, 3, SEED),
        lambda m, x: m.plackett_luce_log_prob(x.logits, x.chosen),
        lambda m, x: m.relaxed_top_k(x.logits, 3, 0.5, SEED),
        lambda m, x: m.gumbel_sigmoid(x.logits, 0.5, SEED),
    ),
    "gamma and Dirichlet": (
        lambda m, x: m.log_gamma_sample(x.alpha, SEED),
        lambda m, x: m.standard_gamma_grad(x.alpha.detach(), x.beta.detach()),
        lambda m, x: m.dirichlet_sample(x.alpha, SEED),
        lambda m, x: m.dirichlet_log_prob(x.alpha, torch.softmax(x.other, -1)),
        lambda m, x: m.dirichlet_entropy(x.alpha),
        lambda m, x: m.dirichlet_kl(x.alpha, x.beta),
    ),
    "routing by top-k": (lambda m, x: m.route_top_k(x.logits, 3, normalize=True),),
    "routing by ProbMoE": (
        lambda m, x: m.route_probmoe(x.logits, BAND, training=True, seed=SEED),
        lambda m, x: m.route_probmoe(x.logits, 3, training=True, forward="topk", backward="ste"),
        lambda m, x: m.route_probmoe(x.logits, BAND, training=False),
    ),
    "routing by DirMoE": (_dirmoe,),
}
"""By name, the calls that are compared; ``m`` is `ops` or `reference`."""

SINGLE = ("subset law", "routing by top-k")
"""Compared in float32 as well: no draw can fall on the other side of a rounding."""


def check_operators(device: str) -> Iterator[Outcome]:
    """Compare every operator family with the reference, forward and backward, on random input.

    Args:
        device: ``cpu`` or ``cuda``.
    """
    for name, cases in FAMILIES.items():
        dtypes = tuple(TOLERANCE) if name in SINGLE else (torch.float64,)
        yield _outcome(name, device, lambda cases=cases, dtypes=dtypes: _compare(cases, dtypes, device))  # type: ignore[misc]


def check_swap(device: str) -> Outcome:
    """Route a tiny OLMoE by ProbMoE, train a step's worth, and put its own router back.

    Args:
        device: ``cpu`` or ``cuda``.
    """
    return _outcome("swap into an OLMoE", device, lambda: _swap(device))


def _outcome(name: str, device: str, check: Callable[[], str | None]) -> Outcome:
    began = time.perf_counter()
    try:
        reason = check()
    except Exception as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
    return Outcome(name, device, reason, time.perf_counter() - began)


def _compare(cases: tuple[Case, ...], dtypes: tuple[torch.dtype, ...], device: str) -> str | None:
    for dtype in dtypes:
        for number, case in enumerate(cases, start=1):
            found, expected = (_values_and_gradients(case, module, dtype, device) for module in (ops, reference))
            for one, other in zip(found, expected, strict=True):
                if one.shape != other.shape or not torch.allclose(
                    one.double(), other.double(), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype]
                ):
                    return f"call {number} in {str(dtype).removeprefix('torch.')} differs from the reference"
    return None


def _values_and_gradients(case: Case, module: Any, dtype: torch.dtype, device: str) -> list[Tensor]:
    generator = torch.Generator().manual_seed(SEED)
    logits, other, alpha, beta = (torch.randn(ROWS, EXPERTS, generator=generator, dtype=dtype) for _ in range(4))
    leaves = (1.5 * logits, other, 0.5 + alpha.abs(), 0.5 + beta.abs())
    inputs = Inputs(*(leaf.to(device).requires_grad_() for leaf in leaves))
    result = case(module, inputs)
    values = list(result) if isinstance(result, tuple) else [result]
    smooth = [value for value in values if value.requires_grad]
    if not smooth:
        return values
    # Weights that differ, so that no gradient cancels.
    total = sum(
        (value * torch.linspace(0.5, 1.5, value.numel(), device=device).view_as(value)).sum() for value in smooth
    )
    gradients = torch.autograd.grad(total, inputs.leaves, materialize_grads=True, allow_unused=True)  # type: ignore[arg-type]
    return [*(value.detach() for value in values), *gradients]


def _swap(device: str) -> str | None:
    from transformers import OlmoeConfig, OlmoeForCausalLM

    from probmoe_ext.hf import restore_router, swap_router

    config = OlmoeConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_experts=8,
        num_experts_per_tok=2,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
    with torch.random.fork_rng():
        torch.manual_seed(SEED)
        model: Any = OlmoeForCausalLM(config)
        model.to(device)
        tokens = torch.randint(2, 32, (2, 9)).to(device)
        with torch.no_grad():
            before = model.eval()(tokens).logits
        swap_router(model, "probmoe", k=(1, 3))
        loss = model.train()(tokens, labels=tokens).loss
        loss.backward()
    gate = next(value.grad for name, value in model.named_parameters() if name.endswith("gate.weight"))
    if not loss.isfinite() or gate is None or not gate.isfinite().all() or not gate.any():
        return "the loss or the gradient of the gate is not finite, or there is none"
    restore_router(model)
    with torch.no_grad():
        after = model.eval()(tokens).logits
    return None if torch.equal(before, after) else "the model's own router does not come back"
