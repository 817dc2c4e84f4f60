"""Probabilistic expert routing for mixture-of-experts models: exact operators, routers and the Hugging Face swap.

``probmoe_ext.ops`` holds the differentiable operators, ``probmoe_ext.distributions`` the law as a
``torch.distributions`` class, ``probmoe_ext.routers`` what turns hidden states into experts,
``probmoe_ext.hf`` the swap into Hugging Face models. Importing this package registers the operators; it needs neither
transformers nor a GPU, and initialises no CUDA.
"""

from __future__ import annotations

import sys as _sys
from itertools import pairwise as _pairwise
from pathlib import Path as _Path
from typing import TYPE_CHECKING as _TYPE_CHECKING
from typing import Any as _Any


def _is_command() -> bool:
    """Whether this process is ``probmoe`` or ``python -m probmoe_ext``.

    The command imports what it runs by itself: its help comes without torch, and its doctor also where torch or the
    extension cannot be imported.
    """
    return _Path(_sys.argv[0]).name == "probmoe" or ("-m", "probmoe_ext") in _pairwise(_sys.orig_argv)


if _TYPE_CHECKING or not _is_command():
    from . import distributions, ops, reference, routers

__version__ = "0.1.0"

__all__ = ["build_info", "distributions", "from_pretrained", "ops", "reference", "routers"]


def build_info() -> dict[str, object]:
    """How the compiled core was built, and the instruction set that it uses here.

    Returns:
        Keys ``version``, ``compiler``, ``built_with_torch``, ``torch_target_version``, ``cuda`` (toolkit version, or
        None for a CPU-only build), ``cuda_architectures``, ``cuda_absence`` (why a build has no CUDA kernels) and
        ``instruction_set``.
    """
    import torch  # noqa: F401  (the extension module needs torch's libraries loaded)

    from . import _C

    return {**_C.build_info(), "instruction_set": _C.instruction_set()}


def from_pretrained(pretrained_model_name_or_path: _Any, *model_args: _Any, **kwargs: _Any) -> _Any:
    """Load a Hugging Face model with the routing that it was saved with; see :func:`probmoe_ext.hf.from_pretrained`."""
    from .hf import from_pretrained as load

    return load(pretrained_model_name_or_path, *model_args, **kwargs)
