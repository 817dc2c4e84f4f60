"""Gamma and Dirichlet draws and their derivatives: digits, laws, unbiased gradients, independence of how they are run.

``python -m tests.ops.test_gamma`` prints the table of docs/gamma.md.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mpmath
import numpy as np
import pytest
import torch
from scipy import special, stats
from torch import Tensor

from probmoe_ext import ops, reference
from tests.gamma_oracle import ALPHAS, QUANTILES, beta_slope, log_gamma_slope, log_quantile

SLOPE = torch.ops.probmoe_ext.log_gamma_sample_backward
TOLERANCE = {torch.float32: 2e-6, torch.float64: 2e-12}
both_precisions = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
Errors = dict[str, float]


def slopes(alpha: float, dtype: torch.dtype) -> Errors:
    """Worst relative errors over the quantiles, of d log g / d alpha and of dg / dalpha, ours and torch's."""
    log_value = torch.tensor([[log_quantile(alpha, p) for p in QUANTILES]]).to(dtype)
    concentration = torch.full_like(log_value, alpha)
    at = float(concentration[0, 0])

    def worst(got: Tensor, exact: list[Any]) -> float:
        pairs = zip(got[0].tolist(), exact, strict=True)
        return max((abs(float((a - b) / b)) for a, b in pairs if abs(b) > 1e-30), default=0.0)

    by_log = [log_gamma_slope(at, y) for y in log_value[0].tolist()]
    value = log_value.exp()
    mpmath.mp.dps = 40
    by_value = [mpmath.mpf(g) * log_gamma_slope(at, mpmath.log(g)) if g > 0 else 0 for g in value[0].tolist()]
    return {
        "log": worst(SLOPE(torch.ones_like(log_value), concentration, log_value), by_log),
        "value": worst(ops.standard_gamma_grad(concentration, value), by_value),
        "torch": worst(torch._standard_gamma_grad(concentration, value), by_value),
    }


@both_precisions
@pytest.mark.parametrize("alpha", ALPHAS)
def test_slope_digits(alpha: float, dtype: torch.dtype) -> None:
    errors = slopes(alpha, dtype)
    assert errors["log"] <= TOLERANCE[dtype]
    assert errors["value"] <= TOLERANCE[dtype]


@both_precisions
def test_slope_everywhere(dtype: torch.dtype) -> None:
    """Beyond the promised range too: alpha from 1e-30 to 1e30, values far into both tails; positive, and accurate."""
    alpha = torch.logspace(-30, 30, 121, dtype=torch.float64)[:, None]
    delta = torch.tensor([[-1e4, -80.0, -10.0, -2.0001, -1.9999, 0.0, 1.4999, 1.5001, 3.0, 10.0]], dtype=torch.float64)
    log_value = torch.log1p(alpha) + delta
    alpha, log_value = torch.broadcast_tensors(alpha.to(dtype), log_value.clamp(max=70).to(dtype))
    got = SLOPE(torch.ones_like(alpha), alpha, log_value)
    assert (got > 0).all() and got.isfinite().all()
    moderate = (alpha >= 1e-6) & (alpha <= 2e4)  # The reference's work grows like the square root of alpha.
    want = reference.log_gamma_grad(alpha[moderate].double(), log_value[moderate].double())
    assert ((got[moderate] / want - 1).abs() <= TOLERANCE[dtype]).all()
    grad = ops.standard_gamma_grad(alpha, log_value.exp())
    assert (grad >= 0).all() and grad.isfinite().all()


@both_precisions
def test_where_there_is_no_law(dtype: torch.dtype) -> None:
    inf, nan, tiny = torch.inf, torch.nan, torch.finfo(dtype).tiny
    alpha = torch.tensor([0.0, -1.0, inf, nan, 1.0, 1.0, 1.0, 1.0], dtype=dtype)
    drawn = ops.log_gamma_sample(alpha, seed=1)
    assert drawn[0] == -inf and drawn[1:4].isnan().all() and drawn[4:].isfinite().all()
    value = torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0, tiny / 4, -1.0, nan], dtype=dtype)
    grad = ops.standard_gamma_grad(alpha, value)
    assert grad.isnan().tolist() == [True, True, True, True, False, False, True, True] and (grad[4:6] == 0).all()
    shares = ops.dirichlet_sample(torch.tensor([[0.0, 1.0, 2.0], [0.0, 0.0, 0.0], [1.0, -1.0, 1.0]], dtype=dtype), 1)
    assert shares[0, 0] == 0 and shares[0].sum() == pytest.approx(1) and shares[1:].isnan().all()


@both_precisions
@pytest.mark.parametrize("alpha", [1e-3, 0.1, 0.6, 1.0, 2.5, 40.0, 1e4])
def test_law_of_draws(alpha: float, dtype: torch.dtype) -> None:
    """Kolmogorov-Smirnov, in the logarithm; and the moments psi(alpha), psi'(alpha) of log g."""
    drawn = ops.log_gamma_sample(torch.full((20_000, 5), alpha, dtype=dtype), seed=3).double().flatten().numpy()
    # P(log g <= y), by its leading term where g itself underflows.
    below = np.minimum((alpha * drawn - special.gammaln(alpha + 1)), 0)
    cdf = np.where(drawn < -40, np.exp(below), special.gammainc(alpha, np.exp(drawn)))
    assert stats.kstest(cdf, "uniform").pvalue > 1e-4
    deviation = np.sqrt(special.polygamma(1, alpha) / drawn.size)
    assert abs(drawn.mean() - special.digamma(alpha)) <= 4 * deviation
    spread = (drawn - special.digamma(alpha)) ** 2
    assert abs(spread.mean() - special.polygamma(1, alpha)) <= 4 * spread.std() / np.sqrt(drawn.size)


def test_columns_rows_and_seeds_are_independent() -> None:
    """Correlations of neighbouring elements, rows and seeds, of the draws and of their squares."""
    draws = [ops.log_gamma_sample(torch.full((50_000, 2), 0.7), seed=seed).double() for seed in (5, 6)]
    for f in (lambda x: x, torch.square):
        first, other = (f(d - d.mean()) for d in draws)
        pairs = [(first[:, 0], first[:, 1]), (first[1:, 0], first[:-1, 0]), (first[:, 0], other[:, 0])]
        for a, b in pairs:
            assert abs(float(torch.corrcoef(torch.stack([a, b]))[0, 1])) <= 4 / len(a) ** 0.5


@pytest.mark.parametrize("alpha", [0.01, 0.1, 1.0, 7.0, 100.0])
def test_gradients_are_unbiased(alpha: float) -> None:
    """d/dalpha of E[theta], E[theta^2] and E[log theta] from 10^6 draws, within 4 standard errors."""
    count, shape = 1_000_000, torch.tensor([alpha, 1.5 * alpha, 0.5 + alpha], dtype=torch.float64)
    a, total = shape[0], shape.sum()
    by_own, by_other = torch.eye(3, dtype=torch.float64)[0], torch.ones(3, dtype=torch.float64)
    mean = by_own / total - a / total**2 * by_other
    square = (2 * a + 1) / (total * (total + 1)) * by_own
    square = square - a * (a + 1) * (2 * total + 1) / (total * (total + 1)) ** 2 * by_other
    logarithm = torch.special.polygamma(1, a) * by_own - torch.special.polygamma(1, total) * by_other
    for dtype in (torch.float32, torch.float64):
        concentration = shape.to(dtype).expand(count, -1).clone().requires_grad_()
        share = ops.dirichlet_sample(concentration, seed=7)[:, 0]
        log_share = torch.log_softmax(ops.log_gamma_sample(concentration, seed=7), -1)[:, 0]
        for value, want in ((share, mean), (share.square(), square), (log_share, logarithm)):
            (grad,) = torch.autograd.grad(value.sum(), concentration, retain_graph=True)
            error = (grad.double().mean(0) - want).abs()
            assert (error <= 4 * grad.double().std(0) / count**0.5).all(), (dtype, grad.double().mean(0), want)


@both_precisions
def test_small_concentrations_do_not_degenerate(dtype: torch.dtype) -> None:
    """At 1e-4, where torch's sampler returns ties at the smallest number, every draw has a winner, fairly."""
    shares = ops.dirichlet_sample(torch.full((8000, 8), 1e-4, dtype=dtype), seed=11)
    assert ((shares.sum(-1) - 1).abs() < 1e-5).all()
    assert stats.chisquare(torch.bincount(shares.argmax(-1), minlength=8)).pvalue > 1e-4


@both_precisions
def test_equals_reference(dtype: torch.dtype) -> None:
    """Attempt by attempt the same as the plain-torch statement of the scheme, but for roundings of a decision."""
    alpha = 10 ** (torch.rand(1000, 24, dtype=torch.float64) * 12 - 6).to(dtype)
    got, want = ops.log_gamma_sample(alpha, seed=13), reference.log_gamma_sample(alpha, seed=13)
    error = (got - want).abs() / (1 + want.abs())
    assert (error > 8 * torch.finfo(dtype).eps).double().mean() <= 1e-4


def test_float32_agrees_with_float64() -> None:
    alpha = 10 ** (torch.rand(4000, 24) * 5 - 2)
    single, double = (ops.log_gamma_sample(a, seed=17).double() for a in (alpha, alpha.double()))
    error = (single - double).abs() / (1 + double.abs())
    assert (error > 1e-3).double().mean() < 1e-4


def _route(logits: Tensor) -> Any:
    numbers = {"temperature": 0.5, "concentration": 2.0, "prior": (1.0, 2.0, 0.1)}
    hi, lo = torch.full_like(logits, 1.5), torch.full_like(logits, 0.2)
    return torch.cat(
        [
            o.reshape(*logits.shape[:-1], -1)
            for o in ops.route_dirmoe(logits, hi, lo, 4, training=True, seed=19, **numbers)
        ],
        -1,
    )


@pytest.mark.parametrize(
    "draw",
    [lambda x: ops.log_gamma_sample(x.exp(), 19), lambda x: ops.dirichlet_sample(x.exp(), 19), _route],
    ids=["log_gamma_sample", "dirichlet_sample", "route_dirmoe"],
)
def test_depends_on_row_number_only(
    draw: Callable[[Tensor], Tensor], with_threads: Callable[[int, Callable[[], Any]], Any]
) -> None:
    """Threads, batch shape and what follows in the batch change nothing."""
    logits = torch.randn(999, 24)
    one, two = (with_threads(n, lambda: draw(logits)) for n in (1, 2))
    assert torch.equal(one, two)
    for count in (1, 2, 15, 16, 17, 500):
        assert torch.equal(draw(logits[:count]), one[:count])
    assert torch.equal(draw(logits.reshape(3, 333, 24)).reshape(999, -1), one)


def test_no_second_derivative_of_a_draw() -> None:
    alpha = torch.rand(3, 4, dtype=torch.float64, requires_grad=True)
    for draw in (ops.dirichlet_sample, ops.log_gamma_sample):
        (grad,) = torch.autograd.grad(draw(alpha, 3).square().sum(), alpha, create_graph=True)
        with pytest.raises(RuntimeError, match="once differentiable"):
            torch.autograd.grad(grad.sum(), alpha)


@pytest.mark.parametrize("name", ["log_gamma_sample", "dirichlet_sample", "dirichlet_entropy"])
def test_errors_of_one_argument(name: str) -> None:
    call: Callable[..., Any] = getattr(ops, name)
    with pytest.raises(TypeError, match=r"concentration must be .* not torch.int64"):
        call(torch.ones(3, 4).long())
    with pytest.raises(TypeError, match=r"must be a torch\.Tensor, not list"):
        call([1.0])
    with pytest.raises(ValueError, match="E >= 1"):
        call(torch.ones(3, 0))
    if name.endswith("sample"):
        with pytest.raises(TypeError, match="seed"):
            call(torch.ones(3), seed=1.5)


@pytest.mark.parametrize("name", ["standard_gamma_grad", "dirichlet_log_prob", "dirichlet_kl"])
def test_errors_of_two_arguments(name: str) -> None:
    call: Callable[..., Any] = getattr(ops, name)
    with pytest.raises(ValueError, match=r"shape of (p_)?concentration \(3, 4\), not \(3, 5\)"):
        call(torch.ones(3, 4), torch.ones(3, 5))
    with pytest.raises(TypeError, match="int64"):
        call(torch.ones(3, 4), torch.ones(3, 4).long())
    with pytest.raises(ValueError, match="meta"):
        call(torch.ones(3, 4), torch.ones(3, 4, device="meta"))


def torch_dirichlet_error(alpha: float, dtype: torch.dtype) -> float:
    """Worst relative error of torch's Dirichlet gradient for two shares, Beta(alpha, beta), over quantiles."""
    worst = 0.0
    for beta in (0.3 * alpha, alpha, 3 * alpha):
        for x in stats.beta.ppf((0.01, 0.1, 0.5, 0.9, 0.99), alpha, beta):
            value, a, total = (torch.tensor([v], dtype=dtype) for v in (x, alpha, alpha + beta))
            if not 1e-30 < float(value) < 1:
                continue
            got = torch._dirichlet_grad(value, a, total) * (1 - value)
            exact = beta_slope(float(a), float(total.double() - a.double()), float(value))
            worst = max(worst, abs(float((float(got) - exact) / exact)))
    return worst


def print_table() -> None:
    """One line for each alpha."""
    names = [str(d).removeprefix("torch.") for d in TOLERANCE]
    heads = [f"{what}, {name}" for what in ("d log g", "dg", "torch dg", "torch Dirichlet") for name in names]
    print(f"| alpha | {' | '.join(heads)} |\n|{'---|' * (len(heads) + 1)}")
    for alpha in ALPHAS:
        errors = [slopes(alpha, dtype) for dtype in TOLERANCE]
        cells = [f"{e[what]:.1e}" for what in ("log", "value", "torch") for e in errors]
        in_reach = 0.1 <= alpha <= 100
        cells += [f"{torch_dirichlet_error(alpha, dtype):.1e}" if in_reach else "–" for dtype in TOLERANCE]
        print(f"| {alpha:g} | {' | '.join(cells)} |")


if __name__ == "__main__":
    print_table()
