"""What the Gumbel family's kernels promise beyond the contract: the CPU's bits, rows without an answer, any order."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from probmoe_ext import ops, reference
from tests import emulation
from tests import gumbel_oracle as oracle
from tests.contract import assert_near, assert_same, needs_fma
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
from tests.inputs import SET_NAMES, logit_sets

pytestmark = pytest.mark.filterwarnings("ignore:Warning only once for all operators")

SHAPES = [(64, 8), (60, 4), (13, 5), (256, 8), (300, 9)]
every_shape = pytest.mark.parametrize(("num_experts", "k"), SHAPES)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def results(logits: Tensor, k: int, temperature: float = 0.7) -> Results:
    """Outputs of every raw operator on the same logits."""
    generator = torch.Generator().manual_seed(3)
    v = torch.randn(logits.shape, generator=generator, dtype=torch.float64).to(logits.dtype)
    keys, order = RAW.gumbel_top_k(logits, SEED, k)
    relaxed, noisy = RAW.relaxed_top_k(logits, SEED, k, temperature)
    return {
        "gumbel_top_k": (keys, order),
        "gumbel_sigmoid": (RAW.gumbel_sigmoid(logits, SEED, temperature),),
        "plackett_luce_log_prob": (RAW.plackett_luce_log_prob(logits, order),),
        "plackett_luce_log_prob_backward": (RAW.plackett_luce_log_prob_backward(v[:, 0], logits, order),),
        "relaxed_top_k": (relaxed, noisy),
        "relaxed_top_k_backward": (RAW.relaxed_top_k_backward(v, noisy, k, temperature),),
    }


# ---- answers ------------------------------------------------------------------------------------------------------


@needs_fma
@every_dtype
@pytest.mark.parametrize(("num_experts", "k"), [*SHAPES, (1, 1), (6, 6), (1024, 40)])
def test_keys_and_gates_have_the_cpus_bits(num_experts: int, k: int, dtype: torch.dtype) -> None:
    """The same draws on both, ties and rounding included, not only the same law."""
    logits = torch.cat(list(logit_sets(3, num_experts, (k, k), torch.float32).values())).to(dtype)

    def drawn() -> tuple[Tensor, ...]:
        top, gates = RAW.gumbel_top_k(logits, SEED, k), RAW.gumbel_sigmoid(logits, SEED, 0.4)
        return *top, gates, RAW.relaxed_top_k(logits, SEED, k, 0.4)[1]

    want = drawn()
    with emulation.in_place_of_cpu():
        got = drawn()
    assert_same(got, want, f"E={num_experts}, k={k}")


@pytest.mark.parametrize("name", [name for name in SET_NAMES if name != "half masked"])
def test_log_prob_far_out(name: str) -> None:
    """Single precision suffices for what the CPU takes in double: differences are of logits, and exact."""
    logits = logit_sets(2, 60, (20, 20), torch.float32)[name]
    indices = logits.argsort(-1, descending=True)[:, :20]
    if name != "masked to k_min":
        indices[1] = logits[1].argsort()[:20]
    exact = [oracle.exact_log_prob(row, order) for row, order in zip(logits.tolist(), indices.tolist(), strict=True)]
    want, grad = (torch.tensor(list(part), dtype=torch.float64) for part in zip(*exact, strict=True))
    for dtype in (torch.float32, torch.float64):
        with emulation.in_place_of_cpu():
            got = ops.plackett_luce_log_prob(logits.to(dtype), indices)
            got_grad = RAW.plackett_luce_log_prob_backward(torch.ones(2, dtype=dtype), logits.to(dtype), indices)
        unit = torch.finfo(dtype).eps
        assert_near(got, want, 8 * unit * want.abs().clamp(min=1), f"{name}, {dtype}")
        assert_near(got_grad, grad, 16 * unit * grad.abs().clamp(min=1), f"gradient: {name}, {dtype}")


@pytest.mark.parametrize("k", [1, 5, 8, 9, 40])
def test_relaxed_at_any_temperature(k: int) -> None:
    logits = torch.cat([logit_sets(2, 40, (k, k), torch.float64)[n] for n in ("spread 1", "spread 100", "ties")])
    for temperature in (1e-6, 1e-2, 1.0, 1e6):
        want = ops.relaxed_top_k(logits, k, temperature, seed=SEED)
        with emulation.in_place_of_cpu():
            got = ops.relaxed_top_k(logits, k, temperature, seed=SEED)
        assert_near(got, want, 1e-12 * max(1.0, 100 / temperature), f"temperature {temperature}")


@every_dtype
def test_rows_without_an_answer(dtype: torch.dtype) -> None:
    """NaN, +inf and too few experts: NaN and 0, 1, 2, ...; the neighbours as ever."""
    logits = torch.randn(6, 20).to(dtype)
    spoilt = logits.clone()
    spoilt[1, 4], spoilt[3, 19], spoilt[4, 2:] = torch.nan, torch.inf, -torch.inf
    with emulation.in_place_of_cpu():
        good, bad = results(logits, 3), results(spoilt, 3)
    for name, outputs in bad.items():
        for output, expected in zip(outputs, good[name], strict=True):
            assert_same((output[[0, 2, 5]],), (expected[[0, 2, 5]],), name)
            if name == "gumbel_sigmoid":
                assert output[[1, 3, 4], [4, 19, 2]].nan_to_num(nan=-1).tolist() == [-1, 1, 0]
                continue
            lost = [1, 3] if name.startswith("plackett") else [1, 3, 4]  # two experts, three choices: not NaN but -inf
            if output.is_floating_point():
                assert output[lost].isnan().all(), name
            else:
                assert output[lost].tolist() == [[0, 1, 2]] * len(lost), name
    assert bad["plackett_luce_log_prob"][0][4] == -torch.inf
    assert (bad["plackett_luce_log_prob_backward"][0][4] == 0).all()


def test_no_index() -> None:
    """An index that is no expert makes its row NaN, and is not read through."""
    logits, grad = torch.randn(5, 9), torch.ones(5)
    indices = torch.tensor([[0, 1], [0, 9], [-1, 2], [1 << 40, 3], [4, 4]])
    with emulation.in_place_of_cpu():
        value = RAW.plackett_luce_log_prob(logits, indices)
        gradient = RAW.plackett_luce_log_prob_backward(grad, logits, indices)
    assert value[0].isfinite() and value[1:4].isnan().all() and value[4] == -torch.inf
    assert gradient[0].isfinite().all() and gradient[1:4].isnan().all() and (gradient[4] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_rounds_in_the_scratch(dtype: torch.dtype) -> None:
    """More rounds than shared memory holds: in the scratch, for as many rows at a time as it holds."""
    rows, num_experts, k = 16, 600, 550
    shape, size = Shape(rows, num_experts, k, k, num_experts, 0), emulation.library()
    scratch = size.pm_cuda_relaxed_top_k_backward_scratch_size
    scratch.restype = ctypes.c_int64
    bytes_of_a_row = k * (1024 * dtype.itemsize + 3 * dtype.itemsize)
    assert 0 < scratch(ctypes.byref(shape), DTYPES[dtype]) <= 1 << 26
    wide = dtype == torch.float64
    assert (rows * bytes_of_a_row > 1 << 26) == wide, "single in one turn, double in two"
    keys, upstream = torch.randn(rows, num_experts, dtype=torch.float64), torch.randn(rows, num_experts).double()
    keys, upstream = keys.to(dtype), upstream.to(dtype)
    want = RAW.relaxed_top_k_backward(upstream, keys, k, 0.8)
    with emulation.in_place_of_cpu():
        got = RAW.relaxed_top_k_backward(upstream, keys, k, 0.8)
    assert_near(got, want, (1e-11 if wide else 5e-3) * want.abs().amax().double(), "gradient")


@pytest.mark.parametrize("grad_dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_gradient_as_it_comes(grad_dtype: torch.dtype) -> None:
    """Keys in single precision with the gradient of any type."""
    keys, upstream = torch.randn(5, 60), torch.randn(5, 60).to(torch.float16).to(grad_dtype)
    with emulation.in_place_of_cpu():
        want = RAW.relaxed_top_k_backward(upstream.float(), keys, 4, 0.5)
        assert_same((RAW.relaxed_top_k_backward(upstream, keys, 4, 0.5),), (want,), str(grad_dtype))


# ---- threads and memory -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@every_shape
def test_rows_of_any_alignment(num_experts: int, k: int, dtype: torch.dtype) -> None:
    """Wide, narrow and single accesses give the same bits: rows that begin at any element of a wider tensor."""
    assert_any_alignment(torch.randn(2, num_experts + 8).to(dtype), num_experts, lambda rows: results(rows, k))


@every_shape
def test_threads_in_any_order(num_experts: int, k: int) -> None:
    """No result depends on the order of threads between meetings: none reads what another has yet to write."""
    logits = torch.cat(list(logit_sets(1, num_experts, (k, k), torch.float32).values()))
    assert_any_order(lambda: results(logits, k))


@every_dtype
@pytest.mark.parametrize(("num_experts", "k"), [(64, 8), (60, 4), (13, 5), (31, 11), (300, 5)])
def test_no_access_outside_the_arrays(num_experts: int, k: int, dtype: torch.dtype) -> None:
    """Every array of every launcher ends at an inaccessible page, the last row of strided logits included."""
    core = emulation.library()
    core.pm_cuda_error_text.restype = ctypes.c_char_p
    rows, stride, wide_type = 5, num_experts + 4, torch.float64 if dtype == torch.float64 else torch.float32
    logits = torch.randn(rows, stride).to(dtype).flatten()[: (rows - 1) * stride + num_experts]
    per_expert, per_slot = torch.randn(rows, num_experts).to(dtype), torch.randn(rows, k).to(dtype)
    order = torch.rand(rows, num_experts).argsort(-1)[:, :k]
    x, v, s, i = (ctypes.c_void_p(guarded(t)) for t in (logits, per_expert, SEED, order))
    keyed = ctypes.c_void_p(guarded(logits.to(wide_type)))
    wide, keys, one = (ctypes.c_void_p(guarded(t)) for t in (per_expert, per_expert.to(wide_type), per_slot[:, :1]))
    top, slots = ctypes.c_void_p(guarded(per_slot)), ctypes.c_void_p(guarded(order))
    none, tau = ctypes.c_void_p(None), ctypes.c_double(0.7)
    calls: dict[str, tuple[torch.dtype, tuple[object, ...]]] = {
        "gumbel_top_k": (dtype, (x, s, top, slots, none)),
        "gumbel_sigmoid": (dtype, (x, tau, s, wide, none)),
        "plackett_luce_log_prob": (dtype, (x, i, one, none)),
        "plackett_luce_log_prob_backward": (dtype, (x, i, one, wide, none)),
        "relaxed_top_k": (dtype, (x, tau, s, wide, keys, none)),
        "relaxed_top_k_backward": (wide_type, (keyed, ctypes.c_int(DTYPES[dtype]), v, tau, keys, none, none)),
    }
    shape = Shape(rows, num_experts, k, k, stride, 0)
    assert core.pm_cuda_relaxed_top_k_backward_scratch_size(ctypes.byref(shape), DTYPES[wide_type]) == 0
    for name, (element, arguments) in calls.items():
        status = getattr(core, f"pm_cuda_{name}")(ctypes.byref(shape), DTYPES[element], *arguments)
        assert status == 0, f"{name}: {core.pm_cuda_error_text(status).decode()}"


@pytest.mark.parametrize(
    "call",
    [
        lambda core, shape, p: core.pm_cuda_gumbel_top_k(shape, 0, p, p, p, p, None),
        lambda core, shape, p: core.pm_cuda_relaxed_top_k(shape, 0, p, ctypes.c_double(0.5), p, p, p, None),
        lambda core, shape, p: core.pm_cuda_relaxed_top_k_backward(
            shape, 0, p, 0, p, ctypes.c_double(0.5), p, None, None
        ),
    ],
)
def test_a_band_is_refused(call: Callable[[ctypes.CDLL, object, ctypes.c_void_p], int]) -> None:
    memory = ctypes.c_void_p(guarded(torch.zeros(64)))
    assert call(emulation.library(), ctypes.byref(Shape(1, 8, 2, 3, 8, 0)), memory) == 1


@pytest.mark.parametrize("temperature", [0.0, -1.0, 1e7, float("nan")])
def test_a_temperature_is_refused(temperature: float) -> None:
    logits = torch.zeros(2, 8)
    with emulation.in_place_of_cpu():
        for call in (
            lambda: RAW.gumbel_sigmoid(logits, SEED, temperature),
            lambda: RAW.relaxed_top_k(logits, SEED, 2, temperature),
            lambda: RAW.relaxed_top_k_backward(logits, logits, 2, temperature),
        ):
            with pytest.raises(RuntimeError, match="invalid value"):
                call()


def test_a_replay_needs_no_host() -> None:
    """The seed is read where the kernel runs: the same launch draws anew when the memory behind it changes."""
    logits, seed = torch.zeros(4, 16), torch.tensor(5)
    with emulation.in_place_of_cpu():
        first = RAW.gumbel_top_k(logits, seed, 4)
        seed.fill_(6)
        second = RAW.gumbel_top_k(logits, seed, 4)
    assert not torch.equal(first[1], second[1])
    assert torch.equal(second[1], reference.gumbel_top_k(logits, 4, 6)[0])
