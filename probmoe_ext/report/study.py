"""The runs of a report: found in folders, grouped over seeds, each group beside its top-k."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from probmoe_ext.report.records import Record, damaged, printable, read_record
from probmoe_ext.report.runs import COMPARISON_FILE, CONFIG_FILE, DONE_FILE, Run, read_run
from probmoe_ext.train.errors import UsageError
from probmoe_ext.train.significance import Interval, mean_interval

PLACE_SETTINGS = ("output", "seed", "device")
"""Settings that may differ within a group, and are no difference between groups."""


@dataclass
class Group:
    """Runs that differ in the seed only.

    Attributes:
        title: what pictures call it.
        source: the comparison that it belongs to.
        runs: in the order of their seeds.
        style: its place among the colours; 0 is top-k.
    """

    title: str
    source: str
    runs: list[Run]
    style: int = 0

    @property
    def first(self) -> Run:
        """The run with the lowest seed, which stands for the group where seeds cannot be averaged."""
        return self.runs[0]

    @property
    def is_ablation(self) -> bool:
        """Whether it is ProbMoE with a rule of its forward or backward pass changed."""
        rules = self.first.options
        changed = rules.get("forward", "sample") != "sample" or rules.get("backward", "marginal") != "marginal"
        return self.first.router == "probmoe" and changed

    def values(self, of: Callable[[Run], float | None]) -> list[float]:
        """A number of each run that has it."""
        return [value for run in self.runs if (value := of(run)) is not None and abs(value) != float("inf")]

    def interval(self, of: Callable[[Run], float | None]) -> Interval | None:
        """Mean of a number over the seeds; None if no run has it, or one is not a number."""
        values = self.values(of)
        return mean_interval(values) if values and all(value == value for value in values) else None


@dataclass
class Study:
    """All that a report is about.

    Attributes:
        groups: in the order in which they were found.
        comparisons: the contents of each ``compare.json``, by name.
        unfinished: folders of runs that a comparison planned and that are not done.
    """

    groups: list[Group]
    comparisons: dict[str, dict[str, Any]] = field(default_factory=dict)
    unfinished: list[Path] = field(default_factory=list)

    @property
    def main(self) -> list[Group]:
        """The groups but for ablations of ProbMoE; all of them if there is nothing else."""
        return [group for group in self.groups if not group.is_ablation] or self.groups

    @property
    def runs(self) -> list[Run]:
        """Every run."""
        return [run for group in self.groups for run in group.runs]

    def baseline(self, group: Group) -> Group | None:
        """The first top-k group of the same comparison; None if there is none."""
        return next((one for one in self.groups if one.source == group.source and one.first.router == "topk"), None)


def read_study(paths: Sequence[Path]) -> Study:
    """Read comparisons, runs, and folders that hold runs.

    Args:
        paths: each the folder of a comparison (``compare.json``), of a run (``train_config.json``), or one whose
            subfolders are runs.

    Raises:
        UsageError: a path is none of these, or a file is damaged.
    """
    study, runs = Study([]), []
    seen: set[Path] = set()
    for path in paths:
        if path.resolve() not in seen:
            seen.add(path.resolve())
            runs += _find(path, study)
    if not runs:
        waiting = f"; {len(study.unfinished)} are unfinished" if study.unfinished else ""
        raise UsageError(f"no finished run in {', '.join(map(str, paths))}{waiting}")
    several = len({run.source for run in runs}) > 1
    grouped: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        grouped.setdefault((run.source, _key(run)), []).append(run)
    for members in grouped.values():
        members.sort(key=lambda run: (run.seed is None, run.seed))
        of = members[0]
        title = f"{of.title} ({of.source})" if several and of.source else of.title
        study.groups.append(Group(printable(title), of.source, members))
    _name_and_colour(study)
    return study


def _find(path: Path, study: Study) -> list[Run]:
    if not path.is_dir():
        raise UsageError(f"{path} is {'a file' if path.exists() else 'not there'}; give the folder of a run")
    if (path / COMPARISON_FILE).is_file():
        return _comparison(path, study)
    if (path / CONFIG_FILE).is_file():
        return [read_run(path)]
    found = sorted(one for one in path.iterdir() if (one / CONFIG_FILE).is_file())
    if not found:
        raise UsageError(
            f"{path} holds no run: neither {COMPARISON_FILE} nor {CONFIG_FILE}, here or one folder further down"
        )
    return [read_run(one) for one in found]


def _comparison(path: Path, study: Study) -> list[Run]:
    found = read_record(path / COMPARISON_FILE)
    if found.integer("version") != 1:
        raise damaged(found.path, f"version {found.integer('version')} is not known here; it must be 1")
    name = found.text("name", path.name)
    while name in study.comparisons:
        name += "′"
    study.comparisons[name] = found.content
    runs = []
    for entry in found.records("runs"):
        folder = _folder_of(path, entry)
        if (folder / DONE_FILE).is_file():
            run = read_run(folder, entry, name)
            runs.append(replace(run, seed=entry.integer("seed")))
        else:
            study.unfinished.append(folder)
    return runs


def _folder_of(path: Path, entry: Record) -> Path:
    """The folder of a run, also where the comparison was moved after it was made."""
    given = Path(entry.text("folder"))
    places = [given, path / given, path / "runs" / entry.text("label") / f"seed-{entry.integer('seed')}"]
    return next((place for place in places[::-1] if place.is_dir()), path / given)


def _key(run: Run) -> str:
    if run.source:
        return run.label
    settings = {name: value for name, value in run.config.items() if name not in PLACE_SETTINGS}
    return repr((run.label, sorted(settings.items(), key=lambda item: item[0])))


def _name_and_colour(study: Study) -> None:
    """Titles of their own for groups that share one, and a colour each; top-k is the first."""
    for more in (lambda group: group.first.folder.name, lambda group: str(group.first.folder)):
        titles = [group.title for group in study.groups]
        for group, title in zip(study.groups, titles, strict=True):
            if titles.count(title) > 1:
                group.title = f"{title} ({more(group)})"
    study.groups.sort(key=lambda group: (group.is_ablation, group.first.router != "topk"))
    styles = iter(range(1, len(study.groups) + 1))
    baselines = iter(range(len(study.groups)))
    for group in study.groups:
        is_baseline = study.baseline(group) is group and next(baselines) == 0
        group.style = 0 if is_baseline else next(styles)
