"""How a trained model routes in evaluation mode: by layer, by token, and every decision in a few problems.

`analyze` counts over many problems (the papers' figures of cardinality, token frequency, mass and entropy); `decide`
keeps the experts and weights of each token of a few problems, with the model's own answers.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from probmoe_ext.hf import moe_layers
from probmoe_ext.hf.layers import MoELayer
from probmoe_ext.hf.monitor import gate_of
from probmoe_ext.hf.tally import Gate
from probmoe_ext.train.data import Example
from probmoe_ext.train.encode import PadRight, encode, pad_token

SHARE = 0.99
"""The softmax mass of which `analyze` counts the experts that hold it."""
MOST_FREQUENT = 2000
DIGITS = 5
"""Significant digits of what is written."""


@dataclass
class _Layer:
    """Sums over the tokens of one layer, in float64."""

    gate: Gate
    index: int
    load: torch.Tensor
    cardinality: torch.Tensor
    sums: torch.Tensor = field(default_factory=lambda: torch.zeros(3, dtype=torch.float64))

    def add(self, probabilities: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        """Add tokens: probabilities ``[n, E]``, experts ``[n, K]`` (E: a slot not used). Returns sizes ``[n]``."""
        used = indices < self.gate.num_experts
        sizes = used.sum(-1)
        self.load += torch.bincount(indices[used], minlength=len(self.load))
        self.cardinality += torch.bincount(sizes, minlength=len(self.cardinality))
        padded = torch.nn.functional.pad(probabilities, (0, 1))
        mass = (padded.gather(-1, indices) * used).sum()
        # An expert counts if those before it, by falling probability, do not yet hold the share.
        held = probabilities.sort(-1, descending=True).values.cumsum(-1)
        experts = len(probabilities) + (held[:, :-1] < SHARE).sum()
        entropy = torch.special.entr(probabilities).sum()
        self.sums += torch.stack((entropy, mass, experts.double()))
        return sizes

    def summary(self, tokens: int) -> dict[str, Any]:
        entropy, mass, experts = (self.sums / tokens).tolist()
        slots = float(self.load.sum())
        return {
            "gate": self.gate.path,
            "index": self.index,
            "load": (self.load / max(slots, 1.0)).tolist(),
            "mean_k": slots / tokens,
            "cardinality": (self.cardinality / tokens).tolist(),
            "entropy": entropy,
            "mass": mass,
            "experts_99": experts,
        }


class _Tap:
    """The first result and the experts and weights of each gate in the last forward pass."""

    def __init__(self, model: nn.Module) -> None:
        self.layers: list[MoELayer] = moe_layers(model)
        self.gates = [gate_of(layer) for layer in self.layers]
        self.seen: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []

    @contextmanager
    def open(self) -> Iterator[None]:
        self.seen = [(torch.empty(0),) * 3 for _ in self.layers]
        handles = [layer.gate.register_forward_hook(self._hook(place)) for place, layer in enumerate(self.layers)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, place: int) -> Callable[..., None]:
        def hook(gate: nn.Module, args: Any, output: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> None:
            self.seen[place] = output

        return hook

    def probabilities(self, place: int) -> torch.Tensor:
        """``[T, E]`` float64 of the layer at `place`."""
        recorded = self.seen[place][0].double()
        return recorded if self.gates[place].probabilities else recorded.softmax(-1)


def analyze(
    model: Any, tokenizer: Any, examples: Sequence[Example], prompt: Callable[[str], str], batch_size: int
) -> tuple[dict[str, Any], float]:
    """Count the routing of a model over problems and their reference answers, all tokens but padding.

    Args:
        model: a causal language model with experts, in evaluation mode.
        tokenizer: its tokenizer.
        examples: at least one problem.
        prompt: makes the prompt from the question.
        batch_size: problems at once.

    Returns:
        What ``analysis.json`` holds: for each layer ``load`` (shares of the used slots), ``mean_k``, ``cardinality``
        (shares of the tokens with 0, 1, …, E experts), ``entropy`` (mean over the tokens of that of the softmax, nats),
        ``mass`` (mean softmax mass of the chosen experts), ``experts_99`` (mean number of experts that hold 99 % of the
        mass); for the most frequent tokens ``mean_k`` over layers and occurrences; over the layers the means ``mean_k``
        and ``load_entropy`` (by log E), and ``dead_experts``, the number without any token. And the tokens a second of
        the forward passes, hooks left out.

    Raises:
        ValueError: the model has no mixture-of-experts layer.
    """
    limit = getattr(model.config, "max_position_embeddings", None) or 2**31
    rows = encode(examples, tokenizer, prompt, limit).rows
    collate = PadRight(pad_token(tokenizer))
    tap = _Tap(model)
    layers = [_counter(gate, layer.index) for gate, layer in zip(tap.gates, tap.layers, strict=True)]
    size = model.get_input_embeddings().num_embeddings
    counts, sizes = torch.zeros(size, dtype=torch.float64), torch.zeros(size, dtype=torch.float64)
    for start in range(0, len(rows), batch_size):
        batch = _on(model, collate(rows[start : start + batch_size]))
        keep = batch["attention_mask"].bool().flatten().cpu()
        ids = batch["input_ids"].flatten().cpu()[keep]
        with tap.open(), torch.inference_mode():
            model(**batch)
        counts += torch.bincount(ids, minlength=size)
        for place, layer in enumerate(layers):
            probabilities, indices = tap.probabilities(place).cpu()[keep], tap.seen[place][2].cpu()[keep]
            sizes.index_add_(0, ids, layer.add(probabilities, indices).double())
    tokens = int(counts.sum())
    made = [layer.summary(tokens) for layer in layers]
    frequent = sorted(counts.nonzero().flatten().tolist(), key=lambda id: (-float(counts[id]), id))[:MOST_FREQUENT]
    found = {
        "layers": made,
        "tokens": [
            {
                "token": tokenizer.decode([id]),
                "count": int(counts[id]),
                "mean_k": float(sizes[id] / counts[id]) / len(layers),
            }
            for id in frequent
        ],
        "mean_k": sum(layer["mean_k"] for layer in made) / len(made),
        "load_entropy": sum(_evenness(layer.load) for layer in layers) / len(layers),
        "dead_experts": sum(int((layer.load == 0).sum()) for layer in layers),
    }
    written: dict[str, Any] = rounded(found)
    return written, _pace(model, [collate(rows[:batch_size]), *[collate(rows[-batch_size:])] * 3])


def decide(model: Any, tokenizer: Any, samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The experts and weights of every token of a few problems.

    Args:
        model: a causal language model with experts, in evaluation mode.
        tokenizer: its tokenizer, a fast one.
        samples: lines of an evaluation's ``samples-*.jsonl``; prompt and output are tokenized again, as one text.

    Returns:
        What ``decisions.json`` holds.
    """
    tap = _Tap(model)
    problems = []
    for sample in samples:
        encoded = tokenizer(sample["prompt"] + sample["output"], return_offsets_mapping=True)
        ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
        with tap.open(), torch.inference_mode():
            model(**_on(model, {"input_ids": torch.tensor([ids])}))
        layers = []
        for gate, (_, weights, indices) in zip(tap.gates, tap.seen, strict=True):
            used = (indices < gate.num_experts).tolist()
            layers.append(
                {"gate": gate.path, "indices": _kept(indices, used), "weights": _kept(weights.double(), used)}
            )
        problems.append(
            {
                "index": sample["index"],
                "question": sample["question"],
                "answer": sample["answer"],
                "output": sample["output"],
                "tokens": [tokenizer.decode([id]) for id in ids],
                "prompt_tokens": sum(end <= len(sample["prompt"]) for _, end in offsets),
                "layers": layers,
            }
        )
    return {"problems": rounded(problems)}


def rounded(value: Any) -> Any:
    """The same with `DIGITS` significant digits in every float."""
    if isinstance(value, dict):
        return {key: rounded(one) for key, one in value.items()}
    if isinstance(value, list):
        return [rounded(one) for one in value]
    return float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value


def _counter(gate: Gate, index: int) -> _Layer:
    zeros = torch.zeros(gate.num_experts, dtype=torch.float64)
    return _Layer(gate, index, zeros, torch.zeros(gate.num_experts + 1, dtype=torch.float64))


def _evenness(load: torch.Tensor) -> float:
    share = load / load.sum().clamp(min=1)
    return float(torch.special.entr(share).sum() / torch.tensor(float(max(len(load), 2))).log())


def _kept(values: torch.Tensor, used: list[list[bool]]) -> list[list[Any]]:
    rows = values.tolist()
    return [[one for one, kept in zip(row, keep, strict=True) if kept] for row, keep in zip(rows, used, strict=True)]


def _on(model: Any, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value.to(model.device) for name, value in batch.items() if name != "labels"}


def _pace(model: Any, batches: Sequence[dict[str, torch.Tensor]]) -> float:
    """Tokens a second of forward passes; the first batch warms up."""
    tokens, began = 0, 0.0
    for number, batch in enumerate(batches):
        if number == 1:
            _synchronize(model)
            began = time.perf_counter()
        with torch.inference_mode():
            model(**_on(model, batch))
        tokens += int(batch["attention_mask"].sum()) if number else 0
    _synchronize(model)
    return tokens / (time.perf_counter() - began)


def _synchronize(model: Any) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
