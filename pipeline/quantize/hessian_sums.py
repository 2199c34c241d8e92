"""The Hessians H = Σ x xᵀ / |x|² of what a model's linear layers read, summed while it runs.

Half of a symmetric matrix is computed, strip by strip, and all products go through oneDNN. It takes the widest
registers of any processor; MKL, with which torch multiplies otherwise, does not on AMD's: there it is half as fast
(torch 2.13.0).
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.core import manifest
from pipeline.quantize import hessians

_STRIP = 256
"""Rows of a Hessian that are computed together, from the diagonal to the right: what lies below is the same again."""


def product(x: Tensor, weight: Tensor) -> Tensor:
    """x weightᵀ in float32, of [..., n] and [m, n], by oneDNN."""
    # What torch.compile makes of a linear layer: the operands as they lie, where `to_mkldnn` would copy both and the
    # result. A copy costs as much as half of the product.
    result: Tensor = torch.ops.mkldnn._linear_pointwise(x.contiguous(), weight, None, "none", [], "")
    return result


def multiply_by_onednn(model: nn.Module) -> None:
    """Let the linear layers of `model` compute by `product`."""

    def forward(layer: nn.Linear, x: Tensor) -> Tensor:
        result = product(x, layer.weight)
        return result if layer.bias is None else result + layer.bias

    for layer in (module for module in model.modules() if isinstance(module, nn.Linear)):
        layer.forward = partial(forward, layer)  # type: ignore[method-assign]


class HessianSums:
    """The Hessians so far, each in a mapped file in `folder`, and which weights each is of.

    Until `close` a file holds what stands on and above the diagonal.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files: dict[str, str] = {}
        self.mapped: dict[str, np.memmap[tuple[int, ...], np.dtype[np.float32]]] = {}
        self._last: tuple[Tensor | None, str] = (None, "")

    def observe(self, model: nn.Module) -> None:
        """Add what every linear layer of `model` reads from now on."""
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear):
                module.register_forward_pre_hook(
                    lambda _, inputs, name=name: self.add_inputs(f"{name}.weight", inputs[0])
                )

    def add_inputs(self, weight: str, inputs: Tensor) -> None:
        """Add `inputs` [..., columns] to the sum of `weight`; a tensor that several layers read is added once."""
        if self._last[0] is inputs:  # q, k and v are called one after the other, as are gate and up
            self.files[weight] = self._last[1]
            return
        file = self.files.setdefault(weight, f"{weight}.npy")
        self._last = (inputs, file)
        self.add(file, inputs.detach().reshape(-1, inputs.shape[-1]).float())

    def add(self, file: str, rows: Tensor) -> None:
        """Add Σ x xᵀ / |x|² of `rows` [tokens, columns], span by span."""
        width = hessians.span(rows.shape[1])
        count = rows.shape[1] // width
        if file not in self.mapped:
            self.mapped[file] = np.lib.format.open_memmap(
                self.folder / file, mode="w+", dtype=np.float32, shape=(count, width, width)
            )
        unit = rows / rows.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
        for place, part in enumerate(unit.T.contiguous().split(width)):
            for start in range(0, width, _STRIP):
                strip = part[start : start + _STRIP]
                self.mapped[file][place, start : start + _STRIP, start:] += product(strip, part[start:]).numpy()

    def close(self) -> None:
        """Finish all files, and write which weight reads which."""
        for mapped in self.mapped.values():
            for start in range(_STRIP, mapped.shape[-1], _STRIP):
                mapped[:, start:, start - _STRIP : start] = mapped[:, start - _STRIP : start, start:].swapaxes(1, 2)
            mapped.flush()
        self.mapped.clear()
        manifest.write_atomically(self.folder / hessians.INDEX, manifest.dump_json(dict(sorted(self.files.items()))))
