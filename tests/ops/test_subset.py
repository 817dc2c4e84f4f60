"""What only the subset family promises, beyond the contract."""

from __future__ import annotations

import pytest
import torch

from probmoe_ext import ops
from tests import contract, oracle
from tests.contract import assert_near
from tests.inputs import Band, logit_sets
from tests.ops.subset_specs import INDICATOR

BANDS: list[Band] = [(4, 4), (2, 5), (0, 12), (12, 12)]
every_band = pytest.mark.parametrize("band", BANDS, ids=str)


@every_band
def test_identities(band: Band) -> None:
    """Marginals sum to the expected size, sizes to 1, and a shift of all logits moves an exact k's log Z by k of it."""
    logits = torch.cat(list(logit_sets(5, 12, band, torch.float64).values()))
    sizes = torch.arange(band[0], band[1] + 1, dtype=torch.float64)
    cardinality = ops.subset_cardinality(logits, band)
    torch.testing.assert_close(cardinality.sum(-1), torch.ones(len(logits), dtype=torch.float64))
    torch.testing.assert_close(ops.subset_marginals(logits, band).sum(-1), cardinality @ sizes)
    if band[0] == band[1]:
        shift = ops.subset_log_partition(logits + 8, band) - ops.subset_log_partition(logits, band)
        torch.testing.assert_close(shift, torch.full_like(shift, 8.0 * band[0]), rtol=1e-11, atol=1e-11)


@every_band
def test_derivatives_close_on_themselves(band: Band) -> None:
    """log Z's gradient is the marginals, bit for bit; its second derivative and theirs the covariance."""
    logits = logit_sets(3, 12, band, torch.float32)["spread 1"].requires_grad_()
    (gradient,) = torch.autograd.grad(ops.subset_log_partition(logits, band).sum(), logits, create_graph=True)
    assert torch.equal(gradient, ops.subset_marginals(logits, band))
    v = torch.randn(3, 12)
    want = ops.subset_covariance_vp(logits, v, band)
    for first in (gradient, ops.subset_marginals(logits, band)):
        (product,) = torch.autograd.grad(first, logits, v, retain_graph=True)
        assert torch.equal(product, want)


def test_mixed_precision_vector() -> None:
    """v may have another floating dtype than the logits: the result has that of the logits."""
    logits, v = torch.randn(4, 9), torch.randn(4, 9, dtype=torch.float64).bfloat16()
    got = ops.subset_covariance_vp(logits, v.double(), 3)
    assert got.dtype == torch.float32
    assert torch.equal(got, ops.subset_covariance_vp(logits, v.float(), 3))


def test_log_prob_of_what_cannot_be() -> None:
    """-inf for a masked expert, a repeated one, a size outside the band; the order of the members is free."""
    logits = torch.tensor([0.5, -torch.inf, 1.0, 2.0, 0.0]).expand(6, -1)
    indices = torch.tensor([[0, 2, 5], [2, 0, 5], [0, 1, 2], [0, 0, 2], [3, 5, 5], [5, 0, 2]])
    values = ops.subset_log_prob(logits, indices, (2, 3))
    assert values[0] == values[1] == values[5] and values[0].isfinite()
    assert (values[2:5] == -torch.inf).all()


def test_masked_experts_take_no_part() -> None:
    """Masking is leaving out: same numbers as without the expert, and nothing flows to it."""
    logits = torch.randn(5, 9, dtype=torch.float64)
    masked = torch.cat([logits[:, :4], torch.full((5, 1), -torch.inf).double(), logits[:, 4:]], dim=-1).requires_grad_()
    kept = [0, 1, 2, 3, 5, 6, 7, 8, 9]
    torch.testing.assert_close(ops.subset_log_partition(masked, (2, 4)), ops.subset_log_partition(logits, (2, 4)))
    marginals = ops.subset_marginals(masked, (2, 4))
    torch.testing.assert_close(marginals[:, kept], ops.subset_marginals(logits, (2, 4)))
    assert (marginals[:, 4] == 0).all()
    (gradient,) = torch.autograd.grad(ops.subset_entropy(masked, (2, 4)).sum(), masked)
    assert gradient.isfinite().all() and (gradient[:, 4] == 0).all()


def test_mode_breaks_ties_low() -> None:
    logits = torch.tensor([[0.0, 1.0, 1.0, -1.0, 1.0], [-1.0, -1.0, -2.0, -1.0, -1.0], [3.0, 2.0, 5.0, 4.0, 1.0]])
    assert ops.subset_mode(logits, (1, 4)).tolist() == [[1, 2, 4, 5], [0, 5, 5, 5], [2, 3, 0, 1]]
    assert ops.subset_mode(logits, 2).tolist() == [[1, 2], [0, 1], [2, 3]]


# ---- pairs, divergence, indicator ---------------------------------------------------------------------------------


@every_band
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_pairwise_identities(band: Band, dtype: torch.dtype) -> None:
    """Symmetric to the bit, marginals on the diagonal, 0 for the masked; less m m^T it is the covariance operator's."""
    logits = torch.cat(list(logit_sets(3, 12, band, dtype).values()))
    pairwise, m = ops.subset_pairwise(logits, band), ops.subset_marginals(logits, band)
    assert torch.equal(pairwise, pairwise.transpose(-1, -2))
    assert torch.equal(pairwise.diagonal(dim1=-2, dim2=-1), m)
    assert (pairwise >= 0).all() and (pairwise <= m.unsqueeze(-1) + 1e-6).all()
    assert (pairwise[logits == -torch.inf] == 0).all()
    rows, units = logits.unsqueeze(-2).expand_as(pairwise), torch.eye(12, dtype=dtype).expand_as(pairwise)
    covariance = ops.subset_covariance_vp(rows, units, band)
    tolerance = 5e-6 if dtype == torch.float32 else 1e-13
    assert_near(pairwise - m.unsqueeze(-1) * m.unsqueeze(-2), covariance, tolerance, "covariance")
    if band[0] == band[1]:
        assert_near(pairwise.sum(-1), band[0] * m, 12 * tolerance, "an exact k's rows sum to k m")


@pytest.mark.parametrize("band", [(3, 3), (2, 5)], ids=str)
def test_pairwise_is_relatively_accurate(band: Band) -> None:
    """Probabilities down to 1e-30 keep their digits: nothing is subtracted."""
    logits = logit_sets(20, 8, band, torch.float32)["spread 10"]
    got, want = ops.subset_pairwise(logits, band).double(), oracle.pairwise(logits, band)
    assert (want < 1e-12).any()
    assert_near(got, want, 1e-5 * want + 1e-30, "pairwise")


@pytest.mark.parametrize(
    ("dtype", "shift"),
    [(torch.float32, 0.0), (torch.float32, 1000.0), (torch.float64, 1e6), (torch.bfloat16, 3.0)],
    ids=str,
)
def test_kl_of_a_law_with_itself(shift: float, dtype: torch.dtype) -> None:
    """0 with no gradient, for an exact k up to a shift of the logits; a band minds the shift, unless both have it."""
    base = (torch.randn(6, 12) * 8).round() / 8
    p = base.to(dtype).requires_grad_()
    q = (p.detach() + shift).requires_grad_()
    shared = (base + shift).to(dtype).requires_grad_()
    for first, second, band in ((p, q, (4, 4)), (shared, shared.detach().requires_grad_(), (2, 5))):
        exact = second.detach() - first.detach()
        assert (exact == exact[:, :1]).all(), "a shift that rounds is another law"
        value = ops.subset_kl(first, second, band)
        assert ((value >= 0) & (value <= 1e-11)).all()
        for gradient in torch.autograd.grad(value.sum(), (first, second)):
            assert gradient.abs().max() <= 1e-11


@pytest.mark.parametrize("band", [(4, 4), (2, 5), (5, 5)], ids=str)
@pytest.mark.parametrize("shift", [100.0, 8000.0])
def test_kl_keeps_its_digits_at_common_shifts(band: Band, shift: float) -> None:
    """Near and far shifted laws alike: what both logits share is not what is measured."""
    p = (torch.randn(8, 8) * 64).round() / 64
    q = p + (torch.randn(8, 8) * 4).round() / 64
    want = oracle.kl(p.double(), q.double(), band if band[0] == band[1] else (band[1], band[1]))
    got = ops.subset_kl(p + shift, q + shift, band).double()
    assert want.min() < 2e-2
    assert_near(got, want, 1e-6 * want + 1e-11, "subset_kl")


def test_kl_is_relatively_accurate_for_near_laws() -> None:
    """A divergence of 1e-8 between float32 logits is not lost in a log Z of 20."""
    p = torch.randn(8, 8) * 4
    q = p + 1e-4 * torch.randn(8, 8)
    want = oracle.kl(p.double(), q.double(), (4, 4))
    assert want.max() < 1e-7
    assert_near(ops.subset_kl(p, q, 4), want, 1e-4 * want + 1e-13, "subset_kl")


def test_kl_of_masks() -> None:
    """Infinite, without gradient, where Q masks what P charges; what P masks costs nothing and gets no gradient."""
    inf = torch.inf
    p = torch.tensor([[0.0, 1.0, -1.0, -inf], [0.0, 1.0, -1.0, -inf], [0.0, -4000.0, 1.0, 0.5]]).double()
    q = torch.tensor([[0.5, 0.0, 0.2, 9.0], [0.5, -inf, 0.2, 9.0], [0.0, -inf, 1.0, 0.5]]).double()
    p.requires_grad_()
    q.requires_grad_()
    value = ops.subset_kl(p, q, 2)
    assert value[0].isfinite() and (value[1:] == inf).all()
    by_p, by_q = torch.autograd.grad(value.sum(), (p, q))
    assert by_p.isfinite().all() and (by_p[1:] == 0).all() and by_p[0, 3] == 0
    assert by_q.isfinite().all() and (by_q[1:] == 0).all() and by_q[0, 3] > 0
    both = q.masked_fill(p == -inf, -inf)
    assert_near(ops.subset_kl(p, both, 2)[0], ops.subset_kl(p[0, :3], q[0, :3], 2), 1e-12, "masked in both: left out")
    assert (ops.subset_kl(p, q, 0) == 0).all(), "only the empty subset: no expert is charged"


def test_kl_twice_differentiable() -> None:
    generator = torch.Generator().manual_seed(8)
    p, q = (torch.randn(3, 6, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(2))
    for k in (3, (1, 4)):
        assert torch.autograd.gradgradcheck(lambda x, y, k=k: ops.subset_kl(x, y, k), (p, q))


def test_kl_errors_name_the_argument() -> None:
    p, q = torch.zeros(3, 6), torch.zeros(3, 6)
    q[2, 1:] = -torch.inf
    with pytest.raises(ValueError, match=r"row 2 of q_logits.*k_min = 3"):
        ops.subset_kl(p, q, 3)
    with pytest.raises(ValueError, match=r"row 2 of p_logits.*k_min = 3"):
        ops.subset_kl(q, p, 3)
    with pytest.raises(ValueError, match="q_logits must have the shape"):
        ops.subset_kl(p, q[:1], 3)
    with pytest.raises(TypeError, match="q_logits must be float32"):
        ops.subset_kl(p, q.long(), 3)


@pytest.mark.parametrize("name", ["subset_pairwise", "subset_kl", "subset_indicator"])
def test_derived_errors(name: str) -> None:
    """The errors of their neighbours."""

    def call(logits: object, k: object) -> object:
        function = getattr(ops, name)
        return function(logits, logits, k) if name == "subset_kl" else function(logits, k)

    logits = torch.zeros(50, 8)
    for k in (9, -1, (3, 2), (2, 9)):
        with pytest.raises(ValueError, match="k must satisfy"):
            call(logits, k)
    for k in (2.0, None, (1, 2, 3)):
        with pytest.raises(TypeError, match="k must be an int"):
            call(logits, k)
    with pytest.raises(TypeError, match="int64"):
        call(logits.long(), 2)
    with pytest.raises(TypeError, match="list"):
        call([[0.0, 1.0]], 1)
    with pytest.raises(ValueError, match="last dimension"):
        call(torch.tensor(1.0), 1)
    logits[41, 1:] = -torch.inf
    with pytest.raises(ValueError, match="row 41"):
        call(logits, 2)


@pytest.mark.parametrize("band", [(4, 4), (2, 5)], ids=str)
def test_indicator(band: Band) -> None:
    """The subset of `subset_sample`, and the gradient C g to the bit; a second derivative is refused in words."""
    logits = logit_sets(7, 12, band, torch.float32)["spread 1"].requires_grad_()
    z = ops.subset_indicator(logits, band, seed=5)
    indices = ops.subset_sample(logits, band, seed=5)
    assert torch.equal(z.sum(-1), (indices < 12).sum(-1).float())
    assert all(
        set(row.nonzero().flatten().tolist()) == set(i.tolist()) - {12} for row, i in zip(z, indices, strict=True)
    )
    g = torch.randn(7, 12)
    (gradient,) = torch.autograd.grad(z, logits, g, create_graph=True)
    assert torch.equal(gradient, ops.subset_covariance_vp(logits, g, band))
    (second,) = torch.autograd.grad(gradient.sum(), logits)
    assert second.isfinite().all()


@pytest.mark.parametrize("band", [(4, 4), (2, 5)], ids=str)
def test_indicator_gradient_keeps_the_contract(band: Band) -> None:
    """All of the contract's checks of gradients but finite differences, which see a piecewise constant value."""
    contract.check_enumeration(INDICATOR, INDICATOR.op, 8, band)
    contract.check_enumeration(INDICATOR, INDICATOR.reference, 8, band)
    contract.check_reference(INDICATOR, 9, 24, band)
    contract.check_half(INDICATOR, torch.bfloat16, band)
    contract.check_strided(INDICATOR, band)
    contract.check_batch_shapes(INDICATOR, band)
    contract.check_written(INDICATOR, band)
    contract.check_compile(INDICATOR, band, "aot_eager")


@pytest.mark.parametrize("name", ["subset_pairwise", "subset_kl", "subset_indicator"])
def test_vmap_of_gradients(name: str) -> None:
    """torch.func.vmap over torch.func.vjp gives the batched gradient: derivatives have rules for vmap as well."""
    logits, other = torch.randn(4, 3, 8), torch.randn(4, 3, 8)

    def function(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        if name == "subset_kl":
            return ops.subset_kl(x, y, 3)
        return ops.subset_pairwise(x, 3) if name == "subset_pairwise" else ops.subset_indicator(x, 3, seed=1)

    leaf = logits.clone().requires_grad_()
    out = function(leaf, other)
    g = torch.randn_like(out)
    (want,) = torch.autograd.grad(out, leaf, g)
    leaf2 = logits.clone().requires_grad_()
    mapped = torch.vmap(function)(leaf2, other)
    (got,) = torch.autograd.grad(mapped, leaf2, g)
    assert_near(got, want, 1e-5, f"vmap of {name}")


@pytest.mark.parametrize("k", [3, (1, 4)])
def test_third_derivative(k: Band) -> None:
    """C v is differentiable in the logits, which second derivatives of the entropy need."""
    generator = torch.Generator().manual_seed(3)
    logits, v = (torch.randn(3, 6, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(2))
    assert torch.autograd.gradcheck(lambda r, w: ops.subset_covariance_vp(r, w, k), (logits, v))


def test_num_samples() -> None:
    logits = torch.randn(5, 6, generator=torch.Generator().manual_seed(4))
    drawn = ops.subset_sample(logits, (1, 3), seed=9, num_samples=4)
    assert drawn.shape == (4, 5, 3)
    assert torch.equal(drawn[0], ops.subset_sample(logits, (1, 3), seed=9))
    assert not torch.equal(drawn[0], drawn[1])
    assert ops.subset_sample(logits, 2, seed=9, num_samples=0).shape == (0, 5, 2)
    with pytest.raises(ValueError, match="num_samples must be at least 0, not -1"):
        ops.subset_sample(logits, 2, num_samples=-1)
    with pytest.raises(TypeError, match=r"num_samples must be None or an int, not 2\.0"):
        ops.subset_sample(logits, 2, num_samples=2.0)  # type: ignore[arg-type]
