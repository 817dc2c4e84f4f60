"""One run as it lies on disk: settings, metrics, scores, cost and routing, as far as they were recorded."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from probmoe_ext.report.records import Record, damaged, read_lines, read_record
from probmoe_ext.train.options import parse_k
from probmoe_ext.train.scoring import SCORERS, Mean

CONFIG_FILE, COMPARISON_FILE, DONE_FILE = "train_config.json", "compare.json", "done.json"
COSTS = ("tokens_per_second", "step_seconds", "wall_seconds", "peak_memory_bytes", "evaluation_tokens_per_second")
Scores = dict[str, dict[int, tuple[str, bool]]]
"""For each scorer and problem: the question, and whether the answer was right."""


@dataclass(frozen=True)
class Layer:
    """Routing of one layer in evaluation mode, over the tokens of the held-out problems.

    Attributes:
        gate: path of the router in the model.
        load: ``[E]`` share of the used slots that each expert gets.
        mean_k: mean number of experts of a token.
        cardinality: share of tokens with 0, 1, 2, … experts.
        entropy: mean entropy of the softmax over experts, nats.
        mass: mean softmax mass of the chosen experts.
        experts_99: mean number of experts that hold 99 % of the softmax mass.
    """

    gate: str
    load: list[float]
    mean_k: float | None
    cardinality: list[float]
    entropy: float | None
    mass: float | None
    experts_99: float | None


@dataclass(frozen=True)
class Analysis:
    """What ``analysis.json`` holds; tokens are text, count and mean number of experts."""

    layers: list[Layer]
    tokens: list[tuple[str, int, float]]
    mean_k: float | None
    load_entropy: float | None
    dead_experts: float | None


@dataclass
class Run:
    """A run; what its folder lacks is empty or None.

    Attributes:
        folder: where it lies.
        label: key of its group, equal for runs that differ in the seed.
        title: what pictures call the group.
        source: the comparison that it belongs to, empty for a run of its own.
        router: the router's name.
        k: experts a token, None for the model's own.
        options: the router's options.
        seed: of the run.
        config: settings as trained.
        parameters: of the model.
        heldout_loss: loss on the held-out slice of the training data.
        test_loss: loss on the reference answers of the test problems, from the evaluation.
        losses: step and training loss of each log.
        scores: mean and standard error by scorer.
        samples: single problems by scorer.
        cost: by the names of `COSTS`; device under ``"device"``.
        analysis: routing in evaluation mode.
        routing: step and mean over the layers of each metric, from training.
    """

    folder: Path
    label: str
    title: str
    source: str
    router: str
    k: int | tuple[int, int] | None
    options: dict[str, Any]
    seed: int | None
    config: dict[str, Any]
    parameters: int | None = None
    device: str = ""
    heldout_loss: float | None = None
    test_loss: float | None = None
    active_experts: float | None = None
    load_entropy: float | None = None
    losses: list[tuple[int, float]] = field(default_factory=list)
    scores: dict[str, Mean] = field(default_factory=dict)
    samples: Scores = field(default_factory=dict)
    cost: dict[str, float] = field(default_factory=dict)
    analysis: Analysis | None = None
    routing: list[tuple[int, dict[str, float]]] = field(default_factory=list)

    @property
    def decisions(self) -> Path | None:
        """The file of single decisions, if there is one."""
        path = self.folder / "decisions.json"
        return path if path.is_file() else None


def read_run(folder: Path, entry: Record | None = None, source: str = "") -> Run:
    """Read a run.

    Args:
        folder: has a ``train_config.json``.
        entry: the run's line in a comparison; None for a run of its own, which is named by its settings.
        source: the comparison.

    Raises:
        UsageError: a file of the run is damaged; the message names it.
    """
    config = read_record(folder / CONFIG_FILE)
    router = config.text("router", "") or (entry.text("router", "") if entry else "")
    k = parse_k(config.content.get("k"))
    options = config.record("router_options").content if config.content.get("router_options") else {}
    seed = config.integer("seed") if config.content.get("seed") is not None else None
    title = entry.text("title") if entry else title_of(router, k, options)
    label = entry.text("label") if entry else title
    run = Run(folder, label, title, source, router, k, options, seed, config.content)
    _read_training(run)
    _read_evaluation(run)
    if (folder / "analysis.json").is_file():
        run.analysis = _read_analysis(read_record(folder / "analysis.json"))
    if (folder / "routing.jsonl").is_file():
        for line in read_lines(folder / "routing.jsonl"):
            means = line.record("mean")
            found = {name: value for name in means.content if (value := means.number(name)) is not None}
            run.routing.append((line.integer("step"), found))
    return run


def title_of(router: str, k: int | tuple[int, int] | None, options: dict[str, Any]) -> str:
    """Router, k and options as text, as `train.models.Routing` writes them."""
    size = "" if k is None else f" k={k}" if isinstance(k, int) else f" k={k[0]}–{k[1]}"
    more = "".join(f" {name}={value}" for name, value in sorted(options.items()))
    return f"{router or 'own router'}{size}{more}"


def _read_training(run: Run) -> None:
    path = run.folder / "metrics.jsonl"
    if path.is_file():
        for line in read_lines(path):
            loss = line.number("loss")
            if loss is not None:
                run.losses.append((line.integer("step"), loss))
    if (run.folder / "summary.json").is_file():
        summary = read_record(run.folder / "summary.json")
        run.heldout_loss = summary.number("heldout_loss")
        run.parameters = int(summary.number("parameters") or 0) or None
        run.device = summary.text("device", "")
        measured = {"step_seconds": summary.number("step_seconds"), "wall_seconds": summary.number("seconds")}
        run.cost = {name: value for name, value in measured.items() if value is not None}
    if (run.folder / "cost.json").is_file():
        cost = read_record(run.folder / "cost.json")
        run.cost.update({name: value for name in COSTS if (value := cost.number(name)) is not None})
        run.device = cost.text("device", run.device)


def _read_evaluation(run: Run) -> None:
    path = run.folder / "eval" / "scores.json"
    if not path.is_file():
        return
    found = read_record(path)
    scores = found.record("scores")
    for key in scores.content:
        score = scores.record(key)
        value = score.number("value")
        if value is None:
            raise damaged(path, f"scores.{key}.value must be a number, got nothing")
        run.scores[key] = Mean(value, score.number("error"), score.integer("count"))
    statistics = found.record("statistics") if found.content.get("statistics") else None
    if statistics:
        run.test_loss = statistics.number("loss")
        run.active_experts = statistics.number("active_experts")
        run.load_entropy = statistics.number("load_entropy")
    for samples in sorted(path.parent.glob("samples-*.jsonl")):
        for line in read_lines(samples):
            marks = line.record("scores")
            for key in set(marks.content) & set(SCORERS):
                right = marks.record(key).boolean("correct")
                run.samples.setdefault(key, {})[line.integer("index")] = (line.text("question", ""), right)


def _read_analysis(found: Record) -> Analysis:
    layers = [
        Layer(
            layer.text("gate", ""),
            layer.numbers("load"),
            layer.number("mean_k"),
            layer.numbers("cardinality") if "cardinality" in layer.content else [],
            layer.number("entropy"),
            layer.number("mass"),
            layer.number("experts_99"),
        )
        for layer in found.records("layers")
    ]
    if not layers or any(len(layer.load) != len(layers[0].load) for layer in layers):
        raise damaged(found.path, "layers must be at least one, with loads of equally many experts")
    tokens = [
        (one.text("token"), one.integer("count"), one.number("mean_k") or 0.0)
        for one in (found.records("tokens") if found.content.get("tokens") else [])
    ]
    return Analysis(layers, tokens, found.number("mean_k"), found.number("load_entropy"), found.number("dead_experts"))
