"""How far one set of logits is from another: everything in float64 and over the full vocabulary.

Sources: KL divergence, same-top-token, perplexity ratio and RMS Δp as llama.cpp's `perplexity --kl-divergence` reports
them; normalised mean square error as its `check-nmse`; block bootstrap after Künsch (1989), with whole windows, or
stretches of a conversation, as blocks. Two runs on one machine give the same bits: rows are independent of each other,
whichever thread has them, and the resampling is seeded.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from pipeline.core import parallel

Doubles = NDArray[np.float64]
Reals = NDArray[np.float16] | NDArray[np.float32] | NDArray[np.float64]
Indices = NDArray[np.int64]

TOP = 5
_CHUNK = 1 << 18
"""Logits that a thread compares at a time: 2 MiB per float64 copy, which a core's cache holds (four times as fast)."""
# The ends of a 95 % interval then rest on 50 draws each.
_RESAMPLES = 2000
_SEED = 20251124
_LEVEL = 0.95


def nmse(got: Reals, wanted: Reals) -> float:
    """The normalised mean square error over all of an array: Σ (got − wanted)² / Σ wanted²."""
    wide = wanted.astype(np.float64)
    return float(((got - wide) ** 2).sum() / (wide**2).sum())


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

    @property
    def delta_p(self) -> Doubles:
        """The text's next token: its probability in the file less that in the reference (NaN without text)."""
        difference: Doubles = np.exp(-self.nll) - np.exp(-self.reference_nll)
        return difference


def join(parts: Sequence[Scores]) -> Scores:
    """Scores of several batches, one after another."""
    return Scores(*(np.concatenate([getattr(part, field.name) for part in parts]) for field in fields(Scores)))


def compare(reference: Reals, logits: Reals, targets: NDArray[np.int32] | Indices | None = None) -> Scores:
    """Score `logits` [n, V] against `reference` [n, V]; `targets` [n] are the tokens that really came next.

    NaN or infinite logits give NaN scores, which no limit lets pass.
    """
    if reference.shape != logits.shape or not len(logits):
        raise ValueError(f"can't compare logits of shapes {reference.shape} and {logits.shape}")
    rows = max(1, _CHUNK // logits.shape[1])

    def score(chunk: slice[int, int, None]) -> Scores:
        return _compare_chunk(reference[chunk], logits[chunk], None if targets is None else targets[chunk])

    return join(list(parallel.ordered(score, (slice(i, i + rows) for i in range(0, len(logits), rows)))))


def _compare_chunk(reference: Reals, logits: Reals, targets: NDArray[np.int32] | Indices | None) -> Scores:
    # A KLD of 1e-6 is the difference of sums near 1, of which float32 keeps seven digits.
    expected, actual = reference.astype(np.float64), logits.astype(np.float64)
    with np.errstate(invalid="ignore", over="ignore"):
        log_p, log_q = log_softmax(expected), log_softmax(actual)
        # Never negative in exact arithmetic; what is below zero is rounding.
        kld = np.maximum((np.exp(log_p) * (log_p - log_q)).sum(axis=1), 0.0)
        difference = actual - expected
        squared_error, max_abs = (difference**2).sum(axis=1), np.abs(difference).max(axis=1)
    rows = np.arange(len(actual))
    best, first = actual.max(axis=1), expected.max(axis=1)
    second = _second(expected, first)
    # A reference token is among the file's five if fewer than five are strictly more likely.
    ahead = (actual > actual[rows, expected.argmax(axis=1)][:, None]).sum(axis=1)
    # argmax of NaN is a place like any other, and could agree by chance.
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


def _second(logits: Doubles, first: Doubles) -> Doubles:
    """The second largest logit of each row; `first` [n], the largest, where there is another as large, or no other."""
    others = logits.copy()
    others[np.arange(len(logits)), logits.argmax(axis=1)] = -np.inf
    return others.max(axis=1) if logits.shape[1] > 1 else first


def log_softmax(logits: Doubles) -> Doubles:
    """Log p over the last axis, computed from the differences to the largest logit."""
    # exp() of a logit beyond 709 is infinite.
    shifted = logits - logits.max(axis=-1, keepdims=True)
    normalised: Doubles = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return normalised


@dataclass(frozen=True)
class Estimate:
    """A value and its 95 % confidence interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Draws:
    """How often each block is drawn in each resample [R, blocks], and the block that each position is in [n].

    Positions of one block share their context, so blocks are drawn (with replacement, 2000 times, fixed seed), not
    positions.
    """

    times: Indices
    member: Indices

    @classmethod
    def of(cls, blocks: Indices) -> Draws:
        """Draws of the blocks that `blocks` [n] names."""
        names, member = np.unique(blocks, return_inverse=True)
        equally = np.full(len(names), 1 / len(names))
        # How often each block is drawn is all that a mean needs: no resample is ever laid out.
        times = np.random.default_rng(_SEED).multinomial(len(names), equally, size=_RESAMPLES)
        return cls(times=times, member=member.astype(np.int64))


def bootstrap(figure: Callable[[Doubles], Doubles], columns: Sequence[Doubles], draws: Draws) -> Estimate:
    """`figure` of the means of `columns` ([n] each), with an interval from resampling whole blocks.

    `figure` maps means [..., columns] to values [...].
    """
    # An interval of what is not finite would be one of the rest.
    if not all(np.isfinite(column).all() for column in columns):
        value = float(figure(np.array([column.mean() for column in columns])))
        return Estimate(value, math.nan, math.nan)
    count = draws.times.shape[1]
    sums = np.stack([np.bincount(draws.member, weights=column, minlength=count) for column in columns], axis=1)
    counts = np.bincount(draws.member, minlength=count).astype(np.float64)
    # Blocks may differ in length: each mean is over the positions drawn, not over blocks.
    means = (draws.times @ sums) / (draws.times @ counts)[:, None]
    return estimate(float(figure(sums.sum(axis=0) / counts.sum())), figure(means))


def quantiles(values: Doubles, shares: Sequence[float], draws: Draws) -> list[Estimate]:
    """The quantiles `shares` (0 to 1, linear between neighbours) of `values` [n], with intervals.

    A sample says nothing of what is beyond its largest value: the interval of the maximum ends there. NaN where a value
    is not finite.
    """
    if not np.isfinite(values).all():
        return [Estimate(math.nan, math.nan, math.nan)] * len(shares)
    order = np.argsort(values, kind="stable")
    ascending, blocks = values[order], draws.member[order]
    drawn = np.stack([_weighted_quantiles(ascending, times[blocks], shares) for times in draws.times])
    found = np.quantile(values, shares)
    return [estimate(float(value), column) for value, column in zip(found, drawn.T, strict=True)]


def _weighted_quantiles(ascending: Doubles, times: Indices, shares: Sequence[float]) -> Doubles:
    """Quantiles of a sample that holds each of the `ascending` values so many `times`."""
    ends = np.cumsum(times)
    places = (ends[-1] - 1) * np.asarray(shares)
    below = ascending[np.searchsorted(ends, np.floor(places), side="right")]
    above = ascending[np.searchsorted(ends, np.ceil(places), side="right")]
    found: Doubles = below + (above - below) * (places - np.floor(places))
    return found


def estimate(value: float, drawn: Doubles) -> Estimate:
    """`value` with the middle 95 % of what was `drawn`."""
    tail = (1 - _LEVEL) / 2
    low, high = np.quantile(drawn, [tail, 1 - tail])
    return Estimate(value, float(low), float(high))


@dataclass(frozen=True)
class Summary:
    """The figures of one file on the corpus; KLD in nats, shares from 0 to 1.

    `rms_delta_p` is the root mean square of `Scores.delta_p`. `margin` is the largest lead that the reference's token
    had where the file chose another one: tiny where only near-ties flip. `ties` is the share of positions where the
    file has several most likely tokens. `blocks` is how many independent pieces the intervals rest on.
    """

    positions: int
    blocks: int
    kld: Estimate
    kld_median: Estimate
    kld_p99: Estimate
    kld_p999: Estimate
    kld_max: Estimate
    top1: Estimate
    top5: Estimate
    rms_delta_p: Estimate
    ties: float
    margin: float
    perplexity: float
    reference_perplexity: float
    perplexity_ratio: Estimate
    nmse_mean: float
    nmse_max: float
    max_abs: float


def summarise(scores: Scores, blocks: Indices) -> Summary:
    """Figures over all positions; `blocks` [n] says which window, or stretch of text, each position is in."""
    nmse, draws = scores.nmse, Draws.of(blocks)
    # NaN is not 0: positions without a sound answer are counted elsewhere.
    wrong = scores.margin[scores.top1 == 0]
    median, p99, p999, most = quantiles(scores.kld, (0.5, 0.99, 0.999, 1.0), draws)
    return Summary(
        positions=len(scores.kld),
        blocks=draws.times.shape[1],
        kld=bootstrap(_only, [scores.kld], draws),
        kld_median=median,
        kld_p99=p99,
        kld_p999=p999,
        kld_max=most,
        top1=bootstrap(_only, [scores.top1], draws),
        top5=bootstrap(_only, [scores.top5], draws),
        rms_delta_p=bootstrap(_root, [scores.delta_p**2], draws),
        ties=float(scores.tie.mean()),
        margin=float(wrong.max()) if len(wrong) else 0.0,
        perplexity=float(np.exp(scores.nll.mean())),
        reference_perplexity=float(np.exp(scores.reference_nll.mean())),
        perplexity_ratio=bootstrap(_ratio, [scores.nll, scores.reference_nll], draws),
        nmse_mean=float(nmse.mean()),
        nmse_max=float(nmse.max()),
        max_abs=float(scores.max_abs.max()),
    )


@dataclass(frozen=True)
class Divergence:
    """How long greedy texts agree with the reference's.

    `length`: tokens until the first difference, the whole text where there is none, in the mean. `identical`: the share
    of texts without any. `tokens`: the longest text, which no length can exceed.
    """

    texts: int
    tokens: int
    length: Estimate
    identical: Estimate


def divergence(agree: Sequence[int], tokens: Sequence[int]) -> Divergence | None:
    """Of texts of `tokens` tokens that `agree` with the reference's up to there; each is a block of its own.

    None without any text.
    """
    if not tokens:
        return None
    lengths, wholes = np.array(agree, np.float64), np.array(tokens, np.float64)
    draws = Draws.of(np.arange(len(lengths)))
    return Divergence(
        texts=len(lengths),
        tokens=max(tokens),
        length=bootstrap(_only, [lengths], draws),
        identical=bootstrap(_only, [(lengths >= wholes).astype(np.float64)], draws),
    )


def _only(means: Doubles) -> Doubles:
    """The mean of the one column."""
    return means[..., 0]


def _root(means: Doubles) -> Doubles:
    """The square root of the one column's mean."""
    root: Doubles = np.sqrt(means[..., 0])
    return root


def _ratio(means: Doubles) -> Doubles:
    """The exponential of the difference of two mean negative log-likelihoods: the ratio of the perplexities."""
    ratio: Doubles = np.exp(means[..., 0] - means[..., 1])
    return ratio


def histogram(values: Doubles, edges: Doubles) -> list[int]:
    """How many of `values` lie between neighbouring `edges`; what is outside counts in the first or last bin."""
    # So that the bins add up to all positions, however far out one lies.
    inside = np.clip(values[np.isfinite(values)], edges[0], edges[-1])
    return [int(count) for count in np.histogram(inside, bins=edges)[0]]


DECADES = (-14, 1)
"""The KLD axis, as powers of ten; what is below counts in the first bin."""
_BINS_PER_DECADE = 4


def kld_edges() -> NDArray[np.float64]:
    """Bin edges of the KLD histograms, in nats: a quarter of a decade each."""
    low, high = DECADES
    return np.logspace(low, high, (high - low) * _BINS_PER_DECADE + 1)
