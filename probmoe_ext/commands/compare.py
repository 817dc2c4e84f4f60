"""``probmoe compare``."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from probmoe_ext.commands.arguments import add_command, calm_libraries
from probmoe_ext.train.comparison import COMPARE_FILE, load_comparison, parse_seeds

EXAMPLES = """\
examples:
  what would be run, and how long it takes:
    probmoe compare --config benchmarks/gsm_comparison/compare.yaml --dry-run
  run it; the same command goes on with what an interruption or a kill has left:
    probmoe compare --config benchmarks/gsm_comparison/compare.yaml
  a part of it:
    probmoe compare --config compare.yaml --only topk,probmoe-exact --seeds 42,43
  on the GPUs of one machine, which train each run together:
    torchrun --nproc-per-node 4 -m probmoe_ext compare --config compare.yaml

the file (YAML or JSON):
  name: gsm-comparison
  seeds: [42, 43, 44]
  train: {data: openai/gsm8k, model: allenai/OLMoE-1B-7B-0125}   # settings of probmoe train, for all
  evaluation: {protocols: b}                                     # settings of probmoe eval, for all
  start: {model: tiny-olmoe, max_steps: 3000}                    # or a model's name: what all begin from (optional)
  routers:
    - {label: topk, router: topk, k: 8}
    - {label: dynamic, title: ProbMoE dynamic, router: probmoe, k: [6, 8]}
    - {label: ablation, router: probmoe, k: 8, options: {backward: ste}, train: {learning_rate: 2e-6}}
"""


def register(commands: Any) -> None:
    """Add the command to the parser of ``probmoe``."""
    parser = add_command(
        commands,
        "compare",
        "train and evaluate several routers under several seeds, and compare them",
        examples=EXAMPLES,
        run=run,
    )
    parser.add_argument("--config", metavar="FILE", required=True, help="YAML or JSON file with the comparison")
    parser.add_argument("--output", metavar="FOLDER", help="folder for runs and results, in place of the file's")
    parser.add_argument("--only", metavar="LABELS", default="", help="run only these routers now: label,label,...")
    parser.add_argument("--seeds", metavar="SEEDS", help="run only these seeds now: 42,43,...")
    parser.add_argument("--dry-run", action="store_true", help="print the plan with its estimated time, and stop")


def run(options: argparse.Namespace) -> int:
    """Run what is left of a comparison; `compare` prints."""
    comparison = load_comparison(options.config, options.output)
    seeds = parse_seeds(options.seeds, "--seeds") if options.seeds is not None else ()
    only = [label.strip() for label in options.only.split(",") if label.strip()]
    calm_libraries()
    from probmoe_ext.train.compare import compare

    begun = comparison.folder / COMPARE_FILE
    options.go_on = lambda: "the same command goes on" if begun.is_file() else ""
    failed = compare(comparison, only=only, seeds=seeds, dry_run=options.dry_run, quiet=options.quiet)
    if failed:
        print(f"probmoe compare: {failed} runs failed; the same command tries them again", file=sys.stderr)
    return 1 if failed else 0
