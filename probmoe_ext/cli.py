"""The command ``probmoe``: its parser and its exit codes. Each command is a module in `probmoe_ext.commands`.

Exit codes: 0 done, 1 a failed run, 2 wrong usage (one line that says what to change).
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NoReturn

from probmoe_ext.commands import (
    compare,
    demo,
    doctor,
    eval,
    report,
    train,
)
from probmoe_ext.train.errors import UsageError

MISSING_PACKAGES = "It needs more packages: pip install 'probmoe_ext[{}]'"

EXAMPLES = """\
examples:
  probmoe demo
  probmoe train --model tiny-olmoe --router probmoe --k 2,4 --data path/to/gsm8k --max-steps 50
  probmoe eval --model runs/tiny-olmoe-probmoe-k2-4 --limit 32
  probmoe report runs/tiny-olmoe-probmoe-k2-4 runs/tiny-olmoe-topk
  probmoe doctor
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
        compare,
        report,
        demo,
        doctor,
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
    with _terminable():
        try:
            return int(options.run(options) or 0)
        except UsageError as error:
            return _stop(2, options, str(error))
        except KeyboardInterrupt as error:
            return _stop(1, options, " ".join(["interrupted", *map(str, error.args)]), options.go_on())
        except ModuleNotFoundError as error:
            needed = {"accelerate", "datasets", "tokenizers", "transformers", "yaml"}
            needed |= {"jinja2", "matplotlib", "numpy", "scipy"}
            missing = (error.name or "").split(".")[0]
            if missing not in needed:
                raise
            extra = "report" if options.command == "report" else "train"
            return _stop(1, options, f"no module named {missing!r}. {MISSING_PACKAGES.format(extra)}")
        except Exception as error:
            reason = _outside_reason(error)
            if reason is not None:
                return _stop(1, options, reason, options.go_on())
            traceback.print_exc()
            return _stop(1, options, f"failed: {type(error).__name__}: {error}")


def _stop(code: int, options: argparse.Namespace, *messages: str) -> int:
    print(f"probmoe {options.command}: {'; '.join(filter(None, messages))}", file=sys.stderr)
    return code


@contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM ends a command as Ctrl-C does."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _outside_reason(error: Exception) -> str | None:
    """One line for a failure that is not the program's: disk, permissions, network, memory; None for others."""
    if isinstance(error, OSError):
        place = f"{error.filename}: " if error.filename else ""
        return place + (error.strerror or " ".join(str(error).split()))
    # safetensors and torch put the system's error into one of their own.
    system = re.search(r"\(os error (\d+)\)", str(error))
    if system:
        return f"cannot write weights: {os.strerror(int(system[1]))}"
    if "PytorchStreamWriter failed writing" in str(error):
        return "cannot write a checkpoint: is the disk full?"
    if type(error).__name__ == "OutOfMemoryError":
        return "out of GPU memory: set a smaller --batch-size"
    return None
