"""DirMoE's sparsity penalty on and off: ``python -m benchmarks.dirmoe_sparsity`` (the paper's ablation, small).

A layer of linear experts learns from one whose tokens use k experts. All gates start half open. With the penalty of the
mean number of open gates this goes to k; with the penalty of each token's number, the paper's, it ends somewhat below
what the task alone adds to k; without a penalty the task alone decides. Writes ``docs/dirmoe_sparsity.json`` and, if
matplotlib is installed, ``docs/dirmoe_sparsity.svg``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from probmoe_ext.routers import make_router

ROOT = Path(__file__).parents[1]
SIZES = ((8, 1), (8, 2), (16, 3), (32, 2), (48, 1), (48, 3))
PENALTIES: tuple[tuple[float, Literal["token", "mean"]], ...] = ((0.01, "mean"), (0.01, "token"), (0.0, "mean"))
HIDDEN, TOKENS, LEARNING_RATE = 16, 128, 0.02
STEPS = 4000
"""For every size: as many as the slowest of them, (48, 1), needs to settle. There the task pulls at the gates until the
experts have learnt."""
BETAS = (0.9, 0.95)
"""As language models are trained. At 0.999 the first gradients, of a penalty of (E / 2 - k) ** 2, shrink Adam's steps
for a thousand more."""
SCALE = 0.02
"""Of the experts' weights, by whose square the task pulls at the gates: far less than a penalty of 0.01 does."""


def train_toy(
    num_experts: int,
    k: int,
    sparsity_weight: float,
    steps: int,
    sparsity_of: Literal["token", "mean"] = "mean",
    seed: int = 0,
) -> list[float]:
    """Train the toy layer.

    Args:
        num_experts: ``E``.
        k: Experts per token, of the teacher and of the target.
        sparsity_weight: Coefficient of the penalty.
        steps: Optimizer steps.
        sparsity_of: What the penalty is the square of.
        seed: Of weights, data and routing.

    Returns:
        The mean expected number of open gates at each step.
    """
    torch.manual_seed(seed)
    gate = nn.Linear(HIDDEN, num_experts, bias=False)
    router = make_router(
        "dirmoe",
        num_experts=num_experts,
        k=k,
        hidden_size=HIDDEN,
        normalize=k > 1,  # the weight of a single expert would be 1, whatever its gate
        sparsity_weight=sparsity_weight,
        sparsity_of=sparsity_of,
        gate_bias=0.0,
    )
    experts = nn.Parameter(torch.randn(num_experts, HIDDEN) * SCALE)
    teacher, teacher_gate = torch.randn(num_experts, HIDDEN) * SCALE, torch.randn(num_experts, HIDDEN)
    optimizer = torch.optim.Adam([*gate.parameters(), *router.parameters(), experts], lr=LEARNING_RATE, betas=BETAS)
    open_gates = []
    for _ in range(steps):
        x = torch.randn(TOKENS, HIDDEN)
        best = torch.softmax(x @ teacher_gate.T, -1).topk(k)
        true_weights = best.values / best.values.sum(-1, keepdim=True)
        wanted = (true_weights * (x @ teacher.T).gather(-1, best.indices)).sum(-1)
        weights, indices = router(x, gate(x))
        loss = ((weights * (x @ experts.T).gather(-1, indices)).sum(-1) - wanted).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        open_gates.append(float(router.open_gates))  # type: ignore[arg-type]
    return open_gates


def draw(curves: dict[str, dict[str, list[float]]], stride: int, path: Path) -> None:
    """One panel for each size; a curve's values are ``stride`` steps apart."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5), layout="constrained")
    for axes, (size, by_penalty) in zip(figure.subplots(2, 3).flat, curves.items(), strict=True):
        for label, values in by_penalty.items():
            axes.plot(range(0, stride * len(values), stride), values, label=label, linewidth=1)
        axes.axhline(int(size.split(",")[1]), color="black", linewidth=0.8, linestyle=":", label="target k")
        axes.set_title(f"(E, k) = ({size})", fontsize=9)
        axes.set_ylim(bottom=0)
    figure.axes[0].legend(fontsize=7)
    figure.supxlabel("step", fontsize=9)
    figure.supylabel("expected number of open gates", fontsize=9)
    figure.savefig(path)


def main(steps: int = STEPS) -> None:
    """Runs all sizes, prints where they end, and writes curves and plot."""
    torch.set_num_threads(1)
    curves: dict[str, dict[str, list[float]]] = {}
    stride = max(steps // 150, 1)
    for num_experts, k in SIZES:
        curves[f"{num_experts},{k}"] = {}
        for weight, sparsity_of in PENALTIES:
            values = train_toy(num_experts, k, weight, steps, sparsity_of)
            end = sum(values[-100:]) / 100
            label = f"weight {weight}, of the {sparsity_of}" if weight else "weight 0"
            print(f"E={num_experts:<3} k={k}  {label:<25} open gates {end:7.3f}  off by {abs(end / k - 1):.1%}")
            curves[f"{num_experts},{k}"][label] = [round(value, 4) for value in values[::stride]]
    (ROOT / "docs" / "dirmoe_sparsity.json").write_text(json.dumps(curves) + "\n")
    try:
        draw(curves, stride, ROOT / "docs" / "dirmoe_sparsity.svg")
    except ImportError:
        print("matplotlib is not installed: no plot")


if __name__ == "__main__":
    main()
