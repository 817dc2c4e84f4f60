"""MATH.md's promises, measured against 50 digits. ``python -m tests.ops.test_accuracy`` prints the table."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch

from probmoe_ext import reference
from tests.inputs import SET_NAMES, Band, exact_case, logit_sets

# Of log Z (in units of max(1, |log Z|)), marginals, marginals relative where >= 1e-12, and C v (in units of max |v|).
PROMISE = {torch.float32: (3e-6, 1e-6, 1e-5, 5e-6), torch.float64: (1e-13, 1e-13, 1e-13, 1e-13)}
COLUMNS = ("log Z", "marginals", "relative", "C v")
CASES: list[tuple[int, Band]] = [
    (1, (0, 0)), (1, (1, 1)), (1, (0, 1)), (2, (1, 1)), (5, (2, 2)), (16, (16, 16)), (60, (4, 4)), (64, (8, 8)),
    (64, (6, 8)), (64, (32, 32)), (64, (64, 64)), (64, (0, 64)), (128, (8, 8)), (256, (8, 8)),
]  # fmt: skip
LARGE: list[tuple[int, Band, tuple[str, ...]]] = [
    (512, (8, 8), ("spread 10", "constant", "plus or minus 2000")),
    (1024, (8, 8), ("spread 1", "spread 100", "one 87 above")),
    (256, (100, 120), ("spread 10",)),
]
MORE: list[tuple[int, Band]] = [
    (64, (8, 8)), (257, (5, 9)), (1023, (1, 1)), (1024, (0, 3)), (600, (300, 300)), (300, (0, 300)), (300, (290, 299)),
]  # fmt: skip


def errors(ops: ModuleType, num_experts: int, band: Band, name: str, dtype: torch.dtype) -> tuple[float, ...]:
    """The four errors of `ops` (or of the reference, which has the same names) on one row."""
    logits64, v64, exact = exact_case(num_experts, band, name)
    logits, v = logits64.to(dtype), v64.to(dtype)
    log_z = float(ops.subset_log_partition(logits, band))
    marginals = ops.subset_marginals(logits, band)[0].double()
    product = ops.subset_covariance_vp(logits, v, band)[0].double()
    return compare(log_z, marginals, product, exact.log_z, exact.marginals, exact.covariance_vp, v64)


def compare(log_z, marginals, product, true_log_z, true_marginals, true_product, v) -> tuple[float, ...]:  # type: ignore[no-untyped-def]
    """Errors in the promise's units; a NaN counts as infinite."""
    true_marginals, true_product = torch.as_tensor(true_marginals), torch.as_tensor(true_product)
    off = (marginals - true_marginals).abs()
    listed = true_marginals >= 1e-12
    found = (
        abs(log_z - true_log_z) / max(1.0, abs(true_log_z)),
        float(off.max()),
        float((off / true_marginals)[listed].max()) if listed.any() else 0.0,
        float((product - true_product).abs().max() / v.abs().max()),
    )
    return tuple(error if error == error else float("inf") for error in found)


def assert_kept(found: tuple[float, ...], dtype: torch.dtype, what: str) -> None:
    """Compare with the promise, column by column."""
    for column, error, promise in zip(COLUMNS, found, PROMISE[dtype], strict=True):
        assert error <= promise, f"{what}: error of {column} is {error:.2e}, promised {promise:.0e}"


@pytest.mark.parametrize("dtype", PROMISE, ids=str)
@pytest.mark.parametrize("name", SET_NAMES)
@pytest.mark.parametrize(("num_experts", "band"), CASES, ids=str)
def test_promise(num_experts: int, band: Band, name: str, dtype: torch.dtype) -> None:
    from probmoe_ext import ops

    assert_kept(errors(ops, num_experts, band, name, dtype), dtype, name)


@pytest.mark.parametrize("dtype", PROMISE, ids=str)
@pytest.mark.parametrize(("num_experts", "band", "names"), LARGE, ids=str)
def test_promise_large(num_experts: int, band: Band, names: tuple[str, ...], dtype: torch.dtype) -> None:
    from probmoe_ext import ops

    for name in names:
        assert_kept(errors(ops, num_experts, band, name, dtype), dtype, name)


@pytest.mark.parametrize(("num_experts", "band"), MORE, ids=str)
def test_promise_by_reference(num_experts: int, band: Band) -> None:
    """Many more rows and sizes, judged by the float64 reference, which 50 digits have been seen to agree with."""
    from probmoe_ext import ops

    sets = logit_sets(40 if num_experts == 64 else 1, num_experts, band, torch.float64)
    logits = torch.cat(list(sets.values()))
    v = torch.randn(logits.shape).double()
    true_log_z = reference.subset_log_partition(logits, band)
    true_marginals = reference.subset_marginals(logits, band)
    true_product = reference.subset_covariance_vp(logits, v, band)
    for dtype in PROMISE:
        log_z = ops.subset_log_partition(logits.to(dtype), band).double()
        marginals = ops.subset_marginals(logits.to(dtype), band).double()
        product = ops.subset_covariance_vp(logits.to(dtype), v.to(dtype), band).double()
        for row in range(len(logits)):
            truth = (float(true_log_z[row]), true_marginals[row], true_product[row])
            found = compare(float(log_z[row]), marginals[row], product[row], *truth, v[row])
            assert_kept(found, dtype, f"{SET_NAMES[row * len(SET_NAMES) // len(logits)]}, row {row}")


@pytest.mark.parametrize(("num_experts", "k"), [(64, 8), (256, 8), (600, 300)], ids=str)
def test_covariance_has_no_constant_direction(num_experts: int, k: int) -> None:
    """``C 1 = 0`` for an exact k, to the promise of C v: nothing is lost when everything cancels."""
    from probmoe_ext import ops

    logits = torch.cat(list(logit_sets(1, num_experts, (k, k), torch.float32).values()))
    for dtype in PROMISE:
        product = ops.subset_covariance_vp(logits.to(dtype), torch.ones_like(logits, dtype=dtype), k)
        assert product.abs().max() <= PROMISE[dtype][3]


def log_space_error(num_experts: int, band: Band, name: str, dtype: torch.dtype) -> float:
    """Largest error of the restated log-space program in a marginal; exact k only."""
    logits, _, exact = exact_case(num_experts, band, name)
    marginals = reference.subset_marginals_log_space(logits.to(dtype), band[0])[0].double()
    error = float((marginals - torch.as_tensor(exact.marginals)).abs().max())
    return error if error == error else float("inf")


def table() -> str:
    """Worst errors by logit set and dtype over `CASES` and `LARGE`, beside the log-space program's at (64, 8)."""
    from probmoe_ext import ops

    lines = [
        f"| logits | dtype | {' | '.join(COLUMNS)} | log-space marginals at (64, 8) |",
        "|---|---|" + "---|" * (len(COLUMNS) + 1),
    ]
    for name in SET_NAMES:
        cases = [*CASES, *((n, band) for n, band, names in LARGE if name in names)]
        for dtype in PROMISE:
            worst = [max(column) for column in zip(*(errors(ops, *c, name, dtype) for c in cases), strict=True)]
            peer = log_space_error(64, (8, 8), name, dtype)
            cells = " | ".join(f"{error:.1e}" for error in (*worst, peer))
            lines.append(f"| {name} | {str(dtype).removeprefix('torch.')} | {cells} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
