"""Matrices that the checkpoint has in 4 bits already: an int4 file takes their integers and scales as they are.

They were trained so (QAT), and any other rounding would leave what was trained: they are not equalized, rotated or
rounded by GPTQ, and have 4 bits whatever the recipe keeps at 8.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from pipeline.checkpoint.reader import Checkpoint, Float32
from pipeline.core.errors import QuantiseError
from pipeline.quantize.blockwise import BLOCK, storable
from pipeline.tflite.graph import Graph
from pipeline.tflite.lazy import Blocks, BlockScales, FourBits, pack

_LONGEST = 256
"""Up to here a group is a block of the file; longer ones are cut into blocks of one scale."""


def keep(graph: Graph) -> frozenset[str]:
    """Give such matrices of `graph` their 4-bit type, before anything else is done to it; returns their names.

    Raises:
        QuantiseError: a scale is negative or not finite.
    """
    kept = set[str]()
    for view in graph.views():
        for tensor in [tensor for tensor in range(len(view.main.tensors)) if view.is_constant(tensor)]:
            values = view.stored(tensor)
            if isinstance(values, FourBits):
                view.set_four_bits(tensor, *four_bits(values))
                kept.add(view.origin(tensor).matrix)
    return frozenset(kept)


def four_bits(values: FourBits) -> tuple[Blocks, BlockScales]:
    """The integers, two in a byte, and their scales, as `blockwise.quantise_blocks` gives them.

    Raises:
        QuantiseError: a scale is negative or not finite.
    """
    scale = values.scale
    if not (scale >= 0).all() or not np.isfinite(scale).all():
        raise QuantiseError(
            "a scale of the checkpoint's 4-bit weights is negative or not finite",
            cause="XNNPACK refuses such scales, or the file is corrupt",
            remedy="give the full-precision checkpoint that it was made from",
        )
    rows, columns = values.shape
    group = columns // scale.shape[1]
    block = group if group <= _LONGEST else BLOCK
    packed = Blocks((rows, columns // 2), np.uint8, lambda start, stop: pack(values.integers(start, stop)))
    return packed, BlockScales(np.repeat(storable(scale), group // block, axis=1), block)


def check(checkpoint: Checkpoint, names: dict[str, str], file: Path) -> int:
    """How many matrices of `file` have the integers and scales of the checkpoint's; `names` canonical → stored.

    Raises:
        QuantiseError: one has others.
    """
    graph, seen = Graph.read(file), set[int]()
    view = next(iter(graph.views()))
    for tensor in range(len(view.main.tensors)):
        stored = names.get(view.name(tensor), "")
        if not view.is_constant(tensor) or not stored or checkpoint.tensors[stored].scale is None:
            continue
        rows, scales = checkpoint.tensors[stored].shape[0], view.block_scales(tensor)
        same = scales is not None and np.array_equal(view.constant(tensor), checkpoint.integers(stored, 0, rows))
        if not same or scales is None or not _same_scales(scales, checkpoint.scales(stored)):
            raise QuantiseError(
                f"{file.name}: {stored} has not the checkpoint's 4-bit integers and scales",
                cause="a defect of this project: nothing may round what is in 4 bits already",
                remedy="report it with config.json of the checkpoint",
                file=file,
            )
        seen.add(view.buffer(tensor))
    return len(seen)


def _same_scales(found: BlockScales, scale: Float32) -> bool:
    return np.array_equal(found.scale, np.repeat(storable(scale), found.scale.shape[1] // scale.shape[1], axis=1))
