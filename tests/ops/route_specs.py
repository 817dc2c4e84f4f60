"""The routing family, as the contract's checks see it."""

from __future__ import annotations

from itertools import product
from typing import Any

import torch
from torch import Tensor

from probmoe_ext import reference
from tests import oracle
from tests.contract import SEED, Band, OpSpec, Tensors


def top_k_spec(normalize: bool) -> OpSpec:
    """Softmax and top-k, which has no band."""
    return OpSpec(
        "route_top_k",
        label="normalize" if normalize else "",
        exact_only=True,
        options={"normalize": normalize},
        oracle=lambda t, band: oracle.routed(t[0], oracle.ranked(t[0].detach(), band[0]), band, normalize, False),
        oracle_indices=lambda t, band: oracle.ranked(t[0], band[0]),
    )


def probmoe_spec(forward: str | None, backward: str, normalize: bool) -> OpSpec:
    """One setting of ProbMoE's options; no `forward` means inference."""
    training = forward is not None
    through_marginals = training and backward == "marginal"
    options: dict[str, Any] = {"training": training, "normalize": normalize}
    if training:
        options |= {"forward": forward, "backward": backward, "seed": SEED}

    def chosen(tensors: Tensors, band: Band) -> Tensor:
        logits = tensors[0].detach()
        return reference.subset_sample(logits, band, SEED) if forward == "sample" else oracle.mode(logits, band)

    def by_total(tensors: Tensors, band: Band) -> Tensor:
        # Dividing by a small sum of weights enlarges gradients, and their errors, by as much.
        weights, _ = reference.route_probmoe(tensors[0].detach().double(), band, **(options | {"normalize": False}))
        total = weights.sum(-1, keepdim=True)
        return 1 / torch.where((total == 0) | (not normalize), 1.0, total)

    return OpSpec(
        "route_probmoe",
        label=", ".join([forward or "inference", *([backward] if training else []), *(["normalize"] * normalize)]),
        options=options,
        sampled=forward == "sample",
        oracle=lambda t, band: oracle.routed(t[0], chosen(t, band), band, normalize, through_marginals),
        oracle_indices=chosen,
        grad_scale=by_total,
        # The derivative is not that of the value: `check_enumeration` has the closed form.
        finite_differences=not through_marginals,
        raw_values={"sample": forward == "sample", "marginal": through_marginals},
    )


SPECS = [
    *(top_k_spec(normalize) for normalize in (False, True)),
    *(
        probmoe_spec(forward, backward, normalize)
        for forward, backward, normalize in product(("sample", "topk"), ("marginal", "ste"), (False, True))
    ),
    *(probmoe_spec(None, "ste", normalize) for normalize in (False, True)),
]
