"""Philox4x32-10 in int64 torch arithmetic, and the uniforms that every sampling op draws from it.

Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3" (SC 2011), sections 3.3 and 4.
A counter-based generator is a pure function of (counter, key): the same seed gives the same draws on any device, with
any number of threads and any split of the batch.
"""

from __future__ import annotations

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10


def _multiply_wide(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return the (high, low) 32-bit words of ``a * b``; by halves of b, so that int64 never overflows."""
    low = a * (b & 0xFFFF)
    high = a * (b >> 16) + (low >> 16)
    return high >> 16, ((high & 0xFFFF) << 16) | (low & 0xFFFF)


def philox4x32(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Apply the ten rounds of Philox4x32 to a batch of counters.

    Args:
        counter: four int64 tensors that broadcast together, each holding 32-bit words.
        key: the two 32-bit words of the key.

    Returns:
        The four output words, int64 tensors of the common shape with values in ``[0, 2**32)``.
    """
    c0, c1, c2, c3 = torch.broadcast_tensors(*counter)
    k0, k1 = key
    for _ in range(_ROUNDS):
        high0, low0 = _multiply_wide(_MULTIPLIERS[0], c0)
        high1, low1 = _multiply_wide(_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _KEY_STEPS[0]) & _WORD, (k1 + _KEY_STEPS[1]) & _WORD
    return c0, c1, c2, c3


def _words(seed: int, rows: Tensor, draws: int, purpose: int) -> Tensor:
    """Return the 32-bit words ``[rows, draws]`` of one purpose: draw t has word ``t % 4`` of block ``t // 4``."""
    blocks = torch.arange((draws + 3) // 4, dtype=torch.int64, device=rows.device)
    row = rows[:, None]
    counter = (blocks, row & _WORD, (row >> 32) & _WORD, torch.full_like(blocks, purpose))
    words = philox4x32(counter, (seed & _WORD, (seed >> 32) & _WORD))
    return torch.stack(words, dim=-1).flatten(start_dim=1)[:, :draws]


def philox_uniform(
    seed: int | Tensor, rows: int | Tensor, draws: int, purpose: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Uniforms in ``[0, 1)``: a pure function of seed, row, draw and purpose.

    The key is the seed's low and high word, the counter ``(draw // 4, row low, row high, purpose)``. A float32 keeps
    the leading 24 bits of its word; a float64 takes 32 bits from `purpose` and 21 more from ``purpose + 1``, so that
    the two dtypes agree in their leading bits.

    Args:
        seed: an int in ``[-2**63, 2**64)``, or a scalar int64 tensor.
        rows: the number of rows (numbered from 0), or an int64 vector of row numbers.
        draws: how many uniforms a row gets.
        purpose: which of a row's independent streams: 0 for the items of a subset, 2 for its size.
        dtype: `torch.float32` or `torch.float64`.

    Returns:
        ``[rows, draws]`` of `dtype`.

    Raises:
        TypeError: for any other dtype.
    """
    if dtype not in (torch.float32, torch.float64):
        raise TypeError(f"dtype must be torch.float32 or torch.float64, got {dtype}")
    key = int(seed)
    row_numbers = torch.arange(rows, dtype=torch.int64) if isinstance(rows, int) else rows
    high = _words(key, row_numbers, draws, purpose)
    if dtype == torch.float32:
        return (high >> 8).to(dtype) * 2.0**-24
    low = _words(key, row_numbers, draws, purpose + 1)
    return ((high << 21) | (low >> 11)).to(dtype) * 2.0**-53


def philox_open_uniform(
    seed: int | Tensor, rows: int, draws: int, purpose: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Uniforms u in ``(0, 1)`` and ``1 - u``, each to the full relative precision of `dtype` near 0.

    For variates with tails, which a grid of multiples of 2**-24 would cut off. With w the draw's word (float64: two of
    them, 64 bits, the leading ones from `purpose`), u is ``(w + 1/2) / 2**bits``, and ``1 - u`` the same of w with all
    bits inverted; both are rounded once, so the lesser of the two never rounds to 0 and carries all its digits.

    Args:
        seed: an int in ``[-2**63, 2**64)``, or a scalar int64 tensor.
        rows: the number of rows, numbered from 0.
        draws: how many uniforms a row gets.
        purpose: which of a row's independent streams: 4 for Gumbel variates, 6 for logistic ones.
        dtype: `torch.float32` or `torch.float64`.

    Returns:
        u and ``1 - u``, each ``[rows, draws]`` of `dtype`.
    """
    numbers = torch.arange(rows, dtype=torch.int64)
    high = _words(int(seed), numbers, draws, purpose)
    low = _words(int(seed), numbers, draws, purpose + 1) if dtype == torch.float64 else high

    def uniform(high: Tensor, low: Tensor) -> Tensor:
        # Both terms are exact: their sum is the only rounding.
        if dtype == torch.float64:
            return high.to(dtype) * 2.0**-32 + (low.to(dtype) + 0.5) * 2.0**-64
        return (high >> 16).to(dtype) * 2.0**-16 + ((high & 0xFFFF).to(dtype) + 0.5) * 2.0**-32

    return uniform(high, low), uniform(high ^ _WORD, low ^ _WORD)
