"""What the kernels of the Gamma and Dirichlet family and of DirMoE routing promise beyond the operators' contract."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests import emulation
from tests.contract import assert_same, needs_fma
from tests.emulation.test_kernels import (
    DTYPES,
    RAW,
    SEED,
    Results,
    Shape,
    assert_any_alignment,
    assert_any_order,
    guarded,
)
from tests.inputs import Band
from tests.ops.test_gamma import TOLERANCE, slopes

pytestmark = pytest.mark.filterwarnings("ignore:Warning only once for all operators")

NUMBERS = (0.7, 2.0, 1.5, 2.0, 0.125)  # temperature, concentration, prior
both_precisions = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


def results(logits: Tensor, band: Band) -> Results:
    """Outputs of every raw operator of the family, from the same logits."""
    k_max = band[1]
    alpha, other = logits.clamp(-4, 4).exp(), logits.flip(-1).clamp(-3, 3).exp()
    grad = torch.linspace(-1, 1, logits.numel()).reshape(logits.shape).to(logits.dtype)
    per_row, theta = grad[:, 0], torch.softmax(logits.flip(-1).clamp(-3, 3).float(), -1).to(logits.dtype)
    sample = RAW.dirichlet_sample(alpha, SEED)
    found: dict[str, Any] = {
        "log_gamma_sample": RAW.log_gamma_sample(alpha, SEED),
        "log_gamma_sample_backward": RAW.log_gamma_sample_backward(grad, alpha, logits.clamp(-9, 4)),
        "standard_gamma_grad": RAW.standard_gamma_grad(alpha, other),
        "dirichlet_sample": sample,
        "dirichlet_sample_backward": RAW.dirichlet_sample_backward(grad, alpha, *sample),
        "dirichlet_log_prob": RAW.dirichlet_log_prob(alpha, theta),
        "dirichlet_log_prob_backward": RAW.dirichlet_log_prob_backward(per_row, alpha, theta),
        "dirichlet_entropy": RAW.dirichlet_entropy(alpha),
        "dirichlet_entropy_backward": RAW.dirichlet_entropy_backward(per_row, alpha),
        "dirichlet_kl": RAW.dirichlet_kl(alpha, other),
        "dirichlet_kl_backward": RAW.dirichlet_kl_backward(per_row, alpha, other),
    }
    for training, normalize in ((True, True), (True, False), (False, True)):
        setting = (*band, *NUMBERS, training, normalize)
        routed = RAW.route_dirmoe(logits, alpha, other, SEED, *setting)
        name = f"route_dirmoe {training} {normalize}"
        upstream = grad[:, :k_max].contiguous(), per_row, per_row
        found[name] = routed
        found[name + " backward"] = RAW.route_dirmoe_backward(
            *upstream, logits, alpha, other, routed[1], *routed[4:], *setting
        )
    return {name: out if isinstance(out, tuple) else (out,) for name, out in found.items()}


def on_kernels(call: Callable[[], Any]) -> Any:
    """The same on the emulated kernels."""
    with emulation.in_place_of_cpu():
        return call()


# ---- answers --------------------------------------------------------------------------------------------------------


@needs_fma
@both_precisions
def test_bits_are_the_cpus(dtype: torch.dtype) -> None:
    """Draws of log g and derivatives over all concentrations of a type: the same attempts, the same arithmetic."""
    generator = torch.Generator().manual_seed(1)
    alpha = 10 ** (70 * torch.rand(40, 50, generator=generator, dtype=torch.float64) - 35)
    alpha[::2] = 10 ** (8 * torch.rand(20, 50, generator=generator, dtype=torch.float64) - 4)
    alpha = alpha.to(dtype)
    log_g = RAW.log_gamma_sample(alpha, SEED)
    upper = (alpha.log1p() + 4 * torch.rand(40, 50, generator=generator)).clamp(max=80)

    def slope(value: Tensor) -> Tensor:
        return RAW.log_gamma_sample_backward(torch.ones_like(alpha), alpha, value.to(dtype))

    cases: list[Callable[[], Tensor]] = [
        lambda: RAW.log_gamma_sample(alpha, SEED),
        lambda: slope(log_g),
        lambda: slope(upper),
        lambda: RAW.standard_gamma_grad(alpha, log_g.exp()),
    ]
    for number, case in enumerate(cases):
        assert torch.equal(on_kernels(case), case()), number


@both_precisions
@pytest.mark.parametrize("alpha", [1e-3, 0.1, 1.7, 30.0])
def test_slope_digits(alpha: float, dtype: torch.dtype) -> None:
    """The promise of docs/gamma.md against 30 digits, from 0.001 to 0.999 of the law."""
    errors = on_kernels(lambda: slopes(alpha, dtype))
    assert errors["log"] <= TOLERANCE[dtype] and errors["value"] <= TOLERANCE[dtype]


@both_precisions
@pytest.mark.parametrize("num_experts", [5, 64, 1000])
def test_dirichlet_draws_are_the_cpus(num_experts: int, dtype: torch.dtype) -> None:
    """But for the order in which a row is summed."""
    alpha = 10 ** (4 * torch.rand(5, num_experts, dtype=torch.float64) - 3).to(dtype)
    (got, total), (want, sum_) = (
        on_kernels(lambda: RAW.dirichlet_sample(alpha, SEED)),
        RAW.dirichlet_sample(alpha, SEED),
    )
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(got, want, rtol=8 * eps + num_experts * eps / 8, atol=0)
    torch.testing.assert_close(total, sum_, rtol=8 * eps, atol=num_experts * eps)


@pytest.mark.parametrize(("num_experts", "k"), [(7, 3), (64, (2, 8)), (129, (0, 129)), (1024, (3, 40))])
@pytest.mark.parametrize("training", [True, False])
def test_routes_are_the_cpus(num_experts: int, k: Any, training: bool) -> None:
    """The same experts in the same order, whatever fills shared memory; ties go to the lower index."""
    rows = 6 if num_experts < 100 else 2
    logits = torch.randn(rows, num_experts, dtype=torch.float64).round(decimals=1)
    hi, lo = torch.rand(rows, 1, dtype=torch.float64) + 1, torch.rand(rows, num_experts, dtype=torch.float64) + 0.1

    band = k if isinstance(k, tuple) else (k, k)

    def route() -> tuple[Tensor, ...]:
        return RAW.route_dirmoe(logits, hi.expand_as(lo), lo, SEED, *band, *NUMBERS, training, True)

    got, want = on_kernels(route), route()
    assert torch.equal(got[1], want[1])
    for a, b in zip((got[0], *got[2:]), (want[0], *want[2:]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)


@needs_fma
@both_precisions
def test_kept_bits_are_the_cpus(dtype: torch.dtype) -> None:
    """The noise and the variates that DirMoE's draws leave for the backward pass."""
    logits, alpha = torch.randn(6, 40).to(dtype), torch.rand(6, 40).to(dtype) + 0.1

    def kept() -> tuple[Tensor, ...]:
        return RAW.route_dirmoe(logits, alpha, alpha.flip(-1), SEED, 4, 4, *NUMBERS, True, True)[4:]

    assert_same(on_kernels(kept), kept(), "noise and variates")


def test_gates_without_experts() -> None:
    """Fewer than k_min open gates cannot raise without waiting for the device: NaN, and 0, 1, 2, ..., in that row."""
    logits, alpha = torch.randn(4, 9), torch.ones(4, 9)
    logits[2, 1:] = -torch.inf
    setting = (2, 4, *NUMBERS, False, True)
    weights, indices, kl, expected_k, *_ = on_kernels(lambda: RAW.route_dirmoe(logits, alpha, alpha, None, *setting))
    assert weights[2].isnan().all() and kl[2].isnan() and expected_k[2].isnan() and indices[2].tolist() == [0, 1, 2, 3]
    kept = [0, 1, 3]
    want = RAW.route_dirmoe(logits[kept], alpha[kept], alpha[kept], None, *setting)
    assert torch.equal(indices[kept], want[1]) and torch.equal(expected_k[kept], want[3])


def test_columns_beyond_a_row_in_shared_memory() -> None:
    """The elementwise operators take any number of them; those that hold a row say how many they take."""
    alpha = torch.rand(2, 1500) + 0.5
    for name in ("log_gamma_sample", "dirichlet_sample"):
        call = getattr(RAW, name)
        if name == "log_gamma_sample":
            torch.testing.assert_close(on_kernels(lambda call=call: call(alpha, SEED)), call(alpha, SEED))
        else:
            with pytest.raises(RuntimeError, match="1 to 1024 experts, not 1500"):
                on_kernels(lambda call=call: call(alpha, SEED))


# ---- threads and memory ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("num_experts", "band"), [(33, (4, 4)), (9, (2, 5))])
def test_threads_in_any_order(num_experts: int, band: Band) -> None:
    """No lane reads what another has yet to write."""
    logits = torch.randn(5, num_experts)
    assert_any_order(lambda: results(logits, band))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_of_a_wider_tensor(dtype: torch.dtype) -> None:
    assert_any_alignment(torch.randn(4, 27).to(dtype), 19, lambda rows: results(rows, (3, 3)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("num_experts", "band"), [(13, (2, 5)), (40, (4, 4))])
def test_no_access_outside_the_arrays(num_experts: int, band: Band, dtype: torch.dtype) -> None:
    """Every array of every launcher ends at an inaccessible page, the last row of strided concentrations included."""
    core, rows, stride = emulation.library(), 5, num_experts + 3
    k_max = band[1]

    def array(tensor: Tensor) -> ctypes.c_void_p:
        return ctypes.c_void_p(guarded(tensor))

    alpha = array((torch.rand(rows * stride) + 0.1).to(dtype)[: (rows - 1) * stride + num_experts])
    dense, slots = torch.rand(rows, num_experts).to(dtype), torch.rand(rows, k_max).to(dtype)
    kept = dense.to(torch.float64 if dtype == torch.float64 else torch.float32)
    indices = torch.rand(rows, num_experts).argsort(-1)[:, :k_max]
    a, b, g, one, s = (array(t) for t in (dense, dense, dense, slots[:, 0], SEED))
    out, beside, third, number = (array(t) for t in (dense, dense, dense, slots[:, 0]))
    none = ctypes.c_void_p(None)
    calls: dict[str, tuple[Any, ...]] = {
        "log_gamma_sample": (alpha, s, out, none),
        "log_gamma_sample_backward": (alpha, a, g, out, none),
        "standard_gamma_grad": (alpha, a, out, none),
        "dirichlet_sample": (alpha, s, out, number, none),
        "dirichlet_sample_backward": (alpha, a, one, g, out, none),
        "dirichlet_log_prob": (alpha, a, number, none),
        "dirichlet_log_prob_backward": (alpha, a, one, out, beside, none),
        "dirichlet_entropy": (alpha, number, none),
        "dirichlet_entropy_backward": (alpha, one, out, none),
        "dirichlet_kl": (alpha, a, number, none),
        "dirichlet_kl_backward": (alpha, a, one, out, beside, none),
    }
    shape, code = Shape(rows, num_experts, *band, stride, 0), DTYPES[dtype]
    core.pm_cuda_error_text.restype = ctypes.c_char_p
    for name, arguments in calls.items():
        status = getattr(core, f"pm_cuda_{name}")(ctypes.byref(shape), code, *arguments)
        assert status == 0, f"{name}: {core.pm_cuda_error_text(status).decode()}"
    routed = array(slots), array(indices), array(slots[:, 0]), array(slots[:, 0]), array(kept), array(kept)
    for training in (1, 0):
        options = Options(*NUMBERS, training, 1)
        head = ctypes.byref(shape), ctypes.byref(options), code, alpha, a, b
        drawn = (routed[4], routed[5]) if training else (none, none)
        upstream = array(slots), one, number
        for status in (
            core.pm_cuda_route_dirmoe(*head, s if training else none, *routed[:4], *drawn, none),
            core.pm_cuda_route_dirmoe_backward(*head, routed[1], *drawn, *upstream, out, beside, third, none),
        ):
            assert status == 0, core.pm_cuda_error_text(status).decode()


class Options(ctypes.Structure):
    """pm_dirmoe."""

    _fields_ = [
        *(
            (n, ctypes.c_double)
            for n in ("temperature", "concentration", "prior_concentration", "prior_hi", "prior_lo")
        ),
        *((n, ctypes.c_int) for n in ("training", "normalize")),
    ]


def test_launchers_refuse_what_is_no_option() -> None:
    core, none = emulation.library(), ctypes.c_void_p(None)
    shape = Shape(1, 4, 1, 2, 4, 0)
    for numbers in ((0.0, 1.0, 1.0, 1.0, 1.0), (1.0, 1.0, float("inf"), 1.0, 1.0), (1.0, 1.0, 1.0, 1.0, float("nan"))):
        options = Options(*numbers, 0, 1)
        assert core.pm_cuda_route_dirmoe(ctypes.byref(shape), ctypes.byref(options), 0, *[none] * 11) != 0
