"""What every operator needs beside its kernels: a fake, its derivative, a rule for ``vmap``, and a cheap way in.

A derivative registered from Python sends each call through Python a second time, below autograd, which at T = 1 costs
several times the kernel. In eager mode the same derivative is therefore attached by a ``torch.autograd.Function``, or
the call goes below autograd at once where nothing needs a gradient; compilers and ``torch.func`` transforms see the
registered operator.

The floors at T = 1, in units of torch's softmax + topk (3.3 us, with backward 34 us, on the machine of the README):
without gradients 0.55 for the dispatcher's boxed call and the guard below autograd, 0.1 for two outputs, 0.3 for the
checks of the arguments, 0.3 for a fresh seed; with backward 0.6 for the autograd engine, 0.35 for the Function and its
two passes through Python. A derivative written in C++ would save the latter, but no stable ABI of torch has one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

NAMESPACE = "probmoe_ext"

_below_autograd = torch._C._AutoDispatchBelowAutograd
_transforms_active = torch._C._are_functorch_transforms_active
_grad_enabled = torch.is_grad_enabled


def register(
    name: str,
    fake: Callable[..., Any],
    backward: Callable[..., Any] | None = None,
    setup_context: Callable[..., Any] | None = None,
    unbatched: tuple[int, ...] = (),
) -> Callable[..., Any]:
    """Registers fake, autograd and vmap for a raw operator.

    Args:
        name: The operator's name in the namespace.
        fake: Maps fake inputs to outputs of the right shapes and dtypes.
        backward: ``backward(ctx, *grads)``, composed of operators, so that it can be differentiated in its turn. None
            for an operator that has no derivative.
        setup_context: ``setup_context(ctx, inputs, output)`` saves for ``backward`` what it needs.
        unbatched: Positions of tensor arguments that all rows share (seeds), which ``vmap`` may not batch.

    Returns:
        The operator, to be called with positional arguments.
    """
    qualified = f"{NAMESPACE}::{name}"
    op = getattr(getattr(torch.ops, NAMESPACE), name).default
    torch.library.register_fake(qualified, fake)
    torch.library.register_vmap(qualified, _vmap_rule(name, op, unbatched))
    if backward is not None:
        torch.library.register_autograd(qualified, backward, setup_context=setup_context)
    return _cheap_way_in(op, backward, setup_context)


def _vmap_rule(name: str, op: Callable[..., Any], unbatched: tuple[int, ...]) -> Callable[..., Any]:
    def rule(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> Any:
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

    return rule


def _cheap_way_in(
    op: Any, backward: Callable[..., Any] | None, setup_context: Callable[..., Any] | None
) -> Callable[..., Any]:
    boxed = op._op  # the operator without OpOverload's own frame
    attach: Callable[..., Any] | None = None
    inputs: tuple[int, ...] = ()
    if backward is not None:

        class Eager(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, *args: Any) -> Any:
                with _below_autograd():
                    output = boxed(*args)
                if setup_context is not None:
                    setup_context(ctx, args, output)
                return output

        Eager.backward = staticmethod(backward)  # type: ignore[method-assign]
        # Function.apply itself only looks for torch.func transforms, which `call` has done.
        attach = super(torch.autograd.Function, Eager).apply
        inputs = tuple(n for n, a in enumerate(op._schema.arguments) if isinstance(a.type, torch.TensorType))

    def call(*args: Any) -> Any:
        if is_compiling() or _transforms_active():
            return op(*args)
        if attach is not None and _grad_enabled():
            for n in inputs:
                if args[n].requires_grad:
                    return attach(*args)
        with _below_autograd():
            return boxed(*args)

    return call


def refuse_derivative(reason: str) -> Callable[..., Any]:
    """A ``backward`` that says why there is none, in place of a gradient that would silently be missing."""

    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(f"{reason}; use probmoe_ext.reference for higher derivatives")

    return backward
