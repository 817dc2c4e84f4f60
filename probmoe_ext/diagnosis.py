"""What is installed and built here. torch and the extension are imported only where they can be."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from probmoe_ext import __version__

NEEDED = {
    "torch": ("2.10", ""),
    "transformers": ("5.0", "hf"),
    "accelerate": ("1.1", "train"),
    "datasets": ("3.0", "train"),
    "tokenizers": ("0.21", "train"),
    "pyyaml": ("6", "train"),
    "tqdm": ("4.66", "train"),
    "peft": ("0.19", "test"),
    "trl": ("1.0", "test"),
    "lm_eval": ("0.4.13", "lm-eval"),
}
"""Oldest version of each package, and the extra that brings it; the same as in pyproject.toml."""


def diagnose() -> dict[str, Any]:
    """Look at versions, the extension, the processor and the GPUs.

    Returns:
        ``probmoe_ext``, ``python``, ``system``: text; ``packages``: by name ``version`` (None if it is missing),
        ``needs`` and ``note``; ``extension``: what it says of its build, ``cuda_note`` and ``note``; ``cpu``; ``gpu``:
        ``driver``, ``devices`` and ``note``; ``problems``: what keeps the package from working, a sentence each.
    """
    problems: list[str] = []
    packages = {name: _package(name, *needed, problems) for name, needed in NEEDED.items()}
    torch = _torch(packages["torch"], problems)
    extension = _extension(problems) if torch is not None else {"note": "not looked at: it needs torch"}
    return {
        "probmoe_ext": f"{__version__} in {Path(__file__).parent}",
        "python": platform.python_version(),
        "system": f"{platform.platform()}",
        "packages": packages,
        "extension": extension,
        "cpu": _cpu(torch),
        "gpu": _gpu(torch, extension, problems),
        "problems": problems,
    }


def _package(name: str, needs: str, extra: str, problems: list[str]) -> dict[str, Any]:
    install = f"pip install 'probmoe_ext[{extra}]'" if extra else f"pip install '{name}>={needs}'"
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        if not extra:
            problems.append(f"{name} is not installed: {install}")
        return {"version": None, "needs": needs, "note": f"not installed: {install}"}
    note = None
    if _numbers(version) < _numbers(needs):
        note = f"too old, {needs} or newer is needed: pip install '{name}>={needs}'"
        problems.append(f"{name} {version} is {note}")
    return {"version": version, "needs": needs, "note": note}


def _numbers(version: str) -> tuple[int, ...]:
    release = re.match(r"[\d.]*\d", version)
    return tuple(int(part) for part in release[0].split(".")) if release else ()


def _torch(package: dict[str, Any], problems: list[str]) -> Any:
    if package["version"] is None:
        return None
    try:
        import torch
    except Exception as error:
        problems.append(f"torch cannot be imported: {_line(error)}")
        return None
    return torch


def _extension(problems: list[str]) -> dict[str, Any]:
    from probmoe_ext import build_info

    try:
        info = build_info()
    except ImportError as error:
        built = sorted(path.name for path in Path(__file__).parent.glob("_C*.so"))
        if not built:
            reason = "it is not built"
        elif not any(name.startswith(f"_C.{sys.implementation.cache_tag}") for name in built):
            reason = f"it is built for another Python ({', '.join(built)})"
        else:
            reason = _line(error)
        note = f"{reason}; build it: pip install --no-build-isolation ."
        problems.append(f"the extension cannot be imported: {note}")
        return {"note": note}
    cuda_note = None
    if info["cuda"] is None:
        absence = info.get("cuda_absence") or "there was no nvcc, or PROBMOE_CUDA=0"
        cuda_note = f"not built ({absence}); set CUDA_HOME and reinstall to have the kernels"
    return {**info, "cuda_note": cuda_note, "note": None}


def _cpu(torch: Any) -> dict[str, Any]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "machine": platform.machine(),
        "cores": cores,
        "threads": torch.get_num_threads() if torch is not None else None,
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS"),
    }


def _gpu(torch: Any, extension: dict[str, Any], problems: list[str]) -> dict[str, Any]:
    driver = _driver()
    if torch is None:
        return {"driver": driver, "devices": [], "note": "not looked at: it needs torch"}
    if torch.version.cuda is None:
        return {"driver": driver, "devices": [], "note": f"torch {torch.__version__} is built without CUDA"}
    if not torch.cuda.is_available():
        why = "" if driver else ", and there is no driver"
        note = f"torch is built with CUDA {torch.version.cuda} but finds no GPU{why}"
        return {"driver": driver, "devices": [], "note": note}
    devices = []
    for number in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(number)
        devices.append(
            {"name": found.name, "capability": f"{found.major}.{found.minor}", "memory_bytes": found.total_memory}
        )
        built = str(extension.get("cuda_architectures") or "")
        if built and not covers(built, (found.major, found.minor)):
            problems.append(
                f"the kernels are built for {built}, not for {found.name} ({found.major}.{found.minor}): reinstall "
                f"with TORCH_CUDA_ARCH_LIST={found.major}.{found.minor}"
            )
    slow = "operators run as plain torch on the GPU, correct but slow" if extension.get("cuda_note") else None
    return {"driver": driver, "devices": devices, "note": slow}


def covers(architectures: str, capability: tuple[int, int]) -> bool:
    """Whether kernels for these architectures run on a GPU.

    Args:
        architectures: as in ``TORCH_CUDA_ARCH_LIST``: ``"8.0;9.0+PTX"``. Machine code runs on later GPUs of the same
            major version, PTX on all later ones.
        capability: major and minor compute capability of the GPU.
    """
    for text in re.split(r"[;\s]+", architectures):
        major, minor = (int(part) for part in re.sub(r"a?(\+PTX)?$", "", text).split("."))
        if (major, minor) <= capability and (text.endswith("+PTX") or major == capability[0]):
            return True
    return False


def _driver() -> str | None:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    try:
        command = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.split("\n")[0].strip() or None


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
