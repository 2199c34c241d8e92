"""GPTQ: weights rounded one column after the other, each column's error taken up by those still to come.

What counts is not how far a weight is from its integer but how far the layer's result is: for inputs x with the Hessian
H = Σ x xᵀ the mean square of an error e of one row is e H eᵀ. Columns are rounded from left to right; the error
of one, over the diagonal of U, is subtracted from the rest along its row of U, where Uᵀ U = H⁻¹ with U upper triangular
(Frantar et al., GPTQ, arXiv 2210.17323, equations 2 and 3, algorithm 1). Scales are set beforehand, as without it, so
columns can be taken in any order: those with the largest inputs come first, whose errors all others can take up.

Weights are [rows, columns], H is [n, n] for a span of n columns, from stage `moments`. Everything here is float64: a
product's last bits differ from machine to machine, and so would weights that lie between two integers. Columns are
treated in spans of at most `hessians.SPAN`, each with a Hessian of its own.

Of a tied table the rows that are looked up get worse by it, the head gets better, and that counts for more.
Result: Gemma 3 270M, int8x2: KL(fp32 file || file) 0.0026 instead of 0.0055, and smaller; docs/experiments.md.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray
from scipy.linalg.lapack import dtrtri
from threadpoolctl import threadpool_limits

from pipeline.core import parallel
from pipeline.quantize.hadamard import rotate_blocks
from pipeline.quantize.hessians import INDEX
from pipeline.tflite.graph import Origin
from pipeline.tflite.lazy import Array

DAMPING = 0.01
"""Added to the diagonal of H, over its mean: the paper's value."""
# Within a chunk errors go column by column, behind it all at once as a product of matrices (the paper's lazy batches).
_CHUNK = 32
_ROWS = 1024
"""Rows that are rounded together: 32 columns of them stay in a core's cache."""


@dataclass(frozen=True)
class Factor:
    """What a span of columns is rounded by: the order in which they are taken, and U for the columns in that order."""

    order: NDArray[np.int64]
    upper: NDArray[np.float64]

    @classmethod
    def of(cls, hessian: Array, damping: float = DAMPING) -> Factor:
        """From H [n, n], of which `damping` times the mean is added to the diagonal.

        Channels that are always zero count as the mean.
        """
        wide = np.array(hessian, np.float64)
        diagonal = np.einsum("ii->i", wide)
        # A layer that read nothing but zeros: any H is right, and the identity is one.
        mean = float(diagonal.mean()) or 1.0
        diagonal[diagonal <= 0] = mean
        diagonal += damping * mean
        # Stable, so that equal channels keep one order on every machine, and files their bytes.
        order = np.argsort(-diagonal, kind="stable")
        # H = R Rᵀ with R upper triangular, by the Cholesky factor of H read backwards; then U = R⁻¹.
        backwards = np.linalg.cholesky(wide[np.ix_(order[::-1], order[::-1])])[::-1, ::-1]
        return cls(order, np.ascontiguousarray(dtrtri(backwards)[0]))


_Key = tuple[str, int, int, int, bytes]


@dataclass(frozen=True)
class ByFactors:
    """Rounds rows of a matrix by the factors of its spans, from left to right, made when they are needed."""

    factors: Callable[[], Sequence[Factor]]

    def __call__(self, values: Array, scale: Array, low: int, high: int) -> NDArray[np.int8]:
        """As `round_rows`."""
        return round_rows(values, scale, self.factors(), low, high)


def round_rows(values: Array, scale: Array, factors: Sequence[Factor], low: int, high: int) -> NDArray[np.int8]:
    """Rows [rows, columns] as integers `low` … `high`, by `scale` [rows, columns / block], block by block."""
    lots = (slice(start, start + _ROWS) for start in range(0, len(values), _ROWS))
    return np.concatenate([_round_lot(values[lot], scale[lot], factors, low, high) for lot in lots])


def _round_lot(values: Array, scale: Array, factors: Sequence[Factor], low: int, high: int) -> NDArray[np.int8]:
    rounded, block, first = np.empty(values.shape[::-1], np.int8), values.shape[1] // scale.shape[1], 0
    for factor in factors:
        columns = first + factor.order
        # Columns as rows: each step below then works on memory that lies together.
        rest, steps = values.T[columns].astype(np.float64), scale.T[columns // block].astype(np.float64)
        rounded[columns] = _round_span(rest, steps, factor.upper, low, high)
        first += len(columns)
    return rounded.T


def _round_span(rest: Array, steps: Array, upper: Array, low: int, high: int) -> Array:
    """Integers for `rest` [columns, rows], which is changed on the way; `steps` as many."""
    rounded = np.empty(rest.shape)
    for start in range(0, len(rest), _CHUNK):
        stop = min(start + _CHUNK, len(rest))
        errors = np.empty((stop - start, rest.shape[1]))
        for column in range(start, stop):
            whole = rounded[column] = np.clip(np.rint(rest[column] / steps[column]), low, high)
            error = errors[column - start] = (rest[column] - whole * steps[column]) / upper[column, column]
            # `rest` holds what the columns to come should be by now; those behind the chunk catch up below.
            rest[column + 1 : stop] -= upper[column, column + 1 : stop, None] * error
        rest[stop:] -= upper[start:stop, stop:].T @ errors
    return rounded


class Hessians:
    """H of what each layer reads, as stage `moments` left them in a folder, by the name of the layer's weight.

    Within `with hessians:` BLAS has one thread: rows are rounded in a thread per core already.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files: dict[str, str] = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        self._lock, self._cache = threading.Lock(), dict[_Key, tuple[threading.Lock, list[Factor]]]()
        self._limits = ExitStack()

    def __enter__(self) -> Self:
        self._limits.enter_context(threadpool_limits(1, "blas"))
        return self

    def __exit__(self, *_error: object) -> None:
        self._limits.close()

    def rounding(
        self, column_factors: Mapping[str, Array] | None = None, rotated: Mapping[str, int] | None = None
    ) -> Callable[[Origin, int], ByFactors | None]:
        """What rounds a part of a matrix that has so many columns; None where there is no Hessian of it.

        Columns may be a group of the matrix's (groups.py), rows a range of them (row_ranges.py), which read the same.

        Args:
            column_factors: what the columns of a whole matrix were multiplied with, and its inputs divided by.
            rotated: the size of the blocks in which both were rotated then (quantize/rotate.py).
        """

        def of(part: Origin, columns: int) -> ByFactors | None:
            file, factors = self.files.get(part.matrix), (column_factors or {}).get(part.matrix)
            size = (rotated or {}).get(part.matrix, 1)
            return ByFactors(lambda: self._factors(file, part.column, columns, factors, size)) if file else None

        return of

    def _factors(self, file: str, start: int, columns: int, scaled: Array | None, rotation: int) -> list[Factor]:
        """Those of each span, made once for matrices that read the same and for rows that come in lots."""
        key = (file, start, columns, rotation, b"" if scaled is None else scaled.tobytes())
        with self._lock:
            # Taken out and put back: the last used stands last, and the first are the ones to drop.
            own, factors = self._cache[key] = self._cache.pop(key, (threading.Lock(), []))
            # As many as rows are worked on at once: a factor of 2,048 columns takes 32 MB.
            for old in list(self._cache)[: -parallel.threads()]:
                del self._cache[old]
        with own:
            # Under a lock of its own: others that need the same factor wait for it, those of other layers do not.
            return factors or self._fill(factors, file, slice(start, start + columns), scaled, rotation)

    def _fill(
        self, factors: list[Factor], file: str, columns: slice[int, int, None], scaled: Array | None, rotation: int
    ) -> list[Factor]:
        """`factors`, with that of each span of `columns`."""
        # Mapped: of a wide layer only the spans that are asked for are read.
        stored: Array = np.load(self.folder / file, mmap_mode="r")
        width = stored.shape[1]
        for place, whole in enumerate(stored):
            low, high = (min(max(edge - place * width, 0), width) for edge in (columns.start, columns.stop))
            if low < high:
                first, last = low - low % rotation, -(-high // rotation) * rotation  # whole blocks; a part is kept
                part = np.array(whole[first:last, first:last], np.float64)
                if scaled is not None:
                    scale = scaled[place * width + first : place * width + last].astype(np.float64)
                    # Columns of weights times f means inputs over f, and H is a product of two inputs.
                    part /= scale[:, None] * scale
                if rotation > 1:
                    # Bᵀ H B: once for the rows, once for the columns; B and H are symmetric, so one transposition is
                    # enough.
                    part = rotate_blocks(rotate_blocks(part, rotation).T, rotation)
                kept = slice(low - first, high - first)
                factors.append(Factor.of(part[kept, kept]))
        return factors
