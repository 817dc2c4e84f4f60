"""``probmoe train``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from probmoe_ext.commands.arguments import add_command, add_settings, calm_libraries, given_settings
from probmoe_ext.train.errors import UsageError
from probmoe_ext.train.options import TrainConfig, load_config

EXAMPLES = """\
examples:
  a small model on the built-in problems, no network needed:
    probmoe train --router probmoe --k 4 --max-steps 500
  the same model on GSM8K files (train.jsonl, test.jsonl), between 2 and 4 experts a token:
    probmoe train --router probmoe --k 2,4 --data path/to/gsm8k --max-steps 50
  settings from a file, one of them changed:
    probmoe train --config configs/tiny-olmoe.yaml --seed 43
  an ablation of the router:
    probmoe train --router probmoe --k 4 --router-option backward=ste
  what would be done, without doing it:
    probmoe train --config configs/tiny-olmoe.yaml --dry-run
  go on with an interrupted run:
    probmoe train --resume runs/tiny-olmoe-probmoe-k2-4
"""


def register(commands: Any) -> None:
    """Add the command to the parser of ``probmoe``."""
    parser = add_command(commands, "train", "fine-tune a model with a router", examples=EXAMPLES, run=run)
    add_settings(parser, TrainConfig)
    parser.add_argument("--resume", metavar="RUN", help="go on with the run in this folder, with its own settings")


def run(options: argparse.Namespace) -> None:
    """Fine-tune, and print what came out of it."""
    given = given_settings(options, TrainConfig)
    if options.resume and (given or options.config or options.overwrite):
        raise UsageError("--resume takes the settings from the run; leave out the other settings")
    config = None if options.resume else load_config(TrainConfig, options.config, given)
    calm_libraries()
    from probmoe_ext.train.finetune import CONFIG_FILE, finetune, load_run

    if config is None:
        config = load_run(Path(options.resume))
    if options.dry_run:
        from probmoe_ext.train.dry_run import plan_training

        print(plan_training(config, resume=bool(options.resume), overwrite=options.overwrite))
        return
    folder = config.folder
    options.go_on = lambda: f"go on with: probmoe train --resume {folder}" if (folder / CONFIG_FILE).is_file() else ""
    summary = finetune(config, resume=bool(options.resume), overwrite=options.overwrite, quiet=options.quiet)
    lost = f", {summary.shortened} cut, {summary.dropped} left out" if summary.shortened or summary.dropped else ""
    heldout = "" if summary.heldout_loss is None else f", held-out loss {summary.heldout_loss:.4f}"
    pace = "" if summary.step_seconds is None else f", {1000 * summary.step_seconds:.0f} ms a step"
    print(
        f"{summary.routing}: {summary.steps} steps on {summary.examples} examples"
        f"{lost}{heldout}{pace}, {summary.device}"
    )
    print(f"evaluate it: probmoe eval --model {summary.folder}")
