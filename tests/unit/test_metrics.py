"""Metrics against plain sums, scipy and closed forms, on hand-made and on drawn distributions."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import special, stats

from pipeline.judge import metrics
from pipeline.judge.metrics import Draws

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


def test_what_the_file_adds_to_the_probability_of_the_next_token_is_positive() -> None:
    reference, file = np.log([[0.5, 0.5]]), np.log([[0.75, 0.25]])
    assert metrics.compare(reference, file, np.array([0])).delta_p == pytest.approx([0.25])
    assert metrics.compare(reference, file, np.array([1])).delta_p == pytest.approx([-0.25])


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
    one, other = (metrics.bootstrap(metrics._only, [column], Draws.of(blocks)) for _ in range(2))
    assert one == other
    assert one.value == pytest.approx(column.mean())
    assert column.min() - 1e-9 <= one.low <= one.high <= column.max() + 1e-9


def test_positions_of_one_block_say_less_than_independent_ones() -> None:
    values = np.repeat(np.random.default_rng(6).normal(size=40), 16)
    blocked = metrics.bootstrap(metrics._only, [values], Draws.of(np.arange(640) // 16))
    free = metrics.bootstrap(metrics._only, [values], Draws.of(np.arange(640)))
    assert blocked.high - blocked.low > 3 * (free.high - free.low)


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    random = np.random.default_rng(7)
    blocks = np.arange(400) // 8
    hits = 0
    for _ in range(100):
        estimate = metrics.bootstrap(metrics._only, [random.exponential(size=400)], Draws.of(blocks))
        hits += estimate.low <= 1.0 <= estimate.high
    assert 85 <= hits <= 100


def test_summary_of_known_scores() -> None:
    reference, file = logits_of(P, P, P, P), logits_of(P, P, P, Q)
    summary = metrics.summarise(metrics.compare(reference, file, np.array([0, 0, 1, 0])), np.array([0, 0, 1, 1]))
    assert summary.positions == 4
    assert summary.kld.value == pytest.approx(plain_kld(P, Q) / 4)
    assert summary.kld_max.value == pytest.approx(plain_kld(P, Q))
    assert summary.top1.value == 0.75
    assert summary.margin == pytest.approx(math.log(2))
    assert summary.reference_perplexity == pytest.approx(2 ** (5 / 4))
    assert summary.perplexity_ratio.value == pytest.approx(2 ** (1 / 4))


def drawn(seed: int, rows: int, tokens: int, noise: float) -> tuple[metrics.Doubles, metrics.Doubles]:
    """A reference like a language model's, a few likely tokens of many, and a file that is off by `noise`."""
    random = np.random.default_rng(seed)
    reference = random.normal(scale=3.0, size=(rows, tokens))
    return reference, reference + random.normal(scale=noise, size=(rows, tokens))


@pytest.mark.parametrize("noise", [1e-6, 1e-2, 1.0])
def test_every_figure_is_what_scipy_and_plain_sorting_give(noise: float) -> None:
    reference, file = drawn(8, 300, 2_000, noise)
    targets, rows = np.random.default_rng(9).integers(0, 2_000, size=300), np.arange(300)
    found = metrics.summarise(metrics.compare(reference, file, targets), rows // 16)
    p, q = special.softmax(reference, axis=1), special.softmax(file, axis=1)
    kld = special.rel_entr(p, q).sum(axis=1)  # rounding of sums of 2,000 terms is larger than the smallest of these
    assert found.kld.value == pytest.approx(kld.mean(), rel=1e-7, abs=1e-14)
    shares = {"kld_median": 50, "kld_p99": 99, "kld_p999": 99.9, "kld_max": 100}
    for name, share in shares.items():
        assert getattr(found, name).value == pytest.approx(np.percentile(kld, share), rel=1e-6, abs=1e-14)
    assert found.top1.value == (p.argmax(axis=1) == q.argmax(axis=1)).mean()
    five = np.argsort(-q, axis=1)[:, :5]
    assert found.top5.value == (five == p.argmax(axis=1)[:, None]).any(axis=1).mean()
    own, other = q[rows, targets], p[rows, targets]
    assert found.rms_delta_p.value == pytest.approx(np.sqrt(((own - other) ** 2).mean()), rel=1e-6, abs=1e-14)
    assert found.perplexity_ratio.value == pytest.approx(stats.gmean(other / own))
    assert found.perplexity == pytest.approx(stats.gmean(1 / own))
    assert found.nmse_max == pytest.approx((((file - reference) ** 2).sum(1) / (reference**2).sum(1)).max())


def test_kld_of_two_gaussian_like_distributions_is_the_closed_form() -> None:
    """KL(N(0, 1) || N(m, s²)) = ln s + (1 + m²) / 2s² − ½, on a grid so fine that sums are integrals."""
    grid = np.linspace(-12, 12, 20_001)
    scores = metrics.compare(stats.norm.logpdf(grid)[None], stats.norm.logpdf(grid, 0.3, 1.2)[None])
    assert scores.kld[0] == pytest.approx(math.log(1.2) + (1 + 0.3**2) / (2 * 1.2**2) - 0.5, rel=1e-6)


def test_identical_shifted_and_one_wrong_position_in_a_summary() -> None:
    reference, _ = drawn(10, 160, 50, 0.0)
    targets, blocks = np.arange(160) % 50, np.arange(160) // 16
    for same in (reference, reference + 7.5):
        found = metrics.summarise(metrics.compare(reference, same, targets), blocks)
        assert (found.top1.low, found.top5.low, found.margin) == (1.0, 1.0, 0.0)
        assert found.kld_max.high < 1e-13 and found.rms_delta_p.high < 1e-13
        assert found.perplexity_ratio.low == pytest.approx(1.0) == found.perplexity_ratio.high
    wrong = reference.copy()
    wrong[37] = -reference[37]
    scores = metrics.compare(reference, wrong, targets)
    found = metrics.summarise(scores, blocks)
    assert found.top1.value == 159 / 160 and found.kld_median.high == 0.0
    assert found.kld_max.value == scores.kld[37] == pytest.approx(160 * found.kld.value)
    assert found.rms_delta_p.value == pytest.approx(abs(scores.delta_p[37]) / math.sqrt(160))
    assert found.kld.low == 0.0 < found.kld.value < found.kld.high, "the one block is drawn not at all, or often"


@given(st.lists(st.floats(0, 10), min_size=1, max_size=30), st.lists(st.integers(0, 4), min_size=30, max_size=30))
def test_a_weighted_quantile_is_that_of_the_repeated_values(values: list[float], times: list[int]) -> None:
    counts = np.array(times[: len(values)])
    counts[0] += 1
    ascending, shares = np.sort(np.array(values)), (0.0, 0.5, 0.99, 1.0)
    expected = np.quantile(np.repeat(ascending, counts), shares)
    assert metrics._weighted_quantiles(ascending, counts, shares) == pytest.approx(expected)


def test_the_interval_of_a_median_covers_it_about_as_often_as_it_says() -> None:
    random, blocks = np.random.default_rng(11), np.arange(400) // 8
    found = [metrics.quantiles(random.exponential(size=400), [0.5], Draws.of(blocks))[0] for _ in range(60)]
    assert 52 <= sum(each.low <= math.log(2) <= each.high for each in found) <= 60


def test_the_interval_of_a_maximum_ends_at_it() -> None:
    (most,) = metrics.quantiles(np.random.default_rng(12).exponential(size=200), [1.0], Draws.of(np.arange(200)))
    assert most.low < most.high == most.value


def test_how_long_texts_agree() -> None:
    found = metrics.divergence([3, 8, 0, 8], [8, 8, 8, 8])
    assert found and (found.texts, found.tokens, found.length.value, found.identical.value) == (4, 8, 4.75, 0.5)
    assert 0 <= found.length.low < 4.75 < found.length.high <= 8
    whole = metrics.divergence([5, 8], [5, 8])
    assert whole and (whole.identical.low, whole.length.value) == (1.0, 6.5)
    assert metrics.divergence([], []) is None


def test_the_same_input_gives_the_same_bits() -> None:
    reference, file = drawn(13, 64, 300_000, 0.1)
    targets, blocks = np.arange(64), np.arange(64) // 4
    first, again = (metrics.summarise(metrics.compare(reference, file, targets), blocks) for _ in range(2))
    assert first == again


def test_histogram_counts_every_finite_value_once() -> None:
    edges = np.array([1.0, 2.0, 3.0])
    assert metrics.histogram(np.array([0.0, 1.5, 2.5, 9.0, math.nan]), edges) == [2, 2]
