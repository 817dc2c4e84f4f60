"""The plan of a comparison: what is left to do, and how long it may take."""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import pairwise

import torch

from probmoe_ext.files import read_json
from probmoe_ext.train.arguments import accumulation_of, optimizer_steps
from probmoe_ext.train.beginning import load_beginning
from probmoe_ext.train.comparison import Comparison, Run
from probmoe_ext.train.data import load_examples, split_holdout
from probmoe_ext.train.encode import PadRight, encode, pad_token
from probmoe_ext.train.generate import generate_outputs
from probmoe_ext.train.models import Routing, pick_device
from probmoe_ext.train.protocols import PROMPTS, ZERO_SHOT, prompt_b
from probmoe_ext.train.run import DONE_FILE, is_done
from probmoe_ext.train.tables import markdown_table

WARM_UP = 3
"""Batches that are timed where no finished run tells the pace."""
PROBED_TOKENS = 8


def seconds_by_label(runs: Sequence[Run]) -> dict[str, float]:
    """Mean seconds of the finished runs of each router."""
    found: dict[str, list[float]] = {}
    for run in runs:
        done = read_json(run.folder / DONE_FILE)
        if done is not None:
            found.setdefault(run.contestant.label, []).append(float(done["seconds"]))
    return {label: sum(seconds) / len(seconds) for label, seconds in found.items()}


def remaining_seconds(pending: Sequence[Run], known: dict[str, float], default: float | None = None) -> float | None:
    """Estimate of the time for the pending runs.

    Args:
        pending: the runs.
        known: seconds by label, from `seconds_by_label`.
        default: seconds of a run where nothing is known.

    Returns:
        Seconds: of each run those of its router's finished runs, else of all routers', else `default`; None if there is
        none of these.
    """
    if not pending:
        return 0.0
    other = sum(known.values()) / len(known) if known else default
    seconds = [known.get(run.contestant.label, other) for run in pending]
    return None if None in seconds else sum(one for one in seconds if one is not None)


def plan_text(comparison: Comparison, runs: Sequence[Run], estimate: float | None, source: str) -> str:
    """The plan as a table, and the time that is left.

    Args:
        comparison: the comparison.
        runs: those that were asked for.
        estimate: seconds for what is left; None if not known.
        source: where the estimate comes from.
    """
    rows = []
    for contestant in comparison.contestants:
        own = [run for run in runs if run.contestant.label == contestant.label]
        if not own:
            continue
        config = contestant.train
        routing = str(Routing(config.router, config.k, config.router_options))
        options = ", ".join(f"{name}={value}" for name, value in config.router_options.items())
        seeds = ", ".join(str(run.train.seed) for run in own)
        done = sum(is_done(run) for run in own)
        rows.append([contestant.title, f"{routing} {options}".strip(), seeds, f"{done} of {len(own)}"])
    table = markdown_table(["router", "routing", "seeds", "done"], rows)
    config = comparison.contestants[0].train
    start = "" if comparison.start is None else f" from {comparison.start.folder}"
    steps = f"{config.max_steps} steps" if config.max_steps else f"{config.epochs:g} epochs"
    lines = [
        f"{comparison.name}: {len(runs)} runs in {comparison.folder}",
        f"each{start or f' from {config.model}'}: {steps} on {config.data}, then {_problems(comparison)}",
        "",
        table,
        "",
        f"left: {sum(not is_done(run) for run in runs)} runs, "
        + (f"about {duration(estimate)} ({source})" if estimate is not None else source),
    ]
    return "\n".join(lines)


def duration(seconds: float) -> str:
    """Seconds for readers: ``40 s``, ``12 min``, ``3.5 h``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def warm_up(run: Run) -> float:
    """Measure a few batches of a run, and estimate the seconds of the whole.

    Forward and backward passes at the run's batch size, and a few tokens generated for a batch of test problems. Every
    output is taken to reach the token limit, so the estimate of the evaluation is an upper one.
    """
    config, evaluation = run.train, run.evaluation
    device = pick_device(config.device)
    training = split_holdout(load_examples(config.data, "train"), config.holdout)[0][: config.limit]
    model, tokenizer = load_beginning(config, training)
    model.to(device).train()
    some = training[: config.batch_size * (WARM_UP + 1)]
    rows = encode(some, tokenizer, PROMPTS[config.prompt], config.max_length).rows
    collate = PadRight(pad_token(tokenizer))
    bf16 = config.autocast if config.autocast is not None else device.type == "cuda" and config.dtype == "float32"
    times = [_now(device)]
    for start in range(0, len(rows), config.batch_size):
        batch = collate(rows[start : start + config.batch_size])
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            loss = model(**{name: value.to(device) for name, value in batch.items()}).loss
        loss.backward()
        times.append(_now(device))
    # The first one also pays for what is set up once.
    pace = min(after - before for before, after in pairwise(times))
    trained = pace * accumulation_of(config) * optimizer_steps(config, len(training))

    model.eval()
    test = load_examples(str(evaluation.data), "test")[: evaluation.limit]
    prompts = [prompt_b(one.question) for one in test[: evaluation.batch_size]]
    settings = {"max_new_tokens": PROBED_TOKENS, "stop": ZERO_SHOT.stop, "batch_size": evaluation.batch_size}
    began = _now(device)
    for _ in generate_outputs(model, tokenizer, prompts, **settings):  # type: ignore[arg-type]
        pass
    longest = evaluation.max_new_tokens or ZERO_SHOT.max_new_tokens
    return trained + (_now(device) - began) / PROBED_TOKENS * longest * len(test) / len(prompts)


def _problems(comparison: Comparison) -> str:
    limit = comparison.evaluation.limit
    return f"{limit or 'all'} test problems of {comparison.evaluation.data}"


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
