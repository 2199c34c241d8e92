"""What the activations of a step graph look like on real text: the numbers that static quantisation needs.

The fp32 file itself is run, sample by sample at each sample's own length, and each wanted tensor is read back.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline.core import log
from pipeline.core.errors import QuantiseError
from pipeline.runtime.litert import Tokens, open_traced, run
from pipeline.tflite.lazy import Array

_SHORTEST = 2
# Real text in any language is far above this; a repeated sentence or one token is below.
_FEWEST_EFFECTIVE_TOKENS = 24.0
# 12 bits for a range that int8 cuts into 255 steps: 16 bins a step.
_BINS = 4096
# Elements of one tensor that one sample adds to a histogram; the extremes are always counted exactly.
_ELEMENTS = 2**16


def make_samples(documents: Iterable[Sequence[int]], bos: int, *, count: int, window: int) -> list[Tokens]:
    """Cut `documents`, token ids, into windows that begin with `bos`, of at most `window` ids; `count` of them, spread.

    Raises:
        QuantiseError: there are too few, or they are so alike that ranges from them would mean nothing.
    """
    windows = [ids for document in documents for ids in _windows(document, bos, window)]
    remedy = "calibrate with more, and real, text like what the model will see"
    if len(windows) < count:
        raise QuantiseError(
            f"the calibration text gives {len(windows)} samples, the recipe wants {count}", remedy=remedy
        )
    # Evenly over the text and not at random: the file's bytes follow from the text alone.
    chosen = [windows[i * len(windows) // count] for i in range(count)]
    effective = _effective_tokens(chosen)
    if effective < _FEWEST_EFFECTIVE_TOKENS:
        raise QuantiseError(
            f"the calibration text is constant or nearly so: it uses {effective:.0f} different tokens, weighted by use",
            cause="ranges from it would clip real activations",
            remedy=remedy,
        )
    return chosen


def _windows(ids: Sequence[int], bos: int, window: int) -> list[Tokens]:
    body = ids[1:] if ids[:1] == [bos] else ids  # a template's; elsewhere it belongs to the text
    step = window - 1
    cuts = [np.array([bos, *body[i : i + step]], np.int32) for i in range(0, len(body), step)]
    return [cut for cut in cuts if len(cut) >= _SHORTEST]


def _effective_tokens(samples: Sequence[Tokens]) -> float:
    """exp(entropy) of the token frequencies, the bos of each sample left out."""
    _, counts = np.unique(np.concatenate([sample[1:] for sample in samples]), return_counts=True)
    # Weighted by use, so that a text of one sentence a thousand times over does not count as its words.
    share = counts / counts.sum()
    return float(np.exp(-(share * np.log(share)).sum()))


@dataclass
class Statistics:
    """What was seen of one tensor: a histogram over [−`bound`, `bound`], the extremes, and each channel's peak."""

    bound: float = 0.0
    low: float = np.inf
    high: float = -np.inf
    counts: NDArray[np.float64] = field(default_factory=lambda: np.zeros(_BINS))
    peak: NDArray[np.float32] | None = None

    def add(self, values: Array) -> None:
        """Count the values of one sample; the last axis is the channel."""
        # Extremes and peaks of all elements: a rare outlier is what a range has to decide on.
        flat = values.reshape(-1)
        self.low, self.high = min(self.low, float(flat.min())), max(self.high, float(flat.max()))
        if values.ndim:
            peak = np.abs(values.reshape(-1, values.shape[-1])).max(axis=0)
            if self.peak is None or self.peak.shape == peak.shape:
                self.peak = peak if self.peak is None else np.maximum(self.peak, peak)
        self._widen(max(-self.low, self.high))
        # Evenly spaced elements, and each counts for those left out: attention scores have millions a sample.
        taken = flat[:: -(-flat.size // _ELEMENTS)]
        place = np.minimum(((taken + self.bound) * (_BINS / (2 * self.bound))).astype(np.int64), _BINS - 1)
        self.counts += np.bincount(np.maximum(place, 0), minlength=_BINS) * (flat.size / taken.size)

    def _widen(self, reach: float) -> None:
        """Double `bound` until it holds `reach`, merging pairs of bins outwards from the middle."""
        if self.bound == 0.0:
            self.bound = float(2.0 ** np.ceil(np.log2(max(reach, 1e-30))))
        while self.bound < reach:
            # Bounds are powers of two, so doubling maps pairs of bins on bins exactly: no count is moved by rounding.
            self.counts = np.concatenate(
                [np.zeros(_BINS // 4), self.counts.reshape(-1, 2).sum(1), np.zeros(_BINS // 4)]
            )
            self.bound *= 2

    def centres(self) -> NDArray[np.float64]:
        """The middle value of each bin."""
        edges: NDArray[np.float64] = np.linspace(-self.bound, self.bound, _BINS + 1)
        return (edges[:-1] + edges[1:]) / 2


def collect(file: Path, wanted: Sequence[int], samples: Sequence[Tokens]) -> dict[int, Statistics]:
    """Run the step graph `file` on every sample and look at the tensors `wanted` (indices in the main subgraph).

    Raises:
        QuantiseError: a tensor was the same everywhere, or not finite.
    """
    # It keeps every tensor: the plain interpreter writes one over another once it has been read.
    interpreter = open_traced(file)
    seen = {tensor: Statistics() for tensor in wanted}
    with log.progress("calibrate", len(samples), "samples") as bar:
        # Longest first: with all tensors kept, each growth of the memory plan takes seconds (LiteRT 2.3.0).
        for sample in sorted(samples, key=len, reverse=True):
            run(interpreter, sample)
            for tensor, statistics in seen.items():
                statistics.add(interpreter.get_tensor(tensor))
            bar.advance()
    for tensor, statistics in seen.items():
        if not np.isfinite(statistics.low + statistics.high) or statistics.low == statistics.high:
            raise QuantiseError(
                f"tensor {tensor} of {file.name} is {statistics.low} everywhere on the calibration text",
                cause="the text is constant, or the model is damaged",
                remedy="calibrate with more, and real, text",
            )
    return seen
