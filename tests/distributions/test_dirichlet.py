"""Dirichlet against 40 digits, quadrature, torch's own class, and its own draws."""

from __future__ import annotations

import mpmath
import numpy as np
import pytest
import torch
from scipy import integrate, stats
from torch import Tensor
from torch.distributions import Dirichlet as TorchDirichlet
from torch.distributions import Independent, kl_divergence

from probmoe_ext.distributions import Dirichlet

CASES = [[0.3, 2.0, 5.0], [1e-3, 1e-2, 0.5], [1.0, 1.0], [1e4, 2e4, 5e3, 1.0], [0.05] * 64, [1e-4, 1e-4]]
OTHERS = [[1.0, 1.0, 0.2], [1e-2, 1e-3, 2.0], [3.0, 0.1], [1.1e4, 1.9e4, 4e3, 2.0], [0.5] * 64, [1.0, 2.0]]


def exact(alpha: list[float], beta: list[float], theta: list[float]) -> tuple[float, float, float]:
    """log_prob, entropy and divergence with 40 digits, from their definitions as integrals' closed forms."""
    with mpmath.workdps(40):
        a, b, t = (list(map(mpmath.mpf, x)) for x in (alpha, beta, theta))
        log_beta = [mpmath.fsum(map(mpmath.loggamma, x)) - mpmath.loggamma(mpmath.fsum(x)) for x in (a, b)]
        mean_log = [mpmath.digamma(x) - mpmath.digamma(mpmath.fsum(a)) for x in a]
        log_prob = mpmath.fsum((x - 1) * mpmath.log(y) for x, y in zip(a, t, strict=True)) - log_beta[0]
        entropy = log_beta[0] - mpmath.fsum((x - 1) * m for x, m in zip(a, mean_log, strict=True))
        divergence = log_beta[1] - log_beta[0]
        divergence += mpmath.fsum((x - y) * m for x, y, m in zip(a, b, mean_log, strict=True))
        return float(log_prob), float(entropy), float(divergence)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("alpha", "beta"), list(zip(CASES, OTHERS, strict=True)), ids=lambda x: f"E={len(x)}")
def test_forty_digits(alpha: list[float], beta: list[float], dtype: torch.dtype) -> None:
    p, q = (torch.tensor(x, dtype=dtype) for x in (alpha, beta))
    theta = torch.softmax(torch.linspace(-2, 2, len(alpha), dtype=dtype), -1)
    law, other = Dirichlet(p), Dirichlet(q)
    got = law.log_prob(theta), law.entropy(), kl_divergence(law, other)
    # What cancels in the sums is known to half an ulp of its largest term, in double precision for both dtypes.
    largest = float(torch.lgamma(torch.cat([p, q, p.sum()[None], q.sum()[None]]).double()).abs().max())
    for value, want in zip(got, exact(p.tolist(), q.tolist(), theta.tolist()), strict=True):
        assert value.dtype == dtype
        assert abs(float(value) - want) <= 64 * largest * 2.0**-53 + torch.finfo(dtype).eps * abs(want)


@pytest.mark.parametrize(
    ("alpha", "beta"), [((0.7, 2.5), (1.5, 1.2)), ((3.0, 1.0), (2.0, 0.5)), ((1.0, 1.0), (9.0, 4.0))]
)
def test_quadrature(alpha: tuple[float, float], beta: tuple[float, float]) -> None:
    """With two experts the density integrates to 1, and entropy and divergence are the integrals they are named for."""
    law, other = (Dirichlet(torch.tensor(x, dtype=torch.float64)) for x in (alpha, beta))

    def density(x: float) -> tuple[float, float, float]:
        theta = torch.tensor([x, 1 - x], dtype=torch.float64)
        log_p, log_q = (float(d.log_prob(theta)) for d in (law, other))
        p = float(np.exp(log_p))
        return p, -p * log_p, p * (log_p - log_q)

    got = [integrate.quad(lambda x, n=n: density(x)[n], 0, 1, epsabs=1e-10, limit=200)[0] for n in range(3)]
    want = [1.0, float(law.entropy()), float(kl_divergence(law, other))]
    np.testing.assert_allclose(got, want, atol=2e-7)


def test_is_torchs() -> None:
    """Same class, constraints, shapes, moments and values as torch's own."""
    alpha = torch.rand(4, 3, 5, dtype=torch.float64) * 4 + 0.1
    ours, torchs = Dirichlet(alpha), TorchDirichlet(alpha)
    assert isinstance(ours, TorchDirichlet) and ours.has_rsample
    assert ours.arg_constraints == torchs.arg_constraints and ours.support == torchs.support
    assert ours.batch_shape == (4, 3) and ours.event_shape == (5,)
    value = torchs.sample((2,))
    for name in ("mean", "mode", "variance"):
        assert torch.equal(getattr(ours, name), getattr(torchs, name))
    torch.testing.assert_close(ours.log_prob(value), torchs.log_prob(value))
    torch.testing.assert_close(ours.entropy(), torchs.entropy())
    other = torch.rand(5, dtype=torch.float64) + 0.5
    want = kl_divergence(torchs, TorchDirichlet(other))
    for p, q in ((ours, Dirichlet(other)), (ours, TorchDirichlet(other)), (torchs, Dirichlet(other))):
        torch.testing.assert_close(kl_divergence(p, q), want)
    assert torch.equal(kl_divergence(ours, Dirichlet(alpha.clone())), torch.zeros(4, 3, dtype=torch.float64))
    assert repr(ours).startswith("Dirichlet(concentration")


def test_expand() -> None:
    law = Dirichlet(torch.tensor([0.5, 1.5, 2.5]))
    wide = law.expand((4, 2))
    assert isinstance(wide, Dirichlet) and wide.batch_shape == (4, 2) and wide.sample((3,)).shape == (3, 4, 2, 3)
    assert wide.concentration.data_ptr() == law.concentration.data_ptr()
    assert torch.equal(wide.entropy(), law.entropy().expand(4, 2))
    assert Independent(wide, 1).log_prob(wide.sample()).shape == (4,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("alpha", [1e-4, 1e-2, 1.0, 1e3])
def test_draws_are_on_the_simplex(alpha: float, dtype: torch.dtype) -> None:
    """Positive, summing to 1, with a finite density; at 1e-4 one share takes all, each as often as the others."""
    # In half precision a draw's sum is rounded away from 1 by more than torch's validation allows.
    law = Dirichlet(torch.full((4,), alpha, dtype=dtype), validate_args=dtype.itemsize > 2)
    draws = law.sample((2000,))
    assert draws.dtype == dtype and (draws > 0).all()
    rounding = 4 * torch.finfo(dtype).eps
    assert ((draws.double().sum(-1) - 1).abs() <= rounding).all()
    assert law.log_prob(draws).isfinite().all()
    if alpha == 1e-4:
        winners = torch.bincount(draws.argmax(-1), minlength=4)
        assert (draws.amax(-1) > 0.99).double().mean() > 0.98
        assert stats.chisquare(winners).pvalue > 1e-4


@pytest.mark.parametrize("alpha", [[0.2, 0.4], [0.5, 0.5, 1.0], [2.0, 3.0, 4.0, 0.3], [150.0, 40.0]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_marginals_are_beta(alpha: list[float], dtype: torch.dtype) -> None:
    """Kolmogorov-Smirnov on every marginal, whose law is Beta(alpha_i, A - alpha_i); above 1/2 by the others'
    sum, which has the digits that a share near 1 has lost.
    """
    draws = Dirichlet(torch.tensor(alpha, dtype=dtype)).sample((20_000,)).double().numpy()
    for i, a in enumerate(alpha):
        share, rest = draws[:, i], np.delete(draws, i, axis=1).sum(1)
        below = stats.beta.cdf(share, a, sum(alpha) - a)
        above = stats.beta.sf(rest, sum(alpha) - a, a)
        assert stats.kstest(np.where(share < 0.5, below, above), "uniform").pvalue > 1e-4


def test_gradients_reach_the_concentration() -> None:
    alpha = torch.tensor([0.3, 2.0, 5.0], dtype=torch.float64, requires_grad=True)
    law = Dirichlet(alpha)
    (pathwise,) = torch.autograd.grad(law.rsample((200_000,))[:, 0].mean(), alpha)
    (closed,) = torch.autograd.grad((alpha / alpha.sum())[0], alpha)
    torch.testing.assert_close(pathwise, closed, rtol=0.02, atol=1e-3)
    assert not law.sample().requires_grad


@pytest.mark.parametrize(
    ("call", "kind", "word"),
    [
        (lambda: Dirichlet(torch.tensor([1, 2])), TypeError, "int64"),
        (lambda: Dirichlet(torch.tensor(1.0)), ValueError, "concentration"),
        (lambda: Dirichlet([1.0, 2.0]), TypeError, "list"),  # type: ignore[arg-type]
        (lambda: Dirichlet(torch.tensor([1.0, -1.0])), ValueError, "concentration"),
        (lambda: Dirichlet(torch.ones(3)).log_prob(torch.ones(3)), ValueError, "Simplex"),
        (lambda: kl_divergence(Dirichlet(torch.ones(3)), Dirichlet(torch.ones(4))), ValueError, "3 and 4"),
    ],
    ids=lambda x: getattr(x, "__name__", str(x)),
)
def test_errors(call: object, kind: type[Exception], word: str) -> None:
    with pytest.raises(kind, match=word):
        call()  # type: ignore[operator]


def test_seeds() -> None:
    law = Dirichlet(torch.ones(8))
    torch.manual_seed(5)
    first, second = law.sample((3,)), law.sample((3,))
    torch.manual_seed(5)
    assert torch.equal(law.sample((3,)), first) and not torch.equal(first, second)


def test_compiles() -> None:
    def moments(alpha: Tensor) -> Tensor:
        law = Dirichlet(alpha, validate_args=False)
        return law.entropy() + kl_divergence(law, Dirichlet(torch.ones_like(alpha), validate_args=False))

    alpha = torch.rand(3, 4) + 0.5
    compiled = torch.compile(moments, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(alpha), moments(alpha))
