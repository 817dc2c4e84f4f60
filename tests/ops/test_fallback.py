"""The plain-torch fallback answers what the kernels answer; it runs on CPU tensors here, on CUDA in the contract."""

from __future__ import annotations

import pytest
import torch

from probmoe_ext.ops.fallback import COMPILED, FALLBACKS

RAW = torch.ops.probmoe_ext


def _arguments(name: str, dtype: torch.dtype) -> list[tuple[object, ...]]:
    generator = torch.Generator().manual_seed(7)
    logits = torch.randn(33, 24, generator=generator, dtype=torch.float64).to(dtype)
    logits[0, :10] = -torch.inf
    other = torch.randn(33, 24, generator=generator, dtype=torch.float64).to(dtype)
    seed = torch.tensor(11)
    calls: list[tuple[object, ...]] = []
    for k_min, k_max in ((4, 4), (2, 6)):
        indices = RAW.subset_sample(logits, seed, k_min, k_max)
        grad = torch.randn(33, k_max, generator=generator, dtype=torch.float64).to(dtype)
        sizes = torch.randn(33, k_max - k_min + 1, generator=generator, dtype=torch.float64).to(dtype)
        calls += {
            "subset_covariance_vp": [(logits, other, k_min, k_max)],
            "subset_cardinality_backward": [(sizes, logits, k_min, k_max)],
            "subset_log_prob": [(logits, indices, k_min, k_max)],
            "subset_sample": [(logits, seed, k_min, k_max)],
            "route_top_k": [(logits, k_max, False), (logits, k_max, True)],
            "route_top_k_backward": [(grad, logits, indices, False), (grad, logits, indices, True)],
            "route_probmoe": [
                (logits, seed, k_min, k_max, sample, normalize, True)
                for sample in (False, True)
                for normalize in (False, True)
            ],
            "route_probmoe_backward": [
                (grad, logits, indices, k_min, k_max, normalize, marginal)
                for normalize in (False, True)
                for marginal in (False, True)
            ],
        }.get(name, [(logits, k_min, k_max)])
    return calls


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", FALLBACKS)
def test_equals_the_kernel(name: str, dtype: torch.dtype) -> None:
    tolerance = {torch.float32: 3e-6, torch.float64: 1e-12, torch.bfloat16: 1e-2}[dtype]
    for arguments in _arguments(name, dtype):
        ours, kernel = FALLBACKS[name](*arguments), getattr(RAW, name)(*arguments)
        for mine, theirs in zip(*(x if isinstance(x, tuple) else (x,) for x in (ours, kernel)), strict=True):
            assert mine.dtype == theirs.dtype
            torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=tolerance)


def test_every_operator_runs_on_cuda_one_way_or_the_other() -> None:
    for schema in torch._C._jit_get_all_schemas():
        if schema.name.startswith("probmoe_ext::"):
            name = schema.name.removeprefix("probmoe_ext::")
            assert name in FALLBACKS or name in COMPILED, name
            assert torch._C._dispatch_has_kernel_for_dispatch_key(schema.name, "CUDA"), name
