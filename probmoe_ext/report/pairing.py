"""Scores of a group beside those of its top-k: the same seeds, the same problems."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from probmoe_ext.report.study import Group, Study
from probmoe_ext.train.crossed_bootstrap import crossed_bootstrap
from probmoe_ext.train.scoring import SCORERS
from probmoe_ext.train.significance import Interval, Paired

PREFERRED = ("b.exact_match", "a.strict_match", "c.numeric", "a.flexible_extract")
"""The score of the papers first."""


@dataclass(frozen=True)
class Against:
    """A group's difference to top-k, with the numbers of seeds and problems that both have."""

    paired: Paired
    seeds: int
    problems: int

    @property
    def interval(self) -> Interval:
        """The bootstrap's interval."""
        return Interval(self.paired.difference, self.paired.low, self.paired.high, self.seeds)


def scorers(study: Study) -> list[str]:
    """The scores that some run has, in the order of `SCORERS`."""
    return [key for key in SCORERS if any(key in run.scores for run in study.runs)]


def main_scorer(study: Study) -> str | None:
    """The score that the summary shows; None if no run was evaluated."""
    found = scorers(study)
    return next((key for key in PREFERRED if key in found), None)


def against_baseline(study: Study, group: Group, key: str) -> Against | None:
    """The paired bootstrap of a group against its top-k.

    Returns:
        None for top-k itself, without a top-k beside it, and where no seed or no problem is common to both.
    """
    baseline = study.baseline(group)
    if baseline is None or baseline is group:
        return None
    theirs = {run.seed: run.samples.get(key, {}) for run in baseline.runs}
    pairs = [
        (samples, theirs[run.seed]) for run in group.runs if (samples := run.samples.get(key)) and theirs.get(run.seed)
    ]
    if not pairs:
        return None
    every = [samples for pair in pairs for samples in pair]
    first = every[0]
    problems = sorted(
        index for index, (question, _) in first.items() if all(one.get(index, ("",))[0] == question for one in every)
    )
    if not problems:
        return None
    ours, others = (
        np.array([[pair[side][index][1] for index in problems] for pair in pairs], dtype=np.float64) for side in (0, 1)
    )
    return Against(crossed_bootstrap(ours, others), len(pairs), len(problems))
