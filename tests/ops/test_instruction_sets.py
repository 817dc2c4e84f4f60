"""Every path that the processor can take gives right answers, and those with fused multiply-add the same bits."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.contract import floats_of, gradients, indices_of
from tests.inputs import MODERATE, logit_sets
from tests.ops import SPECS

SIZES = [(5, 24, (3, 3)), (3, 64, (6, 8)), (33, 16, (4, 4))]
X86 = platform.machine().lower() in ("x86_64", "amd64")


def outputs() -> dict[str, list[Tensor]]:
    """Results of all ops on fixed inputs, floats and their gradients first."""
    results = {}
    for spec in SPECS:
        for num_rows, num_experts, band in SIZES:
            if not spec.allows(band):
                continue
            for dtype in (torch.float32, torch.float64):
                sets = logit_sets(num_rows, num_experts, band, dtype)
                tensors = spec.tensors(torch.cat([sets[name] for name in MODERATE]), band)
                found = spec.call(spec.op, tensors, band)
                slopes = gradients(spec, spec.op, tensors, band) if spec.differentiable else []
                results[f"{spec} {num_experts} {band} {dtype}"] = [*floats_of(found), *slopes, *indices_of(found)]
    return results


@pytest.fixture(scope="module")
def by_set(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, list[Tensor]]]:
    """Results by instruction set, each from a process of its own: the choice is made once in a process."""
    folder = tmp_path_factory.mktemp("instruction_sets")
    results = {}
    for name in ("avx512", "avx2", "portable") if X86 else ("neon", "portable"):
        path = folder / name
        subprocess.run(
            [sys.executable, "-m", "tests.ops.test_instruction_sets", str(path)],
            env={**os.environ, "PROBMOE_ISA": name},
            cwd=Path(__file__).parents[2],
            check=True,
            timeout=300,
        )
        used, found = torch.load(path)
        results[used] = found
    return results


def test_portable_is_right(by_set: dict[str, dict[str, list[Tensor]]]) -> None:
    assert "portable" in by_set, f"PROBMOE_ISA=portable was not obeyed, got {sorted(by_set)}"
    for what, here in outputs().items():
        for a, b in zip(by_set["portable"][what], here, strict=True):
            if a.is_floating_point():
                tolerance = 1e-12 if a.dtype == torch.float64 else 1e-5
                torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, msg=lambda m, w=what: f"{w}: {m}")
            else:
                assert torch.equal(a, b), f"{what}: indices differ"


def test_fused_paths_agree_to_the_bit(by_set: dict[str, dict[str, list[Tensor]]]) -> None:
    fused = [name for name in by_set if name != "portable" or not X86]
    if len(fused) < 2:
        pytest.skip(f"this processor has only {fused} with fused multiply-add")
    for other in fused[1:]:
        for what, first in by_set[fused[0]].items():
            for a, b in zip(first, by_set[other][what], strict=True):
                assert torch.equal(a, b), f"{what}: {fused[0]} and {other} differ"


if __name__ == "__main__":
    from probmoe_ext import _C

    torch.set_num_threads(1)
    torch.save((_C.instruction_set(), outputs()), sys.argv[1])
