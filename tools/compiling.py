"""Compiles translation units of several languages with ninja: side by side, and only those that need it."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


class CompilationError(Exception):
    """A compiler that failed; what it said has been printed."""


@dataclass(frozen=True)
class Unit:
    """A source and the compiler's command for it, without the source and the object."""

    source: Path
    command: tuple[str, ...]

    def object_in(self, folder: Path) -> Path:
        """Where its object lies: named as the source is, suffix included, so that a.c and a.cpp get on."""
        return folder / f"{self.source}.o"


def count_workers() -> int:
    """Compilers at once: ``MAX_JOBS``, or one for each core that this process may use."""
    asked = os.environ.get("MAX_JOBS", "")
    if not asked:
        return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if not asked.isdecimal() or int(asked) < 1:
        raise ValueError(f"MAX_JOBS must be a whole number of at least 1, not {asked!r}")
    return int(asked)


def find_ninja() -> str:
    """The ninja of this Python environment, whether or not that is activated, or of the PATH."""
    found = shutil.which("ninja", path=sysconfig.get_path("scripts")) or shutil.which("ninja")
    if found is None:
        raise CompilationError("ninja is not on the PATH; install it with `pip install ninja`")
    return found


def _path(path: Path) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def manifest(units: Sequence[Unit], folder: Path) -> str:
    """What ninja reads: one rule, one line a unit. It compiles again when a source, a header or the command changed."""
    lines = [
        f"builddir = {_path(folder)}",  # of ninja's own records
        "rule compile",
        "  command = $compiler -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
    ]
    for unit in units:
        lines += [
            f"build {_path(unit.object_in(folder))}: compile {_path(unit.source)}",
            f"  compiler = {shlex.join(unit.command).replace('$', '$$')}",
        ]
    return "\n".join(lines) + "\n"


def compile_all(units: Sequence[Unit], root: Path, folder: Path, workers: int, force: bool = False) -> list[Path]:
    """Compile units, begun in their order: the caller puts those first that take longest.

    Args:
        units: sources relative to ``root``, where the compilers run.
        root: folder of the sources.
        folder: absolute path of the folder for objects.
        workers: compilers at once.
        force: compile what is current, too.

    Returns:
        The objects, in the order of the units.

    Raises:
        CompilationError: there is no ninja, or a unit failed: those that were running have ended, no other was begun.
    """
    folder.mkdir(parents=True, exist_ok=True)
    plan = folder / "build.ninja"
    plan.write_text(manifest(units, folder))
    ninja = [find_ninja(), "-C", str(root), "-f", str(plan)]
    if force:
        subprocess.run([*ninja, "-t", "clean"], check=True)
    done = subprocess.run([*ninja, f"-j{workers}"])
    if done.returncode != 0:
        raise CompilationError(f"ninja ended with {done.returncode}; what the compiler said is above")
    return [unit.object_in(folder) for unit in units]
