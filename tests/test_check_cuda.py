"""The check of what nvcc made finds what it is for."""

from __future__ import annotations

import importlib.util
from pathlib import Path

PATH = Path(__file__).parents[1] / "tools/check_cuda.py"
SPEC = importlib.util.spec_from_file_location("check_cuda", PATH)
assert SPEC is not None and SPEC.loader is not None
check_cuda = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(check_cuda)

USAGE = """
 Function _ZN7probmoe11draw_kernelILi8EEEv:
  REG:124 STACK:{stack} SHARED:0 LOCAL:0 CONSTANT[2]:32 TEXTURE:0 SURFACE:0 SAMPLER:0
 Function _ZN7probmoe13sample_kernelENS_3JobE:
  REG:72 STACK:24 SHARED:0 LOCAL:0 CONSTANT[0]:1040 TEXTURE:0 SURFACE:0 SAMPLER:0
 Function _ZN7probmoe18closed_form_kernelILNS0_10ClosedFormE2EEEvNS_6LawJobEi:
  REG:50 STACK:{stack} SHARED:0 LOCAL:0 CONSTANT[0]:1040 TEXTURE:0 SURFACE:0 SAMPLER:0
"""
SASS = """
		Function : _ZN7probmoe15gradient_kernelILi8EEEv
        /*0010*/                   {instruction} ;                 /* 0x000000ff0aff7624 */
		Function : _ZN7probmoe62_GLOBAL__N__0_17_gumbel_relaxed_cu_020relaxed_top_k_kernelIdLi8EEEvNS_3JobE
        /*0010*/                   DFMA R8, R8, R4, R6 ;           /* 0x000000ff0aff7624 */
		Function : _ZN7probmoe62_GLOBAL__N__0_17_gumbel_relaxed_cu_020relaxed_top_k_kernelIfLi8EEEvNS_3JobE
        /*0010*/                   FFMA R8, R8, R4, R6 ;           /* 0x000000ff0aff7624 */
		Function : _ZN7probmoe14tangent_kernelENS_3JobE
        /*0010*/                   DFMA R8, R8, R4, R6 ;           /* 0x000000ff0aff7624 */
		Function : _ZN7probmoe23dirichlet_sample_kernelIfEEvNS_6LawJobEi
        /*0010*/                   {instruction} ;                 /* 0x000000ff0aff7624 */
		Function : _ZN7probmoe23dirichlet_sample_kernelIdEEvNS_6LawJobEi
        /*0010*/                   DFMA R8, R8, R4, R6 ;           /* 0x000000ff0aff7624 */
"""


def test_local_memory() -> None:
    assert check_cuda.local_memory(USAGE.format(stack=0)) == []
    single, double = check_cuda.local_memory(USAGE.format(stack=8))
    assert "draw_kernel" in single and "8 bytes of stack" in single
    assert "closed_form_kernel" in double


def test_double_precision() -> None:
    assert check_cuda.double_precision(SASS.format(instruction="FFMA R8, R8, R4, R6")) == (3, [])
    for instruction in (
        "DADD R8, R8, R4",
        "@P0 DSETP.GT.AND P0, PT, R4, RZ, PT",
        "F2F.F64.F32 R4, R4",
        "MUFU.RCP64H R5, R7",
    ):
        _, found = check_cuda.double_precision(SASS.format(instruction=instruction))
        assert len(found) == 2 and all(instruction in one for one in found)
