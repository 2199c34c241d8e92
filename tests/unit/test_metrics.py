"""Metrics against plain sums over hand-made distributions, and their properties on drawn ones."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from pipeline.judge import metrics

LOGITS = arrays(np.float64, (3, 7), elements=st.floats(-30, 30))


def plain_kld(p: list[float], q: list[float]) -> float:
    return math.fsum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def logits_of(*rows: list[float]) -> metrics.Doubles:
    return np.log(np.array(rows))


P, Q = [0.5, 0.25, 0.125, 0.125], [0.25, 0.5, 0.125, 0.125]


def test_kld_is_the_plain_sum_in_the_right_direction() -> None:
    skewed = [0.7, 0.1, 0.1, 0.1]
    scores = metrics.compare(logits_of(P, skewed), logits_of(Q, P))
    assert scores.kld == pytest.approx([plain_kld(P, Q), plain_kld(skewed, P)], rel=1e-12)
    assert plain_kld(skewed, P) != pytest.approx(plain_kld(P, skewed), rel=1e-3)


def test_identical_logits_are_at_distance_zero() -> None:
    logits = np.random.default_rng(1).normal(size=(5, 11))
    scores = metrics.compare(logits, logits, np.arange(5))
    for name in ("kld", "squared_error", "max_abs", "tie"):
        assert getattr(scores, name).tolist() == [0.0] * 5
    assert scores.top1.tolist() == scores.top5.tolist() == [1.0] * 5
    assert np.array_equal(scores.nll, scores.reference_nll)


def test_a_shift_changes_logits_but_not_the_distribution() -> None:
    logits = np.random.default_rng(2).normal(size=(4, 9))
    scores = metrics.compare(logits, logits + 3.0)
    assert scores.kld.max() < 1e-15
    assert scores.max_abs == pytest.approx([3.0] * 4)
    assert scores.nmse == pytest.approx(9 * 9.0 / (logits**2).sum(axis=1))


def test_one_wrong_position_counts_once() -> None:
    reference = np.random.default_rng(3).normal(size=(10, 6))
    file = reference.copy()
    file[4] = -file[4]
    scores = metrics.compare(reference, file)
    assert scores.top1.sum() == 9
    assert np.flatnonzero(scores.kld > 1e-12).tolist() == [4]


def test_negative_log_likelihood_is_that_of_the_next_token() -> None:
    scores = metrics.compare(logits_of(P, P), logits_of(Q, Q), np.array([0, 1]))
    assert scores.reference_nll == pytest.approx([math.log(2), math.log(4)])
    assert scores.nll == pytest.approx([math.log(4), math.log(2)])


def test_a_tie_in_the_file_counts_its_first_token_and_is_reported() -> None:
    reference = np.array([[1.0, 2.0, 0.0], [2.0, 1.0, 0.0]])
    scores = metrics.compare(reference, np.array([[5.0, 5.0, 0.0], [5.0, 5.0, 0.0]]))
    assert scores.tie.tolist() == [1.0, 1.0]
    assert scores.top1.tolist() == [0.0, 1.0]


def test_a_tie_in_the_reference_allows_each_of_its_tokens() -> None:
    reference = np.array([[2.0, 2.0, 0.0]] * 3)
    scores = metrics.compare(reference, np.eye(3) * 4)
    assert scores.top1.tolist() == [1.0, 1.0, 0.0]
    assert scores.margin.tolist() == [0.0, 0.0, 0.0]


def test_top5_needs_fewer_than_five_tokens_ahead() -> None:
    reference = np.zeros((2, 8))
    reference[:, 7] = 1.0
    file = np.array([[9, 8, 7, 6, 0, 0, 0, 5], [9, 8, 7, 6, 5.5, 0, 0, 5]], dtype=float)
    assert metrics.compare(reference, file).top5.tolist() == [1.0, 0.0]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_logits_that_are_not_finite_give_no_good_figure(bad: float) -> None:
    reference = np.random.default_rng(4).normal(size=(2, 5))
    file = reference.copy()
    file[1, 2] = bad
    scores = metrics.compare(reference, file)
    assert np.isnan(scores.top1[1]) and np.isnan(scores.top5[1])
    assert not np.isfinite(scores.kld[1])
    summary = metrics.summarise(metrics.compare(reference, file, np.zeros(2, dtype=int)), np.arange(2))
    assert not np.isfinite(summary.kld.value) and not np.isfinite(summary.top1.value)


def test_shapes_that_differ_are_refused() -> None:
    with pytest.raises(ValueError, match="can't compare"):
        metrics.compare(np.zeros((2, 3)), np.zeros((2, 4)))


def test_chunks_do_not_change_a_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(5)
    reference, file, targets = random.normal(size=(9, 13)), random.normal(size=(9, 13)), np.arange(9)
    whole = metrics.compare(reference, file, targets)
    monkeypatch.setattr(metrics, "_CHUNK", 2 * 13)
    parts = metrics.compare(reference, file, targets)
    assert np.array_equal(whole.kld, parts.kld) and np.array_equal(whole.nll, parts.nll)


@given(LOGITS, LOGITS)
def test_kld_is_never_negative_and_agrees_with_plain_sums(reference: metrics.Doubles, file: metrics.Doubles) -> None:
    scores = metrics.compare(reference, file)
    assert (scores.kld >= 0).all()
    for row in range(len(reference)):
        p, q = (np.exp(x[row] - x[row].max()) for x in (reference, file))
        expected = plain_kld(*((x / math.fsum(x)).tolist() for x in (p, q)))
        assert scores.kld[row] == pytest.approx(expected, rel=1e-9, abs=1e-12)


@given(LOGITS, LOGITS, st.permutations(range(7)))
def test_the_order_of_the_vocabulary_does_not_matter(
    reference: metrics.Doubles, file: metrics.Doubles, order: list[int]
) -> None:
    one, other = metrics.compare(reference, file), metrics.compare(reference[:, order], file[:, order])
    assert other.kld == pytest.approx(one.kld, rel=1e-9, abs=1e-12)
    assert other.squared_error == pytest.approx(one.squared_error)


@given(st.lists(st.floats(0, 10), min_size=1, max_size=40), st.integers(1, 8))
def test_an_interval_holds_its_value_and_is_the_same_each_time(values: list[float], size: int) -> None:
    column, blocks = np.array(values), np.arange(len(values)) // size
    one, other = (metrics.bootstrap(metrics._only, [column], blocks) for _ in range(2))
    assert one == other
    assert one.value == pytest.approx(column.mean())
    assert column.min() - 1e-9 <= one.low <= one.high <= column.max() + 1e-9


def test_positions_of_one_block_say_less_than_independent_ones() -> None:
    values = np.repeat(np.random.default_rng(6).normal(size=40), 16)
    blocked = metrics.bootstrap(metrics._only, [values], np.arange(640) // 16)
    free = metrics.bootstrap(metrics._only, [values], np.arange(640))
    assert blocked.high - blocked.low > 3 * (free.high - free.low)


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    random = np.random.default_rng(7)
    blocks = np.arange(400) // 8
    hits = 0
    for _ in range(100):
        estimate = metrics.bootstrap(metrics._only, [random.exponential(size=400)], blocks)
        hits += estimate.low <= 1.0 <= estimate.high
    assert 85 <= hits <= 100


def test_summary_of_known_scores() -> None:
    reference, file = logits_of(P, P, P, P), logits_of(P, P, P, Q)
    summary = metrics.summarise(metrics.compare(reference, file, np.array([0, 0, 1, 0])), np.array([0, 0, 1, 1]))
    assert summary.positions == 4
    assert summary.kld.value == pytest.approx(plain_kld(P, Q) / 4)
    assert summary.kld_max == pytest.approx(plain_kld(P, Q))
    assert summary.top1.value == 0.75
    assert summary.margin == pytest.approx(math.log(2))
    assert summary.reference_perplexity == pytest.approx(2 ** (5 / 4))
    assert summary.perplexity_ratio.value == pytest.approx(2 ** (1 / 4))


def test_histogram_counts_every_finite_value_once() -> None:
    edges = np.array([1.0, 2.0, 3.0])
    assert metrics.histogram(np.array([0.0, 1.5, 2.5, 9.0, math.nan]), edges) == [2, 2]
