"""What every operator needs beside its kernels: a fake, its derivative, and a rule for ``vmap``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

NAMESPACE = "probmoe_ext"


def register(
    name: str,
    fake: Callable[..., Any],
    backward: Callable[..., Any] | None = None,
    setup_context: Callable[..., Any] | None = None,
    unbatched: tuple[int, ...] = (),
) -> Callable[..., Any]:
    """Registers fake, autograd and vmap for a raw operator, and returns the operator.

    Args:
        name: The operator's name in the namespace.
        fake: Maps fake inputs to outputs of the right shapes and dtypes.
        backward: ``backward(ctx, *grads)``, composed of operators, so that it can be differentiated in its turn. None
            for an operator that has no derivative.
        setup_context: Saves for ``backward`` what it needs.
        unbatched: Positions of tensor arguments that all rows share (seeds), which ``vmap`` may not batch.
    """
    qualified = f"{NAMESPACE}::{name}"
    op = getattr(getattr(torch.ops, NAMESPACE), name).default
    torch.library.register_fake(qualified, fake)
    if backward is not None:
        torch.library.register_autograd(qualified, backward, setup_context=setup_context)

    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> Any:
        moved = []
        for position, (argument, dim) in enumerate(zip(args, in_dims, strict=True)):
            if not isinstance(argument, Tensor) or position in unbatched:
                if dim is not None:
                    raise ValueError(f"{name}: argument {position} is shared by all rows and cannot be batched by vmap")
                moved.append(argument)
            elif dim is None:
                moved.append(argument.expand(info.batch_size, *argument.shape))
            else:
                moved.append(argument.movedim(dim, 0))
        out = op(*moved)
        return out, tuple(0 for _ in out) if isinstance(out, tuple) else 0

    torch.library.register_vmap(qualified, vmap)
    return op


def refuse_derivative(reason: str) -> Callable[..., Any]:
    """A ``backward`` that says why there is none, in place of a gradient that would silently be missing."""

    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(f"{reason}; use probmoe_ext.reference for higher derivatives")

    return backward
