"""The plain-torch reference against the definitions: enumeration, finite differences, 50 digits, published vectors."""

from __future__ import annotations

import pytest
import torch

from probmoe_ext import reference
from tests import oracle
from tests.contract import OpSpec, check_enumeration, check_gradcheck
from tests.inputs import SET_NAMES, Band, exact_case
from tests.ops import SPECS

BANDS = [(1, (1, 1)), (1, (0, 1)), (4, (0, 0)), (4, (4, 4)), (5, (2, 2)), (6, (2, 4)), (6, (0, 6)), (8, (3, 3))]
SUBSET_SPECS = [spec for spec in SPECS if spec.name.startswith("subset")]


@pytest.mark.parametrize(
    ("spec", "num_experts", "band"),
    [(spec, *size) for spec in SPECS for size in BANDS if spec.allows(size[1])],
    ids=str,
)
def test_enumeration(spec: OpSpec, num_experts: int, band: Band) -> None:
    check_enumeration(spec, spec.reference, num_experts, band)


@pytest.mark.parametrize("band", [(2, 2), (1, 3)], ids=str)
@pytest.mark.parametrize("spec", SUBSET_SPECS, ids=str)
def test_finite_differences(spec: OpSpec, band: Band) -> None:
    check_gradcheck(spec, spec.reference, 4, band)


@pytest.mark.parametrize(
    ("num_experts", "band"),
    [(64, (8, 8)), (64, (6, 8)), (64, (0, 64)), (64, (64, 64)), (60, (4, 4)), (96, (40, 60)), (512, (8, 8))],
    ids=str,
)
def test_fifty_digits(num_experts: int, band: Band) -> None:
    """In float64 the reference is good to 1e-13, and so fit to judge float32 at real sizes."""
    for name in SET_NAMES if num_experts <= 64 else ("spread 10", "constant", "plus or minus 2000"):
        logits, v, exact = exact_case(num_experts, band, name)
        log_z = reference.subset_log_partition(logits, band)
        assert abs(float(log_z) - exact.log_z) <= 1e-13 * max(1, abs(exact.log_z)), name
        marginals = reference.subset_marginals(logits, band)[0]
        true_marginals = torch.from_numpy(exact.marginals)
        assert ((marginals - true_marginals).abs() <= 1e-13 * true_marginals + 1e-25).all(), name
        product = reference.subset_covariance_vp(logits, v, band)[0]
        assert ((product - torch.from_numpy(exact.covariance_vp)).abs() <= 1e-13 * v.abs().max()).all(), name


def test_philox_known_answers() -> None:
    """The three vectors for philox4x32-10 that the authors publish with Random123 (kat_vectors)."""
    ones = 0xFFFFFFFF
    vectors = [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((ones, ones, ones, ones), (ones, ones), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ]
    for counter, key, expected in vectors:
        c0, c1, c2, c3 = (torch.tensor([word]) for word in counter)
        assert tuple(int(word) for word in reference.philox4x32((c0, c1, c2, c3), key)) == expected


def test_philox_uniform_layout() -> None:
    """Counter and key as documented; negative seeds are their two's complement; float64 extends float32."""
    seed, row = -2, 2**33 + 5
    uniforms = reference.philox_uniform(seed, torch.tensor([row]), 6, 2, torch.float32)
    assert uniforms.shape == (1, 6)
    for draw in range(6):
        counter = tuple(torch.tensor([word]) for word in (draw // 4, 5, 2, 2))
        word = reference.philox4x32(counter, (0xFFFFFFFE, 0xFFFFFFFF))[draw % 4]  # type: ignore[arg-type]
        assert float(uniforms[0, draw]) == (int(word) >> 8) / 2**24
    wide = reference.philox_uniform(torch.tensor(seed), torch.tensor([row]), 6, 2, torch.float64)
    assert torch.equal((wide * 2**24).floor() / 2**24, uniforms.double())
    with pytest.raises(TypeError, match="dtype"):
        reference.philox_uniform(0, 1, 1, 0, torch.float16)


def test_sample_by_the_sentence() -> None:
    """The vectorised sampler makes the decisions that its docstring states, done here one by one on unscaled odds."""
    num_experts, band, seed, count = 7, (2, 4), 99, 200
    logits = torch.randn(count, num_experts, dtype=torch.float64)
    logits[::3, 2] = -torch.inf
    got = reference.subset_sample(logits, band, seed)
    sizes = reference.philox_uniform(seed, count, 1, 2, torch.float64)
    items = reference.philox_uniform(seed, count, band[1], 0, torch.float64)
    for row in range(count):
        polynomials = [[1.0] + [0.0] * num_experts]
        for w in logits[row].exp().tolist():
            last = polynomials[-1]
            polynomials.append([1.0] + [last[j] + w * last[j - 1] for j in range(1, num_experts + 1)])
        total = sum(polynomials[-1][band[0] : band[1] + 1])
        size = next(
            j for j in range(band[0], band[1] + 1) if sum(polynomials[-1][band[0] : j + 1]) > float(sizes[row]) * total
        )
        n, subset = num_experts, []
        for draw, j in enumerate(range(size, 0, -1)):
            bound = float(items[row, draw]) * polynomials[n][j]
            i = next(i for i in range(1, n + 1) if polynomials[i][j] > bound)
            subset.insert(0, i - 1)
            n = i - 1
        assert got[row].tolist() == subset + [num_experts] * (band[1] - size)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("band", [(3, 3), (1, 3)], ids=str)
def test_probmoe_gradient_closed_form(band: Band, normalize: bool) -> None:
    """Autograd of the stop-gradient expression is MATH.md's ``C q + J_softmax^T (g z)``."""
    num_experts = 6
    logits = torch.randn(4, num_experts, dtype=torch.float64, requires_grad=True)
    weights, indices = reference.route_probmoe(logits, band, training=True, normalize=normalize, seed=3)
    upstream = torch.randn_like(weights)
    (got,) = torch.autograd.grad(weights, logits, upstream)
    s = torch.softmax(logits.detach(), -1)
    z = reference.subset.subset_indicator(indices, num_experts, torch.float64)
    g = torch.zeros(4, num_experts + 1, dtype=torch.float64).scatter(-1, indices, upstream)[:, :num_experts] * z
    if normalize:
        total = (z * s).sum(-1, keepdim=True)
        g = (g - (g * z * s).sum(-1, keepdim=True) / total) / total
    covariance = oracle.covariance(logits.detach(), band)
    by_softmax = s * (g * z - (g * z * s).sum(-1, keepdim=True))
    want = (covariance @ (g * s).unsqueeze(-1)).squeeze(-1) + by_softmax
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-13)


def test_log_space_restatement() -> None:
    """Right where its clamps do not bite, wrong as published where they do."""
    mild = torch.randn(16, 12, dtype=torch.float64)
    torch.testing.assert_close(
        reference.subset_marginals_log_space(mild, 4), reference.subset_marginals(mild, 4), rtol=0, atol=1e-9
    )
    shifted = torch.randn(64, 64) + 100
    error = reference.subset_marginals_log_space(shifted, 8) - reference.subset_marginals(shifted, 8)
    assert error.abs().max() > 0.1
