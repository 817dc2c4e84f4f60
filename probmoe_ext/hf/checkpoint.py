"""Save a model with its routing, load it again, and say in a model card what it is."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from probmoe_ext.hf.card import CARD, with_section
from probmoe_ext.hf.entry import BAND, band_of, entry_of
from probmoe_ext.hf.gate import SwappedGate
from probmoe_ext.hf.layers import MoELayer, find_layers
from probmoe_ext.hf.swap import swap_layers
from probmoe_ext.routers import make_router, router_class
from probmoe_ext.routers.context import ATTENTION

HUB_ARGUMENTS = (
    "cache_dir",
    "force_download",
    "local_files_only",
    "token",
    "revision",
    "subfolder",
    "trust_remote_code",
    "code_revision",
)


def from_pretrained(
    pretrained_model_name_or_path: str | os.PathLike[str],
    *model_args: Any,
    model_class: type[nn.Module] | None = None,
    **kwargs: Any,
) -> Any:
    """Load a model that was saved after :func:`probmoe_ext.hf.swap_router`, with its routing and the routers' state.

    Args:
        pretrained_model_name_or_path: A folder, or a name on the hub.
        *model_args: For the model's constructor, after the configuration.
        model_class: The class of the model; by default that which was saved.
        **kwargs: What ``from_pretrained`` of transformers takes: ``dtype``, ``device_map``, ``revision``, and so on.
            ``attn_implementation`` is ``"eager"`` by default if a router needs attention weights.

    Returns:
        The model, in evaluation mode, or with ``output_loading_info=True`` the model and that.

    Raises:
        ValueError: If the configuration holds no routing, or one that does not fit the model or its weights.
        OSError: If there is no such model.
    """
    config = _config_of(pretrained_model_name_or_path, kwargs)
    where = str(pretrained_model_name_or_path)
    entry = entry_of(config)
    if entry is None:
        raise ValueError(
            f"{where} has no routing in its config.json: it was not saved after swap_router. Load it with "
            "AutoModelForCausalLM.from_pretrained of transformers, then call probmoe_ext.hf.swap_router"
        )
    if any(ATTENTION in router_class(group["router"]).needs for group in entry["routing"]):
        # The only way of the library that returns attention weights.
        kwargs.setdefault("attn_implementation", "eager")
    own = model_class or _saved_class(config, where)
    wants_info = kwargs.pop("output_loading_info", False)
    # The routers must be there before the weights are read, so that the library places and casts theirs, too.
    routed = _routed_class(own, entry, where)
    model, info = routed.from_pretrained(where, *model_args, config=config, output_loading_info=True, **kwargs)
    model.__class__ = own
    lost = sorted(key for kind in ("missing_keys", "mismatched_keys") for key in info.get(kind, ()) if _is_state(key))
    if lost:
        raise ValueError(f"{where} lacks the state of its routers: {', '.join(map(str, lost))}")
    for layer in find_layers(model):
        if isinstance(layer.gate, SwappedGate):
            _fill_buffers(layer)
            band = band_of(layer.gate.probmoe)
            if band not in (None, [layer.gate.probmoe.k_min, layer.gate.probmoe.k_max]):
                raise ValueError(f"{where} says k = {layer.gate.probmoe.k} in config.json, and {band} in {layer.place}")
    return (model, info) if wants_info else model


def save_pretrained(model: Any, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
    """Save a model with its routing and a section on it in the model card; all of it, or nothing.

    ``model.save_pretrained`` saves the same model. This writes beside the folder first, so that a failure leaves what
    was there, and then moves file by file: weights first, the configuration last. Other files in the folder stay.

    Args:
        model: A transformers model, swapped or not.
        save_directory: The folder.
        **kwargs: What ``model.save_pretrained`` takes, but for ``push_to_hub``: see :func:`push_to_hub`.

    Raises:
        ValueError: If ``push_to_hub`` is given.
        NotADirectoryError: If the folder is a file.
    """
    if kwargs.pop("push_to_hub", False):
        raise ValueError("save_pretrained writes to a folder; use probmoe_ext.hf.push_to_hub for the hub")
    folder = Path(save_directory)
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"save_directory {str(folder)!r} is a file; give a folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        model.save_pretrained(scratch, **kwargs)
        card = folder / CARD
        before = card.read_text(encoding="utf-8") if card.is_file() else ""
        (scratch / CARD).write_text(with_section(before, model), encoding="utf-8")
        written = sorted(scratch.iterdir(), key=lambda path: (path.suffix == ".json", path.name == "config.json"))
        stale = _weights(folder) - {path.name for path in written} if folder.is_dir() else set()
        folder.mkdir(exist_ok=True)
        for path in written:
            os.replace(path, folder / path.name)
        for name in stale:
            (folder / name).unlink()
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def push_to_hub(model: Any, repo_id: str, *, private: bool | None = None, token: Any = None, **kwargs: Any) -> str:
    """Upload a model to the hub as :func:`save_pretrained` writes it.

    Args:
        model: A transformers model.
        repo_id: The repository, made if it is not there.
        private: Whether a new repository is private.
        token: Of the hub; by default that of the login.
        **kwargs: Further arguments of ``HfApi.upload_folder`` (``commit_message``, ``revision``, ``create_pr``).

    Returns:
        The address of the commit.
    """
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(model, Path(folder) / "model")
        what = {"commit_message": "Upload a model with its routing"} | kwargs
        return str(api.upload_folder(repo_id=repo_id, folder_path=str(Path(folder) / "model"), **what))


def _config_of(name: str | os.PathLike[str], kwargs: dict[str, Any]) -> Any:
    """The configuration; takes out of ``kwargs`` what is for it."""
    from transformers import AutoConfig

    given = kwargs.pop("config", None)
    if given is not None and not isinstance(given, str | os.PathLike):
        return given
    hub = {key: kwargs[key] for key in HUB_ARGUMENTS if key in kwargs}
    rest = {key: kwargs.pop(key) for key in list(kwargs) if key not in HUB_ARGUMENTS}
    # These are both: the configuration would take them, and the model must have them.
    both = {key: rest.pop(key) for key in ("dtype", "torch_dtype", "quantization_config") if key in rest}
    config, unused = AutoConfig.from_pretrained(given or name, return_unused_kwargs=True, **hub, **rest)
    kwargs.update({key: value for key, value in unused.items() if key not in HUB_ARGUMENTS} | both)
    return config


def _saved_class(config: Any, where: str) -> Any:
    import transformers

    for name in getattr(config, "architectures", None) or ():
        if hasattr(transformers, name):
            return getattr(transformers, name)
    raise ValueError(
        f"{where} names no model class of transformers {transformers.__version__} (architectures in config.json: "
        f"{getattr(config, 'architectures', None)}); give model_class"
    )


def _routed_class(own: Any, entry: dict[str, Any], where: str) -> Any:
    """A class of the same name whose instances are swapped as soon as they are built."""

    def build(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        # The original routers have the k that they had when the model was swapped.
        for name, value in entry["config"].items():
            setattr(config.get_text_config(), name, value)
        own.__init__(self, config, *args, **kwargs)
        apply_entry(self, entry, where)

    return type(own.__name__, (own,), {"__init__": build, "__module__": own.__module__, "__doc__": own.__doc__})


def apply_entry(model: nn.Module, entry: dict[str, Any], where: str) -> None:
    """Swap the routers of a model as an entry of a configuration says.

    Raises:
        ValueError: If the model has not the gates that the entry names, or a router cannot be built.
    """
    layers = list(find_layers(model))
    for group in entry["routing"]:
        found = [layer for layer in layers if any(_same_place(layer.place, place) for place in group["gates"])]
        if len(found) != len(group["gates"]):
            raise ValueError(
                f"{where} routes {len(group['gates'])} layers by {group['router']!r}, of which {type(model).__name__} "
                f"has {len(found)} ({', '.join(layer.place for layer in found) or 'none'})"
            )
        k = group["k"]
        swap_layers(model, found, group["router"], tuple(k) if isinstance(k, list) else k, group["options"])


def _same_place(one: str, other: str) -> bool:
    """Whether two paths are of the same module, in a model and in the model with a head around it."""
    return one == other or one.endswith(f".{other}") or other.endswith(f".{one}")


def _is_state(key: Any) -> bool:
    name = key if isinstance(key, str) else key[0]
    return ".probmoe." in name and not name.endswith(f".{BAND}")


def _fill_buffers(layer: MoELayer) -> None:
    """Give a router the buffers that no checkpoint holds; the library left their memory as it was."""
    router: Any = layer.gate.probmoe
    saved = router.state_dict()
    missing = [name for name, _ in router.named_buffers() if name not in saved]
    if not missing:
        return
    fresh = make_router(router.name, num_experts=router.num_experts, k=router.k, **router.options)
    for name in missing:
        path, _, attribute = name.rpartition(".")
        held = router.get_submodule(path)
        value = fresh.get_buffer(name)
        device = held._buffers[attribute].device
        held._buffers[attribute] = value.to(torch.device("cpu") if device.type == "meta" else device)


def _weights(folder: Path) -> set[str]:
    return {path.name for pattern in ("model*.safetensors", "model*.index.json") for path in folder.glob(pattern)}
