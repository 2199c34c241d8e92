"""Whether a model's output head is its token embedding or a matrix of its own, told from what is stored.

As transformers 5 reads it (5.23.0, `PreTrainedModel.tie_weights`), whatever config.json says of tying: where both
matrices are stored and differ, the head is its own; where they are equal, or one of them alone is stored, there is one
matrix for both. Only where config.json unties them, one matrix alone is a lack: transformers would invent the other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping

import numpy as np

from pipeline.checkpoint.headers import FLOATS, TensorInfo
from pipeline.checkpoint.names import EMBEDDING, HEAD

_BLOCK = 4 << 20
"""Elements that are compared at a time (16 MiB in float32)."""
_SAMPLE = (9, 1 << 15)
"""Blocks of a remote head that are compared before the download, the first and the last among them; their elements."""

Rows = Callable[[str, int, int], "np.typing.NDArray[np.float32]"]
"""Rows `start` to `stop` of the stored tensor of that name, in float32."""


def is_tied(names: Mapping[str, str], tensors: Mapping[str, TensorInfo], rows: Rows, *, sampled: bool = False) -> bool:
    """Whether one matrix serves as embedding and head.

    Args:
        names: canonical → stored name.
        tensors: what is stored.
        rows: reads them.
        sampled: compare a few blocks that are spread over the matrix, not all of it.
    """
    if not {EMBEDDING, HEAD} <= names.keys():
        return True
    head, table = (tensors[names[name]] for name in (HEAD, EMBEDDING))
    if head.shape != table.shape or len(table.shape) != 2 or not {head.dtype, table.dtype} <= FLOATS.keys():
        return False
    if not math.prod(table.shape):
        return True
    # Bit patterns would take -0.0 for another number; a NaN is refused when weights are read.
    return all(
        np.array_equal(rows(names[HEAD], *part), rows(names[EMBEDDING], *part))
        for part in _parts(*table.shape, sampled=sampled)
    )


def _parts(rows: int, width: int, *, sampled: bool) -> Iterator[tuple[int, int]]:
    """Ranges of rows: all of them, or a few that are spread over them."""
    if not sampled:
        step = max(1, _BLOCK // width)
        return ((start, min(start + step, rows)) for start in range(0, rows, step))
    count, elements = _SAMPLE
    step = min(rows, max(1, elements // width))
    return ((start, start + step) for start in sorted({(rows - step) * i // (count - 1) for i in range(count)}))
