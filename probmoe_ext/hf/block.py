"""The block around a gate: it must be what calls the gate, whatever forward a kernel library has for it.

With ``use_kernels=True`` transformers lets the ``kernels`` library set another ``forward`` on the modules of classes
that have a ``kernel_layer_name``. For norms and rotary embeddings that is welcome. GPT-OSS has one for the whole
mixture-of-experts block (``MegaBlocksMoeMLP``), which reads the gate's weight and routes by itself: no router that is
swapped in would ever run.
"""

from __future__ import annotations

from torch import nn

from probmoe_ext.hf.layers import MoELayer
from probmoe_ext.hf.reclass import Reclassed, holds_another_forward, reclass, restore_class


class RoutedBlock(Reclassed):
    """A block that keeps its own forward, and so its router, when the ``kernels`` library looks for layers."""

    kernel_layer_name = "RoutedByProbMoE"
    """No kernel is registered under this name; versions that know no condition look for one."""

    @staticmethod
    def kernel_condition(module: nn.Module) -> bool:
        """Whether a kernel may replace the forward: never."""
        return False


def check_block(layer: MoELayer) -> None:
    """Check that the block around a gate runs its own forward.

    Raises:
        ValueError: If another one was set on the instance.
    """
    if holds_another_forward(layer.block):
        place = layer.place.rpartition(".")[0]
        raise ValueError(
            f"the block {place} ({type(layer.block).__name__}) has a forward that was set on the instance, as "
            "use_kernels=True does: it may not call its router. Load the model without use_kernels, swap, and then set "
            "model.use_kernels = True: kernels of other layers are used, and that of this one is left out"
        )


def keep_forward(layer: MoELayer) -> None:
    """Let no kernel replace the forward of a block whose class could have one."""
    if hasattr(type(layer.block), "kernel_layer_name") and not isinstance(layer.block, RoutedBlock):
        reclass(layer.block, RoutedBlock)


def restore_block(module: nn.Module) -> None:
    """Undo :func:`keep_forward`; nothing if it was not done."""
    if isinstance(module, RoutedBlock):
        restore_class(module)
