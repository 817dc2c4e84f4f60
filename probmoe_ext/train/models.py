"""Load a model with its tokenizer, and give it the router that was asked for or that its run was trained with."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from probmoe_ext.files import write_json
from probmoe_ext.hf import from_pretrained, restore_router, routing_of, swap_router
from probmoe_ext.hf.entry import entry_of
from probmoe_ext.routers import available_routers, router_options
from probmoe_ext.train.errors import UsageError, nearest
from probmoe_ext.train.options import ExpertsPerToken, parse_k

ROUTING_FILE = "routing.json"
RUNS = "runs"
"""Where runs lie by default; no name on the hub is looked for below it."""


@dataclass(frozen=True)
class Routing:
    """How a model routes.

    Attributes:
        router: name of the router.
        k: active experts; None is the model's own number.
        options: further options of the router.
    """

    router: str = "topk"
    k: ExpertsPerToken | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        """For example ``probmoe k=2,4``."""
        k = "" if self.k is None else f" k={self.k if isinstance(self.k, int) else f'{self.k[0]},{self.k[1]}'}"
        return f"{self.router}{k}"


def write_routing(folder: Path, routing: Routing) -> None:
    """Record a routing beside the weights in `folder`."""
    write_json(folder / ROUTING_FILE, asdict(routing))


def read_routing(folder: Path) -> Routing:
    """The routing recorded in a folder; the model's own where there is none."""
    path = folder / ROUTING_FILE
    if not path.is_file():
        return Routing()
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return Routing(content["router"], parse_k(content["k"]), content["options"])
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise UsageError(f"{path} is damaged ({error!r}); delete it and give --router and --k") from error


def check_router(name: str) -> None:
    """Check a router's name.

    Raises:
        UsageError: an unknown name; the message lists the known ones.
    """
    known = available_routers()
    if name not in known:
        raise UsageError(f"--router {name!r} is unknown{nearest(name, known)}; known: {', '.join(known)}")


def check_model(name: str) -> None:
    """Check that a model folder is there, or that the name can be one on the hub.

    Raises:
        UsageError: neither.
    """
    path = Path(name)
    if path.is_dir():
        if not (path / "config.json").is_file():
            found = sorted(child.name for child in path.glob("checkpoint-*"))
            hint = f"; it has {', '.join(found)}" if found else ""
            raise UsageError(f"--model {name!r} is a folder without config.json{hint}")
    elif path.exists() or path.parts[0] == RUNS or not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", name):
        raise UsageError(
            f"--model {name!r} does not exist; give a model folder, a hub name, 'tiny-olmoe' or 'small-olmoe'"
        )


def experts_of(config: Any) -> tuple[int, int] | None:
    """Number of experts and of active experts a token in a model configuration; None for a model without experts."""
    experts = getattr(config, "num_experts", None) or getattr(config, "num_local_experts", None)
    return (int(experts), int(config.num_experts_per_tok)) if experts else None


def check_k(config: Any, k: ExpertsPerToken | None) -> None:
    """Check the number of active experts against a model's configuration.

    Raises:
        UsageError: more than the model has.
    """
    experts = experts_of(config)
    largest = k if isinstance(k, int) or k is None else k[1]
    if experts and largest is not None and largest > experts[0]:
        raise UsageError(
            f"--k {largest} is more than the {experts[0]} experts of the model; choose at most {experts[0]}"
        )


def apply_routing(model: Any, routing: Routing) -> None:
    """Give a model a router, in place. The model's own top-k with its own k stays as it is.

    Raises:
        UsageError: the router does not know the options or k, or the model has no mixture-of-experts layers.
    """
    check_router(routing.router)
    check_k(model.config, routing.k)
    experts = experts_of(model.config)
    own = (None, experts[1]) if experts else (None,)
    if routing.router == "topk" and routing.k in own and not routing.options:
        return
    known = router_options(routing.router)
    for option in routing.options:
        if option not in known:
            raise UsageError(
                f"router {routing.router!r} has no option {option!r}{nearest(option, known)}; "
                f"its options: {', '.join(known) or 'none'}"
            )
    try:
        swap_router(model, routing.router, k=routing.k, **routing.options)
    except (ValueError, TypeError) as error:
        raise UsageError(f"router {routing}: {' '.join(str(error).split())}") from error


def check_routing(config: Any, routing: Routing) -> int:
    """Give a router to a model without weights.

    Args:
        config: the model's configuration.
        routing: the router to give it.

    Returns:
        Number of the model's parameters.

    Raises:
        UsageError: see `apply_routing`.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    parameters: int = model.num_parameters()
    apply_routing(model, routing)
    return parameters


def load_config_of(name: str) -> Any:
    """The configuration of a model, without its weights.

    Raises:
        UsageError: no such folder, or the hub does not give it.
    """
    check_model(name)
    try:
        return AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UsageError(f"--model {name!r} is no model folder, and the hub has not given it: {reason}") from error


def load_model(name: str, routing: Routing, dtype: str, experts: str | None = None) -> tuple[Any, Any]:
    """Load a causal language model and its tokenizer.

    Args:
        name: a local folder or a hub name.
        routing: the router to give it.
        dtype: of the weights.
        experts: how transformers evaluates the experts; None leaves its choice.

    Returns:
        The model, on the CPU and in evaluation mode, and the tokenizer.

    Raises:
        UsageError: see `load_config_of` and `apply_routing`.
    """
    check_router(routing.router)
    config = load_config_of(name)
    check_k(config, routing.k)
    tokenizer = AutoTokenizer.from_pretrained(name)
    # A routing that was saved with the weights brings the state of its routers.
    load = AutoModelForCausalLM.from_pretrained if entry_of(config) is None else from_pretrained
    model = load(name, dtype=getattr(torch, dtype))
    set_experts(model, experts)
    if not _routes_by(model, routing):
        restore_router(model)
        apply_routing(model, routing)
    return model, tokenizer


def _routes_by(model: Any, routing: Routing) -> bool:
    """Whether every layer of a model routes so already."""
    k = list(routing.k) if isinstance(routing.k, tuple) else routing.k
    found = routing_of(model)
    return bool(found) and all(
        one["router"] == routing.router
        and k in (None, one["k"])
        and all(one["options"].get(name) == value for name, value in routing.options.items())
        for one in found.values()
    )


def set_experts(model: Any, implementation: str | None) -> None:
    """Choose how transformers evaluates the experts.

    Raises:
        UsageError: an implementation that the installed transformers does not know.
    """
    if implementation is None:
        return
    try:
        model.set_experts_implementation(implementation)
    except (ValueError, AttributeError, KeyError) as error:
        raise UsageError(f"experts={implementation!r}: {' '.join(str(error).split())}") from error


def pick_device(device: str) -> torch.device:
    """The device for ``auto``, ``cpu`` or ``cuda``.

    Raises:
        UsageError: ``cuda`` where there is none.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: torch finds no GPU here; use --device cpu")
    return torch.device("cuda" if device != "cpu" and torch.cuda.is_available() else "cpu")
