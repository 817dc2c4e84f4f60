"""The command ``probmoe``: its parser and its exit codes. Each command is a module in `probmoe_ext.commands`.

Exit codes: 0 done, 1 a failed run, 2 wrong usage (one line that says what to change).
"""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Sequence
from typing import NoReturn

from probmoe_ext.commands import (
    demo,
    eval,
    train,
)
from probmoe_ext.train.errors import UsageError

MISSING_PACKAGES = "probmoe train, eval and demo need more packages: pip install 'probmoe_ext[train]'"

EXAMPLES = """\
examples:
  probmoe demo
  probmoe train --model tiny-olmoe --router probmoe --k 2,4 --data path/to/gsm8k --max-steps 50
  probmoe eval --model runs/tiny-olmoe-probmoe-k2-4 --limit 32
"""


class _Parser(argparse.ArgumentParser):
    """A parser that explains a wrong call in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def build_parser() -> argparse.ArgumentParser:
    """The parser of ``probmoe`` and its commands."""
    parser = _Parser(
        prog="probmoe",
        description="Fine-tune and evaluate mixture-of-experts models with probabilistic routing.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for command in (
        train,
        eval,
        demo,
    ):
        command.register(commands)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: what follows ``probmoe``; None takes the process's.

    Returns:
        The exit code.
    """
    parser = build_parser()
    try:
        options = parser.parse_args(arguments)
    except SystemExit as stop:
        return int(stop.code or 0)
    try:
        return int(options.run(options) or 0)
    except UsageError as error:
        return _stop(2, f"probmoe {options.command}: {error}")
    except KeyboardInterrupt:
        return _stop(1, f"probmoe {options.command}: interrupted{f', {options.go_on}' if options.go_on else ''}")
    except ModuleNotFoundError as error:
        needed = ("accelerate", "datasets", "tokenizers", "transformers", "yaml")
        missing = (error.name or "").split(".")[0]
        if missing not in needed:
            raise
        return _stop(1, f"probmoe {options.command}: no module named {missing!r}. {MISSING_PACKAGES}")
    except Exception as error:
        traceback.print_exc()
        return _stop(1, f"probmoe {options.command}: failed: {type(error).__name__}: {error}")


def _stop(code: int, message: str) -> int:
    print(message, file=sys.stderr)
    return code
