"""Constants that are made when the file is written: matrices of any size as blocks of rows, with their scales."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from pipeline.core import parallel
from pipeline.core.parallel import Result

Array = NDArray[Any]


# Of float32 rows that are worked on at a time, per thread.
# Large enough that threads seldom wait for each other, small enough that copies in float64 are made where the last ones
# lay: of 32 MiB each is made of new pages, which the system has to clear (a quarter of int8's time with Gemma 4).
_BLOCK_BYTES = 2**22


@dataclass(frozen=True)
class Scales:
    """Quantisation of a tensor: real = scale · (q − zero point), one pair per index along `axis`, or one in all."""

    scale: NDArray[np.float32]
    zero_point: NDArray[np.int64]
    axis: int = 0

    @classmethod
    def tensor(cls, scale: float, zero_point: int = 0) -> Scales:
        """One scale and zero point for the whole tensor."""
        # The types of the schema: the runtime reads a float and a long for each.
        return cls(np.array([scale], np.float32), np.array([zero_point], np.int64))

    @classmethod
    def channels(cls, scale: Array, axis: int = 0) -> Scales:
        """Symmetric, one scale per index along `axis`."""
        # The runtime wants a zero point per channel, also where all are 0; the writer stores such vectors once.
        return cls(scale.astype(np.float32), np.zeros(scale.size, np.int64), axis)


@dataclass(frozen=True)
class BlockScales:
    """Quantisation of a matrix by blocks: real = scale · q, one float16 scale per `block` neighbours in a row.

    `scale` is [rows, columns / block]. In the file it is a constant of its own, that the matrix names.
    """

    scale: NDArray[np.float16]
    block: int


class Blocks:
    """Values of a constant that are made when they are needed, a block of rows at a time, several blocks at once."""

    def __init__(self, shape: Sequence[int], dtype: DTypeLike, rows: Callable[[int, int], Array]) -> None:
        """`rows(start, stop)` gives rows `start` to `stop` (exclusive) of the first axis, in any thread."""
        self.shape, self.dtype, self.rows = tuple(shape), np.dtype(dtype), rows

    @classmethod
    def of(cls, values: Array) -> Blocks:
        """Values that are there."""
        return cls(values.shape, values.dtype, lambda start, stop: values[start:stop])

    def __len__(self) -> int:
        """Bytes in all."""
        return int(math.prod(self.shape) * self.dtype.itemsize)

    def map(self, dtype: DTypeLike, change: Callable[[Array, int], Array]) -> Blocks:
        """What `change(block, first row)` makes of each block, of type `dtype`."""
        return Blocks(self.shape, dtype, lambda start, stop: change(self.rows(start, stop), start))

    def parts(self) -> Iterator[tuple[int, int]]:
        """First and last (exclusive) row of the blocks that are worked on at a time."""
        # By the width in float32, whatever the type: that is what a block takes while it is worked on.
        step = max(1, _BLOCK_BYTES // max(1, 4 * math.prod(self.shape[1:])))
        # A constant without rows has one empty part: whoever joins the parts needs one to learn the type from.
        return ((start, min(start + step, self.shape[0])) for start in range(0, max(self.shape[0], 1), step))

    def each(self, work: Callable[[Array], Result]) -> Iterator[Result]:
        """What `work` makes of each block, in order; blocks are made and worked on in a thread per core."""
        return parallel.ordered(lambda part: work(self.rows(*part)), self.parts())


class FourBits(Blocks):
    """Values float32 that are 4-bit integers times scales [rows, groups] already; what is made of them is not."""

    def __init__(
        self,
        shape: Sequence[int],
        rows: Callable[[int, int], Array],
        integers: Callable[[int, int], NDArray[np.int8]],
        scale: NDArray[np.float32],
    ) -> None:
        """`integers(start, stop)` gives those of rows `start` to `stop`, as `rows` gives their values."""
        super().__init__(shape, np.float32, rows)
        self.integers, self.scale = integers, scale


def pack(values: Array) -> NDArray[np.uint8]:
    """4-bit integers, −8 … 7, two in a byte, the first in its low half: [rows, columns] → [rows, columns / 2]."""
    # The order of nibbles that TFLite reads, little end first. As uint8 a negative number keeps its low four bits.
    low, high = (values[:, start::2].astype(np.int8).view(np.uint8) for start in (0, 1))
    packed: NDArray[np.uint8] = (low & np.uint8(15)) | (high << np.uint8(4))
    return packed


def unpack(packed: NDArray[np.uint8]) -> NDArray[np.int8]:
    """The integers in the bytes of `pack`, as int8."""
    # Shifts of signed numbers carry the sign along: −8 … 7 again, not 0 … 15.
    both = packed.view(np.int8)
    return np.stack([(both << 4) >> 4, both >> 4], axis=-1).astype(np.int8)


def flat_bytes(values: Array) -> NDArray[np.uint8]:
    """The bytes of `values` as they lie in memory, uint8 [n]."""
    return np.ascontiguousarray(values).reshape(-1).view(np.uint8)
