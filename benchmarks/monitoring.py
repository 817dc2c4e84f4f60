"""Times training steps with and without RoutingMonitor, turn by turn: ``python -m benchmarks.monitoring``.

An OLMoE of a few layers with random weights; a step is forward and backward, and a report every ``--log`` steps, as a
Trainer would ask for one. "off" is the same step twice: what the machine cannot tell apart. The last line is what the
monitor adds for all layers, timed by itself.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch
from transformers import OlmoeConfig, OlmoeForCausalLM

from probmoe_ext.hf import RoutingMonitor, swap_router

from .measure import alternate, machine
from .peers import Run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--width", type=int, default=256, help="of an expert")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--batch", type=int, nargs=2, default=(4, 256), help="sequences and their length")
    parser.add_argument("--log", type=int, default=10)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=60.0)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    config = OlmoeConfig(
        vocab_size=4096,
        hidden_size=args.hidden,
        intermediate_size=args.width,
        num_hidden_layers=args.layers,
        num_attention_heads=8,
        num_experts=args.experts,
        num_experts_per_tok=min(8, args.experts),
        experts_implementation="grouped_mm",
    )
    model = swap_router(OlmoeForCausalLM(config).train(), "probmoe")
    ids = torch.randint(3, 4096, tuple(args.batch))
    mask = torch.ones_like(ids)
    monitor = RoutingMonitor(model)
    steps = 0

    def step() -> None:
        model.zero_grad(set_to_none=True)
        model(ids, attention_mask=mask, labels=ids).loss.backward()

    def watched() -> None:
        nonlocal steps
        monitor.start()
        step()
        steps += 1
        if steps % args.log == 0:
            monitor.scalars()
        monitor.stop()

    print(", ".join(f"{name}: {value}" for name, value in machine().items()))
    print("| monitor | ms a step | without, ms | ratio of medians | of the 20th percentiles |")
    print("|---|---|---|---|---|")
    runs: tuple[tuple[str, Run], ...] = (("on", watched), ("off", step))
    for name, run in runs:
        mine, theirs = alternate(run, step, args.seconds)
        a, b = statistics.median(mine), statistics.median(theirs)
        fast = [statistics.quantiles(times, n=5)[0] for times in (mine, theirs)]
        print(f"| {name} | {a * 1e3:.1f} | {b * 1e3:.1f} | {a / b:.3f} | {fast[0] / fast[1]:.3f} |", flush=True)
    seen: list[Any] = []
    hook = monitor.layers[0].gate.register_forward_hook(lambda gate, args, out: seen.extend((args[0], *out)))
    step()
    hook.remove()
    hidden, logits, _, indices = (one.detach() for one in seen)
    keep, buckets = mask.flatten().bool(), torch.zeros(mask.numel(), dtype=torch.long)
    times = []
    for _ in range(30):
        start = time.perf_counter()
        monitor.tallies[0].add(hidden, logits, indices, keep, buckets)
        times.append((time.perf_counter() - start) * args.layers)
    cost = statistics.median(times)
    print(f"{cost * 1e3:.2f} ms a step for {args.layers} layers, {cost / b:.2%} of it")


if __name__ == "__main__":
    main()
