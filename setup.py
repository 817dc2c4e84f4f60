"""Build of probmoe_ext: the C core as a static library, the CUDA kernels where there is an nvcc, one extension module.

Environment: ``PROBMOE_CUDA=0`` leaves the CUDA kernels out, ``PROBMOE_CUDA=1`` insists on them, otherwise nvcc decides;
``TORCH_CUDA_ARCH_LIST`` (``"8.0;9.0+PTX"``) picks the architectures; ``PROBMOE_DEBUG=1`` compiles without optimisation.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import setup
from setuptools.command.build_clib import build_clib

ROOT = Path(__file__).parent.resolve()
try:
    import torch
    from torch.utils.cpp_extension import BuildExtension, CppExtension
except ImportError:
    sys.exit(
        "probmoe_ext: torch is not importable in this build; install torch >= 2.10 first and build with "
        "`pip install --no-build-isolation .`"
    )

DEBUG = os.environ.get("PROBMOE_DEBUG", "0") == "1"
OPTIMISE = ["-O0", "-g"] if DEBUG else ["-O3"]
# Contraction is explicit in the core (rows/simd.h): the compiler must not add any, or results would depend on it.
C_FLAGS = ["-std=c17", *OPTIMISE, "-ffp-contract=off", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]
# isa/begin.h sets these targets by pragma, but clang's does not define the feature macros that rows/simd.h asks for.
ISA_FLAGS = {
    "avx2": ["-mavx2", "-mfma"],
    "avx512": ["-mavx512f", "-mavx512dq", "-mavx512vl", "-mavx512bw", "-mavx2", "-mfma"],
}
X86 = platform.machine().lower() in ("x86_64", "amd64")
CXX_FLAGS = ["-std=c++20", *OPTIMISE, "-fvisibility=hidden", "-Wall"]
DEFAULT_ARCHITECTURES = ("8.0", "8.6", "8.9", "9.0", "10.0", "12.0")


def sources(folder: str, pattern: str) -> list[str]:
    return sorted(str(p.relative_to(ROOT)) for p in (ROOT / folder).glob(pattern))


def isa_flags(unit: str) -> list[str]:
    return ISA_FLAGS.get(Path(unit).stem.partition("_")[0], []) if X86 else []


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


class CudaBuild:
    """Compiles ``cuda/*.cu`` with nvcc and says what the extension must link."""

    def __init__(self, nvcc: str) -> None:
        self.nvcc = nvcc
        text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
        found = re.search(r"release (\d+\.\d+)", text)
        self.version = found.group(1) if found else "unknown"
        # nvcc on the PATH may be a wrapper; the toolkit's own dry run tells where its libraries are.
        dry = subprocess.run([nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True).stderr
        top = re.search(r"#\$ TOP=(.+)", dry)
        self.home = Path(top.group(1).strip()).resolve() if top else Path(nvcc).resolve().parent.parent

    def architectures(self) -> list[str]:
        listed = os.environ.get("TORCH_CUDA_ARCH_LIST")
        if listed:
            return re.split(r"[;\s]+", listed.strip())
        known = subprocess.run([self.nvcc, "--list-gpu-code"], capture_output=True, text=True).stdout
        codes = [a for a in DEFAULT_ARCHITECTURES if f"sm_{a.replace('.', '')}" in known.split()]
        return [*codes[:-1], f"{codes[-1]}+PTX"]

    def flags(self) -> list[str]:
        result = []
        for architecture in self.architectures():
            number = architecture.removesuffix("+PTX").replace(".", "")
            result.append(f"-gencode=arch=compute_{number},code=sm_{number}")
            if architecture.endswith("+PTX"):
                result.append(f"-gencode=arch=compute_{number},code=compute_{number}")
        return result

    def libraries(self) -> list[str]:
        for name in ("lib64", "lib", "targets/x86_64-linux/lib"):
            if (self.home / name / "libcudart_static.a").exists():
                return [str(self.home / name)]
        sys.exit(
            f"probmoe_ext: {self.home} has nvcc but no libcudart_static.a; install the CUDA runtime's static library or set PROBMOE_CUDA=0"
        )

    def compile(self, folder: Path) -> list[str]:
        folder.mkdir(parents=True, exist_ok=True)
        units = sources("cuda", "*.cu")

        def one(unit: str) -> str:
            target = str(folder / (Path(unit).stem + ".cu.o"))
            command = [
                self.nvcc,
                "-c",
                unit,
                "-o",
                target,
                "-std=c++17",
                "-O3",
                "-Icsrc",
                "--threads=2",
                "-Werror=all-warnings",
                "-Xcompiler",
                "-fPIC,-fvisibility=hidden",
                *self.flags(),
            ]
            print(" ".join(command))
            subprocess.run(command, cwd=ROOT, check=True)
            return target

        with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            return list(pool.map(one, units))


class BuildCore(build_clib):
    """The C core, its translation units side by side (one for each instruction set and precision)."""

    def build_libraries(self, libraries) -> None:  # type: ignore[no-untyped-def]
        if shutil.which(self.compiler.compiler_so[0]) is None:
            sys.exit(
                f"probmoe_ext: no C compiler ({self.compiler.compiler_so[0]!r} is not on the PATH); install gcc or clang, or set CC"
            )
        for name, build in libraries:

            def one(unit: str, build=build) -> list[str]:  # type: ignore[no-untyped-def]
                return self.compiler.compile(
                    [unit],
                    output_dir=self.build_temp,
                    include_dirs=build["include_dirs"],
                    extra_postargs=[*build["cflags"], *isa_flags(unit)],
                    depends=build["obj_deps"][""],
                )

            with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
                objects = [o for group in pool.map(one, build["sources"]) for o in group]
            self.compiler.create_static_lib(objects, name, output_dir=self.build_clib)


class Build(BuildExtension):
    """The extension, after the core: in-place and editable builds do not build libraries by themselves."""

    def run(self) -> None:
        self.run_command("build_clib")
        super().run()

    def build_extensions(self) -> None:
        if CUDA is not None:
            objects = CUDA.compile(Path(self.build_temp) / "cuda")
            for extension in self.extensions:
                extension.extra_objects += objects
        super().build_extensions()


nvcc = find_nvcc() if sources("cuda", "*.cu") else None
CUDA = CudaBuild(nvcc) if nvcc else None

macros = [
    ("TORCH_TARGET_VERSION", "0x020a000000000000"),  # the stable ABI of torch 2.10: runs on every later one
    ("PM_TORCH_VERSION", f'"{torch.__version__}"'),
]
if CUDA is None:
    reason = "PROBMOE_CUDA=0" if os.environ.get("PROBMOE_CUDA") == "0" else "no nvcc was found"
    macros.append(("PM_CUDA_ABSENCE", f'"{reason}"'))
cuda_libraries: list[str] = []
link: list[str] = []
if CUDA is not None:
    macros += [
        ("PM_CUDA_VERSION", f'"{CUDA.version}"'),
        ("PM_CUDA_ARCHITECTURES", f'"{";".join(CUDA.architectures())}"'),
    ]
    cuda_libraries = CUDA.libraries()
    link = ["-lcudart_static", "-ldl", "-lpthread", "-lrt"]

headers = [*sources("csrc", "*.h"), *sources("csrc/rows", "*.h"), *sources("csrc/isa", "*.h")]
setup(
    libraries=[
        (
            "probmoe",
            {
                "sources": [*sources("csrc", "*.c"), *sources("csrc/isa", "*.c")],
                "include_dirs": ["csrc"],
                "obj_deps": {"": headers},
                "cflags": C_FLAGS,
            },
        )
    ],
    ext_modules=[
        CppExtension(
            "probmoe_ext._C",
            sources("csrc/shim", "*.cpp"),
            define_macros=macros,
            include_dirs=[str(ROOT / "csrc"), str(ROOT / "cuda")],
            library_dirs=cuda_libraries,
            extra_compile_args=CXX_FLAGS,
            extra_link_args=link,
            depends=[*headers, *sources("csrc/shim", "*.h")],
        )
    ],
    cmdclass={"build_clib": BuildCore, "build_ext": Build},
)
