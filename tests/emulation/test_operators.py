"""The operators' contract and promises, on the emulated CUDA kernels and their adapters."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from probmoe_ext import ops
from tests import contract, emulation
from tests.contract import OpSpec
from tests.inputs import SET_NAMES, Band
from tests.ops import SPECS
from tests.ops.test_accuracy import PROMISE, assert_kept, errors
from tests.ops.test_contract import PAIR, SMALL

pytestmark = pytest.mark.filterwarnings("ignore:Warning only once for all operators")

KERNELS = [spec for spec in SPECS if spec.name in emulation.operators()]
REAL: list[tuple[int, int, Band]] = [
    (3, 60, (4, 4)), (5, 64, (8, 8)), (2, 64, (6, 8)), (1, 128, (2, 2)), (1, 256, (8, 8)),  # the tree
    (1, 40, (9, 9)), (1, 64, (0, 64)), (1, 300, (3, 5)), (3, 7, (7, 7)),  # and what is general
]  # fmt: skip
PROMISED: list[tuple[int, Band]] = [
    (1, (0, 1)), (16, (8, 8)), (60, (4, 4)), (64, (8, 8)), (64, (6, 8)), (256, (8, 8)),
]  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def _emulated() -> Iterator[None]:
    before = emulation.library().emulation_launches()
    with emulation.in_place_of_cpu():
        yield
    assert emulation.library().emulation_launches() > before, "the kernels were not what ran"


def cases(sizes: list[tuple]) -> pytest.MarkDecorator:  # type: ignore[type-arg]
    """Every operator with a kernel at each of the sizes; a size ends in a band."""
    found = [(spec, size) for spec in KERNELS for size in sizes if spec.allows(size[-1])]
    return pytest.mark.parametrize(("spec", "size"), found, ids=[f"{spec}-{size}" for spec, size in found])


@cases(SMALL)
def test_enumeration(spec: OpSpec, size: tuple[int, Band]) -> None:
    contract.check_enumeration(spec, spec.op, *size)


@cases(REAL)
def test_reference(spec: OpSpec, size: tuple[int, int, Band]) -> None:
    contract.check_reference(spec, *size)


@cases([(band,) for band in PAIR])
def test_form(spec: OpSpec, size: tuple[Band]) -> None:
    """Half types, strides, shapes, and outputs that all were written."""
    for dtype in (torch.bfloat16, torch.float16):
        contract.check_half(spec, dtype, *size)
    contract.check_strided(spec, *size)
    contract.check_batch_shapes(spec, *size)
    contract.check_written(spec, *size)


@cases([(8, (3, 3)), (19, (2, 5)), (24, (10, 12))])
def test_edges(spec: OpSpec, size: tuple[int, Band]) -> None:
    contract.check_edges(spec, *size)


@pytest.mark.parametrize("dtype", PROMISE, ids=str)
@pytest.mark.parametrize(("num_experts", "band"), PROMISED, ids=str)
def test_promise(num_experts: int, band: Band, dtype: torch.dtype) -> None:
    """Fifty digits, on all sets of logits."""
    for name in SET_NAMES:
        assert_kept(errors(ops, num_experts, band, name, dtype), dtype, name)
