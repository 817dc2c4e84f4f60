"""How exact the Gumbel family is, against 50 digits.

``python -m tests.ops.test_gumbel_accuracy`` prints the table of docs/gumbel.md.
"""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor

from probmoe_ext import ops
from tests import gumbel_oracle as oracle
from tests.inputs import logit_sets

ROWS, EXPERTS, K, SEED = 3, 12, 5, 23
NAMES = ("spread 1", "spread 10", "spread 100", "constant", "one 87 above", "plus or minus 2000", "half masked", "ties")
NEAR = {"spread 1", "spread 10", "constant", "half masked", "ties"}
"""Where the oracle of relaxed top-k, whose digits grow with the distance of the keys, still ends."""
TEMPERATURES = (1.0, 0.5, 0.1)
COLUMNS = ("keys", "gates", "log P", "its gradient", *(f"relaxed, τ = {t:g}" for t in TEMPERATURES))
PROMISE = {torch.float32: (2e-7, 1e-7), torch.float64: (5e-16, 1e-12)}
"""Of keys, relative to max(1, their size), and of gates; and of log P, relative likewise, and its gradient."""


def _key_errors(logits: Tensor, bits: int) -> float:
    unmasked = int(logits.isfinite().sum(-1).min())
    indices, keys = ops.gumbel_top_k(logits, unmasked, seed=SEED)
    worst = 0.0
    for row in range(ROWS):
        for column, key in zip(indices[row].tolist(), keys[row].double().tolist(), strict=True):
            true = float(logits[row, column]) + oracle.gumbel_variate(SEED, row, column, bits)
            worst = max(worst, abs(key - true) / max(1.0, abs(true)))
    return worst


def _gate_errors(logits: Tensor, bits: int) -> float:
    noise = [[oracle.logistic_variate(SEED, row, column, bits) for column in range(EXPERTS)] for row in range(ROWS)]
    true = torch.sigmoid(logits.double() + torch.tensor(noise, dtype=torch.float64))
    return float((ops.gumbel_sigmoid(logits, 1.0, seed=SEED).double() - true).abs().max())


def _log_prob_errors(logits: Tensor) -> tuple[float, float]:
    leaf = logits.clone().requires_grad_()
    order = ops.gumbel_top_k(logits, K, seed=SEED)[0]
    log_prob = ops.plackett_luce_log_prob(leaf, order)
    (gradient,) = torch.autograd.grad(log_prob.sum(), leaf)
    value = log_prob.detach()
    of_value = of_gradient = 0.0
    for row in range(ROWS):
        true, slope = oracle.exact_log_prob(logits[row].double().tolist(), order[row].tolist())
        of_value = max(of_value, abs(float(value[row]) - true) / max(1.0, abs(true)))
        exact = torch.tensor(slope, dtype=torch.float64)
        of_gradient = max(of_gradient, float((gradient[row].double() - exact).abs().max()))
    return of_value, of_gradient


def _relaxed_error(logits: Tensor, temperature: float) -> float:
    """Beyond the keys' own rounding: the oracle begins from the keys that the operator kept."""
    got, keys = torch.ops.probmoe_ext.relaxed_top_k(logits, torch.tensor(SEED), K, temperature)
    true = torch.tensor([oracle.relaxed(row, K, temperature) for row in keys.tolist()], dtype=torch.float64)
    return float((got.double() - true).abs().max())


@cache
def errors(name: str, dtype: torch.dtype) -> tuple[float, ...]:
    """Worst errors by `COLUMNS`, without the last where the oracle is out of reach."""
    logits = logit_sets(ROWS, EXPERTS, (K, K), dtype)[name]
    bits = 64 if dtype == torch.float64 else 32
    relaxed = [_relaxed_error(logits, t) for t in TEMPERATURES if name in NEAR]
    return (_key_errors(logits, bits), _gate_errors(logits, bits), *_log_prob_errors(logits), *relaxed)


@pytest.mark.parametrize("dtype", PROMISE, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_holds_its_promise(name: str, dtype: torch.dtype) -> None:
    keys, gates, log_prob, gradient, *relaxed = errors(name, dtype)
    of_noise, of_law = PROMISE[dtype]
    assert max(keys, gates) <= of_noise and max(log_prob, gradient) <= of_law
    for temperature, error in zip(TEMPERATURES, relaxed, strict=False):
        # A rounding of a key, of size up to 40 here, counts for 1 / temperature times as much.
        assert error <= 40 * of_noise / temperature


def table() -> str:
    """The errors of every set in both types."""
    lines = [f"| logits | dtype | {' | '.join(COLUMNS)} |", "|---|---|" + "---|" * len(COLUMNS)]
    for name in NAMES:
        for dtype in PROMISE:
            cells = [f"{error:.1e}" for error in errors(name, dtype)]
            cells += ["–"] * (len(COLUMNS) - len(cells))
            lines.append(f"| {name} | {str(dtype).removeprefix('torch.')} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
