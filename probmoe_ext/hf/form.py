"""Learn what the router of a layer computes by running its class, so that no list of classes is needed."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from probmoe_ext.hf.gate import RouterForm
from probmoe_ext.hf.layers import MoELayer, shape_of
from probmoe_ext.hf.reclass import original_class

PROBE_TOKENS = 32


def read_form(layer: MoELayer) -> RouterForm:
    """What the router of a layer computes, found by running its class on small random weights on the CPU.

    The model's own tensors are not touched, so this holds for a model on any device, the meta device included.

    Raises:
        ValueError: If it is not softmax, top-k, and perhaps renormalisation; the message says what it is.
    """
    num_experts, hidden_size = shape_of(layer.gate.weight)
    held = [name for child, module in layer.gate.named_children() for name, _ in module.named_parameters(child)]
    if held:
        raise _refusal(layer, "it has modules of its own with parameters")
    # Every device and dtype is spelt out: defaults may have been changed around the call.
    x = _random((PROBE_TOKENS, hidden_size), torch.Generator("cpu").manual_seed(0), torch.float32)
    twin = _twin(layer.gate, torch.float32)
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        _, weights, indices = _run(layer, twin, x)
        probs = torch.softmax(F.linear(x, twin.weight), dim=-1)
        k = indices.shape[-1]
        best, order = probs.topk(k, dim=-1)
        # Chosen by another score, or weighted by one: refuse rather than train on something else than the model's.
        if weights.shape != indices.shape or not torch.equal(indices.sort().values, order.sort().values):
            raise _refusal(layer, "it does not choose the k largest of softmax(hidden @ weight.T)")
        chosen = probs.gather(-1, indices)
        plain = torch.allclose(weights.float(), chosen, rtol=1e-4, atol=1e-6)
        normed = torch.allclose(weights.float(), chosen / best.sum(-1, keepdim=True), rtol=1e-4, atol=1e-6)
        if not (plain or normed):
            scores = torch.sigmoid(F.linear(x, twin.weight)).gather(-1, indices)
            known = (scores, scores / scores.sum(-1, keepdim=True))
            what = "sigmoid scores, not" if any(torch.allclose(weights.float(), one) for one in known) else "not"
            raise _refusal(layer, f"its weights are {what} the softmax probabilities of the chosen experts")
        # Half precision tells where the class computes and what it records and returns.
        x, twin = x.bfloat16(), _twin(layer.gate, torch.bfloat16)
        recorded, weights, _ = _run(layer, twin, x)
        logits = F.linear(x, twin.weight)
        records = {
            "logits": logits,
            "logits as float32": logits.float(),
            "float32 logits": F.linear(x.float(), twin.weight.float()),
            "probabilities": torch.softmax(logits, dim=-1, dtype=torch.float32),
        }
        matching = [what for what, value in records.items() if value.dtype == recorded.dtype and value.equal(recorded)]
    if not matching:
        raise _refusal(layer, "its first result is neither hidden @ weight.T nor the softmax of it")
    return RouterForm(
        num_experts=num_experts,
        hidden_size=hidden_size,
        k=k,
        # With k = E both hold; what the module says of itself decides (one that says nothing renormalises).
        normalize=normed and (not plain or bool(getattr(layer.gate, "norm_topk_prob", True))),
        records=matching[0],
        float32_weights=weights.dtype == torch.float32,
    )


def _twin(gate: nn.Module, dtype: torch.dtype) -> Any:
    """A module of the same class and settings, with random tensors of the same shapes on the CPU."""
    rng = torch.Generator("cpu").manual_seed(1)
    twin: Any = object.__new__(original_class(gate))
    twin.__dict__.update(gate.__dict__)
    twin.__dict__["training"] = False
    for group in ("_parameters", "_buffers"):
        tensors = {name: value for name, value in gate.__dict__[group].items() if value is not None}
        twin.__dict__[group] = gate.__dict__[group] | {
            name: _random(shape_of(value), rng, dtype) / max((1, *shape_of(value)[1:])) ** 0.5
            for name, value in tensors.items()
        }
    return twin


def _random(shape: tuple[int, ...], rng: torch.Generator, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape, generator=rng, device="cpu", dtype=torch.float32).to(dtype)


def _run(layer: MoELayer, twin: Any, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    try:
        # Past the hooks: they belong to the model, and this is not it.
        result = type(twin).forward(twin, x)
    except Exception as error:
        raise _refusal(layer, f"it failed on a small input ({type(error).__name__}: {error})") from error
    if not (isinstance(result, tuple) and len(result) == 3 and all(isinstance(one, torch.Tensor) for one in result)):
        got = f"{len(result)} results" if isinstance(result, tuple) else f"a {type(result).__name__}"
        raise _refusal(layer, f"it returns {got} rather than (router_logits, weights, indices)")
    return result


def _refusal(layer: MoELayer, reason: str) -> ValueError:
    gate = layer.gate
    extra = [name for name, _ in (*gate.named_parameters(), *gate.named_buffers()) if name != "weight"]
    signs = ("n_group", "topk_group", "routed_scaling_factor", "router_jitter_noise", "score_func", "scoring_func")
    extra += [f"{name}={getattr(gate, name)}" for name in signs if hasattr(gate, name)]
    also = f" (it also has {', '.join(extra)})" if extra else ""
    return ValueError(
        f"the router at {layer.path} ({type(gate).__name__}) is not supported: {reason}{also}; "
        "supported are routers that return (logits, weights, indices) of softmax and top-k without a bias"
    )
