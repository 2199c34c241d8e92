"""What one file is chosen by among several: the figures that have limits, at few positions, in float32.

What is chosen is judged in full afterwards (metrics.py, in float64). Here a KLD near 1e-3 needs three digits, and the
head of a large vocabulary is most of the work: float32 takes a quarter of the time and half of the memory. Sums are in
float64; a KLD is right to some 1e-6 nats.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from pipeline.core import parallel
from pipeline.judge import corpus
from pipeline.judge.metrics import Doubles
from pipeline.judge.reference import Head, widened

Floats = NDArray[np.float32]

_LOT, _LOTS = 16, 4
"""Windows of a lot, lots at most. Windows differ more than a window's positions do: half as many windows with twice the
positions each have an interval that is twice as wide (Gemma 3 270M)."""
_PRODUCTS = 10**13
"""Parameters times tokens that the reference reads, if one lot has no more: some two minutes on two cores."""
LOGITS = 1 << 24
"""Logits of a file that are there at a time, and of the reference (64 MiB each), for which its head is widened."""
_BLOCK = 1 << 22
"""Head elements that a thread widens at a time (16 MiB)."""
_CHUNK = 1 << 19
"""Logits that a thread compares at a time: 2 MiB per copy."""


def judged_in(window: int) -> int:
    """How many positions of a window of so many tokens are judged."""
    return min(corpus.POSITIONS_PER_WINDOW, window - 1)


def lots(parameters: int, window: int) -> tuple[int, ...]:
    """The windows of each lot that a model of so many parameters is judged on: fewer lots for larger models."""
    return (_LOT,) * max(1, min(_LOTS, _PRODUCTS // (parameters * window * _LOT)))


@dataclass(frozen=True)
class Sample:
    """Figures per position, float64 [n] each: `kld`, `top1`, `nll` and `reference_nll` as in `metrics.Scores`.

    NaN where a file's logits are not finite.
    """

    kld: Doubles
    top1: Doubles
    nll: Doubles
    reference_nll: Doubles

    @classmethod
    def join(cls, parts: list[Sample]) -> Sample:
        """Several, one after another."""
        return cls(*(np.concatenate([getattr(part, field.name) for part in parts]) for field in fields(cls)))


def logits(head: Head, hidden: Floats) -> Floats:
    """As `Head.logits`, in float32: [n, H] → [n, V]."""
    rows, size = head.weight.shape
    step, found = max(1, _BLOCK // size), np.empty((len(hidden), rows), np.float32)

    def fill(start: int) -> None:
        block = hidden @ widened(head.weight[start : start + step], np.float32).T
        found[:, start : start + step] = block if head.cap is None else head.cap * np.tanh(block / head.cap)

    # A thread per core works already, and BLAS's own would wait for each other.
    with threadpool_limits(1, "blas"):
        for _ in parallel.ordered(fill, range(0, rows, step)):
            pass
    return found


def compare(reference: Floats, found: Floats, targets: NDArray[np.int32]) -> Sample:
    """A file's logits `found` [n, V] beside the `reference`'s; `targets` [n] are the tokens that really came next."""
    rows = max(1, _CHUNK // reference.shape[1])

    def part(start: int) -> Sample:
        chunk = slice(start, start + rows)
        return _compare(reference[chunk], found[chunk], targets[chunk])

    return Sample.join(list(parallel.ordered(part, range(0, len(reference), rows))))


def _compare(expected: Floats, actual: Floats, targets: NDArray[np.int32]) -> Sample:
    rows = np.arange(len(actual))
    with np.errstate(invalid="ignore", over="ignore"):
        (p, log_p), (_, log_q) = _softmax(expected), _softmax(actual)
        nll, reference_nll = -log_q[rows, targets], -log_p[rows, targets]
        kld = np.multiply(p, np.subtract(log_p, log_q, out=log_p), out=p).sum(axis=1, dtype=np.float64)
    # argmax of NaN is a place like any other, and could agree by chance.
    top1 = np.where(np.isfinite(kld), expected[rows, actual.argmax(axis=1)] == expected.max(axis=1), np.nan)
    return Sample(np.maximum(kld, 0.0), top1, nll.astype(np.float64), reference_nll.astype(np.float64))


def _softmax(values: Floats) -> tuple[Floats, Floats]:
    """p and log p over the last axis; no exponential is of more than 0."""
    shifted = values - values.max(axis=-1, keepdims=True)
    p = np.exp(shifted)
    total = p.sum(axis=-1, keepdims=True, dtype=np.float64)
    shifted -= np.log(total).astype(np.float32)
    p /= total.astype(np.float32)
    return p, shifted
