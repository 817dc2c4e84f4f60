"""A small OLMoE from random weights by top-k, DirMoE and ReLU routing: ``python -m benchmarks.dirmoe_language_model``.

The models start from the same weights and see the same batches. They take turns, step by step, so that a slow moment of
the machine hits all of them; the time of a step (forward, backward, update) is the processor's, of one thread, and is
compared by the median over the steps of its ratio to top-k's. Puts the results of the model under its name in
``docs/dirmoe_language_model.json`` and, if matplotlib is installed, the curves in ``docs/dirmoe_<model>.svg``.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.run import machine
from probmoe_ext.files import write_text
from probmoe_ext.hf import swap_router
from probmoe_ext.routers import ExpertsPerToken, Router, annealed_temperature, aux_losses, register_router
from probmoe_ext.routers.dirmoe import dirmoe_routers, set_temperature
from probmoe_ext.train.problems import generate
from probmoe_ext.train.tiny import BUILT_IN, TINY_OLMOE, Size, build_tiny

ROOT = Path(__file__).parents[1]
RECORD = ROOT / "docs" / "dirmoe_language_model.json"
BATCH, LENGTH, LEARNING_RATE, WARMUP = 16, 96, 3e-3, 20
TEMPERATURE, RATE, FLOOR = 1.0, 0.995, 0.3
ROUTERS = ("topk", "dirmoe", "remoe")
MODELS = {**BUILT_IN, "wide-olmoe": Size(2, 256, 16, 4, 1024)}
"""Beside the built-in models one of 26 M parameters, whose experts are as wide as those of OLMoE-1B-7B."""


@register_router("relu-routing")
class ReLURouter(Router):
    """ReMoE's routing (Wang, Zhu & Chen, ICLR 2025): the weights are ``relu(logits)``, experts at 0 are not run.

    An L1 penalty holds the mean number of active experts at ``active``: its coefficient goes up by a factor when more
    are active, and down when fewer are.
    """

    has_loss = True

    def __init__(self, num_experts: int, k: ExpertsPerToken, *, active: int, factor: float = 1.2) -> None:
        super().__init__(num_experts, k, active=active, factor=factor)
        self.active, self.factor, self.coefficient = active, factor, 1e-8
        self.share = float(num_experts)

    def forward(self, hidden_states: torch.Tensor, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Route ``[T, E]`` logits to weights and indices ``[T, E]``; experts that are not used have index E."""
        weights = torch.relu(logits)
        used = weights > 0
        indices = torch.where(used, torch.arange(self.num_experts, device=logits.device), self.num_experts)
        if self.training:
            penalty = self.coefficient * weights.float().sum(-1).mean() / self.active
            self.share = float(used.float().sum(-1).mean())
            self.coefficient *= self.factor if self.share > self.active else 1 / self.factor
            weights = self.join_loss(weights, penalty, "l1")
        return weights, indices


def swap(model: Any, router: str, experts: int, active: int) -> Any:
    """The model with one of the three routers."""
    if router == "dirmoe":
        return swap_router(model, "dirmoe", k=active, temperature=TEMPERATURE)
    if router == "remoe":
        return swap_router(model, "relu-routing", k=(0, experts), active=active)
    return swap_router(model, "topk", k=active)


def batches(texts: list[str], tokenizer: Any, steps: int, seed: int) -> list[torch.Tensor]:
    """Packed token ids ``[BATCH, LENGTH]`` for each step."""
    stream: list[int] = []
    rng = random.Random(seed)
    while len(stream) < steps * BATCH * LENGTH:
        for text in rng.sample(texts, len(texts)):
            stream += [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    ids = torch.tensor(stream[: steps * BATCH * LENGTH])
    return list(ids.reshape(steps, BATCH, LENGTH))


def held_out_loss(model: Any, data: list[torch.Tensor]) -> float:
    """Mean loss in evaluation mode, in nats a token."""
    model.eval()
    with torch.no_grad():
        losses = [float(model(ids, labels=ids).loss) for ids in data]
    model.train()
    return sum(losses) / len(losses)


def train(model_name: str, steps: int, seed: int) -> dict[str, Any]:
    """Train a model with each router, in turns; curves, held-out losses and times by router."""
    texts = [f"{one.question} {one.answer}" for one in generate("train", 4000, seed=seed)]
    held_out = [f"{one.question} {one.answer}" for one in generate("test", 600, seed=seed)]
    size = MODELS[model_name]
    base, tokenizer = build_tiny(texts, seed, size)
    data = batches(texts, tokenizer, steps, seed)
    judged = batches(held_out, tokenizer, 8, seed)
    models = {router: swap(copy.deepcopy(base), router, size.experts, size.active).train() for router in ROUTERS}
    optimizers = {
        name: torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98))
        for name, model in models.items()
    }
    result: dict[str, Any] = {name: {"loss": [], "milliseconds": []} for name in models}
    result["dirmoe"]["open_gates"], result["remoe"]["active_experts"] = [], []
    order = list(models)
    for step, ids in enumerate(data):
        random.Random(step).shuffle(order)
        set_temperature(models["dirmoe"], annealed_temperature(step, TEMPERATURE, RATE, FLOOR))
        for name in order:
            model, optimizer = models[name], optimizers[name]
            optimizer.param_groups[0]["lr"] = LEARNING_RATE * min(1.0, (step + 1) / WARMUP)
            torch.manual_seed(step)
            start = time.process_time()
            loss = model(ids, labels=ids).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            result[name]["milliseconds"].append(1e3 * (time.process_time() - start))
            result[name]["loss"].append(float(loss.detach()))
        gates = [float(router.open_gates) for router in dirmoe_routers(models["dirmoe"])]
        result["dirmoe"]["open_gates"].append(sum(gates) / len(gates))
        shares = [module.share for module in models["remoe"].modules() if isinstance(module, ReLURouter)]
        result["remoe"]["active_experts"].append(sum(shares) / len(shares))
        if step % 20 == 19:
            print(f"step {step + 1}: " + ", ".join(f"{n} {result[n]['loss'][-1]:.3f}" for n in models), flush=True)
    for name, model in models.items():
        result[name]["held_out_loss"] = held_out_loss(model, judged)
        result[name]["auxiliary"] = {path: float(value) for path, value in aux_losses(model).items()}
        times = result[name]["milliseconds"][10:]
        ratios = [mine / base for mine, base in zip(times, result["topk"]["milliseconds"][10:], strict=True)]
        result[name]["median_milliseconds"] = statistics.median(times)
        result[name]["step_time_ratio"] = statistics.median(ratios)
    return result


def draw(result: dict[str, Any], path: Path) -> None:
    """Loss curves, smoothed over ten steps."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for name in ROUTERS:
        loss = result[name]["loss"]
        smooth = [statistics.fmean(loss[max(0, n - 9) : n + 1]) for n in range(len(loss))]
        axes.plot(smooth, label=f"{name}, held-out {result[name]['held_out_loss']:.3f}", linewidth=1)
    axes.set_xlabel("step")
    axes.set_ylabel("training loss, nats a token")
    axes.legend(fontsize=8)
    figure.savefig(path)


def main() -> None:
    """Trains, prints a line for each router, and writes the results."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.dirmoe_language_model")
    parser.add_argument("--model", choices=sorted(MODELS), default=TINY_OLMOE, help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    result = train(options.model, options.steps, options.seed)
    for name in ROUTERS:
        one = result[name]
        print(
            f"{name:<8} held-out loss {one['held_out_loss']:.4f}  step {one['median_milliseconds']:.1f} ms, "
            f"{one['step_time_ratio']:.3f} x top-k"
        )
        one["loss"] = [round(value, 4) for value in one["loss"]]
        del one["milliseconds"]
    for name, counts in (("dirmoe", "open_gates"), ("remoe", "active_experts")):
        result[name][counts] = [round(value, 3) for value in result[name][counts]]
    record = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    record[options.model] = {
        "machine": machine(),
        "steps": options.steps,
        "seed": options.seed,
        "routers": result,
    }
    write_text(RECORD, json.dumps(record) + "\n")
    try:
        draw(result, ROOT / "docs" / f"dirmoe_{options.model}.svg")
    except ImportError:
        print("matplotlib is not installed: no plot")


if __name__ == "__main__":
    main()
