"""Build of probmoe_ext: the C core, the CUDA kernels where there is an nvcc and the C++ shim, one extension module.

Environment: ``PROBMOE_CUDA=0`` leaves the CUDA kernels out, ``PROBMOE_CUDA=1`` insists on them, otherwise nvcc decides;
``TORCH_CUDA_ARCH_LIST`` (``"8.0;9.0+PTX"``) picks the architectures; ``PROBMOE_DEBUG=1`` compiles without optimisation;
``MAX_JOBS`` says how many compilers run at once, otherwise one for each core.
"""

from __future__ import annotations

import copy
import os
import platform
import shlex
import shutil
import sys
from pathlib import Path

from setuptools import setup
from setuptools.errors import CompileError

ROOT = Path(__file__).parent.resolve()
sys.path.insert(0, str(ROOT / "tools"))  # an isolated build does not have the project on its path

from compiling import CompilationError, Unit, compile_all, count_workers  # noqa: E402
from nvcc import Toolkit, find_nvcc  # noqa: E402

try:
    import torch
    from torch.utils.cpp_extension import BuildExtension, CppExtension, get_cxx_compiler
except ImportError:
    sys.exit(
        "probmoe_ext: torch is not importable in this build; install torch >= 2.10 first and build with "
        "`pip install --no-build-isolation .`"
    )

DEBUG = os.environ.get("PROBMOE_DEBUG", "0") == "1"
OPTIMISE = ["-O0", "-g"] if DEBUG else ["-O3"]
# Contraction is explicit in the core (rows/simd.h): the compiler must not add any, or results would depend on it.
C_FLAGS = ["-std=c17", *OPTIMISE, "-ffp-contract=off", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Icsrc"]
# isa/begin.h sets these targets by pragma, but clang's does not define the feature macros that rows/simd.h asks for.
ISA_FLAGS = {
    "avx2": ["-mavx2", "-mfma"],
    "avx512": ["-mavx512f", "-mavx512dq", "-mavx512vl", "-mavx512bw", "-mavx2", "-mfma"],
}
X86 = platform.machine().lower() in ("x86_64", "amd64")
CXX_FLAGS = ["-std=c++20", *OPTIMISE, "-fvisibility=hidden", "-Wall"]


def sources(pattern: str) -> list[str]:
    """Files below ROOT, the largest first: the compilers' time goes by it, and a long unit must not begin last."""
    found = sorted(ROOT.glob(pattern), key=lambda path: (-path.stat().st_size, path))
    return [str(path.relative_to(ROOT)) for path in found]


class Build(BuildExtension):
    """The extension from units of three languages, which share the cores and are compiled again only where needed."""

    def __init__(self, *args, **kwargs) -> None:  # type: ignore[no-untyped-def]
        super().__init__(*args, use_ninja=False, **kwargs)

    def core_command(self, unit: str, symbols: list[str]) -> tuple[str, ...]:
        isa = ISA_FLAGS.get(Path(unit).stem.partition("_")[0], []) if X86 else []
        return (*self.compiler.compiler_so, *symbols, *C_FLAGS, *isa)

    def shim_command(self, extension: CppExtension, symbols: list[str]) -> tuple[str, ...]:
        """The C++ compiler as torch picks it, Python's flags for C, and what BuildExtension put into the extension."""
        macros = [f"-D{name}" if value is None else f"-D{name}={value}" for name, value in extension.define_macros]
        include = [f"-I{folder}" for folder in (*extension.include_dirs, *self.compiler.include_dirs)]
        flags = (*self.compiler.compiler_so[1:], *symbols, *macros, *include, *extension.extra_compile_args)
        return (*shlex.split(get_cxx_compiler()), *flags)

    def build_extensions(self) -> None:
        for language, compiler, variable in (
            ("C", self.compiler.compiler_so[0], "CC"),
            ("C++", shlex.split(get_cxx_compiler())[0], "CXX"),
        ):
            if shutil.which(compiler) is None:
                sys.exit(
                    f"probmoe_ext: no {language} compiler ({compiler!r} is not on the PATH); "
                    f"install gcc or clang, or set {variable}"
                )
        super().build_extensions()

    def build_extension(self, extension: CppExtension) -> None:
        # Python's own flags ask for debugging information, whether or not anybody looks at it: a third of the time.
        asked = DEBUG or any(flag.startswith("-g") for flag in os.environ.get("CFLAGS", "").split())
        symbols = ["-g"] if self.debug else [] if asked else ["-g0"]
        kernels = [Unit(Path(unit), CUDA.command()) for unit in CUDA_SOURCES] if CUDA else []
        core = [Unit(Path(unit), self.core_command(unit, symbols)) for unit in CORE_SOURCES]
        shim = [Unit(Path(unit), self.shim_command(extension, symbols)) for unit in SHIM_SOURCES]
        # CUDA units take longest by far, those of the shim are short and alike: with them the cores end together.
        units = [*kernels, *core, *shim]
        try:
            workers = int(self.parallel or 0) or count_workers()
            objects = compile_all(units, ROOT, Path(self.build_temp).resolve(), workers, bool(self.force))
        except (CompilationError, ValueError) as error:
            raise CompileError(f"probmoe_ext: {error}") from None
        linked = copy.copy(extension)
        linked.sources, linked.depends, linked.extra_objects = [], list(map(str, objects)), list(map(str, objects))
        super().build_extension(linked)


CORE_SOURCES = [*sources("csrc/isa/*.c"), *sources("csrc/*.c")]
SHIM_SOURCES = sources("csrc/shim/*.cpp")
CUDA_SOURCES = sources("cuda/*.cu")
nvcc = find_nvcc() if CUDA_SOURCES else None
CUDA = Toolkit(nvcc) if nvcc else None

macros = [
    ("TORCH_TARGET_VERSION", "0x020a000000000000"),  # the stable ABI of torch 2.10: runs on every later one
    ("PM_TORCH_VERSION", f'"{torch.__version__}"'),
]
if CUDA is None:
    reason = "PROBMOE_CUDA=0" if os.environ.get("PROBMOE_CUDA") == "0" else "no nvcc was found"
    macros.append(("PM_CUDA_ABSENCE", f'"{reason}"'))
else:
    macros += [
        ("PM_CUDA_VERSION", f'"{CUDA.version}"'),
        ("PM_CUDA_ARCHITECTURES", f'"{";".join(CUDA.architectures)}"'),
    ]

setup(
    ext_modules=[
        CppExtension(
            "probmoe_ext._C",
            [*CORE_SOURCES, *SHIM_SOURCES],
            define_macros=macros,
            include_dirs=["csrc", "cuda"],
            library_dirs=[CUDA.libraries()] if CUDA else [],
            extra_compile_args=CXX_FLAGS,
            extra_link_args=["-lcudart_static", "-ldl", "-lpthread", "-lrt"] if CUDA else [],
            language="c++",
        )
    ],
    cmdclass={"build_ext": Build},
)
