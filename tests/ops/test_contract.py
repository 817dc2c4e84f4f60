"""The contract, applied to every op."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests import contract
from tests.contract import OpSpec
from tests.inputs import Band
from tests.ops import SPECS

SMALL = [(1, (1, 1)), (1, (0, 1)), (1, (0, 0)), (2, (1, 1)), (3, (0, 0)), (3, (3, 3)), (5, (2, 2)), (5, (1, 3))]
SMALL += [(8, (0, 8)), (8, (3, 3)), (8, (8, 8)), (8, (0, 4)), (8, (5, 8))]
REAL = [(9, 64, (8, 8)), (3, 60, (4, 4)), (5, 64, (6, 8)), (1, 256, (8, 8)), (1, 64, (0, 64)), (1, 96, (40, 60))]
REAL += [(33, 16, (1, 4)), (4, 7, (7, 7))]
PAIR: list[Band] = [(4, 4), (2, 5)]

every_op = pytest.mark.parametrize("spec", SPECS, ids=str)


def with_bands(bands: list[Band], specs: list[OpSpec] = SPECS) -> pytest.MarkDecorator:
    """Every op with each of the bands that its signature takes."""
    cases = [(spec, band) for spec in specs for band in bands if spec.allows(band)]
    return pytest.mark.parametrize(("spec", "band"), cases, ids=[f"{spec}-{band}" for spec, band in cases])


def with_sizes(sizes: list[tuple]) -> pytest.MarkDecorator:
    """Every op with each of the sizes; a size is any tuple that ends in a band."""
    cases = [(spec, size) for spec in SPECS for size in sizes if spec.allows(size[-1])]
    return pytest.mark.parametrize(("spec", "size"), cases, ids=[f"{spec}-{size}" for spec, size in cases])


every_op_and_band = with_bands(PAIR)


@with_sizes(SMALL)
def test_enumeration(spec: OpSpec, size: tuple[int, Band]) -> None:
    contract.check_enumeration(spec, spec.op, *size)


@with_sizes(REAL)
def test_reference(spec: OpSpec, size: tuple[int, int, Band]) -> None:
    contract.check_reference(spec, *size)


@with_sizes([(4, (2, 2)), (5, (1, 3)), (2, (2, 2))])
def test_gradcheck(spec: OpSpec, size: tuple[int, Band]) -> None:
    contract.check_gradcheck(spec, spec.op, *size)


@every_op_and_band
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half(spec: OpSpec, band: Band, dtype: torch.dtype) -> None:
    contract.check_half(spec, dtype, band)


@every_op_and_band
def test_strided(spec: OpSpec, band: Band) -> None:
    contract.check_strided(spec, band)


@every_op_and_band
def test_batch_shapes(spec: OpSpec, band: Band) -> None:
    contract.check_batch_shapes(spec, band)


@every_op_and_band
def test_written(spec: OpSpec, band: Band) -> None:
    contract.check_written(spec, band)


@with_sizes([(8, (3, 3)), (19, (2, 5)), (4, (4, 4))])
def test_edges(spec: OpSpec, size: tuple[int, Band]) -> None:
    contract.check_edges(spec, *size)


@every_op_and_band
def test_threads(spec: OpSpec, band: Band, with_threads: Callable[[int, Callable[[], Any]], Any]) -> None:
    contract.check_threads(spec, band, with_threads)


@every_op_and_band
def test_meta(spec: OpSpec, band: Band) -> None:
    contract.check_meta(spec, band)


@every_op_and_band
def test_vmap(spec: OpSpec, band: Band) -> None:
    contract.check_vmap(spec, band)


@with_bands(PAIR, [spec for spec in SPECS if not spec.composite])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(spec: OpSpec, band: Band, dtype: torch.dtype) -> None:
    contract.check_opcheck(spec, band, dtype)


@every_op
def test_compile(spec: OpSpec) -> None:
    contract.check_compile(spec, (4, 4) if spec.exact_only else (2, 5), "aot_eager")


@pytest.mark.parametrize("spec", [s for s in SPECS if str(s) == "route_probmoe[sample, marginal]"], ids=str)
def test_compile_inductor(spec: OpSpec) -> None:
    contract.check_compile(spec, (4, 4), "inductor")


@every_op_and_band
def test_cuda(spec: OpSpec, band: Band, cuda: torch.device) -> None:
    contract.check_cuda(spec, band, cuda)
