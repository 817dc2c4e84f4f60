"""Times a band of k against its upper end, for each expert implementation: ``python -m benchmarks.dynamic_k``.

One OLMoE layer's experts (hidden 512, 64 experts of 256 unless told otherwise), k in [2, 8], and a router that uses 4.0
experts a token on average: the mode of random logits, shifted until it does. The two take turns; the ratio of the
medians is printed only beside a check against every expert on every token, masked. "always" is the library's own
implementation on the same layer at k = 8, as it runs without a swap.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from typing import Any

import torch
from torch import Tensor
from transformers import OlmoeConfig
from transformers.models.olmoe.modeling_olmoe import OlmoeExperts

from probmoe_ext.hf.experts import skip_unused_slots
from probmoe_ext.hf.gate import RouterForm
from probmoe_ext.ops import subset_mode

from .measure import alternate, machine
from .peers import Run


def routes(tokens: int, experts: int, band: tuple[int, int], mean: float) -> Tensor:
    """Indices ``[T, k_max]`` of the most probable subsets, ``mean`` used slots a token on average."""
    logits = torch.randn(tokens, experts)
    low, high = -10.0, 10.0
    for _ in range(50):
        shift = (low + high) / 2
        indices = subset_mode(logits - shift, band)
        used = float((indices < experts).sum()) / tokens
        low, high = (low, shift) if used < mean else (shift, high)
    return indices


def masked_dense(module: Any, x: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    """Every expert on every token, times its weight or 0; an expert at a time, for the memory."""
    experts = module.down_proj.shape[0]
    mixture = torch.zeros(len(x), experts + 1).scatter(-1, indices, weights)[:, :experts]
    total = torch.zeros_like(x)
    for index in range(experts):
        gate, up = (x @ module.gate_up_proj[index].T).chunk(2, dim=-1)
        total += (module.act_fn(gate) * up) @ module.down_proj[index].T * mixture[:, index, None]
    return total


def turn(module: Any, x: Tensor, indices: Tensor, weights: Tensor, backward: bool) -> Run:
    """One pass over the layer as a closure."""

    def run() -> None:
        for tensor in (x, weights, *module.parameters()):
            tensor.grad = None
        with torch.set_grad_enabled(backward):
            result = module(x, indices, weights)
            if backward:
                result.backward(torch.ones_like(result))

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 2048])
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--width", type=int, default=256, help="of an expert")
    parser.add_argument("--band", type=int, nargs=2, default=(2, 8))
    parser.add_argument("--mean", type=float, default=4.0)
    parser.add_argument("--implementations", nargs="+", default=["eager", "grouped_mm", "batched_mm"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=4.0, help="of turns for each line, 7 turns at least")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    config = OlmoeConfig(hidden_size=args.hidden, intermediate_size=args.width, num_experts=args.experts)
    always = OlmoeExperts(config)
    for parameter in always.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    banded = copy.deepcopy(always)
    banded.config = copy.deepcopy(config)
    skip_unused_slots(banded, RouterForm(args.experts, args.hidden, args.band[1], False, "logits", False))
    print(", ".join(f"{name}: {value}" for name, value in machine().items()), f"threads: {args.threads}", sep=", ")
    print("| experts | T | pass | mean k | always, ms | always in our dispatch, ms | band, ms | always / band |")
    print("|---|---|---|---|---|---|---|---|")
    for tokens in args.tokens:
        indices = routes(tokens, args.experts, tuple(args.band), args.mean)
        full = routes(tokens, args.experts, (args.band[1], args.band[1]), args.band[1])
        mean = float((indices < args.experts).sum()) / tokens
        x = torch.randn(tokens, args.hidden, requires_grad=True)
        weights = torch.rand(tokens, args.band[1])
        own = weights.masked_fill(indices == args.experts, 0).requires_grad_()
        weights.requires_grad_()
        for name in args.implementations:
            always.config._experts_implementation = banded.config._experts_implementation = name
            if name == "batched_mm" and tokens * args.band[1] > 1024:
                continue  # it copies the weights of an expert for each slot
            with torch.no_grad():
                torch.testing.assert_close(
                    banded(x, indices, own), masked_dense(banded, x, indices, own), rtol=1e-4, atol=1e-4
                )
            for backward in (False, True):
                ours = turn(banded, x, indices, own, backward)
                mine, theirs = alternate(ours, turn(always, x, full, weights, backward), args.seconds)
                _, same = alternate(ours, turn(banded, x, full, weights, backward), args.seconds)
                a, b, c = (statistics.median(times) * 1e3 for times in (theirs, same, mine))
                passes = "forward + backward" if backward else "forward"
                line = f"| {name} | {tokens} | {passes} | {mean:.2f} | {a:.1f} | {b:.1f} | {c:.1f} | {a / c:.2f} |"
                print(line, flush=True)


if __name__ == "__main__":
    main()
