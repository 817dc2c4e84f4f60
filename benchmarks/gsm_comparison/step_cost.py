"""Processor time of an optimizer step with each router of a comparison, the routers taking turns.

``python -m benchmarks.gsm_comparison.step_cost benchmarks/gsm_comparison/compare.yaml --runs runs/gsm-comparison``

The comparison's own step times are wall-clock, and on a machine that does other work too they say more about that. Here
all routers train the common start on the same batches, one step each in turn, and the time is the processor's, of one
thread. Forward pass, backward pass and AdamW; no data loading, no monitor.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from probmoe_ext.files import write_json
from probmoe_ext.train.beginning import load_beginning
from probmoe_ext.train.comparison import load_comparison
from probmoe_ext.train.data import load_examples
from probmoe_ext.train.encode import PadRight, encode, pad_token
from probmoe_ext.train.machine import machine, versions
from probmoe_ext.train.protocols import PROMPTS

WARM_UP = 2


def measure(path: str, runs: str, rounds: int) -> dict[str, Any]:
    """Time the routers of a comparison.

    Args:
        path: its file.
        runs: its folder, with the common start.
        rounds: steps of each router that count.

    Returns:
        For each label the median milliseconds of a step, and the median over the rounds of its ratio to the first one.
    """
    torch.set_num_threads(1)
    comparison = load_comparison(path, runs)
    runs_of_a_seed = [run for run in comparison.runs() if run.train.seed == comparison.seeds[0]]
    models, optimizers = {}, {}
    batches: list[dict[str, torch.Tensor]] = []
    for run in runs_of_a_seed:
        torch.manual_seed(run.train.seed)
        training = load_examples(run.train.data, "train")[: run.train.batch_size * (rounds + WARM_UP)]
        model, tokenizer = load_beginning(run.train, training)
        models[run.contestant.label] = model.train()
        optimizers[run.contestant.label] = torch.optim.AdamW(model.parameters(), lr=1e-3)
        if not batches:
            rows = encode(training, tokenizer, PROMPTS[run.train.prompt], run.train.max_length).rows
            size, collate = run.train.batch_size, PadRight(pad_token(tokenizer))
            batches = [collate(rows[start : start + size]) for start in range(0, len(rows), size)]
    times: dict[str, list[float]] = {label: [] for label in models}
    for batch in batches:
        for label, model in models.items():
            began = time.process_time()
            model(**batch).loss.backward()
            optimizers[label].step()
            optimizers[label].zero_grad()
            times[label].append(time.process_time() - began)
    kept = {label: seconds[WARM_UP:] for label, seconds in times.items()}
    first = next(iter(kept.values()))
    return {
        "rounds": rounds,
        "machine": machine(),
        "versions": versions(),
        "milliseconds": {label: 1000 * statistics.median(seconds) for label, seconds in kept.items()},
        "ratio": {
            label: statistics.median(one / base for one, base in zip(seconds, first, strict=True))
            for label, seconds in kept.items()
        },
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("comparison", help="the comparison's YAML file")
    parser.add_argument("--runs", required=True, help="its folder, with the common start")
    parser.add_argument("--rounds", type=int, default=20, help="steps of each router (default: %(default)s)")
    parser.add_argument("--output", type=Path, help="JSON file for the result")
    options = parser.parse_args()
    found = measure(options.comparison, options.runs, options.rounds)
    for label, milliseconds in found["milliseconds"].items():
        print(f"{label:24} {milliseconds:7.1f} ms  {found['ratio'][label]:.2f}")
    if options.output:
        write_json(options.output, found)
