"""The table of all routers: ``python -m benchmarks.routers [--seconds 2] [--rows 1024] [NAME ...]``.

Writes ``docs/routers.md`` between ``<!-- routers: table -->`` and ``<!-- routers: end -->``, and what was measured to
``docs/routers.json``. Names measure these routers anew, and keep the others' figures; without, all are measured. Each
takes turns with top-k in one process, on the same inputs, and the ratio is that of the medians.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from probmoe_ext.hf import swap_router
from probmoe_ext.routers import Router, available_routers, make_router, router_options
from probmoe_ext.routers.context import Batch, LayerContext

from .measure import ROOT, alternate, machine
from .peers import Run

PAGE = ROOT / "docs" / "routers.md"
RESULTS = ROOT / "docs" / "routers.json"
BETWEEN = re.compile(r"(<!-- routers: table -->\n).*?(<!-- routers: end -->)", re.DOTALL)
EXPERTS, K, HIDDEN, INNER = 64, 8, 256, 128
"""Of the layer that is measured."""
LENGTH, VOCABULARY = 128, 50304
K_OF: dict[str, Any] = {"switch": 1, "da_moe": (4, 12), "lory": EXPERTS, "top_p": (1, EXPERTS)}
"""Experts per token of routers that do not take 8."""
PAPER = re.compile(r"arXiv (\d{4}\.\d{4,5})")
NAME = r"[A-Z][\w'’-]+"
AUTHORS = re.compile(rf'({NAME}(?:, {NAME})*(?: et al\.| (?:&|and) {NAME})?)(?:, "[^"]*",)? (\d{{4}})')
"""``Wang, Zhu & Chen 2025``, or with the title between names and year."""


def build(name: str, experts: int = EXPERTS, k: Any = None, hidden: int = HIDDEN) -> Router:
    """A router as it is measured: the defaults, and ``k`` unless it takes no such number."""
    options = {"hidden_size": hidden} if "hidden_size" in router_options(name) else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what a router warns of is in its docstring
        return make_router(name, num_experts=experts, k=K_OF.get(name, K) if k is None else k, **options)


def sources(router: Router) -> str:
    """The papers that the docstrings name, with their authors where these stand before the number."""
    module = __import__(type(router).__module__, fromlist=["__doc__"])
    text = " ".join(f"{type(router).__doc__ or ''} {module.__doc__ or ''}".split())
    found: dict[str, str] = {}
    start = 0
    for paper in PAPER.finditer(text):
        authors = AUTHORS.findall(text[start : paper.start()])
        found.setdefault(paper[1], f"{' '.join(authors[-1])}, " if authors else "")
        start = paper.end()
    if not found:
        return " ".join(next(iter(AUTHORS.findall(text)), ("–",)))
    return "; ".join(f"{who}[{number}](https://arxiv.org/abs/{number})" for number, who in found.items())


def parameters(router: Router) -> str:
    """What it learns beside the gate, by name and shape."""
    known = {router.num_experts: "E", 2 * router.num_experts: "2E", HIDDEN: "H"}
    shapes = [
        f"`{name}` [{', '.join(known.get(size, str(size)) for size in parameter.shape)}]"
        for name, parameter in router.named_parameters()
    ]
    return ", ".join(shapes) or "–"


def describe(name: str) -> dict[str, str]:
    """What needs no measurement."""
    router = build(name)
    plain = router.eval().top_k_in_evaluation()
    return {
        "source": sources(router),
        "options": ", ".join(f"`{option}`" for option in router_options(name)) or "–",
        "parameters": parameters(router),
        "plain": "no" if plain is None else "yes" + (", renormalised" if plain[1] else ""),
    }


class Layer:
    """The experts of one layer of a random OLMoE behind a router, with all that a router may ask for."""

    def __init__(self, name: str, rows: int, sizes: dict[str, int] | None = None) -> None:
        from transformers import OlmoeConfig, OlmoeForCausalLM

        used = {"experts": EXPERTS, "k": K, "hidden": HIDDEN, "inner": INNER} | (sizes or {})
        config = OlmoeConfig(
            vocab_size=256,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
            hidden_size=used["hidden"],
            intermediate_size=used["inner"],
            num_hidden_layers=1,
            num_attention_heads=4,
            num_experts=used["experts"],
            num_experts_per_tok=used["k"],
            attn_implementation="eager",
        )
        torch.manual_seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            k = K_OF.get(name, used["k"])
            model = swap_router(OlmoeForCausalLM(config), name, k=k).train()
        self.block: Any = model.model.layers[0].mlp
        self.router: Any = self.block.gate.probmoe
        length = min(LENGTH, rows)
        rows = rows // length * length
        self.ids = torch.randint(VOCABULARY, (rows // length, length))
        scores = torch.randn(rows // length, 4, length, length).masked_fill(
            torch.ones(length, length).triu(1).bool(), -torch.inf
        )
        self.attention = scores.softmax(-1)
        self.router.batch = Batch(token_ids=self.ids)
        self.hidden = torch.randn(rows // length, length, used["hidden"], requires_grad=True)
        nn.init.normal_(self.block.gate.weight, std=used["hidden"] ** -0.5)  # logits of unit variance
        self.logits = torch.nn.functional.linear(self.hidden.flatten(0, 1), self.block.gate.weight).detach()
        self.logits.requires_grad_()
        before = LayerContext()
        before.logits = torch.randn_like(self.logits)
        self.router.layer = LayerContext(previous=before)

    def route(self) -> tuple[Tensor, Tensor]:
        """The router alone, on given logits."""
        self.router.layer.attention = self.attention
        weights, indices = self.router(self.hidden.flatten(0, 1).detach(), self.logits)
        return weights, indices

    def alone(self) -> None:
        """The router forward and backward, as one step of training has it."""
        self.router.begin_pass()
        weights, _ = self.route()
        if weights.requires_grad:
            weights.sum().backward()
        self.logits.grad = None

    def whole(self) -> None:
        """Gate, router and experts, forward and backward."""
        self.router.begin_pass()
        self.router.layer.attention = self.attention
        output = self.block(self.hidden)
        (output if isinstance(output, Tensor) else output[0]).sum().backward()
        self.block.zero_grad()
        self.hidden.grad = None

    def experts_per_token(self, training: bool) -> float:
        """The mean number of slots that are used."""
        self.router.train(training)
        with torch.no_grad():
            counts = [(self.route()[1] < self.router.num_experts).sum(-1).double().mean().item() for _ in range(8)]
        self.router.train()
        return statistics.mean(counts)


def ratio(ours: Run, peer: Run, seconds: float) -> float:
    """How much longer one takes, by medians of turns."""
    mine, theirs = alternate(ours, peer, seconds)
    return statistics.median(mine) / statistics.median(theirs)


def measure(name: str, rows: int, seconds: float, sizes: dict[str, int] | None = None) -> dict[str, float]:
    """Experts per token and the cost beside top-k, of a router with its defaults."""
    ours, peer = Layer(name, rows, sizes), Layer("topk", rows, sizes)
    return {
        "training": ours.experts_per_token(True),
        "evaluation": ours.experts_per_token(False),
        "router": ratio(ours.alone, peer.alone, seconds),
        "layer": ratio(ours.whole, peer.whole, seconds),
    }


def table(document: dict[str, Any]) -> str:
    """One row for each router that was measured."""
    rows = [
        "| name | source | options | parameters of its own | experts per token, training / evaluation "
        "| cost of the router | cost of the layer | inference is plain top-k |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, measured in sorted(document["routers"].items()):
        about = describe(name)
        k = K_OF.get(name, K)
        of = str(k) if isinstance(k, int) else "–".join(map(str, k))
        rows.append(
            f"| `{name}` | {about['source']} | {about['options']} | {about['parameters']} "
            f"| {measured['training']:.3g} / {measured['evaluation']:.3g} (k = {of}) "
            f"| {measured['router']:.2f} | {measured['layer']:.2f} | {about['plain']} |"
        )
    return "\n".join(rows)


def provenance(document: dict[str, Any]) -> str:
    """What produced the figures."""
    of = document["machine"]
    return (
        f"{of['processor']} ({of['instruction_set']}), 1 thread, torch {of['torch']}, commit {of['commit']}, float32, "
        f"T = {document['rows']} tokens, E = {EXPERTS}, H = {HIDDEN}, experts of width {INNER}, load {of['load']}; "
        "`python -m benchmarks.routers`."
    )


def write(document: dict[str, Any], page: Path = PAGE) -> int:
    """Replaces the table of the page; how many there were."""
    text, count = BETWEEN.subn(
        lambda found: f"{found[1]}{provenance(document)}\n\n{table(document)}\n{found[2]}", page.read_text()
    )
    page.write_text(text)
    return count


def main(argv: list[str] | None = None) -> int:
    """Measures, and writes the page."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.routers", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="routers to measure anew; all by default")
    parser.add_argument("--seconds", type=float, default=2.0, help="for each ratio")
    parser.add_argument("--rows", type=int, default=1024, help="tokens")
    given = parser.parse_args(argv)
    unknown = set(given.names) - set(available_routers())
    if unknown:
        parser.error(f"no such router: {', '.join(sorted(unknown))}; known are {', '.join(available_routers())}")
    torch.set_num_threads(1)
    known = json.loads(RESULTS.read_text())["routers"] if given.names and RESULTS.exists() else {}
    document: dict[str, Any] = {"machine": machine(), "rows": given.rows, "routers": known}
    for name in given.names or available_routers():
        known[name] = measure(name, given.rows, given.seconds)
        print(f"{name:<20}" + "".join(f"{key} {value:<10.4g}" for key, value in known[name].items()), flush=True)
    RESULTS.write_text(json.dumps(document, indent=1, sort_keys=True) + "\n")
    if not write(document):
        print(f"{PAGE} has no '<!-- routers: table -->' ... '<!-- routers: end -->'", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
