"""GPTQ: weights rounded one column after the other, each column's error taken up by those still to come.

What counts is not how far a weight is from its integer but how far the layer's result is: for inputs x with the Hessian
H = Σ x xᵀ the mean square of an error e of one row is e H eᵀ = |e R|², where H = R Rᵀ with R upper triangular. Columns
are rounded from left to right: column j, to which the errors before it add Σ e_i R_ij / R_jj, so that its own part of
e R becomes as small as it can (Frantar et al., GPTQ, arXiv 2210.17323; its algorithm 1 takes the same steps by R⁻¹,
Chee et al., QuIP, arXiv 2307.13304, theorem 6). Scales are set beforehand, as without it, so columns can be taken in
any order: those with the largest inputs come first, whose errors all others can take up.

Weights are [rows, columns], H is [n, n] for a span of n columns, from stage `moments`. Everything here is float64: a
product's last bits differ from machine to machine, and so would weights that lie between two integers. Columns are
treated in spans of at most `hessians.SPAN`, each with a Hessian of its own.

Of a tied table the rows that are looked up get worse by it, and the head gets better. Where both count (`lookups`), it
is rounded by H of the head plus a multiple of the identity: an error of a row that is looked up counts in every channel
alike, as far as anybody knows without a gradient.
Result: Gemma 3 270M, int8x2: KL(fp32 file || file) 0.0026 instead of 0.0055, and smaller; docs/experiments.md.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray
from scipy.linalg.lapack import dpotrf
from threadpoolctl import threadpool_limits

from pipeline.core import parallel
from pipeline.core.errors import QuantiseError
from pipeline.quantize.hadamard import rotate_both
from pipeline.quantize.hessians import INDEX
from pipeline.quantize.kept import Kept
from pipeline.tflite.graph import Origin
from pipeline.tflite.lazy import Array

DAMPING = 0.01
"""Added to the diagonal of H, over its mean: the paper's value."""
# So many columns pass their errors on one by one; more are halved, and the first half's errors reach the second all at
# once, as a product of matrices (the paper's lazy batches, at every size).
_FEW = 4
_TOGETHER = 1 << 21
"""Values of a span that are rounded together: two arrays of as many in float64 are held in each thread."""


@dataclass(frozen=True)
class Factor:
    """What a span of columns is rounded by: the order in which they are taken, and in that order R_ij / R_jj.

    Of `upper` only what stands above the diagonal counts.
    """

    order: NDArray[np.int64]
    upper: NDArray[np.float64]

    @classmethod
    def of(cls, hessian: Array, damping: float = DAMPING) -> Factor:
        """From H [n, n], of which `damping` times the mean is added to the diagonal.

        Channels that are always zero count as the mean.

        Raises:
            numpy.linalg.LinAlgError: it is not positive definite, or has a value that is not finite.
        """
        wide = np.array(hessian, np.float64)
        diagonal = np.einsum("ii->i", wide)
        # A layer that read nothing but zeros: any H is right, and the identity is one.
        mean = float(diagonal.mean()) or 1.0
        diagonal[diagonal <= 0] = mean
        diagonal += damping * mean
        # Stable, so that equal channels keep one order on every machine, and files their bytes.
        order = np.argsort(-diagonal, kind="stable")
        # The Cholesky factor of H read backwards is R read backwards. LAPACK has matrices column by column: transposed,
        # so that it takes them without a copy; by its own name, for scipy's `cholesky` takes twice the time.
        backwards = wide.take(order[::-1], 0).take(order[::-1], 1).T
        lower, fault = dpotrf(backwards, lower=1, clean=0, overwrite_a=1)
        factor = np.ascontiguousarray(lower.T[::-1, ::-1])
        pivots = np.diag(factor).copy()
        if fault or not np.isfinite(pivots).all():  # what is not finite ends in a pivot, and LAPACK need not say it
            raise np.linalg.LinAlgError("it is not positive definite, or not finite")
        factor /= pivots[:, None]
        return cls(order, factor.T)


def _factor(hessian: Array, file: Path) -> Factor:
    try:
        return Factor.of(hessian)
    except np.linalg.LinAlgError as error:
        raise QuantiseError(
            f"the Hessian in {file} can't be factored: {error}",
            cause="the model gives no finite numbers on the calibration text, or the file was damaged",
            remedy="look at the reference (`make golden`), or round without it: gptq = false in the recipe",
        ) from error


_Key = tuple[str, int, int, bytes]


@dataclass(frozen=True)
class _Change:
    """What makes of a layer's stored H that by which its matrix is rounded; fields as `Hessians.rounding` says."""

    scaled: Array | None
    rotation: int
    lookups: float

    def key(self) -> bytes:
        return repr((self.rotation, self.lookups)).encode() + (b"" if self.scaled is None else self.scaled.tobytes())

    def of(self, hessian: NDArray[np.float64], columns: slice[int, int, None]) -> NDArray[np.float64]:
        """H of whole blocks, `columns` of the matrix; it is written into."""
        np.einsum("ii->i", hessian)[:] += self.lookups * np.diag(hessian).mean()
        if self.scaled is not None:
            scale = self.scaled[columns].astype(np.float64)
            # Columns of weights times f means inputs over f, and H is a product of two inputs.
            hessian /= scale
            hessian /= scale[:, None]
        return rotate_both(hessian, self.rotation) if self.rotation > 1 else hessian


@dataclass(frozen=True)
class ByFactors:
    """Rounds rows of a matrix by the factors of its spans, from left to right, made when they are needed.

    `made_of` says what the factors are made of: rows that are the same, by the same, are taken from `kept`.
    """

    factors: Callable[[], Sequence[Factor]]
    made_of: tuple[bytes, ...] = ()
    kept: Kept | None = None

    def __call__(self, values: Array, scale: Array, low: int, high: int) -> NDArray[np.int8]:
        """As `round_rows`."""

        def make() -> NDArray[np.int8]:
            return round_rows(values, scale, self.factors(), low, high)

        if not self.kept:
            return make()
        return self.kept.once([*self.made_of, f"{low} {high}".encode(), scale, values], values.shape, make)


def round_rows(values: Array, scale: Array, factors: Sequence[Factor], low: int, high: int) -> NDArray[np.int8]:
    """Rows [rows, columns] as integers `low` … `high`, by `scale` [rows, columns / block], block by block."""
    step = max(1, _TOGETHER // max(len(factor.order) for factor in factors))
    lots = (slice(start, start + step) for start in range(0, len(values), step))
    return np.concatenate([_round_lot(values[lot], scale[lot], factors, low, high) for lot in lots])


def _round_lot(values: Array, scale: Array, factors: Sequence[Factor], low: int, high: int) -> NDArray[np.int8]:
    rounded, block, first = np.empty(values.shape[::-1], np.int8), values.shape[1] // scale.shape[1], 0
    steps = np.ascontiguousarray(scale.T, np.float64)
    for factor in factors:
        columns = first + factor.order
        # Columns as rows: each step below then works on memory that lies together.
        own = values.T[columns].astype(np.float64)
        span = _Span.of(own, [steps[place] for place in columns // block], factor.upper, low, high)
        rounded[columns] = span.round(0, len(columns))
        first += len(columns)
    return rounded.T


@dataclass(frozen=True)
class _Span:
    """Columns under way: what each is off [columns, rows], before it is rounded its values; and what is added to it.

    What each becomes, and by which steps.
    """

    errors: Array
    steps: Sequence[Array]
    upper: Array
    low: int
    high: int
    rounded: NDArray[np.int8]
    added: Array

    @classmethod
    def of(cls, values: Array, steps: Sequence[Array], upper: Array, low: int, high: int) -> _Span:
        """With nothing rounded so far; `steps` [rows] for each column."""
        return cls(values, steps, upper, low, high, np.empty(values.shape, np.int8), np.zeros(values.shape))

    def round(self, start: int, stop: int) -> NDArray[np.int8]:
        """Round columns `start` to `stop`, and keep their errors; all that is rounded."""
        if stop - start <= _FEW:
            for column in range(start, stop):
                self._round_one(column, stop)
        else:
            middle = start + -(-(stop - start) // (2 * _FEW)) * _FEW
            self.round(start, middle)
            self.added[middle:stop] += self.upper[start:middle, middle:stop].T @ self.errors[start:middle]
            self.round(middle, stop)
        return self.rounded

    def _round_one(self, column: int, stop: int) -> None:
        error, step, whole = self.errors[column], self.steps[column], self.added[column]
        whole += error
        np.rint(np.divide(whole, step, out=whole), out=whole)
        self.rounded[column] = np.minimum(np.maximum(whole, self.low, out=whole), self.high, out=whole)
        error -= np.multiply(whole, step, out=whole)
        for later in range(column + 1, stop):
            self.added[later] += self.upper[column, later] * error


class Hessians:
    """H of what each layer reads, as stage `moments` left them in a folder, by the name of the layer's weight.

    Within `with hessians:` BLAS has one thread: rows are rounded in a thread per core already. Several graphs have the
    same matrices: with a folder as `room`, what is rounded for one is kept there, and the next takes it.
    """

    def __init__(self, folder: Path, room: Path | None = None) -> None:
        self.folder, self.room = folder, room
        self.files: dict[str, str] = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        self._lock, self._cache = threading.Lock(), dict[_Key, tuple[threading.Lock, list[Factor]]]()
        self._within = ExitStack()
        self._kept: Kept | None = None

    def __enter__(self) -> Self:
        self._within.enter_context(threadpool_limits(1, "blas"))
        if self.room:
            self._kept = self._within.enter_context(closing(Kept(self.room)))
        return self

    def __exit__(self, *_error: object) -> None:
        self._within.close()

    def rounding(
        self,
        column_factors: Mapping[str, Array] | None = None,
        rotated: Mapping[str, int] | None = None,
        lookups: Mapping[str, float] | None = None,
    ) -> Callable[[Origin, int], ByFactors | None]:
        """What rounds a part of a matrix that has so many columns; None where there is no Hessian of it.

        Columns may be a group of the matrix's (groups.py), rows a range of them (row_ranges.py), which read the same.

        Args:
            column_factors: what the columns of a whole matrix were multiplied with, and its inputs divided by.
            rotated: the size of the blocks in which both were rotated then (quantize/rotate.py).
            lookups: of matrices whose rows are looked up too, what an error there counts beside one of the products.
        """

        def of(part: Origin, columns: int) -> ByFactors | None:
            file, factors = self.files.get(part.matrix), (column_factors or {}).get(part.matrix)
            size, share = (rotated or {}).get(part.matrix, 1), (lookups or {}).get(part.matrix, 0.0)
            if not file:
                return None
            change = _Change(factors, size, share)
            made_of = repr((file, part.column, columns)).encode(), change.key()
            return ByFactors(lambda: self._factors(file, part.column, columns, change), made_of, self._kept)

        return of

    def _factors(self, file: str, start: int, columns: int, change: _Change) -> list[Factor]:
        """Those of each span, made once for matrices that read the same and for rows that come in lots."""
        key = (file, start, columns, change.key())
        with self._lock:
            # Taken out and put back: the last used stands last, and the first are the ones to drop.
            own, factors = self._cache[key] = self._cache.pop(key, (threading.Lock(), []))
            # As many as rows are worked on at once: a factor of 2,048 columns takes 32 MB.
            for old in list(self._cache)[: -parallel.threads()]:
                del self._cache[old]
        with own:
            # Under a lock of its own: others that need the same factor wait for it, those of other layers do not.
            return factors or self._fill(factors, file, slice(start, start + columns), change)

    def _fill(self, factors: list[Factor], file: str, columns: slice[int, int, None], change: _Change) -> list[Factor]:
        """`factors`, with that of each span of `columns`."""
        # Mapped: of a wide layer only the spans that are asked for are read.
        stored: Array = np.load(self.folder / file, mmap_mode="r")
        width, rotation = stored.shape[1], change.rotation
        for place, whole in enumerate(stored):
            low, high = (min(max(edge - place * width, 0), width) for edge in (columns.start, columns.stop))
            if low < high:
                first, last = low - low % rotation, -(-high // rotation) * rotation  # whole blocks; a part is kept
                part = np.array(whole[first:last, first:last], np.float64)
                part = change.of(part, slice(place * width + first, place * width + last))
                kept = slice(low - first, high - first)
                factors.append(_factor(part[kept, kept], self.folder / file))
        return factors
