"""``probmoe demo``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from probmoe_ext.commands.arguments import add_command, calm_libraries

EXAMPLES = """\
examples:
  probmoe demo
  probmoe demo --output runs/demo-43 --seed 43
"""


def register(commands: Any) -> None:
    """Add the command to the parser of ``probmoe``."""
    parser = add_command(
        commands, "demo", "train and compare three routers on built-in problems", examples=EXAMPLES, run=run
    )
    parser.add_argument("--output", default="runs/demo", help="folder for runs and results (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=42, help="seed of weights, data order and routing (default: 42)")


def run(options: argparse.Namespace) -> None:
    """Train and evaluate; `run_demo` prints."""
    calm_libraries()
    from probmoe_ext.train.demo import run_demo

    run_demo(Path(options.output), seed=options.seed, quiet=options.quiet)
