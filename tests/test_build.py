"""What importing costs, and how a build that cannot work ends: in one sentence that says what to do."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def _python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_is_light() -> None:
    out = _python(
        "import time, sys, torch; start = time.process_time(); import probmoe_ext; "
        "seconds = time.process_time() - start; "
        "print(seconds, torch.cuda.is_initialized(), *(m for m in ('transformers', 'datasets') if m in sys.modules))"
    ).split()
    assert float(out[0]) < 0.5
    assert out[1:] == ["False"]


def test_module_says_how_it_was_built() -> None:
    import torch

    import probmoe_ext

    info = probmoe_ext.build_info()
    assert info["version"] == probmoe_ext.__version__
    assert info["torch_target_version"] == "0x020a000000000000"
    assert info["instruction_set"] in ("avx512", "avx2", "neon", "portable")
    assert (info["cuda"] is None) == (info["cuda_architectures"] == "")
    assert tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 10)


@pytest.fixture
def bare(tmp_path: Path) -> dict[str, str]:
    """An environment whose PATH holds a shell's tools but neither nvcc nor a compiler."""
    tools = tmp_path / "bin"
    tools.mkdir()
    return {
        **{name: value for name, value in os.environ.items() if name not in ("CUDA_HOME", "CUDA_PATH", "CC", "CXX")},
        "PATH": str(tools),
    }


def _build(command: list[str], environment: dict[str, str], tmp_path: Path) -> tuple[int, str]:
    folders = ["--build-base", str(tmp_path / "build"), "--build-lib", str(tmp_path / "lib")]
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", *command, *folders],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    lines = [line for line in done.stderr.splitlines() if line.startswith("probmoe_ext: ")]
    return done.returncode, lines[-1] if lines else done.stderr


def test_build_without_torch(bare: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('no torch here')\n")
    code, said = _build(["build"], {**bare, "PYTHONPATH": str(tmp_path)}, tmp_path)
    assert code != 0
    assert "install torch >= 2.10" in said and "--no-build-isolation" in said


def test_build_without_compiler(bare: dict[str, str], tmp_path: Path) -> None:
    code, said = _build(["build"], {**bare, "CC": "no-such-compiler", "PROBMOE_CUDA": "0"}, tmp_path)
    assert code != 0
    assert "no C compiler" in said and "set CC" in said


def test_compiler_that_fails(tmp_path: Path) -> None:
    """Its last words are shown, and nothing is linked."""
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\necho 'the compiler is ill'; exit 3\n")
    broken.chmod(0o755)
    folders = ["--build-base", str(tmp_path / "build"), "--build-lib", str(tmp_path / "lib")]
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "build", *folders],
        cwd=ROOT,
        env={**os.environ, "CC": str(broken), "PROBMOE_CUDA": "0"},
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    assert "the compiler is ill" in done.stdout
    assert "error: probmoe_ext: ninja ended with " in done.stderr
    assert not list((tmp_path / "lib").rglob("_C*.so"))


def test_number_of_compilers_is_checked(tmp_path: Path) -> None:
    code, said = _build(["build"], {**os.environ, "MAX_JOBS": "none", "PROBMOE_CUDA": "0"}, tmp_path)
    assert code != 0
    assert "MAX_JOBS must be a whole number of at least 1, not 'none'" in said


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
def test_architectures_are_checked(tmp_path: Path) -> None:
    code, said = _build(["build"], {**os.environ, "TORCH_CUDA_ARCH_LIST": "8.0;Hopper"}, tmp_path)
    assert code != 0
    assert "TORCH_CUDA_ARCH_LIST" in said and "'Hopper' is not" in said


def test_cuda_insisted_on_without_nvcc(bare: dict[str, str], tmp_path: Path) -> None:
    code, said = _build(["build"], {**bare, "PROBMOE_CUDA": "1"}, tmp_path)
    assert code != 0
    assert "no nvcc" in said and "CUDA_HOME" in said


def test_cuda_switch_is_checked(bare: dict[str, str], tmp_path: Path) -> None:
    code, said = _build(["build"], {**bare, "PROBMOE_CUDA": "yes"}, tmp_path)
    assert code != 0
    assert "PROBMOE_CUDA must be 0 or 1, not 'yes'" in said
