"""The Hessians H = Σ x xᵀ / |x|² of what a model's linear layers read, summed while it runs.

Half of a symmetric matrix is computed, by BLAS's routine for it, into the file. On a GPU torch multiplies, and the sums
stay there until all is read: the files would go to and fro for each batch.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from scipy.linalg.blas import ssyrk
from torch import Tensor, nn

from pipeline.core import manifest
from pipeline.quantize import hessians


class HessianSums:
    """The Hessians so far, each in a mapped file in `folder`, and which weights each is of.

    Until `close` a file holds what stands on and above the diagonal; nothing of it if sums are `held` where the inputs
    are.
    """

    def __init__(self, folder: Path, *, held: bool = False) -> None:
        self.folder = folder
        self.held: dict[str, Tensor] | None = {} if held else None
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
        unit = rows / rows.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
        parts = unit.split(width, dim=1)
        if self.held is not None:
            if file not in self.held:
                self.held[file] = rows.new_zeros(count, width, width)
            for total, part in zip(self.held[file], parts, strict=True):
                total.addmm_(part.T, part)
            return
        mapped = self._mapped(file, count, width)
        # BLAS has matrices column by column: transposed, so that it takes both as they lie and adds to the second.
        for place, part in enumerate(parts):
            ssyrk(1.0, part.contiguous().numpy().T, beta=1.0, c=mapped[place].T, lower=1, overwrite_c=1)

    def _mapped(self, file: str, count: int, width: int) -> np.memmap[tuple[int, ...], np.dtype[np.float32]]:
        if file not in self.mapped:
            self.mapped[file] = np.lib.format.open_memmap(
                self.folder / file, mode="w+", dtype=np.float32, shape=(count, width, width)
            )
        return self.mapped[file]

    def close(self) -> None:
        """Finish all files, and write which weight reads which."""
        while self.held:
            file, totals = self.held.popitem()
            self._mapped(file, len(totals), totals.shape[1])[:] = totals.triu().cpu().numpy()
        for mapped in self.mapped.values():
            for span in mapped:
                span += np.triu(span, 1).T  # nothing has been written below the diagonal
            mapped.flush()
        self.mapped.clear()
        manifest.write_atomically(self.folder / hessians.INDEX, manifest.dump_json(dict(sorted(self.files.items()))))
