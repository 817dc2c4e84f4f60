"""Folders as a comparison leaves them, with invented numbers: what the reports in these tests are made from."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

TITLE = "Synthetic example: invented numbers"
EXPERTS, K = 16, 4
WORDS = ["the", ",", ".", "of", "to", "is", "a", "in", "how", "many", "apples", "buy", "12", "7", "left", "####"]
HOSTILE = "</script><script>document.title='broken'</script><!-- $x_1$ <b>&amp;\u2028\u202e\x00"
"""Text that must stay text wherever it ends up."""


@dataclass
class Invented:
    """A router of the synthetic comparison: what makes it different from the others."""

    label: str
    title: str
    router: str
    k: int | list[int] = K
    options: dict[str, Any] = field(default_factory=dict)
    right: float = 0.6
    pace: float = 1.0


ROUTERS = (
    Invented("topk", "top-k", "topk"),
    Invented("densemixer", "DenseMixer", "densemixer", right=0.62, pace=2.4),
    Invented("sparsemixer", "SparseMixer", "sparsemixer", right=0.55, pace=1.1),
    Invented("remoe", "ReMoE", "remoe", right=0.57, pace=1.3),
    Invented("dirmoe", "DirMoE", "dirmoe", right=0.5, pace=1.5),
    Invented("probmoe-exact", "ProbMoE exact", "probmoe", right=0.66, pace=1.15),
    Invented("probmoe-dynamic", "ProbMoE dynamic", "probmoe", [2, K], right=0.64, pace=1.05),
    Invented("sample-ste", "sample + STE", "probmoe", options={"backward": "ste"}, right=0.58),
    Invented("topk-marginal", "top-k + marginal", "probmoe", options={"forward": "topk"}, right=0.6),
    Invented("topk-ste", "top-k + STE", "probmoe", options={"forward": "topk", "backward": "ste"}, right=0.56),
)


def write_comparison(
    folder: Path,
    routers: Sequence[Invented] = ROUTERS,
    *,
    seeds: Sequence[int] = (42, 43, 44),
    layers: int = 4,
    problems: int = 60,
    steps: int = 40,
    decisions: int = 2,
    text: str = " She buys 12 apples.",
) -> Path:
    """A finished comparison; the same arguments give the same files."""
    entries = []
    for one in routers:
        for seed in seeds:
            place = f"runs/{one.label}/seed-{seed}"
            (folder / place / "eval").mkdir(parents=True)
            _Writer(folder / place, one, seed, layers, problems, steps, decisions, text).write()
            entry = {"label": one.label, "title": one.title, "router": one.router, "k": one.k, "options": one.options}
            entries.append({**entry, "seed": seed, "folder": place})
    content = {
        "version": 1,
        "name": TITLE,
        "config": {"max_steps": steps},
        "runs": entries,
        "machine": {"processor": "none", "cores": 0},
        "versions": {"torch": "0"},
    }
    _dump(folder / "compare.json", content)
    return folder


class _Writer:
    """Writes one run."""

    def __init__(
        self, folder: Path, of: Invented, seed: int, layers: int, problems: int, steps: int, decisions: int, text: str
    ) -> None:
        self.folder, self.of, self.seed, self.text = folder, of, seed, text
        self.layers, self.problems, self.steps, self.decisions = layers, problems, steps, decisions
        self.random = np.random.default_rng([seed, *map(ord, of.label)])
        self.low, self.high = (of.k, of.k) if isinstance(of.k, int) else of.k

    def write(self) -> None:
        config = {"model": "synthetic", "router": self.of.router, "k": self.of.k, "router_options": self.of.options}
        more = {"seed": self.seed, "data": "synthetic", "max_steps": self.steps, "output": str(self.folder)}
        _dump(self.folder / "train_config.json", {**config, **more})
        self._training()
        self._scores()
        self._analysis()
        self._decisions()
        _dump(self.folder / "done.json", {"seconds": 1.0, "finished": "2026-01-01T00:00:00Z"})

    def _training(self) -> None:
        offset = 0.3 * (0.6 - self.of.right)
        losses = [
            0.4 + offset + 3 * math.exp(-step / 8) + 0.02 * self.random.standard_normal() for step in range(self.steps)
        ]
        _lines(self.folder / "metrics.jsonl", ({"step": 5 * step + 5, "loss": one} for step, one in enumerate(losses)))
        summary = {"heldout_loss": losses[-1] + 0.05, "parameters": 10_000_000, "device": "cpu"}
        seconds = 0.1 * self.of.pace * (1 + 0.02 * self.random.standard_normal())
        _dump(self.folder / "summary.json", {**summary, "step_seconds": seconds, "seconds": seconds * self.steps})
        cost = {"tokens_per_second": 400 / seconds, "step_seconds": seconds, "wall_seconds": seconds * self.steps}
        more = {"peak_memory_bytes": int(3e8 * (0.7 + 0.3 * self.of.pace)), "evaluation_tokens_per_second": None}
        _dump(self.folder / "cost.json", {**cost, **more, "device": "cpu", "parameters": 10_000_000})
        rows = []
        for step in range(0, self.steps, 4):
            mean = {"mean_k": (self.low + self.high) / 2, "load_entropy": 0.9 + 0.05 * step / self.steps}
            mean.update(exploration=0.4 - 0.3 * step / self.steps, drift=0.2 * step / self.steps, max_vio=1.0)
            rows.append({"step": 5 * step + 5, "mean": mean, "worst": {}, "layers": {}})
        _lines(self.folder / "routing.jsonl", rows)

    def _scores(self) -> None:
        hard = np.random.default_rng(7).random(self.problems)
        marks = hard + 0.15 * self.random.standard_normal(self.problems) < self.of.right
        samples = [
            {
                "index": index,
                "question": f"Question {index}?",
                "answer": "#### 1",
                "prompt": "",
                "output": self.text,
                "scores": {key: {"prediction": "1", "correct": bool(mark)} for key in ("b.exact_match", "c.numeric")},
            }
            for index, mark in enumerate(marks)
        ]
        _lines(self.folder / "eval" / "samples-zero-shot.jsonl", samples)
        share = float(marks.mean())
        error = float(marks.std(ddof=1)) / math.sqrt(self.problems)
        scores = {
            key: {"value": share, "error": error, "count": self.problems} for key in ("b.exact_match", "c.numeric")
        }
        statistics = {"loss": 0.5 - 0.1 * share, "active_experts": (self.low + self.high) / 2, "load_entropy": 0.95}
        _dump(
            self.folder / "eval" / "scores.json", {"routing": self.of.title, "scores": scores, "statistics": statistics}
        )

    def _analysis(self) -> None:
        layers = []
        for layer in range(self.layers):
            load = self.random.dirichlet(np.full(EXPERTS, 4.0))
            if layer == 1:
                load[3] = 0.0
                load /= load.sum()
            shares = np.zeros(EXPERTS + 1)
            shares[self.low : self.high + 1] = self.random.dirichlet(np.full(self.high - self.low + 1, 5.0))
            layers.append(
                {
                    "gate": f"model.layers.{layer}.mlp.gate",
                    "index": layer,
                    "load": load.tolist(),
                    "mean_k": float(shares @ np.arange(EXPERTS + 1)),
                    "cardinality": shares.tolist(),
                    "entropy": 1.5 + 0.2 * layer + 0.05 * self.random.standard_normal(),
                    "mass": 0.8 - 0.03 * layer + 0.1 * (self.of.right - 0.6) + 0.01 * self.random.standard_normal(),
                    "experts_99": 9 + layer / 2 + 10 * (self.of.right - 0.6) + 0.1 * self.random.standard_normal(),
                }
            )
        tokens = []
        for rank in range(300):
            spread = (self.high - self.low) * (rank / 300 + 0.1 * self.random.standard_normal())
            word = WORDS[rank] if rank < len(WORDS) else f" word{rank}"
            mean = min(self.high, max(self.low, self.low + spread))
            tokens.append({"token": word, "count": int(2000 / (rank + 1)) + 1, "mean_k": mean})
        tokens[5]["token"] = self.text
        mean = sum(one["mean_k"] for one in layers) / self.layers
        _dump(
            self.folder / "analysis.json",
            {"layers": layers, "tokens": tokens, "mean_k": mean, "load_entropy": 0.95, "dead_experts": 1},
        )

    def _decisions(self) -> None:
        problems = []
        for index in range(self.decisions):
            tokens = [f" {WORDS[(7 * place + index) % len(WORDS)]}" for place in range(90)]
            tokens[40], tokens[60] = "\n", self.text
            layers = []
            for layer in range(self.layers):
                sizes = self.random.integers(self.low, self.high + 1, len(tokens))
                indices = [self.random.permutation(EXPERTS)[:size].tolist() for size in sizes]
                weights = [(0.9 * self.random.dirichlet(np.ones(size))).tolist() for size in sizes]
                layers.append({"gate": f"model.layers.{layer}.mlp.gate", "indices": indices, "weights": weights})
            facts = {"index": index, "question": f"Question {index}? {self.text}", "answer": f"#### 1 {self.text}"}
            problems.append({**facts, "output": self.text, "tokens": tokens, "prompt_tokens": 50, "layers": layers})
        _dump(self.folder / "decisions.json", {"problems": problems})


def _dump(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content), encoding="utf-8")


def _lines(path: Path, rows: Any) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
