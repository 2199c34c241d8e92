"""How far one set of logits is from another: everything in float64 and over the full vocabulary.

Sources: KL divergence, same-top-token and perplexity ratio as llama.cpp's `perplexity --kl-divergence` reports them;
normalised mean square error as its `check-nmse`; block bootstrap after Künsch (1989), with whole windows as blocks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

Doubles = NDArray[np.float64]

TOP = 5
_CHUNK = 1 << 22
"""Logits that are compared at a time (32 MiB per float64 copy)."""
_RESAMPLES = 2000
_SEED = 20251124
_LEVEL = 0.95


@dataclass(frozen=True)
class Scores:
    """Figures per position, float64 [n] each.

    `kld`: KL(reference || file) in nats. `top1`: 1 where the file's most likely token (the first of equals, as a
    greedy decoder takes it) is one of the reference's most likely. `top5`: 1 where the reference's is among the
    file's five. `tie`: 1 where the file has several most likely tokens. `margin`: the reference's lead of its first
    over its second token, in logits. `nll`, `reference_nll`: -log p of the text's next token (NaN without text).
    `squared_error`, `squared_reference`: sums over the vocabulary. `max_abs`: largest difference of logits.
    """

    kld: Doubles
    top1: Doubles
    top5: Doubles
    tie: Doubles
    margin: Doubles
    nll: Doubles
    reference_nll: Doubles
    squared_error: Doubles
    squared_reference: Doubles
    max_abs: Doubles

    def take(self, order: NDArray[np.int64]) -> Scores:
        """The positions `order`, in that order."""
        return Scores(*(getattr(self, field.name)[order] for field in fields(self)))

    @property
    def nmse(self) -> Doubles:
        """Normalised mean square error per position: Σ (file − reference)² / Σ reference²."""
        return self.squared_error / self.squared_reference


def join(parts: Sequence[Scores]) -> Scores:
    """Scores of several batches, one after another."""
    return Scores(*(np.concatenate([getattr(part, field.name) for part in parts]) for field in fields(Scores)))


def compare(reference: NDArray[Any], logits: NDArray[Any], targets: NDArray[Any] | None = None) -> Scores:
    """Score `logits` [n, V] against `reference` [n, V]; `targets` [n] are the tokens that really came next.

    NaN or infinite logits give NaN scores, which no limit lets pass.
    """
    if reference.shape != logits.shape or not len(logits):
        raise ValueError(f"can't compare logits of shapes {reference.shape} and {logits.shape}")
    rows = max(1, _CHUNK // logits.shape[1])
    parts = []
    for start in range(0, len(logits), rows):
        chunk = slice(start, start + rows)
        parts.append(_compare_chunk(reference[chunk], logits[chunk], None if targets is None else targets[chunk]))
    return join(parts)


def _compare_chunk(reference: NDArray[Any], logits: NDArray[Any], targets: NDArray[Any] | None) -> Scores:
    expected, actual = reference.astype(np.float64), logits.astype(np.float64)
    with np.errstate(invalid="ignore", over="ignore"):
        log_p, log_q = log_softmax(expected), log_softmax(actual)
        # Never negative in exact arithmetic; what is below zero is rounding.
        kld = np.maximum((np.exp(log_p) * (log_p - log_q)).sum(axis=1), 0.0)
        difference = actual - expected
        squared_error, max_abs = (difference**2).sum(axis=1), np.abs(difference).max(axis=1)
    rows = np.arange(len(actual))
    best, first = actual.max(axis=1), expected.max(axis=1)
    second = np.partition(expected, -2, axis=1)[:, -2] if expected.shape[1] > 1 else first
    # A reference token is among the file's five if fewer than five are strictly more likely.
    ahead = (actual > actual[rows, expected.argmax(axis=1)][:, None]).sum(axis=1)
    sound = np.isfinite(actual).all(axis=1)
    missing = np.full(len(actual), np.nan)
    return Scores(
        kld=kld,
        top1=np.where(sound, expected[rows, actual.argmax(axis=1)] == first, np.nan),
        top5=np.where(sound, ahead < TOP, np.nan),
        tie=((actual == best[:, None]).sum(axis=1) > 1).astype(np.float64),
        margin=first - second,
        nll=missing if targets is None else -log_q[rows, targets],
        reference_nll=missing if targets is None else -log_p[rows, targets],
        squared_error=squared_error,
        squared_reference=(expected**2).sum(axis=1),
        max_abs=max_abs,
    )


def log_softmax(logits: Doubles) -> Doubles:
    """Log p over the last axis, computed from the differences to the largest logit."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    normalised: Doubles = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return normalised


@dataclass(frozen=True)
class Estimate:
    """A value and its 95 % confidence interval."""

    value: float
    low: float
    high: float


def bootstrap(figure: Callable[[Doubles], Doubles], columns: Sequence[Doubles], blocks: NDArray[np.int64]) -> Estimate:
    """`figure` of the means of `columns` ([n] each), with an interval from resampling whole blocks.

    Positions of one window share their context, so windows are drawn (with replacement, 2000 times, fixed seed), not
    positions. `figure` maps means [..., columns] to values [...].
    """
    if not all(np.isfinite(column).all() for column in columns):
        value = float(figure(np.array([column.mean() for column in columns])))
        return Estimate(value, math.nan, math.nan)
    names, member = np.unique(blocks, return_inverse=True)
    sums = np.stack([np.bincount(member, weights=column, minlength=len(names)) for column in columns], axis=1)
    counts = np.bincount(member, minlength=len(names)).astype(np.float64)
    drawn = np.random.default_rng(_SEED).multinomial(len(names), np.full(len(names), 1 / len(names)), size=_RESAMPLES)
    means = (drawn @ sums) / (drawn @ counts)[:, None]
    tail = (1 - _LEVEL) / 2
    low, high = np.quantile(figure(means), [tail, 1 - tail])
    return Estimate(float(figure(sums.sum(axis=0) / counts.sum())), float(low), float(high))


@dataclass(frozen=True)
class Summary:
    """The figures of one file on the corpus; KLD in nats, shares from 0 to 1.

    `margin` is the largest lead that the reference's token had where the file chose another one: tiny where only
    near-ties flip. `ties` is the share of positions where the file has several most likely tokens.
    """

    positions: int
    kld: Estimate
    kld_median: float
    kld_p99: float
    kld_max: float
    top1: Estimate
    top5: float
    ties: float
    margin: float
    perplexity: float
    reference_perplexity: float
    perplexity_ratio: Estimate
    nmse_mean: float
    nmse_max: float
    max_abs: float


def summarise(scores: Scores, blocks: NDArray[np.int64]) -> Summary:
    """Figures over all positions; `blocks` [n] says which window each position is in."""
    nmse = scores.nmse
    wrong = scores.margin[scores.top1 == 0]
    return Summary(
        positions=len(scores.kld),
        kld=bootstrap(_only, [scores.kld], blocks),
        kld_median=float(np.median(scores.kld)),
        kld_p99=_quantile(scores.kld, 0.99),
        kld_max=float(scores.kld.max()),
        top1=bootstrap(_only, [scores.top1], blocks),
        top5=float(scores.top5.mean()),
        ties=float(scores.tie.mean()),
        margin=float(wrong.max()) if len(wrong) else 0.0,
        perplexity=float(np.exp(scores.nll.mean())),
        reference_perplexity=float(np.exp(scores.reference_nll.mean())),
        perplexity_ratio=bootstrap(_ratio, [scores.nll, scores.reference_nll], blocks),
        nmse_mean=float(nmse.mean()),
        nmse_max=float(nmse.max()),
        max_abs=float(scores.max_abs.max()),
    )


def _quantile(values: Doubles, share: float) -> float:
    """A quantile, NaN where a value is not finite (NumPy would interpolate between infinities)."""
    return float(np.quantile(values, share)) if np.isfinite(values).all() else math.nan


def _only(means: Doubles) -> Doubles:
    """The mean of the one column."""
    return means[..., 0]


def _ratio(means: Doubles) -> Doubles:
    """The exponential of the difference of two mean negative log-likelihoods: the ratio of the perplexities."""
    ratio: Doubles = np.exp(means[..., 0] - means[..., 1])
    return ratio


def histogram(values: Doubles, edges: Doubles) -> list[int]:
    """How many of `values` lie between neighbouring `edges`; what is outside counts in the first or last bin."""
    inside = np.clip(values[np.isfinite(values)], edges[0], edges[-1])
    return [int(count) for count in np.histogram(inside, bins=edges)[0]]
