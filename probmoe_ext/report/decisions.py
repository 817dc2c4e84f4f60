"""Single routing decisions for the page's browser: read, checked, and kept within a size."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from probmoe_ext.report.records import Record, damaged, read_record
from probmoe_ext.report.runs import Run
from probmoe_ext.report.study import Group, Study

SCALE = 10_000
"""Weights travel as whole numbers of ten-thousandths."""

READ_LIMIT = 64 * 2**20
"""A larger file is left out unread: its objects would take some ten times as much memory."""


@dataclass(frozen=True)
class Decisions:
    """What the browser shows.

    Attributes:
        runs: title, seed, number of experts and problems of each run; weights in units of 1 / `SCALE`.
        notes: what was left out, and what was not recorded.
    """

    runs: list[dict[str, Any]]
    notes: list[str]


def collect(study: Study, limit: int) -> Decisions:
    """Read the decisions of as many problems as fit.

    The first run of each group that has any goes first, problem by problem, so that routers can be compared on the same
    ones; then come the other seeds, run by run.

    Args:
        study: the runs.
        limit: bytes of JSON at most; 0 leaves all out.

    Raises:
        UsageError: a file is damaged.
    """
    if limit == 0:
        return Decisions([], ["Left out, as asked."])
    recorded = [[(group, run) for run in group.runs if run.decisions] for group in study.groups]
    shelf = _Shelf(limit)
    shelf.add([_Source(*runs[0]) for runs in recorded if runs])
    for group, run in (one for runs in recorded for one in runs[1:]):
        shelf.add([_Source(group, run)])
    absent = [group.title for group, runs in zip(study.groups, recorded, strict=True) if not runs]
    notes = [*shelf.too_large, *shelf.note(), *([f"Not recorded for: {', '.join(absent)}."] if absent else [])]
    return Decisions([head for head in shelf.heads if head["problems"]], notes)


@dataclass(frozen=True)
class _Source:
    group: Group
    run: Run

    @property
    def path(self) -> Path:
        assert self.run.decisions is not None
        return self.run.decisions


class _Shelf:
    """Problems up to a size, and count of what did not fit."""

    def __init__(self, limit: int) -> None:
        self.limit, self.spent, self.left, self.unread = limit, 0, 0, 0
        self.heads: list[dict[str, Any]] = []
        self.too_large: list[str] = []

    def add(self, sources: list[_Source]) -> None:
        """Take problems from several runs in turn; files that could not add anything stay unread."""
        read: list[tuple[dict[str, Any], list[dict[str, Any]]]] = []
        for source in sources:
            size = source.path.stat().st_size
            if size > READ_LIMIT:
                self.too_large.append(
                    f"Left out: {source.path}, {size / 2**20:.0f} MiB; files over {READ_LIMIT >> 20} MiB are not read."
                )
            elif self.left:
                self.unread += 1
            else:
                problems = read_problems(source.path)
                head: dict[str, Any] = {"title": source.group.title, "seed": source.run.seed, "problems": []}
                read.append(({**head, "experts": _experts(source.run, problems)}, problems))
        for place in range(max((len(problems) for _, problems in read), default=0)):
            for head, problems in read:
                if place < len(problems):
                    self._place(head, problems[place])
        self.heads += [head for head, _ in read]

    def note(self) -> list[str]:
        """The line on what did not fit."""
        if not self.left and not self.unread:
            return []
        more = f" and the files of {self.unread} more runs" if self.unread else ""
        return [
            f"Left out: {self.left} problems{more}, to keep this page small ({self.spent / 1e6:.1f} MB of decisions "
            "are in it; --decisions MEGABYTES changes that)."
        ]

    def _place(self, head: dict[str, Any], problem: dict[str, Any]) -> None:
        size = len(json.dumps(problem, separators=(",", ":")))
        if self.spent + size > self.limit:
            self.left += 1
        else:
            self.spent += size
            head["problems"].append(problem)


def _experts(run: Run, problems: list[dict[str, Any]]) -> int:
    """E, from the loads where they were recorded, else from the experts that occur."""
    loads = [len(layer.load) for layer in run.analysis.layers] if run.analysis else []
    used = [one + 1 for found in problems for layer in found["layers"] for token in layer["i"] for one in token]
    return max([0, *loads, *used])


def read_problems(path: Path) -> list[dict[str, Any]]:
    """The problems of a file, checked, in the page's short form."""
    return [_problem(one) for one in read_record(path).records("problems")]


def _problem(found: Record) -> dict[str, Any]:
    tokens = found.texts("tokens")
    prompt = found.integer("prompt_tokens")
    if prompt > len(tokens):
        raise damaged(found.path, f"{found.place}.prompt_tokens is {prompt}, with {len(tokens)} tokens")
    return {
        "index": found.integer("index"),
        "question": found.text("question", ""),
        "answer": found.text("answer", ""),
        "output": found.text("output", ""),
        "tokens": tokens,
        "prompt": prompt,
        "layers": [_layer(layer, len(tokens)) for layer in found.records("layers")],
    }


def _layer(found: Record, tokens: int) -> dict[str, Any]:
    indices, weights = found.lists("indices"), found.lists("weights")
    if len(indices) != tokens or list(map(len, indices)) != list(map(len, weights)):
        raise damaged(found.path, f"{found.place} must have indices and weights of equal lengths for {tokens} tokens")
    if not all(isinstance(one, int) and one >= 0 for token in indices for one in token):
        raise damaged(found.path, f"{found.place}.indices must be whole numbers of at least 0")
    if not all(isinstance(one, int | float) for token in weights for one in token):
        raise damaged(found.path, f"{found.place}.weights must be numbers")
    scaled = [[round(SCALE * one) if abs(one) < 1e6 else None for one in token] for token in weights]
    return {"gate": found.text("gate", ""), "i": indices, "w": scaled}
