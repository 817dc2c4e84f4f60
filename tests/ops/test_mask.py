"""``mask`` of every operator: a False is a logit of -inf, in values, gradients, errors, compiled and mapped."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from probmoe_ext import ops

Op = Callable[..., Any]
INDICES = torch.tensor([[0, 2, 5]]).expand(7, -1)
OPS: dict[str, Op] = {
    "subset_log_partition": lambda x, **o: ops.subset_log_partition(x, (2, 3), **o),
    "subset_cardinality": lambda x, **o: ops.subset_cardinality(x, (2, 3), **o),
    "subset_marginals": lambda x, **o: ops.subset_marginals(x, (2, 3), **o),
    "subset_covariance_vp": lambda x, **o: ops.subset_covariance_vp(x, torch.ones_like(x).cumsum(-1), (2, 3), **o),
    "subset_sample": lambda x, **o: ops.subset_sample(x, (2, 3), 5, **o),
    "subset_sample, many": lambda x, **o: ops.subset_sample(x, (2, 3), 5, 4, **o),
    "subset_mode": lambda x, **o: ops.subset_mode(x, (2, 3), **o),
    "subset_log_prob": lambda x, **o: ops.subset_log_prob(x, INDICES[: len(x)], 3, **o),
    "subset_entropy": lambda x, **o: ops.subset_entropy(x, (2, 3), **o),
    "subset_pairwise": lambda x, **o: ops.subset_pairwise(x, (2, 3), **o),
    "subset_kl": lambda x, **o: ops.subset_kl(x, torch.sin(7 * x).nan_to_num(), (2, 3), **o),
    "subset_indicator": lambda x, **o: ops.subset_indicator(x, (2, 3), 5, **o),
    "route_top_k": lambda x, **o: ops.route_top_k(x, 3, True, **o),
    "route_probmoe": lambda x, **o: ops.route_probmoe(x, (2, 3), training=True, seed=5, **o),
    "route_probmoe, inference": lambda x, **o: ops.route_probmoe(x, (2, 3), training=False, normalize=True, **o),
}
every_op = pytest.mark.parametrize("name", OPS)


def tuple_of(output: Any) -> tuple[Tensor, ...]:
    return output if isinstance(output, tuple) else (output,)


def inputs() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(6)
    logits = torch.randn(7, 9, generator=generator)
    mask = torch.rand(7, 9, generator=generator) < 0.6
    mask[:, :3] = True
    mask[3, 2] = mask[4, 5] = False
    mask[3, 5:] = True
    return logits, mask


def same(got: Any, want: Any) -> None:
    for a, b in zip(tuple_of(got), tuple_of(want), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@every_op
def test_a_false_is_a_logit_of_minus_infinity(name: str) -> None:
    """Bit for bit, whether the mask is given by row or shared by all rows."""
    logits, mask = inputs()
    op = OPS[name]
    if name == "subset_kl":
        want = ops.subset_kl(
            *(x.masked_fill(~mask, -torch.inf) for x in (logits, torch.sin(7 * logits).nan_to_num())), (2, 3)
        )
    else:
        want = op(logits.masked_fill(~mask, -torch.inf))
    same(op(logits, mask=mask), want)
    shared = mask[0]
    same(op(logits, mask=shared), op(logits, mask=shared.expand(7, -1).contiguous()))
    same(op(logits, mask=torch.ones_like(mask)), op(logits))


@every_op
def test_gradients(name: str) -> None:
    """0 at the masked experts, whatever their logits hold; elsewhere that of the -inf logits."""
    logits, mask = inputs()
    logits.masked_fill_(~mask, 3e4)
    leaf = logits.clone().requires_grad_()
    outputs = [o for o in tuple_of(OPS[name](leaf, mask=mask)) if o.is_floating_point()]
    if not outputs:
        return
    finite = torch.where(outputs[0].isfinite(), outputs[0], 0.0)
    (gradient,) = torch.autograd.grad((finite * torch.arange(1.0, finite.shape[-1] + 1)).sum(), leaf)
    assert gradient.isfinite().all() and (gradient[~mask] == 0).all()
    assert (gradient[mask] != 0).any()


@every_op
def test_compiled_and_mapped(name: str) -> None:
    logits, mask = inputs()
    op = OPS[name]
    torch._dynamo.reset()
    want = op(logits, mask=mask)
    same(torch.compile(lambda x, m: op(x, mask=m), fullgraph=True, backend="aot_eager")(logits, mask), want)
    if name == "subset_sample, many":
        return  # rows of a mapped call are numbered along the mapped dimension first: another draw of the same law
    deep = [torch.stack([t, t]) for t in (logits, mask)]
    for mapped in (torch.vmap(lambda x, m: op(x, mask=m))(*deep), torch.vmap(lambda x: op(x, mask=mask))(deep[0])):
        same(tuple(o[0] for o in tuple_of(mapped)), want)


@every_op
def test_errors(name: str) -> None:
    logits, mask = inputs()
    op = OPS[name]
    with pytest.raises(TypeError, match=r"mask must be a bool tensor \(True keeps the expert\), not torch.float32"):
        op(logits, mask=mask.float())
    with pytest.raises(TypeError, match=r"mask must be a bool tensor.*not list"):
        op(logits, mask=[True] * 9)
    for wrong in (mask[:, :8], mask[:6], mask[:, 0]):
        with pytest.raises(ValueError, match=r"mask must have shape \[..., E\].*not"):
            op(logits, mask=wrong)
    with pytest.raises(ValueError, match="mask is on meta"):
        op(logits, mask=mask.to("meta"))
    mask[4] = False
    if name == "subset_log_prob":
        mask[4, :2] = True
    else:
        mask[4, 0] = True
    with pytest.raises(ValueError, match=r"row \d+ of (p_)?logits has fewer than k_min = \d"):
        op(logits, mask=mask)


def test_a_mask_may_have_more_rows_than_the_logits() -> None:
    logits = torch.randn(9)
    mask = inputs()[1]
    got = ops.subset_marginals(logits, 2, mask=mask)
    assert got.shape == (7, 9)
    assert torch.equal(got, ops.subset_marginals(logits.expand(7, -1), 2, mask=mask))
