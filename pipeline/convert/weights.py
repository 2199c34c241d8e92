"""Checkpoint weights as float32 torch tensors that stay on disk.

The tensors a graph needs are written once, in row blocks, to a scratch file that is then mapped: whatever the model's
size, its weights take no anonymous memory on their way into the flatbuffer.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from pipeline.convert.checkpoint import Checkpoint
from pipeline.core import log
from pipeline.core.errors import IntegrityError


@contextmanager
def mapped(checkpoint: Checkpoint, names: Mapping[str, str], scratch: Path) -> Iterator[dict[str, torch.Tensor]]:
    """The tensors `names` (canonical → checkpoint name) by canonical name; `scratch` is removed at the end.

    Raises:
        IntegrityError: a weight is not finite.
    """
    shapes = {canonical: checkpoint.tensors[stored].shape for canonical, stored in names.items()}
    total = sum(math.prod(shape) for shape in shapes.values())
    try:
        with scratch.open("wb") as stream, log.progress("weights to float32", 4 * total) as bar:
            for stored in names.values():
                for block in checkpoint.blocks(stored):
                    if not np.isfinite(block).all():
                        raise IntegrityError(
                            f"tensor {stored} holds values that are not finite",
                            cause="the fine-tune diverged or the file is corrupt",
                            remedy="use an earlier checkpoint of the fine-tune",
                        )
                    block.tofile(stream)
                    bar.advance(block.nbytes)
        flat = torch.from_file(str(scratch), shared=False, size=total, dtype=torch.float32)
        tensors, start = {}, 0
        for canonical, shape in shapes.items():
            tensors[canonical] = flat[start : start + math.prod(shape)].view(shape)
            start += math.prod(shape)
        yield tensors
    finally:
        scratch.unlink(missing_ok=True)
