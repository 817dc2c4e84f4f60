"""What the commands share: a subparser with examples, flags for the settings of a dataclass, a quiet terminal."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
from collections.abc import Callable
from typing import Any

from probmoe_ext.train.errors import UsageError
from probmoe_ext.train.options import EvalConfig, TrainConfig, describe


def add_command(
    commands: Any,
    name: str,
    summary: str,
    *,
    examples: str,
    run: Callable[[argparse.Namespace], int | None],
) -> argparse.ArgumentParser:
    """Add a command to the parser of ``probmoe``.

    Args:
        commands: what ``add_subparsers`` returned.
        name: of the command.
        summary: what it does, in a few words that start small.
        examples: text for the end of the help.
        run: takes the parsed arguments, and returns the exit code (None is 0). It sets ``options.go_on`` to a function
            without arguments that tells how to go on after an interruption or a full disk.

    Returns:
        The parser of the command, which knows ``--quiet``.
    """
    command: argparse.ArgumentParser = commands.add_parser(
        name,
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}.",
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.set_defaults(run=run, go_on=lambda: "")
    command.add_argument("--quiet", action="store_true", help="print only what matters, without progress bars")
    return command


def add_settings(parser: argparse.ArgumentParser, kind: type[TrainConfig] | type[EvalConfig]) -> None:
    """Add a flag for each setting of a dataclass, with the text of its docstring, and ``--config``."""
    parser.add_argument("--config", metavar="FILE", help="YAML or JSON file with settings; flags win over it")
    parser.add_argument("--overwrite", action="store_true", help="delete what an earlier call left in the folder")
    parser.add_argument("--dry-run", action="store_true", help="check everything, tell what would be done, and stop")
    texts = describe(kind)
    for one in dataclasses.fields(kind):
        flag, annotation = f"--{one.name.replace('_', '-')}", str(one.type)
        has_default = one.default not in (None, dataclasses.MISSING) and not isinstance(one.default, tuple)
        text = texts[one.name] + (f" (default: {one.default})" if has_default else "")
        text = text.replace("%", "%%")
        if annotation.startswith("dict"):
            parser.add_argument(
                "--router-option", action="append", metavar="NAME=VALUE", dest=one.name, help=f"{text} Repeatable."
            )
        elif annotation.startswith("bool"):
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=None, help=text)
        else:
            number = {"int": int, "float": float}.get(annotation.split(" ")[0])
            parser.add_argument(flag, type=number or str, metavar="N" if number else "X", help=text)


def given_settings(options: argparse.Namespace, kind: type[Any]) -> dict[str, Any]:
    """The settings of a dataclass that were given as flags.

    Raises:
        UsageError: a router's option that is not ``NAME=VALUE``.
    """
    names = [one.name for one in dataclasses.fields(kind)]
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    if "router_options" in given:
        given["router_options"] = dict(_router_option(text) for text in given["router_options"])
    return given


def _router_option(text: str) -> tuple[str, Any]:
    name, sign, value = text.partition("=")
    if not sign or not name:
        raise UsageError(f"--router-option must be NAME=VALUE, got {text!r}")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


def calm_libraries() -> None:
    """Leave the terminal to our own output."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    hub_logging.set_verbosity_error()
