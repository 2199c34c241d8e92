"""Linear layers in float32 by oneDNN, which takes the widest registers of any processor.

MKL, with which torch multiplies otherwise, does not on AMD's: there it takes two to seven times as long (torch 2.13.0).
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn


def product(x: Tensor, weight: Tensor) -> Tensor:
    """x weightᵀ in float32, of [..., n] and [m, n], on the CPU."""
    # What torch.compile makes of a linear layer: the operands as they lie, where `to_mkldnn` would copy both and the
    # result. A copy costs as much as half of the product.
    result: Tensor = torch.ops.mkldnn._linear_pointwise(x.contiguous(), weight, None, "none", [], "")
    return result


def multiply_by_onednn(model: nn.Module) -> None:
    """Let the linear layers of `model`, in float32 on the CPU, compute by `product`."""

    def forward(layer: nn.Linear, x: Tensor) -> Tensor:
        result = product(x, layer.weight)
        return result if layer.bias is None else result + layer.bias

    for layer in (module for module in model.modules() if isinstance(module, nn.Linear)):
        layer.forward = partial(forward, layer)  # type: ignore[method-assign]
