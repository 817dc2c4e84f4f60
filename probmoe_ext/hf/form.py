"""Learn what the router of a layer computes by running its class, so that no list of classes is needed."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from probmoe_ext.hf.choice import ChoiceRule
from probmoe_ext.hf.gate import RouterForm, tensor_of
from probmoe_ext.hf.layers import MoELayer, gate_weight, shape_of
from probmoe_ext.hf.reclass import original_class

PROBE_TOKENS = 32


@dataclass(frozen=True)
class _Guess:
    """One way in which a router may come from its logits to its experts."""

    rule: ChoiceRule
    bias: str | None
    correction: str | None


def read_form(layer: MoELayer) -> RouterForm:
    """What the router of a layer computes, found by running its class on small random weights on the CPU.

    The model's own tensors are not touched, so this holds for a model on any device, the meta device included.

    Raises:
        ValueError: If it is not softmax or sigmoid scores, a choice of the largest (perhaps corrected, perhaps within
            groups), and perhaps renormalisation and a factor; the message says what it is.
    """
    weight = gate_weight(layer.gate)
    if weight is None:
        raise _refusal(layer, "it has no weight [experts, hidden]")
    num_experts, hidden_size = shape_of(tensor_of(layer.gate, weight))
    # Every device and dtype is spelt out: defaults may have been changed around the call.
    x = _random((PROBE_TOKENS, hidden_size), torch.Generator("cpu").manual_seed(0), torch.float32)
    twin = _twin(layer.gate, torch.Generator("cpu").manual_seed(1), torch.float32)
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        _, weights, indices = _run(layer, twin, x, num_experts)
        guess, logits = _read_choice(layer, twin, weight, x, weights, indices)
        normalize, scale = _read_weights(layer, guess.rule.scores(logits).gather(-1, indices), weights)
        # Half precision tells where the class computes and what it records and returns.
        half, x16 = _twin(layer.gate, torch.Generator("cpu").manual_seed(1), torch.bfloat16), x.bfloat16()
        recorded, half_weights, _ = _run(layer, half, x16, num_experts)
        records = _read_records(layer, half, weight, guess.bias, x16, recorded)
        with torch.autocast("cpu", torch.bfloat16):
            under_autocast = _run(layer, twin, x, num_experts)[0]
    return RouterForm(
        num_experts=num_experts,
        hidden_size=hidden_size,
        k=indices.shape[-1],
        normalize=normalize,
        records=records,
        float32_weights=half_weights.dtype == torch.float32,
        weight=weight,
        bias=guess.bias,
        correction=guess.correction,
        rule=guess.rule,
        scale=scale,
        ignores_autocast=records == "float32 logits" and under_autocast.equal(logits),
    )


def _guesses(gate: nn.Module, num_experts: int, weight: str) -> Iterator[_Guess]:
    """The known ways, the usual one first."""
    tensors = (*gate.named_parameters(), *gate.named_buffers())
    sided = [name for name, tensor in tensors if tensor.numel() == num_experts and name != weight]
    count = getattr(gate, "num_group", getattr(gate, "n_group", None))
    kept = getattr(gate, "topk_group", None)
    groups: list[tuple[int, int] | None] = [None]
    if isinstance(count, int) and isinstance(kept, int) and 0 < kept < count and num_experts % count == 0:
        groups.append((count, kept))
    for group in groups:
        for best in (1, 2) if group and num_experts >= 2 * group[0] else (1,):
            for bias in (None, *sided):
                for correction in (None, *(name for name in sided if name != bias)):
                    for score in ("softmax", "sigmoid"):
                        rule = ChoiceRule(score, correction is not None, group, best)
                        yield _Guess(rule, bias, correction)


def _read_choice(
    layer: MoELayer, twin: Any, weight: str, x: torch.Tensor, weights: torch.Tensor, indices: torch.Tensor
) -> tuple[_Guess, torch.Tensor]:
    """By what rule the experts are chosen, and the logits: the first that gives these experts, and these weights."""
    num_experts, k = tensor_of(twin, weight).shape[0], indices.shape[-1]
    fitting = []
    for guess in _guesses(layer.gate, num_experts, weight):
        logits = F.linear(x, tensor_of(twin, weight), None if guess.bias is None else tensor_of(twin, guess.bias))
        correction = None if guess.correction is None else tensor_of(twin, guess.correction).flatten()
        choice, scores = guess.rule.choice(logits, correction)
        # A guess whose groups are too small for k would choose masked experts.
        possible = choice.isfinite().sum(-1).min() >= k
        if not possible or not choice.topk(k, dim=-1).indices.sort().values.equal(indices.sort().values):
            continue
        if _ratio(scores.gather(-1, indices), weights) is not None:
            return guess, logits
        fitting.append((guess, logits))
    if not fitting:
        raise _refusal(layer, "it does not choose the k largest of softmax or sigmoid scores of hidden @ weight.T")
    return fitting[0]


def _ratio(scores: torch.Tensor, weights: torch.Tensor) -> tuple[bool, bool, float] | None:
    """Whether weights are scores or normalised scores (both, if all experts are chosen) times a factor, or neither."""
    found = []
    for expected in (scores, scores / scores.sum(-1, keepdim=True)):
        ratio = weights.double().sum() / expected.double().sum()
        found.append(
            ratio if torch.allclose(weights.float(), (expected * ratio).float(), rtol=1e-4, atol=1e-6) else None
        )
    plain, normed = found
    if plain is None and normed is None:
        return None
    return plain is not None, normed is not None, float(plain if plain is not None else normed)  # type: ignore[arg-type]


def _read_weights(layer: MoELayer, scores: torch.Tensor, weights: torch.Tensor) -> tuple[bool, float]:
    found = _ratio(scores, weights)
    if found is None:
        reason = "its weights are neither softmax nor sigmoid scores of the chosen experts, normalised or not"
        sums = weights.sum(-1)
        if weights.max() <= 1 and sums.max() > 1 and sums.min() < sums.max() - 1e-3:
            reason += ", but each a softmax of its own (as SparseMixer's are), which no distribution over subsets gives"
        raise _refusal(layer, reason)
    plain, normed, factor = found
    # With k = E both hold; what the module says of itself decides (one that says nothing renormalises).
    normalize = normed and (not plain or bool(getattr(layer.gate, "norm_topk_prob", True)))
    factor = float(f"{factor:.5g}")
    return normalize, 1.0 if math.isclose(factor, 1, rel_tol=1e-4) else factor


def _read_records(
    layer: MoELayer, twin: Any, weight: str, bias: str | None, x: torch.Tensor, recorded: torch.Tensor
) -> str:
    side = None if bias is None else tensor_of(twin, bias)
    logits = F.linear(x, tensor_of(twin, weight), side)
    records = {
        "logits": logits,
        "logits as float32": logits.float(),
        "float32 logits": F.linear(x.float(), tensor_of(twin, weight).float(), None if side is None else side.float()),
        "probabilities": torch.softmax(logits, dim=-1, dtype=torch.float32),
    }
    for what, value in records.items():
        if value.dtype == recorded.dtype and value.equal(recorded):
            return what
    raise _refusal(layer, "its first result is neither hidden @ weight.T nor the softmax of it")


def _twin(gate: nn.Module, rng: torch.Generator, dtype: torch.dtype) -> Any:
    """A module of the same class, settings and children, with random tensors of the same shapes on the CPU."""
    twin: Any = object.__new__(original_class(gate))
    twin.__dict__.update(gate.__dict__)
    twin.__dict__["training"] = False
    for group in ("_parameters", "_buffers"):
        twin.__dict__[group] = {
            name: None
            if value is None
            else _random(shape_of(value), rng, dtype) / max((1, *shape_of(value)[1:])) ** 0.5
            for name, value in gate.__dict__[group].items()
        }
    # The router of a swapped gate is no part of the original.
    children = {name: child for name, child in gate.__dict__["_modules"].items() if name != "probmoe"}
    twin.__dict__["_modules"] = {name: child and _twin(child, rng, dtype) for name, child in children.items()}
    return twin


def _random(shape: tuple[int, ...], rng: torch.Generator, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape, generator=rng, device="cpu", dtype=torch.float32).to(dtype)


def _run(
    layer: MoELayer, twin: Any, x: torch.Tensor, num_experts: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    parameters = list(inspect.signature(type(twin).forward).parameters.values())[2:]
    needed = [p.name for p in parameters if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    if needed:
        raise _refusal(layer, f"its forward needs {', '.join(needed)} besides the hidden states")
    try:
        # Past the hooks: they belong to the model, and this is not it.
        result = type(twin).forward(twin, x)
    except Exception as error:
        raise _refusal(layer, f"it failed on a small input ({type(error).__name__}: {error})") from error
    if not (isinstance(result, tuple) and len(result) == 3 and all(isinstance(one, torch.Tensor) for one in result)):
        got = f"{len(result)} results" if isinstance(result, tuple) else f"a {type(result).__name__}"
        raise _refusal(layer, f"it returns {got} rather than (router_logits, weights, indices)")
    logits, weights, indices = result
    right = logits.shape == (len(x), num_experts) and weights.shape == indices.shape
    if not right or indices.dtype.is_floating_point or logits.shape[-1] < indices.shape[-1]:
        got = ", ".join(f"{str(one.dtype).removeprefix('torch.')} {list(one.shape)}" for one in result)
        raise _refusal(layer, f"it returns {got} rather than (router_logits [T, E], weights [T, k], indices [T, k])")
    return logits, weights, indices


def _refusal(layer: MoELayer, reason: str) -> ValueError:
    gate = layer.gate
    extra = [name for name, _ in (*gate.named_parameters(), *gate.named_buffers()) if name != "weight"]
    signs = ("n_group", "topk_group", "routed_scaling_factor", "router_jitter_noise", "score_func", "scoring_func")
    extra += [f"{name}={getattr(gate, name)}" for name in signs if hasattr(gate, name)]
    also = f" (it also has {', '.join(extra)})" if extra else ""
    return ValueError(
        f"the router at {layer.path} ({type(gate).__name__}) is not supported: {reason}{also}; supported are routers "
        "that return (logits, weights, indices), where the weights are softmax or sigmoid scores of the k best experts"
    )
