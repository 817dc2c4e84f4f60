"""What a comparison runs: its settings, read from YAML, and the runs that they ask for, routers × seeds.

Imports neither torch nor transformers.
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from probmoe_ext.train.errors import UsageError, nearest
from probmoe_ext.train.options import EvalConfig, TrainConfig, load_config, parse_k, read_mapping

COMPARE_FILE = "compare.json"
KEYS = ("name", "output", "seeds", "train", "evaluation", "start", "routers", "keep_checkpoints")
ROUTER_KEYS = ("label", "title", "router", "k", "options", "train")
OF_THE_COMPARISON = {"router", "k", "router_options", "seed", "output"}
"""Settings of a training that the list of routers, the seeds and the folder decide."""


@dataclass(frozen=True)
class Contestant:
    """A router of the comparison.

    Attributes:
        label: name of its folder.
        title: name in tables and pictures.
        train: its settings of training: the shared ones, its own on top; without seed and folder.
    """

    label: str
    title: str
    train: TrainConfig


@dataclass(frozen=True)
class Run:
    """One router under one seed.

    Attributes:
        contestant: the router.
        train: the complete settings of its training.
        evaluation: the complete settings of its evaluation.
    """

    contestant: Contestant
    train: TrainConfig
    evaluation: EvalConfig

    @property
    def folder(self) -> Path:
        """Where it lies."""
        return self.train.folder

    def __str__(self) -> str:
        """For example ``probmoe-exact, seed 42``."""
        return f"{self.contestant.label}, seed {self.train.seed}"


@dataclass(frozen=True)
class Comparison:
    """The settings of a comparison.

    Attributes:
        name: what the report calls it.
        folder: where everything goes.
        seeds: each router is trained with each of them.
        contestants: the routers.
        evaluation: shared settings of the evaluation.
        start: training of the common start from which all fine-tune, if there is one.
        keep_checkpoints: leave the checkpoints of finished runs on disk.
    """

    name: str
    folder: Path
    seeds: tuple[int, ...]
    contestants: tuple[Contestant, ...]
    evaluation: EvalConfig
    start: TrainConfig | None = None
    keep_checkpoints: bool = False
    resolved: dict[str, Any] = field(default_factory=dict)

    def runs(self) -> list[Run]:
        """All runs: seed by seed, so that an unfinished comparison has the same seeds of all routers."""
        return [self._run(contestant, seed) for seed in self.seeds for contestant in self.contestants]

    def _run(self, contestant: Contestant, seed: int) -> Run:
        folder = str(self.folder / "runs" / contestant.label / f"seed-{seed}")
        train = dataclasses.replace(contestant.train, seed=seed, output=folder)
        if self.start is not None:
            train = dataclasses.replace(train, model=str(self.start.folder))
        evaluation = dataclasses.replace(self.evaluation, model=folder, output=f"{folder}/eval")
        return Run(contestant, train, evaluation)


def load_comparison(path: str, output: str | None = None) -> Comparison:
    """Read a comparison.

    Args:
        path: a YAML or JSON file.
        output: folder in place of the file's.

    Raises:
        UsageError: an unreadable file, an unknown key (the nearest known one is named), or a wrong value.
    """
    content = read_mapping(Path(path))
    _known(content, KEYS, path)
    name = content.get("name", Path(path).stem)
    if not isinstance(name, str) or not name:
        raise UsageError(f"name in {path} must be text, got {name!r}")
    folder = Path(output or content.get("output") or Path("runs") / Path(path).stem)
    shared = _mapping(content, "train", path)
    shared = {"monitor": 1, **shared}
    start = _start(content, folder, path)
    if start is not None and "model" in shared:
        raise UsageError(f"train.model in {path}: the runs begin from the common start; leave one of the two out")
    if isinstance(content.get("start"), str):
        shared["model"] = content["start"]
    _reserved(shared, f"train in {path}")
    contestants = _contestants(content.get("routers"), shared, path)
    evaluation = {"data": contestants[0].train.data, **_mapping(content, "evaluation", path)}
    for key in ("model", "router", "k", "output"):
        if key in evaluation:
            raise UsageError(f"evaluation.{key} in {path}: the comparison sets it; leave it out")
    keep = content.get("keep_checkpoints", False)
    if not isinstance(keep, bool):
        raise UsageError(f"keep_checkpoints in {path} must be true or false, got {keep!r}")
    made = Comparison(
        name=name,
        folder=folder,
        seeds=parse_seeds(content.get("seeds", [42, 43, 44]), f"seeds in {path}"),
        contestants=contestants,
        evaluation=_settings(EvalConfig, evaluation, f"evaluation in {path}"),
        start=start,
        keep_checkpoints=keep,
    )
    return dataclasses.replace(made, resolved=_resolved(made))


def parse_seeds(value: object, place: str) -> tuple[int, ...]:
    """Read seeds: a list of whole numbers, or text such as ``42,43,44``.

    Raises:
        UsageError: anything else, a negative number, or one twice; the message begins with `place`.
    """
    parts: list[Any] = value.split(",") if isinstance(value, str) else value if isinstance(value, list) else [value]
    try:
        seeds = tuple(int(part) for part in parts if not isinstance(part, bool | float | None))
    except (TypeError, ValueError):
        seeds = ()
    if not seeds or len(seeds) != len(parts) or min(seeds) < 0 or len(set(seeds)) < len(seeds):
        raise UsageError(f"{place} must be different whole numbers from 0, as in 42,43,44; got {value!r}")
    return seeds


def _start(content: dict[str, Any], folder: Path, path: str) -> TrainConfig | None:
    start = content.get("start")
    if start is None or isinstance(start, str):
        return None
    if not isinstance(start, dict):
        raise UsageError(f"start in {path} must be a model (text) or the settings of a training, got {start!r}")
    if "output" in start:
        raise UsageError(f"start.output in {path}: the comparison sets it; leave it out")
    return _settings(TrainConfig, {**_underscored(start), "output": str(folder / "start")}, f"start in {path}")


def _contestants(given: object, shared: dict[str, Any], path: str) -> tuple[Contestant, ...]:
    if not isinstance(given, list) or not given:
        raise UsageError(f"routers in {path} must be a list of at least one router, got {given!r}")
    made: list[Contestant] = []
    for number, one in enumerate(given, start=1):
        place = f"router {number} in {path}"
        if isinstance(one, str):
            one = {"router": one}
        if not isinstance(one, dict):
            raise UsageError(f"{place} must be a name or a mapping of {', '.join(ROUTER_KEYS)}; got {one!r}")
        one = _underscored(one)
        _known(one, ROUTER_KEYS, place)
        if not isinstance(one.get("router"), str):
            raise UsageError(f"{place} must name its router, got {one.get('router')!r}")
        label = one.get("label", one["router"])
        if not isinstance(label, str) or not re.fullmatch(r"[A-Za-z0-9][\w.-]*", label):
            raise UsageError(f"label of {place} names a folder: letters, digits, '.', '-' and '_'; got {label!r}")
        if label in (other.label for other in made):
            raise UsageError(f"label {label!r} of {place} is taken by another router; give each its own")
        own = _mapping(one, "train", place)
        _reserved(own, f"train of {place}")
        settings = {
            **shared,
            **own,
            "router": one["router"],
            "k": parse_k(one.get("k")),
            "router_options": _mapping(one, "options", place),
        }
        train = _settings(TrainConfig, settings, f"{label!r} in {path}")
        made.append(Contestant(label, str(one.get("title", label)), train))
    return tuple(made)


def _settings(kind: type[Any], values: dict[str, Any], place: str) -> Any:
    try:
        return load_config(kind, None, values)
    except UsageError as error:
        raise UsageError(f"{place}: {error}") from error


def _mapping(content: dict[str, Any], key: str, path: str) -> dict[str, Any]:
    value = content.get(key)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise UsageError(f"{key} in {path} must be a mapping of settings, got {value!r}")
    return _underscored(value)


def _underscored(mapping: dict[Any, Any]) -> dict[str, Any]:
    return {str(name).replace("-", "_"): value for name, value in mapping.items()}


def _reserved(settings: dict[str, Any], place: str) -> None:
    for key in settings:
        if key in OF_THE_COMPARISON:
            raise UsageError(f"{place} must not set {key!r}: the list of routers, seeds and output say it")


def _known(mapping: dict[str, Any], known: tuple[str, ...], place: str) -> None:
    for key in mapping:
        if key not in known:
            hint = nearest(key, known) or f"; known: {', '.join(known)}"
            raise UsageError(f"unknown key {key!r} in {place}{hint}")


def _resolved(made: Comparison) -> dict[str, Any]:
    """All settings with their defaults, as JSON has them; folders, which may move, are left out."""

    def of(config: TrainConfig | EvalConfig, *without: str) -> dict[str, Any]:
        values = {name: value for name, value in dataclasses.asdict(config).items() if name not in without}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    return {
        "seeds": list(made.seeds),
        "start": None if made.start is None else of(made.start, "output"),
        "evaluation": of(made.evaluation, "model", "output", "router", "k"),
        "routers": {one.label: of(one.train, "output", "seed") for one in made.contestants},
    }
