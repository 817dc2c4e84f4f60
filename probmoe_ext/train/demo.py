"""The demo: a small model learns with top-k, then each router fine-tunes a copy of it on stories that are new to it."""

from __future__ import annotations

import dataclasses
import platform
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from probmoe_ext.files import write_json, write_text
from probmoe_ext.train.evaluate import Result, evaluate
from probmoe_ext.train.finetune import Summary, finetune
from probmoe_ext.train.machine import machine, versions
from probmoe_ext.train.models import Routing
from probmoe_ext.train.options import EvalConfig, TrainConfig
from probmoe_ext.train.tables import markdown_table, number, percent
from probmoe_ext.train.tiny import TINY_OLMOE

ROUTERS: tuple[tuple[str, str, Routing], ...] = (
    ("top-k", "topk", Routing("topk", 4)),
    ("ProbMoE exact", "probmoe-exact", Routing("probmoe", 4)),
    ("ProbMoE dynamic", "probmoe-dynamic", Routing("probmoe", (2, 4))),
)
"""Name in the table, folder, and routing."""

LEARNED, NEW = "builtin:1/things", "builtin:1/travel"
HEADER = ("router", "loss", "exact match", "mean active experts", "load entropy", "ms per step")


@dataclass(frozen=True)
class Budget:
    """How much the demo trains and evaluates.

    Attributes:
        base_steps: steps of the common start, from random weights with top-k.
        steps: steps of fine-tuning with each router.
        batch_size: problems in a step.
        problems: held-out problems to evaluate.
    """

    base_steps: int = 750
    steps: int = 250
    batch_size: int = 32
    problems: int = 300


def run_demo(folder: Path, *, seed: int = 42, budget: Budget | None = None, quiet: bool = False) -> str:
    """Train, evaluate, print one table, and write it as ``results.md`` and ``results.json``.

    Runs of an earlier demo in the folder are replaced.

    Args:
        folder: where runs and results go.
        seed: seeds weights, data order and routing.
        budget: how much to train; the default takes a few minutes on two CPU cores.
        quiet: no progress bars, and only the table.

    Returns:
        The text that was printed last and written to ``results.md``.
    """
    threads = torch.get_num_threads()
    # At this size a second thread gains little, and loses very much where something else runs on the other core.
    torch.set_num_threads(1)
    try:
        return _run(folder, seed, budget or Budget(), quiet)
    finally:
        torch.set_num_threads(threads)


def _run(folder: Path, seed: int, budget: Budget, quiet: bool) -> str:
    began = time.perf_counter()

    def say(text: str) -> None:
        if not quiet:
            print(text, flush=True)

    say(f"1/2  {TINY_OLMOE} learns from random weights with top-k routing: {budget.base_steps} steps on {LEARNED}")
    base = folder / "base"
    start = finetune(_training(base, seed, budget, None), overwrite=True, quiet=quiet)
    rows = [("before fine-tuning", start, _held_out(base, budget))]
    say(f"2/2  each router fine-tunes a copy of it: {budget.steps} steps on {NEW}, the same problems in the same order")
    for name, place, routing in ROUTERS:
        run = folder / place
        summary = finetune(_training(run, seed, budget, (base, routing)), overwrite=True, quiet=quiet)
        rows.append((name, summary, _held_out(run, budget)))
    seconds = time.perf_counter() - began
    text = _report(rows, budget, seed, seconds, start.parameters)
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "results.md", text + "\n")
    write_json(folder / "results.json", _record(rows, budget, seed, seconds))
    print(
        f"{'' if quiet else chr(10)}{text}\n\nresults: {folder / 'results.md'}, {folder / 'results.json'}", flush=True
    )
    return text


def _training(folder: Path, seed: int, budget: Budget, tuned: tuple[Path, Routing] | None) -> TrainConfig:
    model, routing = (TINY_OLMOE, Routing("topk", 4)) if tuned is None else (str(tuned[0]), tuned[1])
    steps = budget.base_steps if tuned is None else budget.steps
    return TrainConfig(
        model=model,
        router=routing.router,
        k=routing.k,
        data=LEARNED if tuned is None else NEW,
        tokenizer_data="builtin:1" if tuned is None else None,
        output=str(folder),
        holdout=0,
        limit=steps * budget.batch_size,
        max_steps=steps,
        learning_rate=5e-3 if tuned is None else 3e-3,
        adam_beta2=0.98,
        warmup=min(0.5, 30 / steps),
        batch_size=budget.batch_size,
        experts="eager",
        device="cpu",
        seed=seed,
        save_steps=steps,
        keep=1,
    )


def _held_out(run: Path, budget: Budget) -> Result:
    config = EvalConfig(
        model=str(run),
        data=NEW,
        protocols=("b", "c"),
        limit=budget.problems,
        batch_size=100,
        max_new_tokens=64,
        experts="eager",
        device="cpu",
    )
    return evaluate(config, overwrite=True, quiet=True)


def _report(rows: list[tuple[str, Summary, Result]], budget: Budget, seed: int, seconds: float, parameters: int) -> str:
    cells = []
    for name, summary, result in rows:
        found = result.statistics
        pace = None if summary.step_seconds is None else 1000 * summary.step_seconds
        cells.append(
            [
                name,
                number(found.loss, 4),
                percent(result.scores["b.exact_match"]),
                number(found.active_experts, 2),
                number(found.load_entropy, 3),
                number(pace, 0),
            ]
        )
    notes = (
        f"{TINY_OLMOE}, {parameters:,} parameters. Common start: {budget.base_steps} steps from random weights "
        f"with top-k on {LEARNED}; then each router fine-tunes a copy for {budget.steps} steps on {NEW}, "
        f"batch {budget.batch_size}. Measured on {budget.problems} held-out problems of {NEW}: greedy, zero-shot, "
        f"protocol B, ± one standard error. Routing in evaluation mode; load entropy is 1 when all experts get the "
        f"same work. "
        f"One seed ({seed}): differences below two or three standard errors mean nothing.",
        f"{seconds:.0f} s in all on {_machine()}.",
    )
    return "\n\n".join([markdown_table(HEADER, cells), *notes])


def _machine() -> str:
    found = versions()
    packages = f"torch {found['torch']}, transformers {found['transformers']}"
    return f"{machine()['cores']} {platform.machine()} cores (one thread used), {packages}"


def _record(rows: list[tuple[str, Summary, Result]], budget: Budget, seed: int, seconds: float) -> dict[str, Any]:
    return {
        "seed": seed,
        "seconds": seconds,
        "machine": _machine(),
        "budget": dataclasses.asdict(budget),
        "data": {"start": LEARNED, "fine-tuning": NEW},
        "rows": [
            {"name": name, "training": dataclasses.asdict(summary), "evaluation": dataclasses.asdict(result)}
            for name, summary, result in rows
        ],
    }
