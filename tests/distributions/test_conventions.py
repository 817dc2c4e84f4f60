"""What ``torch.distributions`` promises of every law: shapes, expansion, validation, copies."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from probmoe_ext.distributions import ConditionalBernoulli, KHot
from tests.contract import assert_near

LOGITS = torch.tensor([0.5, -1.0, 2.0, 0.0, 1.5])


@pytest.mark.parametrize("batch", [(), (3,), (2, 3), (0,), (2, 0)], ids=str)
@pytest.mark.parametrize("k", [2, (1, 3), 0])
def test_shapes(batch: tuple[int, ...], k: int | tuple[int, int]) -> None:
    law = ConditionalBernoulli(k, logits=torch.randn(*batch, 5))
    k_min, k_max = k if isinstance(k, tuple) else (k, k)
    assert (law.batch_shape, law.event_shape, law.k) == (batch, (5,), k)
    for statistic in (law.mean, law.variance, law.stddev, law.mode, law.logits, law.probs):
        assert statistic.shape == (*batch, 5)
    assert law.covariance_matrix.shape == (*batch, 5, 5)
    assert law.cardinality.shape == (*batch, k_max - k_min + 1)
    assert law.entropy().shape == law.perplexity().shape == batch
    for sample_shape in ((), (4,), (4, 1), (0,)):
        value = law.sample(sample_shape)
        assert value.shape == (*sample_shape, *batch, 5)
        assert law.sample_indices(sample_shape).shape == (*sample_shape, *batch, k_max)
        assert law.log_prob(value).shape == (*sample_shape, *batch)
    values = law.enumerate_support()
    assert values.shape == (len(values), *batch, 5)
    assert law.enumerate_support(expand=False).shape == (len(values), *(1 for _ in batch), 5)


def test_log_prob_broadcasts() -> None:
    """A value without batch is scored under every row; a batch of values under one law; any dtype of value."""
    law = ConditionalBernoulli(2, logits=torch.randn(3, 5))
    value = torch.tensor([1, 0, 0, 1, 0])
    each = torch.stack([ConditionalBernoulli(2, logits=row).log_prob(value) for row in law.logits])
    for form in (value, value.bool(), value.double(), value.expand(3, -1), value.expand(1, 5)):
        assert_near(law.log_prob(form), each, 1e-6, "broadcast")
    one = ConditionalBernoulli(2, logits=LOGITS)
    assert one.log_prob(value.expand(4, 2, 5)).shape == (4, 2)
    assert law.log_prob(law.enumerate_support(expand=False)).shape == (10, 3)


def test_log_prob_outside_the_support() -> None:
    """An error with validation, -inf without."""
    values = torch.tensor(
        [
            [1, 0, 0, 0, 0],
            [1, 1, 1, 1, 0],
            [0.5, 1, 1, 0, 0],
            [2, 1, 0, 0, 0],
            [1, 1, -1, 0, 0],
            [torch.nan, 1, 1, 0, 0],
        ]
    )
    strict, lax = (ConditionalBernoulli((2, 3), logits=LOGITS, validate_args=flag) for flag in (True, False))
    for value in values:
        with pytest.raises(ValueError, match="support"):
            strict.log_prob(value)
    assert (lax.log_prob(values) == -torch.inf).all()
    with pytest.raises(ValueError, match="event_shape"):
        strict.log_prob(torch.ones(4))
    with pytest.raises(ValueError, match="broadcastable"):
        ConditionalBernoulli(2, logits=torch.zeros(3, 5)).log_prob(torch.zeros(2, 5))


def test_masked_experts() -> None:
    """A mask, logits of -inf and probabilities of 0 are one thing."""
    mask = torch.tensor([True, False, True, True, True])
    laws = [
        ConditionalBernoulli(2, logits=LOGITS, mask=mask),
        ConditionalBernoulli(2, logits=LOGITS.masked_fill(~mask, -torch.inf)),
        ConditionalBernoulli(2, probs=LOGITS.sigmoid(), mask=mask),
        ConditionalBernoulli(2, probs=LOGITS.sigmoid() * mask),
    ]
    for law in laws:
        assert law.logits[1] == -torch.inf and law.probs[1] == 0 and law.mean[1] == 0
        assert_near(law.mean, laws[0].mean, 1e-6, "mean")
        assert law.log_prob(torch.tensor([1.0, 1, 0, 0, 0])) == -torch.inf
        assert law.support.check(law.sample((100,))).all() and (law.sample((100,))[..., 1] == 0).all()
    batched = ConditionalBernoulli(2, logits=LOGITS, mask=torch.stack([mask, ~mask | (LOGITS > 0)]))
    assert batched.batch_shape == (2,)
    assert_near(batched.mean[0], laws[0].mean, 1e-7, "mask of a larger batch")


def test_parametrisations_agree() -> None:
    """probs are those before conditioning: odds p / (1 - p); each parameter gives the other."""
    probs = torch.tensor([[0.2, 0.5, 0.9, 0.0], [0.1, 0.1, 0.7, 0.4]], dtype=torch.float64)
    by_probs = ConditionalBernoulli((1, 2), probs=probs)
    by_logits = ConditionalBernoulli((1, 2), logits=torch.logit(probs))
    assert_near(by_probs.logits, by_logits.logits, 1e-14, "logits")
    assert_near(by_logits.probs, probs, 1e-15, "probs")
    assert_near(by_probs.mean, by_logits.mean, 1e-14, "mean")
    weights = torch.stack([(probs / (1 - probs))[:, list(s)].prod(-1) for s in ((0,), (1,), (2,), (3,))], -1)
    pairs = torch.stack([(probs / (1 - probs))[:, [i, j]].prod(-1) for i in range(4) for j in range(i)], -1)
    total = weights.sum(-1) + pairs.sum(-1)
    single = torch.tensor([0.0, 0.0, 1.0, 0.0])
    assert_near(by_probs.log_prob(single), (weights[:, 2] / total).log(), 1e-14, "P({2}) by its definition")


@pytest.mark.parametrize("by", ["logits", "probs"])
def test_expand(by: str) -> None:
    law = ConditionalBernoulli((1, 3), **{by: torch.rand(3, 1, 5)})
    wide = law.expand((2, 3, 4))
    assert type(wide) is ConditionalBernoulli and wide.k == (1, 3)
    assert (wide.batch_shape, wide.event_shape) == ((2, 3, 4), (5,))
    assert getattr(wide, by).data_ptr() == getattr(law, by).data_ptr(), "memory is shared"
    assert_near(wide.mean, law.mean.expand(2, 3, 4, 5), 1e-6, "mean")
    assert wide.sample((2,)).shape == (2, 2, 3, 4, 5)
    rows = wide.sample()
    assert not (rows == rows[:1, :, :1]).all(), "expanded rows draw independently"
    assert wide._validate_args == law._validate_args
    lax = ConditionalBernoulli(2, validate_args=False, **{by: torch.rand(5)}).expand([4])
    assert not lax._validate_args

    class Named(ConditionalBernoulli):
        def __init__(self, logits: torch.Tensor) -> None:
            super().__init__(2, logits=logits)

    with pytest.raises(NotImplementedError, match="expand"):
        Named(torch.zeros(5)).expand((2,))


def test_support() -> None:
    support = ConditionalBernoulli((1, 2), logits=LOGITS).support
    assert isinstance(support, KHot) and support.is_discrete and support.event_dim == 1
    assert repr(support) == "KHot(k_min=1, k_max=2)"
    values = torch.tensor([[0.0, 0, 0], [0, 1, 0], [1, 0, 1], [1, 1, 1], [0.5, 0.5, 0], [1, -1, 1], [torch.nan, 1, 0]])
    assert support.check(values).tolist() == [False, True, True, False, False, False, False]
    assert support.check(values[:4].bool()).tolist() == [False, True, True, False]
    assert support.check(values[:4].reshape(2, 2, 3)).shape == (2, 2)


def test_enumerate_support_order_and_limit() -> None:
    law = ConditionalBernoulli((1, 2), logits=torch.zeros(3))
    rows = [row.nonzero().flatten().tolist() for row in law.enumerate_support()]
    assert rows == [[0], [1], [2], [0, 1], [0, 2], [1, 2]]
    assert (
        law.has_enumerate_support
        and len(ConditionalBernoulli((0, 16), logits=torch.zeros(16)).enumerate_support()) == 2**16
    )
    with pytest.raises(ValueError, match="E <= 16 experts, not 17"):
        ConditionalBernoulli(2, logits=torch.zeros(17)).enumerate_support()


def test_refusals() -> None:
    """Types and shapes are always checked; values with validate_args."""

    def refused(kind: type[Exception], words: str, k: object = 2, **arguments: object) -> None:
        with pytest.raises(kind, match=words):
            ConditionalBernoulli(k, **arguments)  # type: ignore[arg-type]

    refused(ValueError, "exactly one of logits and probs")
    refused(ValueError, "exactly one of logits and probs", logits=LOGITS, probs=LOGITS)
    refused(TypeError, "logits must be a torch.Tensor, not list", logits=[0.0, 1.0])
    refused(TypeError, "probs must be float32.*not torch.int64", probs=LOGITS.long())
    refused(ValueError, r"logits must have shape \[..., E\]", logits=torch.tensor(0.0))
    refused(ValueError, "k must satisfy.*E = 5, not 6", k=6, logits=LOGITS)
    refused(TypeError, "k must be an int", k=2.0, logits=LOGITS)
    refused(TypeError, "mask must be a bool tensor.*not torch.float32", logits=LOGITS, mask=torch.ones(5))
    refused(ValueError, r"mask must have shape.*not \(4,\)", logits=LOGITS, mask=torch.ones(4).bool())
    refused(ValueError, r"mask must have shape.*not \(3, 5\)", logits=torch.zeros(2, 5), mask=torch.ones(3, 5).bool())
    for bad in (torch.nan, torch.inf):
        refused(ValueError, "parameter logits.*ConditionalBernoulli", logits=torch.tensor([bad, 0.0]), k=1)
        assert ConditionalBernoulli(1, logits=torch.tensor([bad, 0.0]), validate_args=False).mean.isnan().all()
    for bad in (1.0, -0.1, torch.nan):
        refused(ValueError, "parameter probs", probs=torch.tensor([bad, 0.5]), k=1)
    few = torch.tensor([[0.0, 0.0, 0.0], [0.0, -torch.inf, -torch.inf]])
    refused(ValueError, "k_min = 2.*row 1 leaves 1", logits=few)
    refused(ValueError, "k_min = 2.*row 1 leaves 1", probs=few.exp() / 2)
    with pytest.raises(ValueError, match="row 1"):
        ConditionalBernoulli(2, logits=few, validate_args=False).mean  # noqa: B018  (the property raises)


@pytest.mark.parametrize("by", ["logits", "probs"])
def test_copies(by: str) -> None:
    """pickle and deepcopy keep the law, with or without the lazily built parameter."""
    law = ConditionalBernoulli((1, 3), **{by: torch.rand(2, 5)})
    for _ in range(2):
        for make in (lambda law: pickle.loads(pickle.dumps(law)), copy.deepcopy):
            other = make(law)
            assert repr(other) == repr(law) and (other.k, other.batch_shape) == (law.k, law.batch_shape)
            assert torch.equal(other.mean, law.mean)
            assert getattr(other, by).data_ptr() != getattr(law, by).data_ptr()
        assert law.logits.shape == law.probs.shape
    assert repr(pickle.loads(pickle.dumps(law.support))) == repr(law.support)


def test_repr() -> None:
    assert repr(ConditionalBernoulli(2, logits=LOGITS)) == "ConditionalBernoulli(k: 2, logits: torch.Size([5]))"
    assert repr(ConditionalBernoulli((0, 1), probs=torch.rand(3, 5))).startswith(
        "ConditionalBernoulli(k: (0, 1), probs"
    )


def test_vmap() -> None:
    """Laws can be made and asked inside torch.vmap (validation looks at values, which vmap forbids)."""
    logits = torch.randn(6, 5)
    value = torch.tensor([1.0, 0, 1, 0, 0])

    def ask(row: torch.Tensor) -> tuple[torch.Tensor, ...]:
        law = ConditionalBernoulli(2, logits=row, validate_args=False)
        return law.mean, law.variance, law.entropy(), law.log_prob(value), law.mode, law.cardinality

    law = ConditionalBernoulli(2, logits=logits)
    want = (law.mean, law.variance, law.entropy(), law.log_prob(value), law.mode, law.cardinality)
    for a, b in zip(torch.vmap(ask)(logits), want, strict=True):
        assert_near(a, b, 1e-6, "vmap")


def test_compile() -> None:
    """Statistics compile without a graph break."""

    def loss(logits: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        law = ConditionalBernoulli((1, 3), logits=logits, validate_args=False)
        return (law.log_prob(value) + law.entropy()).sum() + law.variance.sum()

    logits, value = torch.randn(4, 5), torch.tensor([1.0, 0, 1, 0, 0])
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    assert_near(compiled(logits, value), loss(logits, value), 1e-5, "compiled")
