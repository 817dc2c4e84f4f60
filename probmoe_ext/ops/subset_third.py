"""The third derivative of log Z, asked for by second derivatives of the entropy alone: plain torch, no kernel."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import reference
from .registration import vmap_rule


class ThirdDerivative(torch.autograd.Function):
    """Opaque to ``torch.func``: the reference looks at the data, which its wrapped tensors do not show."""

    @staticmethod
    def forward(logits: Tensor, v: Tensor, u: Tensor, k_min: int, k_max: int) -> Tensor:
        """``T(v, u)``, the gradient of ``u . C v`` by the logits."""
        with torch.enable_grad():
            leaf = logits.detach().requires_grad_()
            product = reference.subset_covariance_vp(leaf, v.detach(), (k_min, k_max))
            (gradient,) = torch.autograd.grad(product, leaf, u.detach().to(product.dtype))
        return gradient

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Nothing is kept."""

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        """Says that it ends here."""
        raise RuntimeError(
            "the fourth derivative of log Z is not available; use probmoe_ext.reference for higher derivatives"
        )

    jvp = backward


ThirdDerivative.vmap = staticmethod(  # type: ignore[method-assign]
    vmap_rule("the third derivative of log Z", ThirdDerivative.apply)
)


def third_derivative(logits: Tensor, v: Tensor, u: Tensor, k_min: int, k_max: int) -> Tensor:
    """``sum_jk T_ijk v_j u_k``, ``[..., E]``; T, the third derivative of log Z, is symmetric in its three places."""
    result: Tensor = ThirdDerivative.apply(logits, v, u, k_min, k_max)
    return result
