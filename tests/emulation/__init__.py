"""The CUDA kernels and their adapters on a CPU: compiled as C++ against an emulation of the execution model.

`library` builds it once for a state of the sources; `in_place_of_cpu` puts the kernels where the public operators on
CPU tensors arrive, so that the operators' own tests run on them.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch
from filelock import FileLock

import probmoe_ext.ops  # noqa: F401  (registers the operators)

ROOT = Path(__file__).parents[2]
OWN = ROOT / "tests/emulation"
TORCH = Path(torch.__file__).parent
NAMESPACE = "probmoe_emulated"
_FLAGS = ("-O1", "-march=native", "-ffp-contract=off", "-fPIC", "-Wall", "-Wno-unknown-pragmas")
_ADAPTER_FLAGS = ("-O0", "-fPIC", "-fvisibility=hidden", "-Wall", "-DTORCH_TARGET_VERSION=0x020a000000000000")
_ADAPTER_FLAGS += ('-DPM_CUDA_VERSION="emulated"', f"-DPM_CUDA_NAMESPACE={NAMESPACE}", "-DPM_CUDA_KEY=CPU")


def operators() -> list[str]:
    """The raw operators that have CUDA kernels: those that the adapters register."""
    adapters = (path.read_text() for path in (ROOT / "csrc/shim").glob("*_cuda.cpp"))
    return sorted(name for text in adapters for name in re.findall(r'm\.impl\("(\w+)"', text))


@cache
def library() -> ctypes.CDLL:
    """Build and load it; its operators live in ``torch.ops.probmoe_emulated``."""
    compiler = os.environ.get("CXX", "g++")
    kernels = sorted((ROOT / "cuda").glob("*.cu"))
    adapters = sorted((ROOT / "csrc/shim").glob("*_cuda.cpp"))
    state = hashlib.sha256(repr((_FLAGS, _ADAPTER_FLAGS, torch.__version__, compiler)).encode())
    for folder in (ROOT / "cuda", ROOT / "csrc", OWN):
        for path in sorted(p for p in folder.rglob("*") if p.suffix in {".cu", ".cuh", ".cpp", ".h", ".py"}):
            state.update(path.read_bytes())
    folder = ROOT / "build/emulation"
    target = folder / f"{state.hexdigest()[:16]}.so"
    folder.parent.mkdir(exist_ok=True)
    # Processes that test at the same time build it once.
    with FileLock(folder.with_suffix(".lock")):
        if not target.exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            _build(target, compiler, kernels, adapters)
    schemas = torch.library.Library(NAMESPACE, "DEF")
    for name in operators():
        schema = str(getattr(torch.ops.probmoe_ext, name).default._schema)
        schemas.define(schema.removeprefix("probmoe_ext::"))
    _kept.append(schemas)
    torch.ops.load_library(target)
    return ctypes.CDLL(str(target))


def _build(target: Path, compiler: str, kernels: list[Path], adapters: list[Path]) -> None:
    """Compile all sources at once, and link them."""
    folders = [f"-I{OWN / 'include'}", f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'cuda'}", f"-isystem{TORCH / 'include'}"]
    jobs = [("-std=c++17", "-x", "c++", *_FLAGS, path) for path in (*OWN.glob("*.cpp"), *kernels)]
    jobs += [("-std=c++20", *_ADAPTER_FLAGS, path) for path in adapters]
    objects = [target.with_name(f"{Path(job[-1]).name}.o") for job in jobs]
    running = [
        subprocess.Popen([compiler, "-c", "-o", o, *folders, *job], stderr=subprocess.PIPE, text=True)
        for o, job in zip(objects, jobs, strict=True)
    ]
    said = [process.communicate()[1] for process in running]
    for process, text in zip(running, said, strict=True):
        assert process.returncode == 0 and not text, text
    partial = target.with_suffix(".partial")
    linked = [f"-L{TORCH / 'lib'}", "-ltorch_cpu", f"-Wl,-rpath,{TORCH / 'lib'}"]
    subprocess.run([compiler, "-shared", "-o", partial, *objects, *linked], check=True)
    partial.rename(target)


_kept: list[torch.library.Library] = []


@contextmanager
def in_place_of_cpu() -> Iterator[None]:
    """Within, ``torch.ops.probmoe_ext`` on CPU tensors runs the emulated kernels."""
    library()
    override = torch.library.Library("probmoe_ext", "IMPL")
    for name in operators():
        override.impl(name, getattr(getattr(torch.ops, NAMESPACE), name).default, "CPU", allow_override=True)
    try:
        yield
    finally:
        override._destroy()


@contextmanager
def schedule(seed: int) -> Iterator[None]:
    """Within, threads run in another order between meetings: 1 from the last to the first, above 1 shuffled."""
    library().emulation_schedule(seed)
    try:
        yield
    finally:
        library().emulation_schedule(0)
