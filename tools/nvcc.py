"""The CUDA toolkit in hand: which nvcc, for which architectures, with what to link."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

DEFAULT_ARCHITECTURES = ("8.0", "8.6", "8.9", "9.0", "10.0", "12.0")


def find_nvcc() -> str | None:
    """The nvcc of CUDA_HOME, or of the PATH; whether this machine has a GPU does not matter for building."""
    wanted = os.environ.get("PROBMOE_CUDA", "")
    if wanted not in ("", "0", "1"):
        sys.exit(f"probmoe_ext: PROBMOE_CUDA must be 0 or 1, not {wanted!r}")
    if wanted == "0":
        return None
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    candidate = os.path.join(home, "bin", "nvcc") if home else None
    nvcc = candidate if candidate and os.path.exists(candidate) else shutil.which("nvcc")
    if nvcc is None and wanted == "1":
        sys.exit("probmoe_ext: PROBMOE_CUDA=1 but no nvcc was found; set CUDA_HOME or put nvcc on the PATH")
    if nvcc is None:
        print("probmoe_ext: no nvcc found, building for the CPU only (set CUDA_HOME to build the CUDA kernels)")
    return nvcc


def code_flags(architectures: Sequence[str]) -> list[str]:
    """The ``-gencode`` flags for architectures ("8.6", "12.0+PTX").

    Architectures that differ in the minor version alone share one pass of the compiler proper, that for the lowest of
    them. Nothing in the kernels asks for more than a major version gives, so that their PTX would be the same text, and
    the assembler makes the same code of it. Variants with a letter ("9.0a") stand by themselves.
    """
    families: dict[str, list[str]] = {}
    portable = []
    for architecture in architectures:
        number = architecture.removesuffix("+PTX").replace(".", "")
        if architecture.endswith("+PTX"):
            portable.append(f"-gencode=arch=compute_{number},code=compute_{number}")
        families.setdefault(number[:-1] if number.isdecimal() else number, []).append(number)
    flags = []
    for numbers in families.values():
        lowest = min(numbers, key=lambda number: int(re.sub(r"\D", "", number)))
        machine = ",".join(f"sm_{number}" for number in numbers)
        flags.append(f"-gencode=arch=compute_{lowest},code=[{machine}]")
    return flags + portable


class Toolkit:
    """What ``cuda/*.cu`` is compiled with, and what the extension must link."""

    def __init__(self, nvcc: str) -> None:
        self.nvcc = nvcc
        text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
        found = re.search(r"release (\d+\.\d+)", text)
        self.version = found.group(1) if found else "unknown"
        # nvcc on the PATH may be a wrapper; the toolkit's own dry run tells where its libraries are.
        dry = subprocess.run([nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True).stderr
        top = re.search(r"#\$ TOP=(.+)", dry)
        self.home = Path(top.group(1).strip()).resolve() if top else Path(nvcc).resolve().parent.parent
        self.architectures = self._architectures()

    def _architectures(self) -> list[str]:
        listed = os.environ.get("TORCH_CUDA_ARCH_LIST")
        if listed and listed.strip():
            named = [name for name in re.split(r"[;\s]+", listed) if name]
            for name in named:
                if not re.fullmatch(r"\d+\.\d[a-z]?(\+PTX)?", name):
                    sys.exit(f'probmoe_ext: TORCH_CUDA_ARCH_LIST must be like "8.0;9.0+PTX", and {name!r} is not')
            return named
        known = subprocess.run([self.nvcc, "--list-gpu-code"], capture_output=True, text=True).stdout
        codes = [a for a in DEFAULT_ARCHITECTURES if f"sm_{a.replace('.', '')}" in known.split()]
        return [*codes[:-1], f"{codes[-1]}+PTX"]

    def command(self) -> tuple[str, ...]:
        """The compiler's command, without source and object."""
        host = ("-Xcompiler", "-fPIC,-fvisibility=hidden")
        return (
            self.nvcc,
            "-std=c++17",
            "-O3",
            "-Icsrc",
            "-Werror=all-warnings",
            *host,
            *code_flags(self.architectures),
        )

    def libraries(self) -> str:
        """The folder of the runtime's static library."""
        for name in ("lib64", "lib", "targets/x86_64-linux/lib"):
            if (self.home / name / "libcudart_static.a").exists():
                return str(self.home / name)
        sys.exit(
            f"probmoe_ext: {self.home} has nvcc but no libcudart_static.a; "
            "install the CUDA runtime's static library or set PROBMOE_CUDA=0"
        )
