"""Prints what an extra of pyproject.toml needs, for ``pip install -r /dev/stdin``, without building the package."""

from __future__ import annotations

import re
import sys
from pathlib import Path

try:
    import tomllib
except ImportError:  # Python 3.10: pip carries a copy of the same parser
    from pip._vendor import tomli as tomllib  # type: ignore[no-redef]


def requirements(extra: str) -> list[str]:
    """Requirement lines of an extra, with extras of this project resolved."""
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    lines: list[str] = []
    for line in project["optional-dependencies"][extra]:
        own = re.fullmatch(rf"{project['name']}\[([\w-]+)\]", line)
        lines += requirements(own.group(1)) if own else [line]
    return lines


if __name__ == "__main__":
    print("\n".join(requirements(sys.argv[1])))
