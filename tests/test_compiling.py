"""The build's own machinery: what is compiled again and what is not, and how a failure is told."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

TOOLS = Path(__file__).parents[1] / "tools"


def _load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, TOOLS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


compiling = _load("compiling")
nvcc = _load("nvcc")

COMPILER = os.environ.get("CC", "cc")
needs_compiler = pytest.mark.skipif(shutil.which(COMPILER) is None, reason="no C compiler")


@pytest.fixture
def build(tmp_path: Path) -> Callable[..., list[str]]:
    """Two units, one of which reads a header; the function compiles them and names those that it did."""
    (tmp_path / "my file.h").write_text("#define NUMBER 1\n")
    (tmp_path / "one.c").write_text('#include "my file.h"\nint one(void) { return NUMBER; }\n')
    (tmp_path / "two.c").write_text("int two(void) { return sizeof TEXT; }\n")
    compiler, log = tmp_path / "the compiler", tmp_path / "log"
    compiler.write_text(f'#!/bin/sh\necho "$*" >> "{log}"\nexec {COMPILER} "$@"\n')
    compiler.chmod(0o755)

    def run(*flags: str, force: bool = False) -> list[str]:
        time.sleep(0.02)  # what is written from here on is newer, whatever the file system's clock resolves
        log.write_text("")
        command = (str(compiler), '-DTEXT="a $b"', *flags)
        units = [compiling.Unit(Path(name), command) for name in ("one.c", "two.c")]
        objects = compiling.compile_all(units, tmp_path, tmp_path / "objects", 1, force)
        assert [path.name for path in objects] == ["one.c.o", "two.c.o"] and all(path.exists() for path in objects)
        return sorted(line.split(" -c ")[1].split(".")[0] for line in log.read_text().splitlines())

    return run


@needs_compiler
def test_only_what_changed_is_compiled(build: Callable[..., list[str]], tmp_path: Path) -> None:
    assert build() == ["one", "two"]
    assert build() == []
    assert build(force=True) == ["one", "two"]
    (tmp_path / "two.c").touch()
    assert build() == ["two"]
    assert build() == []
    (tmp_path / "objects/two.c.o").unlink()
    assert build() == ["two"]
    assert build("-O1") == ["one", "two"], "other flags"
    assert build("-O1") == []
    assert not list(tmp_path.glob(".ninja*")), "ninja's records lie beside the sources"


@needs_compiler
def test_header_decides_for_those_who_read_it(build: Callable[..., list[str]], tmp_path: Path) -> None:
    build()
    time.sleep(0.02)
    (tmp_path / "my file.h").touch()
    assert build() == ["one"]
    assert build() == []
    (tmp_path / "my file.h").unlink()
    with pytest.raises(compiling.CompilationError, match="ninja ended with 1"):
        build()


@needs_compiler
def test_failure_is_shown_and_ends_the_build(
    build: Callable[..., list[str]], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    build()
    time.sleep(0.02)
    (tmp_path / "one.c").write_text("int one(void) { return unheard_of; }\n")
    (tmp_path / "objects/two.c.o").unlink()
    capfd.readouterr()
    with pytest.raises(compiling.CompilationError, match="ninja ended with 1; what the compiler said is above"):
        build()
    out = capfd.readouterr().out
    assert "-c one.c" in out and "unheard_of" in out
    assert not (tmp_path / "objects/two.c.o").exists(), "begun after the failure"
    (tmp_path / "one.c").write_text("int one(void) { return 1; }\n")
    assert build() == ["one", "two"], "an object of before the failure passed for current"


def test_without_ninja(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name, path=None: None)
    with pytest.raises(compiling.CompilationError, match="ninja is not on the PATH; install it with"):
        compiling.find_ninja()


def test_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MAX_JOBS", raising=False)
    assert 1 <= compiling.count_workers() <= (os.cpu_count() or 1)
    monkeypatch.setenv("MAX_JOBS", "3")
    assert compiling.count_workers() == 3
    for bad in ("0", "-1", "two"):
        monkeypatch.setenv("MAX_JOBS", bad)
        with pytest.raises(ValueError, match=f"MAX_JOBS must be a whole number of at least 1, not '{bad}'"):
            compiling.count_workers()


def test_code_flags() -> None:
    assert nvcc.code_flags(["8.0", "8.6", "8.9", "9.0", "10.0", "12.0+PTX"]) == [
        "-gencode=arch=compute_80,code=[sm_80,sm_86,sm_89]",
        "-gencode=arch=compute_90,code=[sm_90]",
        "-gencode=arch=compute_100,code=[sm_100]",
        "-gencode=arch=compute_120,code=[sm_120]",
        "-gencode=arch=compute_120,code=compute_120",
    ]
    assert nvcc.code_flags(["9.0a", "9.0", "8.9+PTX", "8.6"]) == [
        "-gencode=arch=compute_90a,code=[sm_90a]",
        "-gencode=arch=compute_90,code=[sm_90]",
        "-gencode=arch=compute_86,code=[sm_89,sm_86]",
        "-gencode=arch=compute_89,code=compute_89",
    ]
