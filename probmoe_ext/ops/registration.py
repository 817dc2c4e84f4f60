"""What every operator needs beside its kernels: a fake, its derivative, a rule for ``vmap``, and a cheap way in.

A derivative registered from Python sends each call through Python a second time, below autograd, which at T = 1 costs
several times the kernel. In eager mode the same derivative is therefore attached by a ``torch.autograd.Function``, or
the call goes below autograd at once where nothing needs a gradient; compilers see the registered operator.
``torch.func`` transforms, which know no derivative registered from Python, see the Function. The raw operator attaches
the same Function at its Autograd key, for both modes: ``torch.library.register_autograd`` would drop tangents silently.

The floors of route_probmoe at T = 1, E = 64, k = 8, in units of torch's softmax + topk (3.3 us on a Zen 4 core, 33 us
with backward). Without gradients: 0.6 for the dispatcher's boxed call with seven arguments, 0.15 for the guard below
autograd, 0.25 for two outputs, 0.4 for the checks and their frames, 0.3 for a fresh seed, before any row is computed.
With backward: 0.7 for the autograd engine, 0.15 for a Function that does nothing, and each of the two operators again
as above. A derivative in C++ would save the Function, but torch's stable ABI has none; packing the flags of the schema
into one number would save 0.2, at the price of an operator that nobody can read.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
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
    jvp: Callable[..., Any] | None = None,
    unbatched: tuple[int, ...] = (),
) -> Callable[..., Any]:
    """Registers fake, autograd and vmap for a raw operator.

    Args:
        name: The operator's name in the namespace.
        fake: Maps fake inputs to outputs of the right shapes and dtypes.
        backward: ``backward(ctx, *grads)``, composed of operators, so that it can be differentiated in its turn. None
            for an operator that has no derivative.
        setup_context: ``setup_context(ctx, inputs, output)`` keeps for ``backward`` and ``jvp`` what they need.
        jvp: ``jvp(ctx, *tangents)``, the forward-mode derivative; without one, asking for it is an error.
        unbatched: Positions of tensor arguments that all rows share (seeds), which ``vmap`` may not batch.

    Returns:
        The operator, to be called with positional arguments.
    """
    qualified = f"{NAMESPACE}::{name}"
    op = getattr(getattr(torch.ops, NAMESPACE), name).default
    torch.library.register_fake(qualified, fake)
    torch.library.register_vmap(qualified, vmap_rule(name, op, unbatched))
    if backward is None:
        return _without_derivative(op)
    return _with_derivative(name, op, backward, setup_context, jvp, unbatched)


def keep(ctx: Any, *tensors: Tensor) -> None:
    """Keeps tensors for ``backward``, and for ``jvp``, which finds them in ``ctx.saved_tensors`` as well."""
    ctx.save_for_backward(*tensors)
    ctx.save_for_forward(*tensors)


def vmap_rule(name: str, function: Callable[..., Any], unbatched: tuple[int, ...] = ()) -> Callable[..., Any]:
    """The rule for an operator whose tensors have any batch dimensions: the mapped dimension becomes the first."""

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
        out = function(*moved)
        return out, tuple(0 for _ in out) if isinstance(out, tuple) else 0

    return rule


def _without_derivative(op: Any) -> Callable[..., Any]:
    boxed = op._op  # the operator without OpOverload's own frame

    def call(*args: Any) -> Any:
        if is_compiling() or _transforms_active():
            return op(*args)
        with _below_autograd():
            return boxed(*args)

    return call


def _with_derivative(
    name: str,
    op: Any,
    backward: Callable[..., Any],
    setup_context: Callable[..., Any] | None,
    jvp: Callable[..., Any] | None,
    unbatched: tuple[int, ...],
) -> Callable[..., Any]:
    boxed = op._op

    class Derivative(torch.autograd.Function):
        @staticmethod
        def forward(*args: Any) -> Any:
            with _below_autograd():
                return boxed(*args)

    Derivative.setup_context = staticmethod(setup_context or (lambda ctx, inputs, output: None))  # type: ignore
    Derivative.backward = staticmethod(backward)  # type: ignore[method-assign]
    Derivative.jvp = staticmethod(jvp or _refuse_forward_mode(name))  # type: ignore[method-assign]
    Derivative.vmap = staticmethod(vmap_rule(name, Derivative.apply, unbatched))  # type: ignore[method-assign]
    # Function.apply itself only looks for torch.func transforms, which `call` has done.
    attach = super(torch.autograd.Function, Derivative).apply
    inputs = tuple(n for n, a in enumerate(op._schema.arguments) if isinstance(a.type, torch.TensorType))

    def raw(*args: Any) -> Any:
        tensors = [args[n] for n in inputs]
        if not (_grad_enabled() and any(t.requires_grad for t in tensors)) and not any(map(_has_tangent, tensors)):
            with _below_autograd():
                return boxed(*args)
        if _transforms_active():
            # Below a transform's own dispatch, a Function is of that one level: its second derivatives would be wrong.
            raise RuntimeError(
                f"torch.ops.{NAMESPACE}.{name} has no derivative under torch.func transforms; the functions of "
                f"{NAMESPACE}.ops have"
            )
        return attach(*args)

    torch.library.impl(f"{NAMESPACE}::{name}", "Autograd", raw)

    def call(*args: Any) -> Any:
        if is_compiling():
            return op(*args)
        if _transforms_active():
            return Derivative.apply(*args)
        if forward_ad._current_level >= 0:
            return attach(*args)
        if _grad_enabled():
            for n in inputs:
                if args[n].requires_grad:
                    return attach(*args)
        with _below_autograd():
            return boxed(*args)

    return call


def _has_tangent(tensor: Tensor) -> bool:
    return forward_ad.unpack_dual(tensor).tangent is not None


def _refuse_forward_mode(name: str) -> Callable[..., Any]:
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise RuntimeError(
            f"{name} has no forward-mode derivative; use reverse mode (backward, torch.func.vjp, grad or jacrev) or "
            "probmoe_ext.reference"
        )

    return jvp


def refuse_derivative(reason: str) -> Callable[..., Any]:
    """A ``backward`` that says why there is none, in place of a gradient that would silently be missing."""

    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(f"{reason}; use probmoe_ext.reference for higher derivatives")

    return backward
