"""What only the subset family promises, beyond the contract."""

from __future__ import annotations

import pytest
import torch

from probmoe_ext import ops
from tests.inputs import Band, logit_sets

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
