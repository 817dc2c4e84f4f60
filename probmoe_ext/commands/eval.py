"""``probmoe eval``."""

from __future__ import annotations

import argparse
from typing import Any

from probmoe_ext.commands.arguments import add_command, add_settings, calm_libraries, given_settings
from probmoe_ext.train.options import EvalConfig, load_config

EXAMPLES = """\
examples:
  all three protocols on the first 32 test problems, with the router of the run:
    probmoe eval --model runs/tiny-olmoe-probmoe-k2-4 --limit 32
  only the zero-shot scores, on other data:
    probmoe eval --model runs/mine --data path/to/gsm8k --protocols b,c
  a model from the hub, routed otherwise:
    probmoe eval --model allenai/OLMoE-1B-7B-0125 --data openai/gsm8k --router probmoe --k 6,8
  how many prompts and tokens that is, without generating:
    probmoe eval --model runs/mine --data path/to/gsm8k --dry-run

scores:
  A strict-match, A flexible-extract   as lm-eval's gsm8k: 5 shots; "$18.00" is wrong for "18", and dots at the end
                                       of the output ("...") are taken for a number
  B exact match                        as open-instruct: zero-shot; signs are lost (-5 is right for 5), 3.5 equals 35
  C numeric                            zero-shot; the last number of the answer, compared as a number
"""


def register(commands: Any) -> None:
    """Add the command to the parser of ``probmoe``."""
    parser = add_command(
        commands, "eval", "generate answers to test problems and score them", examples=EXAMPLES, run=run
    )
    add_settings(parser, EvalConfig)


def run(options: argparse.Namespace) -> None:
    """Evaluate, and print the scores."""
    config = load_config(EvalConfig, options.config, given_settings(options, EvalConfig))
    calm_libraries()
    if options.dry_run:
        from probmoe_ext.train.dry_run import plan_evaluation

        print(plan_evaluation(config, overwrite=options.overwrite))
        return
    from probmoe_ext.train.evaluate import evaluate
    from probmoe_ext.train.evaluation import SETTINGS_FILE

    same = f"the same command{' without --overwrite' if options.overwrite else ''} goes on"
    options.go_on = lambda: same if (config.folder / SETTINGS_FILE).is_file() else ""
    result = evaluate(config, overwrite=options.overwrite, quiet=options.quiet)
    print(result.table())
    print(f"\nsamples and scores: {result.folder}")
