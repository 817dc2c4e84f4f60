"""Exact sampling of subsets, as the compiled kernels do it, decision by decision."""

from __future__ import annotations

import torch
from torch import Tensor

from probmoe_ext.reference.philox import philox_uniform
from probmoe_ext.reference.tilt import check_band, compute_dtype, prefix_table, tilt_rows

ITEM_DRAWS = 0
SIZE_DRAW = 2


def subset_sample(logits: Tensor, k: int | tuple[int, int], seed: int | Tensor | None = None) -> Tensor:
    """Draw one subset for each row; int64 ``[..., k_max]`` ascending, unused slots (last) hold E.

    The size is the smallest j whose cumulative probability exceeds the row's uniform for it; no uniform is used up for
    an exact k. The items then follow from the last to the first: with j still to choose among the first n experts, the
    chosen one is the smallest i (counting from 1) with ``e_j(w_1..w_i) > u * e_j(w_1..w_n)``; go on with ``n = i - 1``.

    Args:
        logits: ``[..., E]``; rows are numbered over the flattened batch, and draw independently by their number.
        k: the size, or the band ``(k_min, k_max)``.
        seed: an int or a scalar int64 tensor; None takes one from torch's default generator.

    Returns:
        The indices. A row with NaN or ``+inf`` gets only unused slots.
    """
    num_experts = logits.shape[-1]
    k_min, k_max = check_band(k, num_experts)
    key = int(torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64)) if seed is None else int(seed)
    with torch.no_grad():
        rows = tilt_rows(compute_dtype(logits).flatten(end_dim=-2) if logits.dim() > 1 else logits[None], k_min, k_max)
        prefix = prefix_table(rows)
        count, dtype, device = rows.x.shape[0], rows.x.dtype, logits.device

        left = torch.full((count, 1), k_max, device=device)
        if k_min < k_max:
            cumulative = (prefix[:, -1] * rows.weights)[:, k_min:].cumsum(-1)
            u = philox_uniform(key, count, 1, SIZE_DRAW, dtype).to(device)
            left = k_min + (cumulative <= u * cumulative[:, -1:]).sum(-1, keepdim=True)

        chosen = torch.full((count, k_max), num_experts, device=device)
        uniforms = philox_uniform(key, count, k_max, ITEM_DRAWS, dtype).to(device)
        draw = torch.zeros_like(left)
        slots = torch.arange(k_max, device=device)

        def threshold(n: int) -> Tensor:
            if k_max == 0:
                return torch.zeros_like(rows.tilt)
            u = uniforms.gather(1, draw.clamp(max=k_max - 1))
            return u * prefix[:, n].gather(1, left.clamp(0, k_max))

        limit = threshold(num_experts)
        # Tables are normalised over the experts that they cover; `scale` undoes that for the experts i+1..n.
        scale = torch.ones_like(rows.tilt)
        for i in range(num_experts, 0, -1):
            scale_below = scale * rows.q[:, i - 1 : i]
            below = prefix[:, i - 1].gather(1, left.clamp(0, k_max)) * scale_below
            take = (left > 0) & (below <= limit)
            chosen = torch.where(take & (slots == left - 1), i - 1, chosen)
            left, draw = left - take.long(), draw + take.long()
            limit = torch.where(take, threshold(i - 1), limit)
            scale = torch.where(take, 1, scale_below)
    return chosen.reshape(*logits.shape[:-1], k_max)
