"""Compare routers: each fine-tunes and is evaluated under several seeds; what a kill interrupts goes on.

The folder::

    OUT/compare.json                 the settings, and the list of runs
    OUT/start/                       the training of the common start, if there is one
    OUT/runs/<label>/seed-<n>/       a run: what `finetune` and `evaluate` write, and analysis, decisions, cost, done
    OUT/results.md, OUT/results.json what came of it
"""

from __future__ import annotations

import dataclasses
import traceback
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

from probmoe_ext.files import check_writable, read_json, write_json, write_text
from probmoe_ext.train.comparison import COMPARE_FILE, Comparison, Run
from probmoe_ext.train.errors import UsageError
from probmoe_ext.train.evaluate import evaluate
from probmoe_ext.train.evaluation import SCORES_FILE
from probmoe_ext.train.finetune import SUMMARY_FILE
from probmoe_ext.train.machine import machine, versions
from probmoe_ext.train.models import pick_device
from probmoe_ext.train.options import EvalConfig, TrainConfig
from probmoe_ext.train.plan import duration, plan_text, remaining_seconds, seconds_by_label, warm_up
from probmoe_ext.train.preflight import check, check_earlier, chosen_runs
from probmoe_ext.train.processes import Processes
from probmoe_ext.train.results import results_of, results_text
from probmoe_ext.train.run import is_done, locked, perform, train
from probmoe_ext.train.scoring import SCORERS

ERROR_FILE, VERSION = "error.txt", 1
OURS, DONE, TAKEN = "ours", "done", "another process is at it"


def compare(
    comparison: Comparison,
    *,
    only: Sequence[str] = (),
    seeds: Sequence[int] = (),
    dry_run: bool = False,
    quiet: bool = False,
) -> int:
    """Do what is left of a comparison, and write and print the results of all its finished runs.

    Args:
        comparison: the settings.
        only: labels of the routers to run now; all by default.
        seeds: seeds to run now; all by default.
        dry_run: print the plan, and do nothing.
        quiet: print the results only.

    Returns:
        The number of runs that failed; each has an ``error.txt`` in its folder.

    Raises:
        UsageError: an unknown router, option or label, k over the number of experts, data or a model that is not there;
            or the folder holds a comparison with other settings.
    """
    processes = Processes(pick_device(comparison.contestants[0].train.device))

    def say(text: str) -> None:
        if processes.is_first and (dry_run or not quiet):
            print(text, flush=True)

    chosen = chosen_runs(comparison, only, seeds)
    processes.first(lambda: check(comparison))
    processes.first(lambda: check_earlier(comparison))
    pending = processes.first(lambda: [run for run in chosen if not is_done(run)])
    known = seconds_by_label(comparison.runs())
    estimate = remaining_seconds(pending, known)
    # Where nothing is finished a few batches are measured, if the start is there and one process is to run them.
    ready = comparison.start is None or (comparison.start.folder / SUMMARY_FILE).is_file()
    if estimate is None and ready and processes.count == 1 and (dry_run or not quiet):
        estimate = remaining_seconds(pending, {}, warm_up(pending[0]))
    source = "by finished runs" if known else "by a few batches of the first run"
    say(plan_text(comparison, chosen, estimate, source if estimate is not None else "the time is not known yet"))
    if dry_run:
        return 0
    processes.first(lambda: _claim(comparison))
    if comparison.start is not None and pending:
        _begin(comparison, comparison.start, processes, say, quiet)
    failed = _perform(comparison, chosen, processes, say, quiet)
    processes.first(lambda: _conclude(comparison))
    return failed


def _claim(comparison: Comparison) -> None:
    try:
        check_writable(comparison.folder)
    except OSError as error:
        raise UsageError(f"cannot write to {comparison.folder}: {error.strerror}; choose another --output") from error
    comparison.folder.mkdir(parents=True, exist_ok=True)
    write_json(comparison.folder / COMPARE_FILE, _record(comparison))


def _record(comparison: Comparison) -> dict[str, Any]:
    return {
        "version": VERSION,
        "name": comparison.name,
        "config": comparison.resolved,
        "runs": [
            {
                "label": run.contestant.label,
                "title": run.contestant.title,
                "router": run.train.router,
                "k": list(run.train.k) if isinstance(run.train.k, tuple) else run.train.k,
                "options": run.train.router_options,
                "seed": run.train.seed,
                "folder": run.folder.relative_to(comparison.folder).as_posix(),
            }
            for run in comparison.runs()
        ],
        "machine": machine(),
        "versions": versions(),
    }


def _begin(
    comparison: Comparison, config: TrainConfig, processes: Processes, say: Callable[[str], None], quiet: bool
) -> None:
    """Train the common start, and see what it can do before it is fine-tuned, and on its own problems."""
    with locked(config.folder, wait=True) if processes.is_first else nullcontext():
        if processes.first(lambda: not (config.folder / SUMMARY_FILE).is_file()):
            say(f"common start: {config.model} learns {config.data}")
        train(config, processes, quiet=quiet)
        processes.first(lambda: _evaluate_start(comparison.evaluation, config, quiet))


def _evaluate_start(evaluation: EvalConfig, config: TrainConfig, quiet: bool) -> None:
    for place, data in (("eval", evaluation.data), ("eval-own", config.data)):
        output = config.folder / place
        if read_json(output / SCORES_FILE) is None:
            own = dataclasses.replace(evaluation, model=str(config.folder), data=data, output=str(output))
            evaluate(own, quiet=quiet)


def _perform(
    comparison: Comparison, runs: list[Run], processes: Processes, say: Callable[[str], None], quiet: bool
) -> int:
    failed = 0
    for number, run in enumerate(runs, start=1):
        place = f"[{number}/{len(runs)}] {run}"
        error = run.folder / ERROR_FILE
        with locked(run.folder) if processes.is_first else nullcontext(False) as ours:
            state = processes.first(partial(_state, run, ours))
            if state != OURS:
                say(f"{place}: {state}")
                continue
            try:
                perform(run, processes, keep_checkpoints=comparison.keep_checkpoints, quiet=quiet)
            except (UsageError, OSError):
                raise
            except Exception:
                # A router that fails does not take the others' night; several processes cannot part ways, though.
                if processes.count > 1:
                    raise
                failed += 1
                write_text(error, traceback.format_exc())
                say(f"{place}: failed, see {error}")
                continue
        if processes.is_first:
            error.unlink(missing_ok=True)
            pending = [one for one in runs[number:] if not is_done(one)]
            left = remaining_seconds(pending, seconds_by_label(comparison.runs()))
            say(f"{place}: {_outcome(run)}" + (f"; about {duration(left)} left" if left else ""))
    return failed


def _state(run: Run, ours: bool) -> str:
    return DONE if is_done(run) else OURS if ours else TAKEN


def _outcome(run: Run) -> str:
    scores = read_json(run.folder / "eval" / SCORES_FILE)["scores"]
    return ", ".join(f"{SCORERS[key][0]} {100 * one['value']:.1f} %" for key, one in scores.items())


def _conclude(comparison: Comparison) -> None:
    found = results_of(comparison)
    text = results_text(found)
    write_json(comparison.folder / "results.json", found)
    write_text(comparison.folder / "results.md", text + "\n")
    print(f"\n{text}\n\nresults: {comparison.folder / 'results.md'}, {comparison.folder / 'results.json'}", flush=True)
