"""Plackett-Luce and its relaxation against enumeration, torch's own laws and torch.distributions' conventions."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical, RelaxedOneHotCategorical, kl_divergence

from probmoe_ext import ops
from probmoe_ext.distributions import ConditionalBernoulli, PlackettLuce, RelaxedTopK
from tests import gumbel_oracle as oracle
from tests.contract import assert_near
from tests.inputs import logit_sets
from tests.ops.test_gumbel import draw_counts
from tests.ops.test_subset_sample import chi_square_p_value

CASES = [(1, 0), (1, 1), (5, 2), (6, 4), (4, 4), (7, 1)]
every_case = pytest.mark.parametrize(("num_experts", "k"), CASES, ids=str)
DRAWS, FAILURE_RATE = 20_000, 1e-7


def law_of(num_experts: int, k: int) -> tuple[Tensor, PlackettLuce]:
    """One row of each logit set, as one batch."""
    sets = logit_sets(1, num_experts, (k, k), torch.float64)
    logits = torch.cat([sets[name] for name in sets if name not in ("plus or minus 2000", "spread 100")])
    return logits, PlackettLuce(k, logits)


def enumerated(logits: Tensor, k: int) -> Tensor:
    """Probabilities ``[..., N]`` of all ordered draws, by their definition."""
    return torch.stack([oracle.probabilities(row, k) for row in logits])


@every_case
def test_statistics_against_enumeration(num_experts: int, k: int) -> None:
    logits, law = law_of(num_experts, k)
    p = enumerated(logits, k)
    values = law.enumerate_support()
    assert torch.equal(values[:, 0], oracle.ordered_draws(num_experts, k))
    assert_near(law.log_prob(values).exp().t(), p, 1e-12, "probabilities")
    assert_near(p.sum(-1), torch.ones(len(logits)), 1e-12, "total")
    members = torch.zeros(len(p[0]), num_experts, dtype=torch.float64).scatter(-1, values[:, 0], 1.0)
    assert_near(law.inclusion, p @ members, 1e-12, "inclusion")
    assert_near(law.entropy(), torch.special.entr(p).sum(-1), 1e-11, "entropy")
    best = law.log_prob(values).amax(0)
    assert law.support.check(law.mode).all()
    assert_near(law.log_prob(law.mode), best, 1e-12 * best.abs().clamp(min=1), "log-probability of the mode")


@every_case
def test_kl_against_enumeration(num_experts: int, k: int) -> None:
    generator = torch.Generator().manual_seed(3)
    p = torch.randn(2, 1, num_experts, generator=generator, dtype=torch.float64) * 2
    q = torch.randn(3, num_experts, generator=generator, dtype=torch.float64) * 2
    divergence = kl_divergence(PlackettLuce(k, p), PlackettLuce(k, q))
    assert divergence.shape == (2, 3)
    for i in range(2):
        for j in range(3):
            ours, theirs = oracle.probabilities(p[i, 0], k), oracle.probabilities(q[j], k)
            assert_near(divergence[i, j], (ours * (ours / theirs).log()).sum(), 1e-11, "KL")


def test_kl_edges() -> None:
    law = PlackettLuce(2, torch.tensor([0.5, -1.0, 2.0, 0.0]))
    assert_near(kl_divergence(law, law), torch.zeros(()), 1e-7, "KL(P, P)")
    masked = PlackettLuce(2, torch.tensor([0.5, -torch.inf, 2.0, 0.0]))
    assert kl_divergence(law, masked) == torch.inf
    assert 0 < kl_divergence(masked, law) < 5
    with pytest.raises(ValueError, match="same number of experts, not 4 and 5"):
        kl_divergence(law, PlackettLuce(2, torch.zeros(5)))
    with pytest.raises(NotImplementedError, match="as many draws, not 2 and 1"):
        kl_divergence(law, PlackettLuce(1, torch.zeros(4)))


def test_known_laws() -> None:
    """One draw is the categorical law; with equal logits the subsets are those of the conditional Bernoulli law."""
    logits = torch.randn(3, 6, dtype=torch.float64)
    one, categorical = PlackettLuce(1, logits), Categorical(logits=logits)
    assert_near(one.inclusion, categorical.probs, 1e-13, "inclusion")
    assert_near(one.entropy(), categorical.entropy(), 1e-13, "entropy")
    equal = torch.zeros(6, dtype=torch.float64)
    assert_near(PlackettLuce(3, equal).inclusion, ConditionalBernoulli(3, logits=equal).mean, 1e-13, "equal logits")
    apart = PlackettLuce(3, logits).inclusion - ConditionalBernoulli(3, logits=logits).mean
    assert apart.abs().max() > 0.01, "different laws, as documented"


def test_gradients() -> None:
    logits = torch.randn(2, 5, dtype=torch.float64, requires_grad=True)
    value = torch.tensor([[0, 3], [4, 1]])

    def statistics(x: Tensor) -> tuple[Tensor, ...]:
        law, other = PlackettLuce(2, x), PlackettLuce(2, torch.linspace(-1, 1, 5).double())
        divergences = kl_divergence(law, other), kl_divergence(other, law)
        return (law.inclusion, law.entropy(), law.log_prob(value), *divergences)

    assert torch.autograd.gradcheck(statistics, logits)


@pytest.mark.parametrize("name", ["spread 1", "half masked"])
def test_draws(name: str) -> None:
    logits = logit_sets(2, 5, (3, 3), torch.float32)[name]
    torch.manual_seed(71)
    drawn = PlackettLuce(3, logits).sample((DRAWS,))
    for row in range(2):
        p_value = chi_square_p_value(draw_counts(drawn[:, row], 5), oracle.probabilities(logits[row], 3))
        assert p_value > FAILURE_RATE


# ---- the relaxation -----------------------------------------------------------------------------------------------


def test_one_relaxed_draw_is_torchs_concrete_law() -> None:
    logits, temperature = torch.randn(3, 5, dtype=torch.float64), 0.6
    ours = RelaxedTopK(temperature, 1, logits)
    theirs = RelaxedOneHotCategorical(torch.tensor(temperature, dtype=torch.float64), logits=logits)
    value = theirs.sample((7,))
    assert_near(ours.log_prob(value), theirs.log_prob(value), 1e-10, "density")
    assert ours.support.check(ours.rsample((100,))).all()
    with pytest.raises(NotImplementedError, match="k = 1 alone, not for k = 2"):
        RelaxedTopK(temperature, 2, logits).log_prob(value)


@pytest.mark.parametrize(("num_experts", "k"), [(5, 2), (4, 3)])
def test_the_order_of_a_relaxed_draw_is_plackett_luce(num_experts: int, k: int) -> None:
    """At a low temperature the entries near 1 are an exact draw, and their means the inclusion probabilities."""
    logits = torch.randn(num_experts, generator=torch.Generator().manual_seed(4))
    torch.manual_seed(5)
    soft = RelaxedTopK(0.001, k, logits).rsample((DRAWS,))
    mean, inclusion = soft.double().mean(0), PlackettLuce(k, logits.double()).inclusion
    deviation = (inclusion * (1 - inclusion) / DRAWS).sqrt()
    assert ((mean - inclusion).abs() < 6 * deviation + 0.002).all()


def test_pathwise_gradient_of_a_relaxed_draw() -> None:
    """Unbiased: the mean gradient is the difference quotient of the mean, same noise on both sides."""
    logits = torch.randn(6, dtype=torch.float64, requires_grad=True)
    loss = torch.linspace(-1, 1, 6).double()

    def mean(x: Tensor) -> Tensor:
        torch.manual_seed(9)
        return (RelaxedTopK(0.7, 3, x).rsample((500,)).square() @ loss).mean()

    assert torch.autograd.gradcheck(mean, logits)


# ---- conventions --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [(), (3,), (2, 3), (0,)], ids=str)
@pytest.mark.parametrize("k", [0, 2, 5])
def test_shapes(batch: tuple[int, ...], k: int) -> None:
    law, relaxed = PlackettLuce(k, torch.randn(*batch, 5)), RelaxedTopK(0.5, k, torch.randn(*batch, 5))
    assert (law.batch_shape, law.event_shape, relaxed.event_shape) == (batch, (k,), (5,))
    assert law.inclusion.shape == (*batch, 5) and law.entropy().shape == batch and law.mode.shape == (*batch, k)
    for sample_shape in ((), (4,), (4, 1), (0,)):
        value = law.sample(sample_shape)
        assert value.shape == (*sample_shape, *batch, k) and value.dtype == torch.int64
        assert law.log_prob(value).shape == (*sample_shape, *batch)
        assert relaxed.rsample(sample_shape).shape == (*sample_shape, *batch, 5)
    values = law.enumerate_support()
    assert values.shape == (len(values), *batch, k)
    assert law.enumerate_support(expand=False).shape == (len(values), *(1 for _ in batch), k)


@pytest.mark.parametrize("make", [lambda x: PlackettLuce(2, x), lambda x: RelaxedTopK(0.5, 2, x)])
def test_expand_copy_and_repr(make: object) -> None:
    law = make(torch.randn(3, 1, 5))  # type: ignore[operator]
    wide = law.expand((2, 3, 4))
    assert type(wide) is type(law) and wide.k == 2 and wide.batch_shape == (2, 3, 4)
    assert wide.logits.data_ptr() == law.logits.data_ptr(), "memory is shared"
    rows = wide.sample()
    assert not (rows == rows[:1, :, :1]).all(), "expanded rows draw independently"
    for other in (pickle.loads(pickle.dumps(law)), copy.deepcopy(law)):
        assert repr(other) == repr(law) and torch.equal(other.logits, law.logits)
    assert "k: 2, " in repr(law)


def test_support() -> None:
    support = PlackettLuce(3, torch.zeros(4)).support
    values = torch.tensor([[0, 1, 2], [3, 0, 1], [0, 0, 1], [0, 1, 4], [-1, 0, 1]])
    assert support.check(values).tolist() == [True, True, False, False, False]
    assert support.check(torch.tensor([0.0, 1.5, 2.0])).logical_not()
    assert repr(support) == "OrderedChoice(num_experts=4)"
    total = RelaxedTopK(1.0, 2, torch.zeros(3)).support
    assert total.check(torch.tensor([[1.0, 0.5, 0.5], [1.0, 1.0, 0.5], [2.5, -0.5, 0.0]])).tolist() == [
        True,
        False,
        False,
    ]


def test_refusals() -> None:
    with pytest.raises(TypeError, match="k must be an int"):
        PlackettLuce((1, 2), torch.zeros(4))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="E = 4"):
        PlackettLuce(5, torch.zeros(4))
    with pytest.raises(TypeError, match="logits must be float32"):
        RelaxedTopK(0.5, 2, torch.zeros(4).long())
    with pytest.raises(ValueError, match="temperature"):
        RelaxedTopK(0.0, 2, torch.zeros(4))
    few = torch.tensor([[0.0, 0.0, 0.0], [0.0, -torch.inf, -torch.inf]])
    for make in (lambda: PlackettLuce(2, few), lambda: RelaxedTopK(0.5, 2, few)):
        with pytest.raises(ValueError, match=r"k = 2.*row 1 leaves 1"):
            make()
    with pytest.raises(ValueError, match="parameter logits"):
        PlackettLuce(1, torch.tensor([torch.nan, 0.0]))
    with pytest.raises(ValueError, match="support"):
        PlackettLuce(2, torch.zeros(4)).log_prob(torch.tensor([1, 1]))
    lax = PlackettLuce(2, torch.zeros(4), validate_args=False)
    assert lax.log_prob(torch.tensor([1, 1])) == -torch.inf
    with pytest.raises(NotImplementedError, match="E <= 16 experts, not 17"):
        PlackettLuce(2, torch.zeros(17)).entropy()
    with pytest.raises(ValueError, match="at most 65536 draws"):
        PlackettLuce(8, torch.zeros(16)).enumerate_support()
    assert torch.equal(
        ops.plackett_luce_log_prob(torch.zeros(3), torch.tensor([0])),
        PlackettLuce(1, torch.zeros(3)).log_prob(torch.tensor([0])),
    )
