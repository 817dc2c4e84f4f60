"""Wrong arguments are refused before anything is launched, in words that say what to change."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from probmoe_ext import ops

LOGITS = torch.zeros(3, 8)
INDICES = torch.tensor([[0, 1]] * 3)
BY_LOGITS: dict[str, Callable[..., Any]] = {
    "subset_log_partition": lambda x, k: ops.subset_log_partition(x, k),
    "subset_cardinality": lambda x, k: ops.subset_cardinality(x, k),
    "subset_marginals": lambda x, k: ops.subset_marginals(x, k),
    "subset_covariance_vp": lambda x, k: ops.subset_covariance_vp(x, x, k),
    "subset_sample": lambda x, k: ops.subset_sample(x, k, seed=0),
    "subset_mode": lambda x, k: ops.subset_mode(x, k),
    "subset_log_prob": lambda x, k: ops.subset_log_prob(x, INDICES, k),
    "subset_entropy": lambda x, k: ops.subset_entropy(x, k),
    "route_top_k": lambda x, k: ops.route_top_k(x, k),
    "route_probmoe": lambda x, k: ops.route_probmoe(x, k, training=True, seed=0),
    "route_probmoe, inference": lambda x, k: ops.route_probmoe(x, k, training=False),
}
every_op = pytest.mark.parametrize("call", BY_LOGITS.values(), ids=BY_LOGITS.keys())


def refused(kind: type[Exception] | tuple[type[Exception], ...], call: Callable[[], Any], *words: str) -> None:
    """The call raises `kind`, and its message has all these words."""
    with pytest.raises(kind) as caught:
        call()
    for word in words:
        assert word in str(caught.value), f"no {word!r} in: {caught.value}"


@every_op
def test_k_out_of_range(call: Callable[..., Any]) -> None:
    refused(ValueError, lambda: call(LOGITS, 9), "k", "9", "8")
    refused(ValueError, lambda: call(LOGITS, -1), "k", "-1", "8")


@pytest.mark.parametrize("name", [name for name in BY_LOGITS if name != "route_top_k"])
def test_band_out_of_range(name: str) -> None:
    call = BY_LOGITS[name]
    refused(ValueError, lambda: call(LOGITS, (3, 2)), "k", "3", "2")
    refused(ValueError, lambda: call(LOGITS, (2, 9)), "k", "9", "8")
    refused(ValueError, lambda: call(LOGITS, (-1, 2)), "k", "-1")
    refused((TypeError, ValueError), lambda: call(LOGITS, (1, 2, 3)), "k", "(1, 2, 3)")  # type: ignore[arg-type]


@every_op
def test_k_of_another_type(call: Callable[..., Any]) -> None:
    refused(TypeError, lambda: call(LOGITS, 2.0), "k", "2.0", "int")
    refused(TypeError, lambda: call(LOGITS, "2"), "k", "2", "int")
    refused(TypeError, lambda: call(LOGITS, None), "k", "None", "int")


@every_op
def test_logits_of_another_type(call: Callable[..., Any]) -> None:
    refused(TypeError, lambda: call(LOGITS.long(), 2), "logits", "int64", "float32")
    refused(TypeError, lambda: call(LOGITS.to(torch.complex64), 2), "logits", "complex64", "float32")
    refused(TypeError, lambda: call([[0.0, 1.0]], 1), "logits", "list", "ensor")


@every_op
def test_logits_without_experts(call: Callable[..., Any]) -> None:
    refused(ValueError, lambda: call(torch.tensor(1.0), 1), "logits", "dimension")


@pytest.mark.parametrize("name", BY_LOGITS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_too_few_unmasked(name: str, dtype: torch.dtype) -> None:
    """The error names the first row that cannot be served, in the flattened batch."""
    logits = torch.zeros(50, 8, dtype=dtype)
    logits[41, 1:] = -torch.inf
    call = BY_LOGITS[name]
    if name == "subset_log_prob":
        call = lambda x, k: ops.subset_log_prob(x, INDICES[:1].expand(50, -1), k)  # noqa: E731
    refused(ValueError, lambda: call(logits, 2), "logits", "row 41", "1", "2")


def test_vector() -> None:
    refused(ValueError, lambda: ops.subset_covariance_vp(LOGITS, LOGITS[:2], 2), "v", "2, 8", "3, 8")
    refused(TypeError, lambda: ops.subset_covariance_vp(LOGITS, LOGITS.long(), 2), "v", "int64", "float32")


def test_indices() -> None:
    refused(TypeError, lambda: ops.subset_log_prob(LOGITS, INDICES.float(), 2), "indices", "float32", "int64")
    refused(ValueError, lambda: ops.subset_log_prob(LOGITS, INDICES[:, :1], 2), "indices", "3, 1", "3, 2")
    refused(ValueError, lambda: ops.subset_log_prob(LOGITS, INDICES[:2], 2), "indices", "2, 2", "3, 2")
    refused(ValueError, lambda: ops.subset_log_prob(LOGITS, INDICES + 8, 2), "indices", "9", "8")
    refused(ValueError, lambda: ops.subset_log_prob(LOGITS, INDICES - 1, 2), "indices", "-1", "8")


@pytest.mark.parametrize("name", ["subset_sample", "route_probmoe"])
def test_seed(name: str) -> None:
    def call(seed: Any) -> Any:
        if name == "subset_sample":
            return ops.subset_sample(LOGITS, 2, seed=seed)
        return ops.route_probmoe(LOGITS, 2, training=True, seed=seed)

    refused(TypeError, lambda: call(1.5), "seed", "float", "int")
    refused(TypeError, lambda: call(torch.tensor(1.0)), "seed", "float32", "int64")
    refused((ValueError, TypeError), lambda: call(torch.tensor([1, 2])), "seed", "2")
    refused(ValueError, lambda: call(torch.tensor(1, device="meta")), "seed", "meta", "cpu")


def test_route_options() -> None:
    def call(**options: Any) -> Any:
        return ops.route_probmoe(LOGITS, 2, training=True, **options)

    refused(ValueError, lambda: call(forward="top"), "forward", "'top'", "sample", "topk")
    refused(ValueError, lambda: call(backward="x"), "backward", "'x'", "marginal", "ste")
