"""The Gumbel family beyond the contract: laws, tails, limits, ties, errors, and what a backward pass keeps."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from probmoe_ext import ops, reference
from tests import gumbel_oracle as oracle
from tests import oracle as subset_oracle
from tests.contract import assert_near
from tests.inputs import logit_sets
from tests.ops.test_errors import refused
from tests.ops.test_subset_sample import chi_square_p_value

DRAWS = 20_000
# All draws of this file together reject a right sampler with this probability (were the seeds not fixed).
FAILURE_RATE = 1e-6
NUM_TESTS = 40
LAWS = [(5, 3), (4, 4), (6, 1), (5, 2)]
LOGITS = torch.zeros(3, 8)


def draw_counts(indices: Tensor, num_experts: int) -> Tensor:
    """How often each ordered draw occurs among `indices` ``[N, k]``."""
    k = indices.shape[-1]
    place = num_experts ** torch.arange(k)
    codes = (oracle.ordered_draws(num_experts, k) * place).sum(-1)
    counts = torch.bincount((indices * place).sum(-1), minlength=num_experts**k)
    assert counts.sum() == counts[codes].sum(), "something that is no ordered draw was drawn"
    return counts[codes]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", ["spread 1", "constant", "ties", "half masked"])
@pytest.mark.parametrize(("num_experts", "k"), LAWS, ids=str)
def test_draws_are_plackett_luce(num_experts: int, k: int, name: str, dtype: torch.dtype) -> None:
    logits = logit_sets(1, num_experts, (k, k), dtype)[name]
    indices, _ = ops.gumbel_top_k(logits.expand(DRAWS, -1), k, seed=19)
    probabilities = oracle.probabilities(logits[0], k)
    assert_near(probabilities.sum(), torch.ones(()).double(), 1e-12, "total")
    assert chi_square_p_value(draw_counts(indices, num_experts), probabilities) > FAILURE_RATE / NUM_TESTS


def test_seeds_and_rows_are_independent() -> None:
    logits = torch.tensor([[0.5, -1.0, 1.0, 0.0]])
    indices = torch.cat([ops.gumbel_top_k(logits, 2, seed=seed)[0] for seed in range(4000)])
    probabilities = oracle.probabilities(logits[0], 2)
    assert chi_square_p_value(draw_counts(indices, 4), probabilities) > FAILURE_RATE / NUM_TESTS
    pairs = ops.gumbel_top_k(logits[:, :3].expand(2 * DRAWS, -1), 1, seed=3)[0].reshape(-1, 2)
    counts = torch.bincount(3 * pairs[:, 0] + pairs[:, 1], minlength=9)
    p = torch.softmax(logits[0, :3].double(), -1)
    assert chi_square_p_value(counts, (p[:, None] * p).flatten()) > FAILURE_RATE / NUM_TESTS


def test_the_law_on_subsets_is_not_the_conditional_bernoulli_law() -> None:
    """As documented: the draws fit Plackett-Luce summed over orders, and refute the other law."""
    logits = torch.tensor([2.0, 0.0, 0.0, -1.0])
    indices, _ = ops.gumbel_top_k(logits.expand(DRAWS, -1), 2, seed=5)
    codes = (2 ** oracle.ordered_draws(4, 2)).sum(-1)
    mass = torch.zeros(16, dtype=torch.float64).index_add(0, codes, oracle.probabilities(logits, 2))
    z, bernoulli = subset_oracle.probabilities(logits, (2, 2))
    cells = (z.long() * 2 ** torch.arange(4)).sum(-1)
    counts = torch.bincount((2**indices).sum(-1), minlength=16)[cells]
    assert chi_square_p_value(counts, mass[cells]) > FAILURE_RATE / NUM_TESTS
    assert chi_square_p_value(counts, bernoulli) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_noise_is_exact_in_the_tails(dtype: torch.dtype) -> None:
    """Keys and gates against 50 digits, at the draws of a million with the least and the greatest noise."""
    bits, seed, columns = 64 if dtype == torch.float64 else 32, 11, 256
    zeros = torch.zeros(4096, columns, dtype=dtype)
    noise = reference.gumbel.gumbel_noise(zeros, seed)
    epsilon = torch.finfo(dtype).eps
    for order in (noise.flatten().argsort()[:40], noise.flatten().argsort()[-40:]):
        for at in order.tolist():
            row, column = divmod(at, columns)
            true = oracle.gumbel_variate(seed, row, column, bits)
            keys, one = torch.full((row + 1, columns), -torch.inf, dtype=dtype), (row, column)
            keys[:, column] = 0
            got = float(ops.gumbel_top_k(keys, 1, seed=seed)[1][row, 0])
            assert abs(got - true) <= 3 * epsilon * max(1, abs(true)), f"Gumbel variate {one}: {got}, not {true}"
            logistic = oracle.logistic_variate(seed, row, column, bits)
            gate = float(ops.gumbel_sigmoid(keys, 1.0, seed=seed)[row, column])
            assert abs(gate - 1 / (1 + math.exp(-logistic))) <= 3 * epsilon
    assert noise.max() > 12 and noise.min() < -2.4, "a million draws reach into both tails"


def test_ends_of_the_uniforms() -> None:
    """Words of all zeros and all ones: the noise is finite and has its digits at both ends."""
    for dtype, least in ((torch.float32, 2.0**-33), (torch.float64, 2.0**-65)):
        original = reference.philox._words
        for word, low_is_u in ((0, True), (2**32 - 1, False)):
            reference.philox._words = lambda *args, w=word: torch.full((1, 1), w)
            try:
                u, complement = reference.philox_open_uniform(0, 1, 1, 4, dtype)
            finally:
                reference.philox._words = original
            assert float(u if low_is_u else complement) == least
            assert float(complement if low_is_u else u) == 1.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_equals_reference(dtype: torch.dtype) -> None:
    """Decision by decision the same as the plain-torch statement of the scheme, but for roundings."""
    sets = logit_sets(400, 60, (8, 8), dtype)
    logits = torch.cat([sets[name] for name in ("spread 1", "spread 100", "constant", "ties", "masked to k_min")])
    got, want = ops.gumbel_top_k(logits, 8, seed=31), reference.gumbel_top_k(logits, 8, seed=31)
    same = (got[0] == want[0]).all(-1)
    assert (~same).double().mean() <= 1e-3
    wide = torch.float32 if dtype == torch.bfloat16 else dtype
    unit = torch.finfo(dtype).eps if dtype == torch.bfloat16 else 3 * torch.finfo(wide).eps
    error = (got[1].double() - want[1].double()).abs()[same]
    assert (error <= unit * want[1].double().abs().clamp(min=1)[same]).all()


def test_masked_experts_are_never_drawn() -> None:
    """However small a logit is, it is drawn before a mask."""
    logits = torch.full((2000, 6), -torch.inf)
    logits[:, [1, 4]] = torch.tensor([-3e38, 50.0])
    indices, keys = ops.gumbel_top_k(logits, 2, seed=1)
    assert (indices == torch.tensor([4, 1])).all() and keys.isfinite().all()


def test_ties_go_to_the_lower_index() -> None:
    """Logits so large that the noise vanishes in their rounding: all keys are equal."""
    for k in (1, 3, 8, 9, 12):
        indices, keys = ops.gumbel_top_k(torch.full((40, 12), 1e20), k, seed=2)
        assert (indices == torch.arange(k)).all() and (keys == keys[0, 0]).all()


def test_depends_on_row_number_only(with_threads: Callable[[int, Callable[[], Any]], Any]) -> None:
    logits = logit_sets(999, 32, (4, 4), torch.float32)["spread 1"]
    calls: list[Callable[[Tensor], Tensor]] = [
        lambda x: ops.gumbel_top_k(x, 4, seed=43)[0],
        lambda x: ops.relaxed_top_k(x, 4, 0.5, seed=43),
        lambda x: ops.gumbel_sigmoid(x, 0.5, seed=43),
    ]
    for call in calls:
        one, two = (with_threads(n, lambda call=call: call(logits)) for n in (1, 2))
        assert torch.equal(one, two)
        for count in (1, 15, 17, 500):
            assert torch.equal(call(logits[:count]), one[:count])
        assert torch.equal(call(logits.reshape(3, 333, 32)).reshape(999, -1), one)


def test_seed_of_torch() -> None:
    for call in (
        lambda: ops.gumbel_top_k(LOGITS, 2)[1],
        lambda: ops.relaxed_top_k(LOGITS, 2, 1.0),
        lambda: ops.gumbel_sigmoid(LOGITS, 1.0),
    ):
        torch.manual_seed(3)
        first, second = call(), call()
        assert not torch.equal(first, second)
        torch.manual_seed(3)
        assert torch.equal(call(), first)


# ---- Plackett-Luce ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["spread 100", "plus or minus 2000", "one 87 above", "shifted by 100"])
def test_log_prob_far_out(name: str) -> None:
    """Nothing cancels where one expert outweighs the others by 10**800, in either order."""
    logits = logit_sets(20, 12, (5, 5), torch.float32)[name]
    for order in (logits.argsort(-1, descending=True), logits.argsort(-1)):
        indices = order[..., :5]
        want = oracle.log_prob(logits, indices)
        for dtype, tolerance in ((torch.float32, 1e-7), (torch.float64, 1e-14)):
            got = ops.plackett_luce_log_prob(logits.to(dtype), indices)
            assert_near(got, want, tolerance * 12 * want.abs().clamp(min=1), name)


def test_log_prob_of_what_cannot_be() -> None:
    """Masked or repeated: -inf, and no gradient."""
    logits = torch.tensor([0.5, -torch.inf, 1.0, 0.0]).expand(4, -1).clone().requires_grad_()
    value = ops.plackett_luce_log_prob(logits, torch.tensor([[0, 2], [1, 0], [0, 1], [2, 2]]))
    assert value[0].isfinite() and (value[1:] == -torch.inf).all()
    (gradient,) = torch.autograd.grad(value.sum(), logits)
    assert gradient.isfinite().all() and (gradient[1:] == 0).all() and (gradient[0, [0, 2, 3]] != 0).all()


def test_log_prob_of_all_orders_sums_to_one() -> None:
    draws = oracle.ordered_draws(6, 4)
    logits = torch.randn(6, dtype=torch.float64).expand(len(draws), -1)
    assert_near(ops.plackett_luce_log_prob(logits, draws).exp().sum(), torch.ones(()), 1e-12, "total")


# ---- relaxations --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [10.0, 1.0, 0.5, 0.1, 0.02])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_relaxed_top_k_against_fifty_digits(temperature: float, dtype: torch.dtype) -> None:
    """The published recursion in exact arithmetic, at temperatures where 1 - a has no digits left in the type."""
    logits = torch.cat([logit_sets(2, 6, (3, 3), dtype)[name] for name in ("spread 1", "spread 10", "half masked")])
    seed = 4
    _, sorted_keys = ops.gumbel_top_k(logits, 3, seed=seed)
    got, keys = torch.ops.probmoe_ext.relaxed_top_k(logits, torch.tensor(seed), 3, temperature)
    assert torch.equal(keys.sort(-1, descending=True).values[:, :3], sorted_keys), "the keys are those of the draw"
    want = torch.tensor([oracle.relaxed(row, 3, temperature) for row in keys.tolist()], dtype=torch.float64)
    # The rounding of a key counts for 1 / temperature times as much.
    tolerance = 8 * torch.finfo(dtype).eps * keys.nan_to_num(neginf=0).abs().amax().double() * max(1, 1 / temperature)
    assert_near(got, want, tolerance, f"temperature {temperature}")
    assert_near(got.sum(-1), torch.full((6,), 3.0), 16 * torch.finfo(dtype).eps, "rows sum to k")


@pytest.mark.parametrize("k", [1, 3, 6])
@pytest.mark.parametrize("temperature", [3.0, 1.0, 0.7, 0.5, 0.25, 0.2])
def test_relaxed_top_k_gradient(k: int, temperature: float) -> None:
    logits = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: ops.relaxed_top_k(x, k, temperature, seed=8), logits)


def test_relaxed_top_k_tends_to_the_draw() -> None:
    logits = torch.randn(200, 16)
    indices, keys = ops.gumbel_top_k(logits, 5, seed=6)
    hard = torch.zeros_like(logits).scatter(-1, indices[:, :4], 1.0)
    soft = ops.relaxed_top_k(logits, 4, 1e-4, seed=6)
    apart = keys[:, 3] - keys[:, 4] > 0.01
    assert apart.sum() > 150
    assert_near(soft[apart], hard[apart], 1e-6, "temperature 1e-4")


@pytest.mark.parametrize("temperature", [0.8, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_many_rounds_in_segments(dtype: torch.dtype, temperature: float) -> None:
    """More rounds than the cache holds: they are run again segment by segment, and the gradient is the same."""
    logits = torch.randn(3, 200, dtype=torch.float64)
    upstream = torch.randn(3, 200, dtype=torch.float64)
    exact = logits.clone().requires_grad_()
    keys = torch.ops.probmoe_ext.relaxed_top_k(logits.to(dtype), torch.tensor(9), 90, temperature)[1].double()
    value = reference.gumbel.relaxed_from_keys(exact + (keys - logits), 90, temperature)
    (want,) = torch.autograd.grad(value, exact, upstream)
    leaf = logits.to(dtype).requires_grad_()
    got = ops.relaxed_top_k(leaf, 90, temperature, seed=9)
    (gradient,) = torch.autograd.grad(got, leaf, upstream.to(dtype))
    tolerance = 2e-4 if dtype == torch.float32 else 1e-12
    assert_near(got, value, tolerance, "value")
    assert_near(gradient, want, tolerance, "gradient")


@pytest.mark.parametrize("temperature", [1.0, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_rows_of_near_and_of_distant_keys(dtype: torch.dtype, temperature: float) -> None:
    """Rounds on weights where the keys of a row lie close, on logarithms elsewhere: each row as if it were alone."""
    spread = torch.tensor([1.0, 1000.0, 3.0, 30.0, 1.0, 1e5])[torch.randperm(36) % 6, None].to(dtype)
    keys, upstream = torch.randn(36, 20, dtype=dtype) * spread, torch.randn(36, 20, dtype=dtype)
    keys[::7, 3:9] = -torch.inf
    backward = torch.ops.probmoe_ext.relaxed_top_k_backward
    whole = backward(upstream, keys, 5, temperature)
    alone = torch.cat([backward(upstream[n : n + 1], keys[n : n + 1], 5, temperature) for n in range(36)])
    assert torch.equal(whole, alone)
    exact = keys.double().requires_grad_()
    value = reference.gumbel.relaxed_from_keys(exact, 5, temperature)
    (want,) = torch.autograd.grad(value, exact, upstream.double())
    scale = keys.masked_fill(keys == -torch.inf, 0).double().abs().amax(-1, keepdim=True).clamp(min=1) / temperature
    assert_near(whole, want, 64 * torch.finfo(dtype).eps * scale * want.abs().amax(-1, keepdim=True).clamp(min=1), "q")


def test_relaxed_top_k_keeps_one_row_of_memory() -> None:
    """What autograd holds on to between forward and backward does not grow with k."""
    for k in (1, 16):
        held: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, held=held: held.append(t) or t, lambda t: t):
            ops.relaxed_top_k(torch.randn(100, 64, requires_grad=True), k, 0.5)
        assert sum(t.numel() for t in held) == 100 * 64


def test_gumbel_sigmoid_law() -> None:
    """P(gate > 1/2) = sigmoid(logit) at any temperature, and the binary concrete law's other quantiles."""
    logit, temperature = 0.4, 0.6
    z = ops.gumbel_sigmoid(torch.full((1000, 40), logit), temperature, seed=77).flatten().double()
    cuts = torch.linspace(0.05, 0.95, 19, dtype=torch.float64)
    below = torch.sigmoid(temperature * torch.logit(cuts) - logit)
    edges = torch.cat([torch.zeros(1).double(), below, torch.ones(1).double()])
    counts = torch.bincount(torch.bucketize(z, cuts), minlength=20)
    assert chi_square_p_value(counts, edges.diff()) > FAILURE_RATE / NUM_TESTS


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_gumbel_sigmoid_edges(dtype: torch.dtype) -> None:
    """Elementwise: what is wrong with one element stays there."""
    logits = torch.zeros(2, 7, dtype=dtype)
    clean = ops.gumbel_sigmoid(logits, 0.5, seed=1)
    logits[0, :4] = torch.tensor([torch.nan, torch.inf, -torch.inf, 3e38])
    gates = ops.gumbel_sigmoid(logits, 0.5, seed=1)
    assert gates[0, 0].isnan() and gates[0, 1] == 1 and gates[0, 2] == 0 and gates[0, 3] == 1
    assert torch.equal(gates[0, 4:], clean[0, 4:]) and torch.equal(gates[1], clean[1])


def test_gumbel_sigmoid_tends_to_zero_and_one() -> None:
    z = ops.gumbel_sigmoid(torch.randn(100, 16), 1e-6, seed=3)
    assert ((z == 0) | (z == 1)).double().mean() > 0.999


# ---- errors -------------------------------------------------------------------------------------------------------

WITH_K: dict[str, Callable[..., Any]] = {
    "gumbel_top_k": lambda x, k: ops.gumbel_top_k(x, k, seed=0),
    "relaxed_top_k": lambda x, k: ops.relaxed_top_k(x, k, 0.5, seed=0),
}


@pytest.mark.parametrize("name", WITH_K)
def test_errors_of_k(name: str) -> None:
    call = WITH_K[name]
    refused(ValueError, lambda: call(LOGITS, 9), "k", "9", "8")
    refused(ValueError, lambda: call(LOGITS, -1), "k", "-1", "8")
    for k in (2.0, "2", None, True, (1, 2)):
        refused(TypeError, lambda k=k: call(LOGITS, k), "k must be an int", str(k))
    logits = torch.zeros(50, 8)
    logits[41, 1:] = -torch.inf
    refused(ValueError, lambda: call(logits, 2), "logits", "row 41", "2")


@pytest.mark.parametrize("name", ["gumbel_top_k", "relaxed_top_k", "gumbel_sigmoid", "plackett_luce_log_prob"])
def test_errors_of_logits_and_seed(name: str) -> None:
    def call(x: Any, seed: Any = 0) -> Any:
        if name == "plackett_luce_log_prob":
            return ops.plackett_luce_log_prob(x, torch.tensor([[0, 1]] * 3))
        extra = {"gumbel_top_k": (2,), "relaxed_top_k": (2, 0.5), "gumbel_sigmoid": (0.5,)}[name]
        return getattr(ops, name)(x, *extra, seed=seed)

    refused(TypeError, lambda: call(LOGITS.long()), "logits", "int64", "float32")
    refused(TypeError, lambda: call([[0.0, 1.0]]), "logits", "list", "ensor")
    refused(ValueError, lambda: call(torch.tensor(1.0)), "logits", "dimension")
    if name != "plackett_luce_log_prob":
        refused(TypeError, lambda: call(LOGITS, 1.5), "seed", "float", "int")
        refused(ValueError, lambda: call(LOGITS, torch.tensor(1, device="meta")), "seed", "meta", "cpu")


@pytest.mark.parametrize("call", [lambda t: ops.relaxed_top_k(LOGITS, 2, t), lambda t: ops.gumbel_sigmoid(LOGITS, t)])
def test_errors_of_the_temperature(call: Callable[..., Any]) -> None:
    for bad in (0.0, -1.0, math.nan, math.inf, 1e-7, 1e7):
        refused(ValueError, lambda bad=bad: call(bad), "temperature", str(bad), "1e-6")
    for bad in ("1", None, True, torch.tensor(1.0)):
        refused(TypeError, lambda bad=bad: call(bad), "temperature must be a number", type(bad).__name__)


def test_errors_of_indices() -> None:
    indices = torch.tensor([[0, 1]] * 3)
    refused(TypeError, lambda: ops.plackett_luce_log_prob(LOGITS, indices.float()), "indices", "float32", "int64")
    refused(ValueError, lambda: ops.plackett_luce_log_prob(LOGITS, indices[:2]), "indices", "2, 2", "3, 2")
    refused(ValueError, lambda: ops.plackett_luce_log_prob(LOGITS, indices + 7), "indices", "8", "7")
    refused(ValueError, lambda: ops.plackett_luce_log_prob(LOGITS, indices - 1), "indices", "-1", "7")
    refused(ValueError, lambda: ops.plackett_luce_log_prob(LOGITS, torch.zeros(3, 9).long()), "indices", "8", "9")
    refused(TypeError, lambda: ops.plackett_luce_log_prob(LOGITS, [[0, 1]]), "indices", "list")
