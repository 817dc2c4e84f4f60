"""No op without a test, a fake kernel, a reference and a benchmark."""

from __future__ import annotations

import pytest
import torch

import probmoe_ext.ops
from probmoe_ext import reference
from tests.ops import SPECS


def raw_op_names() -> list[str]:
    """Names of all registered ops of this package but the backward ones."""
    qualified = torch._C._dispatch_get_all_op_names()
    names = {name.split("::")[1].split(".")[0] for name in qualified if name.startswith("probmoe_ext::")}
    return sorted(name for name in names if not name.endswith("_backward"))


def test_ops_are_registered() -> None:
    assert {"subset_marginals", "subset_sample", "route_top_k", "route_probmoe"} <= set(raw_op_names())


@pytest.mark.parametrize("name", raw_op_names())
def test_raw_op_is_complete(name: str) -> None:
    from benchmarks.registry import BENCHMARKS

    assert name in {spec.name for spec in SPECS}, f"{name} has no OpSpec in tests/ops"
    assert hasattr(probmoe_ext.ops, name), f"{name} has no public function in probmoe_ext.ops"
    assert hasattr(reference, name), f"{name} has no function in probmoe_ext.reference"
    assert name in BENCHMARKS, f"{name} has no entry in benchmarks/registry.py"


@pytest.mark.parametrize("name", sorted({spec.name for spec in SPECS}))
def test_public_op_is_documented(name: str) -> None:
    function = getattr(probmoe_ext.ops, name)
    assert name in probmoe_ext.ops.__all__
    documentation = function.__doc__ or ""
    assert "Returns" in documentation and "Raises" in documentation, f"{name} documents no result or no errors"


@pytest.mark.parametrize(
    "name", sorted(n.split("::")[1] for n in torch._C._dispatch_get_all_op_names() if n.startswith("probmoe_ext::"))
)
def test_raw_op_has_a_fake(name: str) -> None:
    """Meta or fake kernel: torch's registry of Python fakes, or the dispatcher's Meta key, must know the op."""
    qualified = f"probmoe_ext::{name}"
    has_meta = torch._C._dispatch_has_kernel_for_dispatch_key(qualified, "Meta")
    entry = torch._library.simple_registry.singleton.find(qualified)
    assert has_meta or entry.fake_impl.kernel is not None, f"{qualified} has no fake kernel"
