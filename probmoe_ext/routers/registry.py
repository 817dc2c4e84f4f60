"""The routers by name: registered by a decorator, found and built with their options."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, TypeVar

from probmoe_ext.routers.base import ExpertsPerToken, Router
from probmoe_ext.routers.context import NEEDS

RouterClass = TypeVar("RouterClass", bound="type[Router]")

_REGISTRY: dict[str, type[Router]] = {}


def register_router(name: str) -> Callable[[RouterClass], RouterClass]:
    """Class decorator: make a :class:`Router` known by a name.

    Raises:
        TypeError: If it decorates something that is no ``Router``.
        ValueError: If another class has the name already.
    """

    def register(cls: RouterClass) -> RouterClass:
        if not (isinstance(cls, type) and issubclass(cls, Router)):
            raise TypeError(f"register_router({name!r}) expects a subclass of Router, got {cls!r}")
        if not cls.needs <= set(NEEDS):
            raise ValueError(f"needs of {cls.__name__} must be among {', '.join(NEEDS)}, got {sorted(cls.needs)}")
        known = _REGISTRY.get(name)
        # A module that is imported anew (in a notebook) may register its class again.
        if known is not None and (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ValueError(f"router {name!r} is already registered, by {known.__module__}.{known.__qualname__}")
        cls.name = name
        _REGISTRY[name] = cls
        return cls

    return register


def available_routers() -> tuple[str, ...]:
    """The registered names, sorted."""
    return tuple(sorted(_REGISTRY))


def router_class(name: str) -> type[Router]:
    """The class that is registered by a name.

    Raises:
        ValueError: If the name is unknown (the message lists the known ones).
    """
    if name not in _REGISTRY:
        raise ValueError(f"router must be one of {', '.join(available_routers())}; got {name!r}")
    return _REGISTRY[name]


def router_options(name: str) -> tuple[str, ...]:
    """The options of a router, in the order of its constructor.

    Raises:
        ValueError: If the name is unknown (the message lists the known ones).
    """
    parameters = inspect.signature(router_class(name).__init__).parameters
    return tuple(option for option in parameters if option not in ("self", "num_experts", "k"))


def make_router(name: str, *, num_experts: int, k: ExpertsPerToken, **options: Any) -> Router:
    """Build a router by name.

    Args:
        name: One of :func:`available_routers`.
        num_experts: ``E``.
        k: Experts per token, an int or a band ``(k_min, k_max)``.
        **options: The router's own, see its class and :func:`router_options`.

    Raises:
        ValueError: If the name or an option is unknown, or a value is not allowed.
    """
    allowed = router_options(name)
    unknown = [option for option in options if option not in allowed]
    if unknown:
        said = ", ".join(map(repr, unknown))
        raise ValueError(f"router {name!r} has no option {said}; its options: {', '.join(allowed) or 'none'}")
    return router_class(name)(num_experts, k, **options)
