"""``probmoe doctor``."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Iterator
from typing import Any

from probmoe_ext.commands.arguments import add_command

EXAMPLES = """\
examples:
  probmoe doctor
  probmoe doctor --json > doctor.json

exit code: 0 all well, 1 something that is needed is missing or too old, or a line of the self-test failed
"""


def register(commands: Any) -> None:
    """Add the command to the parser of ``probmoe``."""
    parser = add_command(
        commands, "doctor", "show what is installed and built, and test it in seconds", examples=EXAMPLES, run=run
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(options: argparse.Namespace) -> int:
    """Diagnose, test, print; 1 if something is wrong."""
    from probmoe_ext.diagnosis import diagnose

    found = diagnose()
    if not (options.json or options.quiet):
        print("\n".join(_describe(found)), flush=True)
    outcomes = []
    for outcome in _checks(found):
        outcomes.append(outcome)
        if not (options.json or (options.quiet and outcome.reason is None)):
            state = "ok" if outcome.reason is None else f"failed: {outcome.reason}"
            print(f"self-test, {outcome.device:<5} {outcome.name:<22} {state} ({outcome.seconds:.1f} s)", flush=True)
    well = not found["problems"] and all(outcome.reason is None for outcome in outcomes)
    if options.json:
        checks = [{**dataclasses.asdict(one), "ok": one.reason is None} for one in outcomes]
        print(json.dumps({"ok": well, **found, "checks": checks}, indent=2))
    else:
        for problem in found["problems"]:
            print(f"problem: {problem}")
        if not options.quiet:
            print("all well" if well else "not all is well")
    return 0 if well else 1


def _checks(found: dict[str, Any]) -> Iterator[Any]:
    if found["extension"]["note"] is not None:
        return
    from probmoe_ext.selftest import check_operators, check_swap

    transformers = found["packages"]["transformers"]
    for device in ("cpu", "cuda") if found["gpu"]["devices"] else ("cpu",):
        yield from check_operators(device)
        if transformers["version"] is not None and transformers["note"] is None:
            yield check_swap(device)


def _describe(found: dict[str, Any]) -> Iterator[str]:
    yield f"probmoe_ext     {found['probmoe_ext']}"
    yield f"python          {found['python']}, {found['system']}"
    for name, package in found["packages"].items():
        yield f"{name:<15} {', '.join(filter(None, (package['version'], package['note'])))}"
    extension = found["extension"]
    if extension["note"] is not None:
        yield f"extension       {extension['note']}"
    else:
        yield f"extension       built with torch {extension['built_with_torch']}, compiler {extension['compiler']}"
        yield f"instructions    {extension['instruction_set']}"
        built = extension["cuda_note"] or f"CUDA {extension['cuda']} for {extension['cuda_architectures']}"
        yield f"CUDA kernels    {built}"
    cpu, gpu = found["cpu"], found["gpu"]
    limit = "" if cpu["OMP_NUM_THREADS"] is None else f" (OMP_NUM_THREADS={cpu['OMP_NUM_THREADS']})"
    yield f"processor       {cpu['machine']}, {cpu['cores']} cores, {cpu['threads'] or 'no'} threads in torch{limit}"
    for device in gpu["devices"]:
        memory = f"{device['memory_bytes'] / 2**30:.0f} GiB"
        yield f"GPU             {device['name']}, {device['capability']}, {memory}, driver {gpu['driver'] or 'unknown'}"
    if gpu["note"]:
        yield f"GPU             {'none: ' if not gpu['devices'] else ''}{gpu['note']}"
