"""The logits that the ops are tested on: MATH.md's promises name these sets."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from tests import oracle

Band = tuple[int, int]

MODERATE = ("spread 1", "spread 10", "constant", "half masked", "ties")
SET_NAMES = (
    "spread 1",
    "spread 10",
    "spread 100",
    "constant",
    "shifted by 100",
    "one 87 above",
    "plus or minus 2000",
    "masked to k_min",
    "half masked",
    "ties",
)


def logit_sets(num_rows: int, num_experts: int, band: Band, dtype: torch.dtype, seed: int = 0) -> dict[str, Tensor]:
    """Return named batches of logits ``[num_rows, num_experts]``: the same float32 numbers in float32 and float64."""
    generator = torch.Generator().manual_seed(seed + 1009 * num_experts + 31 * band[0] + band[1])
    shape = (num_rows, num_experts)

    def normal() -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    dominated = normal()
    dominated[:, num_experts // 3] = dominated.amax(-1) + 87
    order = torch.rand(shape, generator=generator).argsort(-1)
    masked = normal().scatter_(-1, order[:, band[0] :], -torch.inf)
    half_masked = normal().scatter_(-1, order[:, max(band[0], num_experts // 2) :], -torch.inf)
    batches = (
        normal(),
        10 * normal(),
        100 * normal(),
        torch.full(shape, 0.3, dtype=torch.float64),
        normal() + 100,
        dominated,
        torch.where(normal() > 0.0, 2000.0, -2000.0),
        masked,
        half_masked,
        (2 * normal()).round(),
    )
    return {name: logits.float().to(dtype) for name, logits in zip(SET_NAMES, batches, strict=True)}


@cache
def exact_case(num_experts: int, band: Band, name: str) -> tuple[Tensor, Tensor, oracle.Exact]:
    """Logits ``[1, E]`` from a named set, a vector v ``[1, E]`` (float32 numbers in float64), and the truth."""
    logits = logit_sets(1, num_experts, band, torch.float64)[name]
    generator = torch.Generator().manual_seed(num_experts)
    v = torch.randn(logits.shape, generator=generator, dtype=torch.float32).double()
    return logits, v, oracle.exact(logits[0], v[0], band)
