"""Give a module another forward by giving it another class, and take it back.

A module that replaces another one loses hooks, recording by ``isinstance``, and names in the state dict. If only the
``__class__`` changes, to a subclass made for its class, the module keeps all of them, and the change is reversible.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

from torch import nn


class Reclassed(nn.Module):
    """What is mixed into a class made by :func:`subclass_of`; its ``forward`` may call the original by ``super()``."""

    original: type[nn.Module]
    mixin: type[Reclassed]

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Pickle and copy by the classes that this one is made from: it has no name that could be imported."""
        reduced: Any = super().__reduce_ex__(max(int(protocol), 2))
        return (_rebuild, (self.mixin, self.original), *reduced[2:])


_MADE: dict[tuple[type[Reclassed], type[nn.Module]], type[Reclassed]] = {}


def subclass_of(mixin: type[Reclassed], original: type[nn.Module]) -> type[Reclassed]:
    """The subclass of ``original`` with ``mixin`` before it; the same one each time."""
    made = _MADE.get((mixin, original))
    if made is None:
        name = f"ProbMoE{original.__name__}"
        members = {"original": original, "mixin": mixin, "__module__": mixin.__module__, "__qualname__": name}
        made = _MADE[mixin, original] = type(name, (mixin, original), members)
    return made


def original_class(module: nn.Module) -> type[nn.Module]:
    """The class of a module, or the one that it had before :func:`reclass`."""
    return getattr(type(module), "original", type(module))


def reclass(module: nn.Module, mixin: type[Reclassed]) -> None:
    """Mix a class into the class of a module, in place of what was mixed in before."""
    _set_class(module, subclass_of(mixin, original_class(module)))


def restore_class(module: nn.Module) -> None:
    """Undo :func:`reclass`."""
    _set_class(module, original_class(module))


def check_reclassable(module: nn.Module, path: str) -> None:
    """Check that changing the class of a module would change its forward, and nothing else.

    Raises:
        ValueError: If the module got another class after it was swapped (by a parametrization, for example), or if its
            forward was replaced on the instance by something that is not known to call it.
    """
    cls = type(module)
    if isinstance(module, Reclassed) and "original" not in cls.__dict__:
        raise ValueError(
            f"{path} was given the class {cls.__name__} after its router was swapped; undo that first "
            "(and swap the router after it)"
        )
    if holds_another_forward(module):
        plan = getattr(module, "_is_hooked", False)
        by = ", by the parallel plan that the model was loaded with: later versions of transformers split experts alone"
        raise ValueError(
            f"{path} has a forward that was set on the instance; it would hide the swapped one{by if plan else ''}"
        )


def holds_another_forward(module: nn.Module) -> bool:
    """Whether a forward was set on the instance that is not known to call that of its class."""
    return "forward" in module.__dict__ and not _held_forwards(module)


def _set_class(module: nn.Module, cls: type[nn.Module]) -> None:
    held = _held_forwards(module)
    module.__class__ = cls
    for name in held:
        module.__dict__[name] = MethodType(cls.forward, module)


def _held_forwards(module: nn.Module) -> list[str]:
    """The attributes in which the instance holds the forward of its class, and which have to follow the class.

    A hook of accelerate keeps it as ``_old_forward``; transformers 5.0 leaves it as ``forward`` after recording.
    """
    names = []
    for name in ("forward", "_old_forward"):
        held = module.__dict__.get(name)
        if isinstance(held, MethodType) and held.__self__ is module and held.__func__ is type(module).forward:
            names.append(name)
    return names


def _rebuild(mixin: type[Reclassed], original: type[nn.Module]) -> nn.Module:
    cls = subclass_of(mixin, original)
    module: nn.Module = cls.__new__(cls)
    return module
