"""The law against enumeration: probabilities, moments, entropy, divergence, gradients, draws."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.distributions import Bernoulli, Independent, OneHotCategorical, kl_divergence

from probmoe_ext import ops
from probmoe_ext.distributions import ConditionalBernoulli
from tests import oracle
from tests.contract import assert_near
from tests.inputs import Band, logit_sets
from tests.ops.test_subset_sample import chi_square_p_value, subset_counts

CASES: list[tuple[int, Band]] = [
    (1, (0, 1)),
    (1, (1, 1)),
    (5, (2, 2)),
    (6, (1, 4)),
    (7, (0, 7)),
    (8, (8, 8)),
    (4, (0, 0)),
]
every_case = pytest.mark.parametrize(("num_experts", "band"), CASES, ids=str)
DRAWS = 20_000
# All draws of this file together reject a right sampler with this probability (were the seeds not fixed).
FAILURE_RATE = 1e-6


def k_of(band: Band) -> int | Band:
    return band[0] if band[0] == band[1] else band


def laws(num_experts: int, band: Band, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ConditionalBernoulli]:
    """One row of each logit set that enumeration can judge, as one batch."""
    sets = logit_sets(1, num_experts, band, dtype)
    logits = torch.cat([sets[name] for name in sets if name != "plus or minus 2000"])
    return logits, ConditionalBernoulli(k_of(band), logits=logits)


@every_case
def test_normalised(num_experts: int, band: Band) -> None:
    """Probabilities over the enumerated support are those of the definition, and sum to 1."""
    logits, law = laws(num_experts, band)
    values = law.enumerate_support()
    probabilities = law.log_prob(values).exp()
    assert_near(probabilities.sum(0), torch.ones(len(logits)).double(), 1e-12, "total")
    assert torch.equal(values[:, 0], oracle.subsets(num_experts, *band)), "the documented order is the oracle's"
    assert_near(probabilities.t(), oracle.probabilities(logits, band)[1], 1e-12, "probabilities")


@every_case
def test_moments(num_experts: int, band: Band) -> None:
    logits, law = laws(num_experts, band)
    z, p = oracle.probabilities(logits, band)
    mean = p @ z
    assert_near(law.mean, mean, 1e-12, "mean")
    assert_near(law.variance, (p.unsqueeze(-1) * (z - mean.unsqueeze(-2)) ** 2).sum(-2), 1e-12, "variance")
    assert_near(law.stddev, law.variance.sqrt(), 1e-300, "stddev")
    assert_near(law.covariance_matrix, oracle.covariance(logits, band), 1e-12, "covariance")
    assert torch.equal(law.covariance_matrix.diagonal(dim1=-2, dim2=-1), law.variance)
    assert_near(law.cardinality, oracle.cardinality(logits, band), 1e-12, "cardinality")
    assert_near(law.entropy(), oracle.entropy(logits, band), 1e-11, "entropy")


@every_case
def test_mode(num_experts: int, band: Band) -> None:
    """No value of the support is more probable; ties go as documented."""
    logits, law = laws(num_experts, band)
    mode = law.mode
    assert law.support.check(mode).all()
    best = law.log_prob(law.enumerate_support()).amax(0)
    assert_near(law.log_prob(mode), best, 1e-12 * best.abs().clamp(min=1), "log-probability of the mode")
    indices = oracle.mode(logits, band)
    assert torch.equal(mode, torch.nn.functional.one_hot(indices, num_experts + 1).sum(-2)[..., :-1].double())


@every_case
def test_kl(num_experts: int, band: Band) -> None:
    generator = torch.Generator().manual_seed(3)
    p = torch.randn(2, 1, num_experts, generator=generator, dtype=torch.float64) * 3
    q = torch.randn(4, num_experts, generator=generator, dtype=torch.float64) * 3
    first, second = (ConditionalBernoulli(k_of(band), logits=logits) for logits in (p, q))
    divergence = kl_divergence(first, second)
    assert divergence.shape == (2, 4)
    assert_near(divergence, oracle.kl(*torch.broadcast_tensors(p, q), band), 1e-11, "KL")
    values = first.expand((2, 4)).enumerate_support()
    log_p, log_q = first.log_prob(values), second.log_prob(values)
    assert_near(divergence, (log_p.exp() * (log_p - log_q)).sum(0), 1e-11, "KL by log_prob")


def test_kl_refusals() -> None:
    law = ConditionalBernoulli(2, logits=torch.zeros(4))
    with pytest.raises(ValueError, match="same number of experts, not 4 and 5"):
        kl_divergence(law, ConditionalBernoulli(2, logits=torch.zeros(5)))
    with pytest.raises(NotImplementedError, match=r"same band, not 2 and \(1, 2\)"):
        kl_divergence(law, ConditionalBernoulli((1, 2), logits=torch.zeros(4)))
    masked = ConditionalBernoulli(2, logits=torch.zeros(4), mask=torch.tensor([True, True, True, False]))
    assert kl_divergence(law, masked) == torch.inf
    assert_near(kl_divergence(masked, law), torch.tensor(6 / 3).log(), 1e-6, "uniform on 3 of 6 subsets")


def test_known_laws() -> None:
    """Size 1 is the categorical law; every size allowed is independence."""
    logits = torch.randn(3, 6, dtype=torch.float64)
    one, categorical = ConditionalBernoulli(1, logits=logits), OneHotCategorical(logits=logits)
    assert_near(one.mean, categorical.probs, 1e-13, "mean")
    assert_near(one.entropy(), categorical.entropy(), 1e-13, "entropy")
    value = categorical.sample()
    assert_near(one.log_prob(value), categorical.log_prob(value), 1e-13, "log_prob")
    free, independent = ConditionalBernoulli((0, 6), logits=logits), Independent(Bernoulli(logits=logits), 1)
    assert_near(free.mean, independent.mean, 1e-13, "mean")
    assert_near(free.variance, independent.variance, 1e-13, "variance")
    assert_near(free.entropy(), independent.entropy(), 1e-12, "entropy")
    value = independent.sample()
    assert_near(free.log_prob(value), independent.log_prob(value), 1e-12, "log_prob")


@pytest.mark.parametrize("band", [(2, 2), (1, 3)], ids=str)
def test_gradients(band: Band) -> None:
    """Of all differentiable statistics, by either parameter, by finite differences."""
    value = torch.tensor([1.0, 0.0, 1.0, 0.0]).double()

    def statistics(law: ConditionalBernoulli) -> tuple[Tensor, ...]:
        other = ConditionalBernoulli(k_of(band), logits=torch.linspace(-1, 1, 4).double())
        divergences = (kl_divergence(law, other), kl_divergence(other, law))
        moments = (law.mean, law.variance, law.covariance_matrix, law.cardinality)
        return (*moments, law.entropy(), law.log_prob(value), *divergences)

    logits = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: statistics(ConditionalBernoulli(k_of(band), logits=x)), logits)
    probs = torch.rand(2, 4, dtype=torch.float64) * 0.8 + 0.1
    probs.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: statistics(ConditionalBernoulli(k_of(band), probs=x)), probs)


def test_gradients_of_masked_probs() -> None:
    """A probability of 0 masks: nothing flows to it, and nothing is NaN."""
    probs = torch.tensor([0.3, 0.0, 0.6, 0.5], requires_grad=True)
    law = ConditionalBernoulli(2, probs=probs)
    (law.entropy() + law.log_prob(torch.tensor([1.0, 0.0, 0.0, 1.0])) + law.mean[0]).backward()
    assert probs.grad is not None and probs.grad.isfinite().all()
    assert probs.grad[1] == 0 and (probs.grad[[0, 2, 3]] != 0).all()


LAWS = [(name, band) for band in [(3, 3), (1, 4), (0, 6)] for name in ("spread 1", "constant", "half masked")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("name", "band"), LAWS, ids=str)
def test_sample_law(name: str, band: Band, dtype: torch.dtype) -> None:
    """Draws have the law, over the sample shape and over the batch."""
    logits = logit_sets(2, 6, band, dtype)[name]
    torch.manual_seed(71)
    indices = ConditionalBernoulli(k_of(band), logits=logits).sample_indices((DRAWS // 2, 2))
    for row in range(2):
        _, probabilities = oracle.probabilities(logits[row], band)
        counts = subset_counts(indices[:, :, row].flatten(end_dim=1), 6, band)
        assert chi_square_p_value(counts, probabilities) > FAILURE_RATE / (4 * len(LAWS))


def test_sample_is_what_sample_indices_names() -> None:
    """k-hot in the logits' dtype, governed by torch.manual_seed, and different from one call to the next."""
    law = ConditionalBernoulli((1, 3), logits=torch.randn(4, 7, dtype=torch.float64))
    torch.manual_seed(5)
    values, again = law.sample((6,)), law.sample((6,))
    torch.manual_seed(5)
    indices = law.sample_indices((6,))
    assert values.dtype == torch.float64 and law.support.check(values).all() and not torch.equal(values, again)
    assert torch.equal(values, torch.nn.functional.one_hot(indices, 8).sum(-2)[..., :-1].double())


def test_sample_carries_no_gradient() -> None:
    logits = torch.randn(3, 5, requires_grad=True)
    law = ConditionalBernoulli(2, logits=logits)
    assert not law.has_rsample and not law.sample((2,)).requires_grad and not law.mode.requires_grad
    with pytest.raises(NotImplementedError):
        law.rsample()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dtypes(dtype: torch.dtype) -> None:
    """Everything has the parameter's dtype, and is the float64 truth rounded."""
    logits = torch.randn(3, 8).to(dtype)
    law, truth = ConditionalBernoulli(3, logits=logits), ConditionalBernoulli(3, logits=logits.double())
    value = law.sample()
    assert value.dtype == dtype
    pairs = [
        (law.mean, truth.mean), (law.variance, truth.variance), (law.covariance_matrix, truth.covariance_matrix),
        (law.entropy(), truth.entropy()), (law.log_prob(value), truth.log_prob(value.double())),
        (law.cardinality, truth.cardinality), (law.mode, truth.mode),
        (law.enumerate_support(), truth.enumerate_support()),
        (kl_divergence(law, ConditionalBernoulli(3, logits=-logits)),
         kl_divergence(truth, ConditionalBernoulli(3, logits=-logits.double()))),
    ]  # fmt: skip
    for got, want in pairs:
        assert got.dtype == dtype
        assert_near(got, want, torch.finfo(dtype).eps * want.abs() + 3e-7, str(dtype))
    assert_near(law.probs, truth.probs, torch.finfo(dtype).eps, "probs")


@pytest.mark.parametrize("name", ["shifted by 100", "one 87 above", "spread 100", "plus or minus 2000"])
def test_far_out_in_float32(name: str) -> None:
    """Logits far from 0 are ordinary: draws have positive probability, and nothing is NaN."""
    law = ConditionalBernoulli((2, 8), logits=logit_sets(4, 64, (2, 8), torch.float32)[name])
    for statistic in (law.mean, law.variance, law.covariance_matrix, law.entropy(), law.cardinality):
        assert statistic.isfinite().all()
    assert law.log_prob(law.sample((50,))).isfinite().all()
    assert_near(law.mean, ops.subset_marginals(law.logits.double(), (2, 8)), 1e-6, "mean")
