"""The plain-torch fallback answers what the kernels answer; it runs on CPU tensors here, on CUDA in the contract."""

from __future__ import annotations

from itertools import product

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
        _, order = RAW.gumbel_top_k(logits, seed, k_max)
        scalar = torch.randn(33, generator=generator, dtype=torch.float64).to(dtype)
        wide = (logits if dtype == torch.float64 else logits.float()) * 1.5
        calls += {
            "gumbel_top_k": [(logits, seed, k_max)],
            "gumbel_sigmoid": [(logits, seed, 0.7)],
            "plackett_luce_log_prob": [(logits, order)],
            "plackett_luce_log_prob_backward": [(scalar, logits, order)],
            "relaxed_top_k": [(logits, seed, k_max, 0.7)],
            "relaxed_top_k_backward": [(other.to(wide.dtype), wide, k_max, 0.7)],
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


def _law_arguments(name: str, dtype: torch.dtype) -> list[tuple[object, ...]]:
    generator = torch.Generator().manual_seed(8)
    logits, first, second, grad = (torch.randn(17, 24, generator=generator, dtype=torch.float64) for _ in range(4))
    alpha, beta, grad = first.exp().to(dtype), second.exp().to(dtype), grad.to(dtype)
    seed, per_row, value = torch.tensor(11), grad[:, 0], torch.softmax(second, -1).to(dtype)
    sample, log_total = RAW.dirichlet_sample(alpha, seed)
    if name.startswith("route_dirmoe"):
        logits[0, :10] = -torch.inf
        calls: list[tuple[object, ...]] = []
        for training, normalize, (k_min, k_max) in product((False, True), (False, True), ((4, 4), (2, 6))):
            heads, numbers = (
                (logits.to(dtype), alpha, beta),
                (k_min, k_max, 0.5, 2.0, 1.5, 2.0, 0.25, training, normalize),
            )
            if name == "route_dirmoe":
                calls.append((*heads, seed, *numbers))
            else:
                _, indices, _, _, noise, log_gamma = RAW.route_dirmoe(*heads, seed, *numbers)
                calls.append((grad[:, :k_max], per_row, per_row, *heads, indices, noise, log_gamma, *numbers))
        return calls
    return [
        {
            "log_gamma_sample": (alpha, seed),
            "log_gamma_sample_backward": (grad, alpha, second.to(dtype)),
            "standard_gamma_grad": (alpha, beta),
            "dirichlet_sample": (alpha, seed),
            "dirichlet_sample_backward": (grad, alpha, sample, log_total),
            "dirichlet_log_prob": (alpha, value),
            "dirichlet_log_prob_backward": (per_row, alpha, value),
            "dirichlet_entropy": (alpha,),
            "dirichlet_entropy_backward": (per_row, alpha),
            "dirichlet_kl": (alpha, beta),
            "dirichlet_kl_backward": (per_row, alpha, beta),
        }[name]
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", FALLBACKS)
def test_equals_the_kernel(name: str, dtype: torch.dtype) -> None:
    tolerance = {torch.float32: 3e-6, torch.float64: 1e-12, torch.bfloat16: 1e-2}[dtype]
    of_laws = name.partition("_")[0] in ("log", "standard", "dirichlet") or name.startswith("route_dirmoe")
    for arguments in (_law_arguments if of_laws else _arguments)(name, dtype):
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
