"""Members of a subset: an exact draw, and the most probable one, by the law of :mod:`probmoe_ext.ops.subset`."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _C  # noqa: F401  (registers the operators)
from .arguments import Cardinality, apply_mask, check_band, check_logits, launch, make_seed
from .registration import register

_sample = register(
    "subset_sample",
    lambda logits, seed, k_min, k_max: logits.new_empty((*logits.shape[:-1], k_max), dtype=torch.int64),
    unbatched=(1,),
)
_mode = register(
    "subset_mode", lambda logits, k_min, k_max: logits.new_empty((*logits.shape[:-1], k_max), dtype=torch.int64)
)


def subset_sample(
    logits: Tensor,
    k: Cardinality,
    seed: int | Tensor | None = None,
    num_samples: int | None = None,
    *,
    mask: Tensor | None = None,
) -> Tensor:
    """An exact draw of S: its size from :func:`subset_cardinality`, then its members, by inversion.

    Args:
        logits: ``[..., E]``, floating; -inf masks an expert out.
        k: The size, or ``(k_min, k_max)``.
        seed: None draws one from torch's generator; an int or an int64 scalar tensor makes the call pure. Rows draw
            independently, counted by their index (Philox4x32-10), whatever the number of threads.
        num_samples: How many independent draws of each row; None is one, without a dimension of its own.
        mask: bool, broadcastable with ``logits``: True keeps an expert, False is a logit of -inf. A TypeError if it is
            not bool, a ValueError if it does not fit.

    Returns:
        int64 ``[..., k_max]``, or ``[num_samples, ..., k_max]``, ascending, unused slots at E. Not differentiable.

    Raises:
        TypeError: ``logits`` is no floating tensor, ``k`` no int or pair of ints, ``seed`` no int64.
        ValueError: ``k`` is out of range, ``num_samples`` is negative, the seed is on another device, or a row has
            fewer than ``k_min`` unmasked experts.
    """
    check_logits(logits)
    logits = apply_mask(logits, mask)
    k_min, k_max = check_band(k, logits.shape[-1])
    if num_samples is not None:
        if isinstance(num_samples, bool) or not isinstance(num_samples, int | torch.SymInt):
            raise TypeError(f"num_samples must be None or an int, not {num_samples!r}")
        if num_samples < 0:
            raise ValueError(f"num_samples must be at least 0, not {num_samples}")
        logits = logits.expand(num_samples, *logits.shape)
    return launch(_sample, logits, make_seed(seed, logits), k_min, k_max)


def subset_mode(logits: Tensor, k: Cardinality, *, mask: Tensor | None = None) -> Tensor:
    """The most probable S: every positive logit, the count then clamped to the band along the descending order.

    Args:
        logits: ``[..., E]``, floating; -inf masks an expert out.
        k: The size, or ``(k_min, k_max)``.
        mask: bool, broadcastable with ``logits``: True keeps an expert, False is a logit of -inf. A TypeError if it is
            not bool, a ValueError if it does not fit.

    Returns:
        int64 ``[..., k_max]`` by descending logit, ties to the lower index, unused slots at E. Not differentiable.

    Raises:
        TypeError: ``logits`` is no floating tensor, or ``k`` no int or pair of ints.
        ValueError: ``k`` is out of range, or a row has fewer than ``k_min`` unmasked experts.
    """
    check_logits(logits)
    logits = apply_mask(logits, mask)
    return launch(_mode, logits, *check_band(k, logits.shape[-1]))
