"""What routing costs in a whole model: ``python -m benchmarks.full_size --json benchmarks/results/NAME.json``.

An OLMoE-1B-7B with random weights (16 layers, hidden 2048, 64 experts of 1024, k = 8; 6.9 billion parameters) trains
with conventional top-k, ProbMoE exact and ProbMoE dynamic: the same model, its routers swapped in turn, so that every
round times all three on the same batch. Reported are the median step (forward, backward, and one pass of SGD, which
keeps no moments), tokens a second and the peak memory, as ratios to top-k: the quantities of Figure 7 of arXiv
2606.01509. Random weights route more evenly than trained ones; experts a token are therefore reported beside.

It wants a GPU with 48 GB free in bfloat16. ``--device cpu`` with small sizes is a check of the program.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

import torch
from transformers import OlmoeConfig, OlmoeForCausalLM

from probmoe_ext.files import write_json
from probmoe_ext.hf import moe_layers, restore_router, swap_router

from .gpu import elapsed
from .measure import machine

ROUTERS = (("top-k", "topk", None), ("ProbMoE exact", "probmoe", None), ("ProbMoE dynamic", "probmoe", 0.75))
"""Title, router, and the smallest k as a share of the model's (None: exactly the model's)."""
WARM_UP = 2


def build(layers: int, hidden: int, width: int, experts: int, k: int, device: torch.device) -> Any:
    """An OLMoE with random weights, in bfloat16 on a GPU."""
    config = OlmoeConfig(
        num_hidden_layers=layers,
        hidden_size=hidden,
        intermediate_size=width,
        num_experts=experts,
        num_experts_per_tok=k,
        num_attention_heads=16,
        num_key_value_heads=16,
        use_cache=False,
    )
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16 if device.type == "cuda" else torch.float32)
    try:
        with device:
            return OlmoeForCausalLM(config).train()
    finally:
        torch.set_default_dtype(before)


def measure(model: Any, rows: int, length: int, rounds: int, device: torch.device) -> list[dict[str, Any]]:
    """Train by each router in turn.

    Args:
        model: an OLMoE.
        rows: sequences in a batch.
        length: tokens in each.
        rounds: steps of each router that count.
        device: where the model is.

    Returns:
        A record for each router.
    """
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    k = model.config.num_experts_per_tok
    seconds: list[list[float]] = [[] for _ in ROUTERS]
    memory, used = [0] * len(ROUTERS), [0.0] * len(ROUTERS)
    chosen: list[torch.Tensor] = []
    for turn in range(WARM_UP + rounds):
        ids = torch.randint(model.config.vocab_size, (rows, length), device=device)

        def step(ids: torch.Tensor = ids) -> None:
            model(ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        for index, (_, router, share) in enumerate(ROUTERS):
            swap_router(model, router, k=k if share is None else (int(share * k), k))
            if turn == 0:
                hook = moe_layers(model)[0].gate.register_forward_hook(lambda gate, args, out: chosen.append(out[2]))
                step()
                hook.remove()
                used[index] = float((chosen.pop() < model.config.num_experts).sum()) / ids.numel()
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            seconds[index].append(1e-6 * elapsed(step, 1, device))
            if device.type == "cuda":
                memory[index] = max(memory[index], torch.cuda.max_memory_allocated(device))
            restore_router(model)
    kept = [one[WARM_UP:] for one in seconds]
    return [
        {
            "router": title,
            "experts_per_token": used[index],
            "step_seconds": statistics.median(kept[index]),
            "tokens_per_second": rows * length / statistics.median(kept[index]),
            "step_ratio": statistics.median(one / base for one, base in zip(kept[index], kept[0], strict=True)),
            "peak_memory_bytes": memory[index] or None,
            "memory_ratio": memory[index] / memory[0] if memory[0] else None,
        }
        for index, (title, _, _) in enumerate(ROUTERS)
    ]


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--device", default="cuda", help="cuda, or cpu at small sizes (default: %(default)s)")
    for name, value, text in (
        ("layers", 16, "decoder layers"),
        ("hidden", 2048, "width of the hidden states"),
        ("width", 1024, "width of an expert"),
        ("experts", 64, "experts in a layer"),
        ("k", 8, "experts a token"),
        ("rows", 4, "sequences in a batch"),
        ("length", 2048, "tokens in a sequence"),
        ("rounds", 10, "steps of each router that count"),
    ):
        parser.add_argument(f"--{name}", type=int, default=value, help=f"{text} (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="write the results there")
    options = parser.parse_args(argv)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("no GPU: give --device cpu, and small sizes")
    device = torch.device(options.device)
    model = build(options.layers, options.hidden, options.width, options.experts, options.k, device)
    found = measure(model, options.rows, options.length, options.rounds, device)
    print("| router | experts a token | ms a step | tokens a second | step | peak memory |\n|---|---|---|---|---|---|")
    for one in found:
        memory = "–" if one["memory_ratio"] is None else f"{one['memory_ratio']:.3f}"
        print(
            f"| {one['router']} | {one['experts_per_token']:.2f} | {1000 * one['step_seconds']:.1f} "
            f"| {one['tokens_per_second']:.0f} | {one['step_ratio']:.3f} | {memory} |"
        )
    if options.json:
        sizes = {
            name: getattr(options, name) for name in ("layers", "hidden", "width", "experts", "k", "rows", "length")
        }
        write_json(options.json, {"machine": machine(), "sizes": sizes, "routers": found})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
