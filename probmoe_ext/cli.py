"""The command ``probmoe``. torch and transformers are imported inside the commands, so that ``--help`` is quick.

Exit codes: 0 done, 1 a failed run, 2 wrong usage (one line that says what to change).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from probmoe_ext.train.errors import UsageError
from probmoe_ext.train.options import EvalConfig, TrainConfig, describe, load_config

MISSING_PACKAGES = "probmoe train, eval and demo need more packages: pip install 'probmoe_ext[train]'"

_MAIN_EXAMPLES = """\
examples:
  probmoe demo
  probmoe train --model tiny-olmoe --router probmoe --k 2,4 --data path/to/gsm8k --max-steps 50
  probmoe eval --model runs/tiny-olmoe-probmoe-k2-4 --limit 32
"""

_TRAIN_EXAMPLES = """\
examples:
  a small model on the built-in problems, no network needed:
    probmoe train --router probmoe --k 4 --max-steps 500
  the same model on GSM8K files (train.jsonl, test.jsonl), between 2 and 4 experts a token:
    probmoe train --router probmoe --k 2,4 --data path/to/gsm8k --max-steps 50
  settings from a file, one of them changed:
    probmoe train --config configs/tiny-olmoe.yaml --seed 43
  an ablation of the router:
    probmoe train --router probmoe --k 4 --router-option backward=ste
  go on with an interrupted run:
    probmoe train --resume runs/tiny-olmoe-probmoe-k2-4
"""

_EVAL_EXAMPLES = """\
examples:
  all three protocols on the first 32 test problems, with the router of the run:
    probmoe eval --model runs/tiny-olmoe-probmoe-k2-4 --limit 32
  only the zero-shot scores, on other data:
    probmoe eval --model runs/mine --data path/to/gsm8k --protocols b,c
  a model from the hub, routed otherwise:
    probmoe eval --model allenai/OLMoE-1B-7B-0125 --data openai/gsm8k --router probmoe --k 6,8

scores:
  A strict-match, A flexible-extract   as lm-eval's gsm8k: 5 shots; "$18.00" is wrong for "18", and dots at the end
                                       of the output ("...") are taken for a number
  B exact match                        as open-instruct: zero-shot; signs are lost (-5 is right for 5), 3.5 equals 35
  C numeric                            zero-shot; the last number of the answer, compared as a number
"""

_DEMO_EXAMPLES = """\
examples:
  probmoe demo
  probmoe demo --output runs/demo-43 --seed 43
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
        epilog=_MAIN_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    train = _add(commands, "train", "fine-tune a model with a router", _TRAIN_EXAMPLES, _train)
    _add_config(train, TrainConfig)
    train.add_argument("--resume", metavar="RUN", help="go on with the run in this folder, with its own settings")
    evaluate = _add(commands, "eval", "generate answers to test problems and score them", _EVAL_EXAMPLES, _evaluate)
    _add_config(evaluate, EvalConfig)
    demo = _add(commands, "demo", "train and compare three routers on built-in problems", _DEMO_EXAMPLES, _demo)
    demo.add_argument("--output", default="runs/demo", help="folder for runs and results (default: %(default)s)")
    demo.add_argument("--seed", type=int, default=42, help="seed of weights, data order and routing (default: 42)")
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
        options.run(options)
    except UsageError as error:
        return _stop(2, f"probmoe {options.command}: {error}")
    except KeyboardInterrupt:
        hint = ", go on with --resume RUN" if options.command == "train" else ", the same command goes on"
        return _stop(1, f"probmoe {options.command}: interrupted{hint if options.command != 'demo' else ''}")
    except ModuleNotFoundError as error:
        needed = ("accelerate", "datasets", "tokenizers", "transformers", "yaml")
        missing = (error.name or "").split(".")[0]
        if missing not in needed:
            raise
        return _stop(1, f"probmoe {options.command}: no module named {missing!r}. {MISSING_PACKAGES}")
    except Exception as error:
        traceback.print_exc()
        return _stop(1, f"probmoe {options.command}: failed: {type(error).__name__}: {error}")
    return 0


def _stop(code: int, message: str) -> int:
    print(message, file=sys.stderr)
    return code


def _add(
    commands: Any, name: str, summary: str, examples: str, run: Callable[[argparse.Namespace], None]
) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(
        name,
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}.",
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.set_defaults(run=run)
    command.add_argument("--quiet", action="store_true", help="no progress bars")
    return command


def _add_config(parser: argparse.ArgumentParser, kind: type[TrainConfig] | type[EvalConfig]) -> None:
    parser.add_argument("--config", metavar="FILE", help="YAML or JSON file with settings; flags win over it")
    parser.add_argument("--overwrite", action="store_true", help="delete what an earlier call left in the folder")
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


def _settings(options: argparse.Namespace, kind: type[Any]) -> dict[str, Any]:
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


def _calm() -> None:
    """Leave the terminal to our own output."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    hub_logging.set_verbosity_error()


def _train(options: argparse.Namespace) -> None:
    given = _settings(options, TrainConfig)
    if options.resume and (given or options.config or options.overwrite):
        raise UsageError("--resume takes the settings from the run; leave out the other settings")
    config = None if options.resume else load_config(TrainConfig, options.config, given)
    _calm()
    from probmoe_ext.train.finetune import finetune, load_run

    if config is None:
        config = load_run(Path(options.resume))
    summary = finetune(config, resume=bool(options.resume), overwrite=options.overwrite, quiet=options.quiet)
    lost = f", {summary.shortened} cut, {summary.dropped} left out" if summary.shortened or summary.dropped else ""
    heldout = "" if summary.heldout_loss is None else f", held-out loss {summary.heldout_loss:.4f}"
    pace = "" if summary.step_seconds is None else f", {1000 * summary.step_seconds:.0f} ms a step"
    print(
        f"{summary.routing}: {summary.steps} steps on {summary.examples} examples"
        f"{lost}{heldout}{pace}, {summary.device}"
    )
    print(f"evaluate it: probmoe eval --model {summary.folder}")


def _evaluate(options: argparse.Namespace) -> None:
    config = load_config(EvalConfig, options.config, _settings(options, EvalConfig))
    _calm()
    from probmoe_ext.train.evaluate import evaluate

    result = evaluate(config, overwrite=options.overwrite, quiet=options.quiet)
    print(result.table())
    print(f"\nsamples and scores: {result.folder}")


def _demo(options: argparse.Namespace) -> None:
    _calm()
    from probmoe_ext.train.demo import run_demo

    run_demo(Path(options.output), seed=options.seed, quiet=options.quiet)
