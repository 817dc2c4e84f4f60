"""What only the kernels promise, and that the emulation finds mistakes."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from probmoe_ext import ops
from tests import emulation
from tests.contract import assert_same
from tests.inputs import SET_NAMES, Band, logit_sets

pytestmark = pytest.mark.filterwarnings("ignore:Warning only once for all operators")

RAW = torch.ops.probmoe_ext
DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
SEED = torch.tensor(-17)


Results = dict[str, tuple[Tensor, ...]]


def results(logits: Tensor, band: Band) -> Results:
    """Outputs of every raw operator on the same logits."""
    a, b = band
    generator = torch.Generator().manual_seed(3)
    v = torch.randn(logits.shape, generator=generator, dtype=torch.float64).to(logits.dtype)
    members = RAW.subset_sample(logits, SEED, a, b)
    grad = v[:, :1] + torch.arange(b).to(logits.dtype)
    found = {
        name: getattr(RAW, f"subset_{name}")(logits, a, b)
        for name in ("log_partition", "cardinality", "marginals", "entropy", "mode")
    }
    found |= {
        "covariance_vp": RAW.subset_covariance_vp(logits, v, a, b),
        "log_prob": RAW.subset_log_prob(logits, members, a, b),
        "cardinality_backward": RAW.subset_cardinality_backward(v[:, : b - a + 1].contiguous(), logits, a, b),
        "sample": members,
        "route": RAW.route_probmoe(logits, SEED, a, b, True, True, True),
        "route_mode": RAW.route_probmoe(logits, None, a, b, False, True, True),
        "route_backward": RAW.route_probmoe_backward(grad, logits, members, a, b, True, True),
        "route_top_k_backward": RAW.route_top_k_backward(grad, logits, members, False),
    }
    return {name: out if isinstance(out, tuple) else (out,) for name, out in found.items()}


def assert_any_alignment(wide: Tensor, num_experts: int, call: Callable[[Tensor], Results]) -> None:
    """Rows that begin at any element of a wider tensor give the bits of dense ones."""
    with emulation.in_place_of_cpu():
        for offset in (1, 2, 4):
            view = wide[:, offset : offset + num_experts]
            want = call(view.clone())
            for name, got in call(view).items():
                assert_same(got, want[name], f"{name} at offset {offset}")


def assert_any_order(call: Callable[[], Results]) -> None:
    """Threads that run in another order between meetings give the same bits."""
    with emulation.in_place_of_cpu():
        want = call()
        for seed in (1, 2, 3):
            with emulation.schedule(seed):
                got = call()
            for name, outputs in got.items():
                assert_same(outputs, want[name], f"{name}, schedule {seed}")


# ---- answers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num_experts", "band"), [(64, (8, 8)), (60, (4, 4)), (64, (6, 8)), (30, (2, 7)), (256, (8, 8))]
)
def test_draws_are_the_cpus(num_experts: int, band: Band) -> None:
    """On moderate logits by vote, on the others by walk: the same members as on the CPU, but for rounding."""
    logits = torch.cat(list(logit_sets(640 // num_experts, num_experts, band, torch.float32).values()))
    moderate = torch.randn(12800 // num_experts, num_experts)
    for rows in (logits, moderate, 2 * moderate):
        want = ops.subset_sample(rows, band, seed=SEED)
        with emulation.in_place_of_cpu():
            got = ops.subset_sample(rows, band, seed=SEED)
        assert (got != want).any(-1).sum() <= 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("band", [(3, 3), (2, 5), (10, 12)], ids=str)
def test_too_few_experts(dtype: torch.dtype, band: Band) -> None:
    """No row can be named without waiting for the device: it answers NaN and 0, 1, 2, ...; its neighbours as ever."""
    logits = torch.randn(5, 20).to(dtype)
    spoilt = logits.clone()
    spoilt[2, band[0] - 1 :] = -torch.inf
    with emulation.in_place_of_cpu():
        good, bad = results(logits, band), results(spoilt, band)
    for name, outputs in bad.items():
        for output, expected in zip(outputs, good[name], strict=True):
            if output.is_floating_point():
                assert output[2].isnan().all(), name
            else:
                assert output[2].tolist() == list(range(band[1])), name
            kept = [0, 1, 3, 4]
            assert_same((output[kept],), (expected[kept],), name)


def test_log_prob_of_no_index() -> None:
    """An index outside 0..E makes the row NaN, and is not read through."""
    logits = torch.randn(4, 9)
    indices = torch.tensor([[0, 1], [0, 10], [-1, 2], [1 << 40, 3]])
    with emulation.in_place_of_cpu():
        value = ops.subset_log_prob(logits, indices, 2)
    assert value[0].isfinite() and value[1:].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("num_experts", "band"), [(64, (8, 8)), (60, (4, 4)), (17, (1, 3))])
def test_rows_of_any_alignment(num_experts: int, band: Band, dtype: torch.dtype) -> None:
    """Wide, narrow and single accesses give the same bits: rows that begin at any element of a wider tensor."""
    assert_any_alignment(torch.randn(3, num_experts + 8).to(dtype), num_experts, lambda rows: results(rows, band))


def test_rows_in_the_scratch() -> None:
    """Tables that shared memory does not hold lie in the scratch tensor, for as many rows at a time as it holds."""
    logits = 3 * torch.randn(2, 600, dtype=torch.float64)
    band = (290, 300)
    want = ops.subset_covariance_vp(logits, logits, band), ops.subset_sample(logits, band, seed=SEED)
    with emulation.in_place_of_cpu():
        got = ops.subset_covariance_vp(logits, logits, band), ops.subset_sample(logits, band, seed=SEED)
    torch.testing.assert_close(got[0], want[0], rtol=0, atol=1e-12)
    assert torch.equal(got[1], want[1])


def test_a_row_answers_from_its_own_numbers() -> None:
    """The same bits alone and beside rows that need the other form."""
    logits = torch.cat([sets[:1] for sets in logit_sets(1, 64, (8, 8), torch.float32).values()])
    with emulation.in_place_of_cpu():
        together = ops.subset_marginals(logits, 8)
        for row, name in enumerate(SET_NAMES):
            assert torch.equal(together[row : row + 1], ops.subset_marginals(logits[row : row + 1], 8)), name


# ---- threads and memory -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("num_experts", "band"), [(64, (8, 8)), (33, (2, 4)), (40, (9, 12))])
def test_threads_in_any_order(num_experts: int, band: Band) -> None:
    """No result depends on the order of threads between meetings: none reads what another has yet to write."""
    logits = torch.cat(list(logit_sets(1, num_experts, band, torch.float32).values()))
    assert_any_order(lambda: results(logits, band))


class Shape(ctypes.Structure):
    """pm_shape."""

    _fields_ = [(name, ctypes.c_int64) for name in ("rows", "experts", "k_min", "k_max", "stride", "first_row")]


def guarded(tensor: Tensor) -> int:
    """The address of a copy that ends at an inaccessible page."""
    allocate = emulation.library().emulation_allocate
    allocate.restype, allocate.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    size = tensor.numel() * tensor.element_size()
    address = allocate(size)
    ctypes.memmove(address, tensor.contiguous().data_ptr(), size)
    return int(address)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("num_experts", "band"), [(64, (8, 8)), (60, (4, 4)), (13, (2, 5)), (31, (9, 11))])
def test_no_access_outside_the_arrays(num_experts: int, band: Band, dtype: torch.dtype) -> None:
    """Every array of every launcher ends at an inaccessible page, the last row of strided logits included."""
    core = emulation.library()
    (a, b), rows, stride = band, 5, num_experts + 4
    logits = torch.randn(rows, stride).to(dtype).flatten()[: (rows - 1) * stride + num_experts]
    per_expert, per_slot = torch.randn(rows, num_experts).to(dtype), torch.randn(rows, b).to(dtype)
    members = torch.rand(rows, num_experts).argsort(-1)[:, :b]
    x, v, g, s, i = (ctypes.c_void_p(guarded(t)) for t in (logits, per_expert, per_slot, SEED, members))
    sizes = ctypes.c_void_p(guarded(per_slot[:, : b - a + 1]))
    one, wide, slots = (ctypes.c_void_p(guarded(t)) for t in (per_slot[:, :1], per_expert, members))
    weights, width = ctypes.c_void_p(guarded(per_slot)), ctypes.c_void_p(guarded(per_slot[:, : b - a + 1]))
    none, zero, yes = ctypes.c_void_p(None), ctypes.c_int(0), ctypes.c_int(1)
    calls = {
        "subset_log_partition": (x, one, none, none),
        "subset_entropy": (x, one, none, none),
        "subset_cardinality": (x, width, none, none),
        "subset_cardinality_backward": (x, sizes, wide, none, none),
        "subset_marginals": (x, wide, none, none),
        "subset_covariance_vp": (x, v, wide, none, none),
        "subset_log_prob": (x, i, one, none, none),
        "subset_sample": (x, s, slots, none, none),
        "subset_mode": (x, slots, none),
        "route": (x, s, yes, weights, slots, none, none),
        "route_backward": (x, i, g, zero, yes, wide, none, none),
    }
    shape = Shape(rows, num_experts, a, b, stride, 0)
    assert core.pm_cuda_scratch_size(ctypes.byref(shape), DTYPES[dtype]) == 0
    core.pm_cuda_error_text.restype = ctypes.c_char_p
    for name, arguments in calls.items():
        status = getattr(core, f"pm_cuda_{name}")(ctypes.byref(shape), DTYPES[dtype], *arguments)
        assert status == 0, f"{name}: {core.pm_cuda_error_text(status).decode()}"


@pytest.mark.parametrize(
    ("mistake", "said"),
    [
        (1, "divergence in block 0: thread 0 is at __shfl_xor_sync"),
        (2, "thread 5 has left"),
        (3, "mask leaves it out"),
        (4, "divergence"),
        (5, "outside the block's shared memory, thread 63"),
        (6, "write before the block's shared memory"),
    ],
)
def test_mistakes_are_found(mistake: int, said: str) -> None:
    function, total = emulation.library().emulation_mistake, ctypes.c_int64()
    function.restype = ctypes.c_char_p
    assert said in function(mistake, ctypes.byref(total)).decode()
    assert function(0, ctypes.byref(total)) == b"no error"
    assert total.value == 2 * sum(range(64)), "and the kernel without a mistake is right, after any of them"


def test_a_missing_barrier_shows_in_another_order() -> None:
    function, total = emulation.library().emulation_mistake, ctypes.c_int64()
    found = set()
    for seed in (0, 1, 2):
        with emulation.schedule(seed):
            function(7, ctypes.byref(total))
        found.add(total.value)
    assert len(found) > 1
