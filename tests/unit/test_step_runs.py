"""The shape grid on a model made by hand: which cases run, and what is said of them."""

from __future__ import annotations

import math
from itertools import product
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
from numpy.typing import NDArray

from pipeline.judge import corpus, metrics, step_runs, steps
from pipeline.judge.reference import Floats, Head, Reference
from pipeline.judge.steps import Subject
from pipeline.runtime.litert import StepModel

BATCHES, SEQUENCES, PADDINGS = (1, 2, 3), (1, 8, 32), ("none", "left", "right")
SMALL = 8**2 * 3
"""Batch × sequence² of the largest batch at the sequence before the longest."""


def hidden(ids: corpus.Tokens, mask: corpus.Tokens) -> Floats:
    """A state [B, 3] that depends on the padding, on the text's length and on the batch's rows alone."""
    return np.stack([mask[:, 0], mask.sum(axis=1) / 8, ids[:, -1] / 9], axis=1).astype(np.float32)


class Grid:
    """A reference that says `hidden` of the shape grid."""

    head = Head(np.random.default_rng(3).normal(size=(11, 3)).astype(np.float32), cap=5.0)

    def shapes(self) -> list[tuple[str, corpus.Tokens, corpus.Tokens, Floats]]:
        found = []
        for case in corpus.shape_cases(BATCHES, SEQUENCES, PADDINGS):  # type: ignore[arg-type]
            family = corpus.shape_family(3, case.sequence, case.padding, vocabulary=9, bos=2, pad=0)
            ids, mask = family.input_ids[list(case.rows)], family.attention_mask[list(case.rows)]
            found.append((case.name, ids, mask, hidden(ids, mask)))
        return found


class Model:
    """A file that says the same, but is off by `error` where a row is `wrong`; keeps the shapes that it ran."""

    def __init__(self, shape: tuple[int, int] = (0, 0), error: float = 0.0) -> None:
        self.wrong, self.error = shape, error
        self.ran: list[tuple[tuple[int, ...], str]] = []

    def logits(self, ids: corpus.Tokens, mask: corpus.Tokens) -> NDArray[np.float32]:
        padding = "none" if mask.all() else "left" if not mask[:, 0].all() else "right"
        self.ran.append((ids.shape, padding))
        logits = Grid.head.logits(hidden(ids, mask)).astype(np.float32)
        if ids.shape == self.wrong:
            logits[-1, 4] += self.error
        return logits


GRID = cast(Reference, Grid())
RUN = {(batch, length) for batch, length in product(BATCHES, SEQUENCES) if batch * length**2 <= 32**2}


def run(model: Model, most: float = math.inf, window: int = 16) -> step_runs.GridResult:
    return step_runs.run_grid(cast(StepModel, model), GRID, "by hand", most, window)


def test_without_a_limit_every_case_runs_and_shapes_change_least() -> None:
    model = Model()
    found = run(model)
    assert (found.cases, found.all_cases, found.rows) == (21, 21, 3 * (6 + 6 + 1))
    shapes = [shape for shape, _ in model.ran]
    assert set(shapes) == RUN and len(shapes) == 21
    assert found.nmse < 1e-12 and found.kld < 1e-12 and found.top1 == 1.0


def test_with_a_limit_each_shape_runs_once_paddings_in_turn_and_one_row_beyond_the_window() -> None:
    model = Model()
    found = run(model, SMALL)
    assert sorted(shape for shape, _ in model.ran) == sorted(RUN)
    assert (found.cases, found.all_cases) == (7, 21)
    at_8 = {padding for shape, padding in model.ran if shape[1] == 8}
    assert at_8 == set(PADDINGS)
    short = [(1, 1), (1, 8), (2, 1), (3, 1)]
    for window, more in ((7, []), (8, [(1, 32)]), (16, [(1, 32)]), (32, [(1, 32)])):
        less = Model()
        assert run(less, 8**2, window).cases == len(short + more)
        assert sorted({shape for shape, _ in less.ran}) == sorted(short + more)


@pytest.mark.parametrize("most", [math.inf, SMALL])
@pytest.mark.parametrize("shape", sorted(RUN))
def test_an_error_in_any_shape_is_found_and_named(shape: tuple[int, int], most: float) -> None:
    found = run(Model(shape, 0.5), most)
    assert found.nmse > 1e-4 and found.kld > 1e-5
    assert found.where.startswith(f"b{shape[0]}_s{shape[1]}_") and found.where.endswith(f"row {shape[0] - 1}")
    assert found.max_abs == pytest.approx(0.5, abs=1e-3)


@pytest.mark.parametrize("error", [math.nan, math.inf])
def test_a_logit_that_is_not_finite_is_the_worst(error: float) -> None:
    found = run(Model((2, 8), error))
    assert not math.isfinite(found.nmse) and found.where.startswith("b2_s8_")


def test_corners_are_the_ends_of_the_smallest_and_the_largest_batch() -> None:
    model = Model((3, 8), math.nan)
    bad, names = step_runs.count_unsound(cast(StepModel, model), GRID)
    assert [shape for shape, _ in model.ran] == [(1, 1), (1, 32), (3, 1), (3, 8)]
    assert bad == 1 and names[-1].startswith("b3_s8_")
    less = Model((3, 8), math.nan)
    bad, _ = step_runs.count_unsound(cast(StepModel, less), GRID, 8**2)
    assert [shape for shape, _ in less.ran] == [(1, 1), (1, 8), (3, 1)] and bad == 0
    far = Model((1, 32), math.nan)
    bad, _ = step_runs.count_unsound(cast(StepModel, far), GRID, 8**2, 8)
    assert [shape for shape, _ in far.ran] == [(1, 1), (1, 32), (3, 1)] and bad == 1
    least = Model((1, 1), math.nan)
    assert step_runs.count_unsound(cast(StepModel, least), GRID, 0)[0] == 1 and len(least.ran) == 1


@pytest.mark.parametrize(
    ("name", "kernels", "positions", "every"),
    [
        ("int8", "xnnpack", 2048, 1),
        ("int8", "builtin", 2048, 4),
        ("int8-static", "xnnpack", 2048, 2),
        ("int8-static", "xnnpack", 1000, 1),
        ("int8", "builtin", 1100, 2),
        ("int8-static", "builtin", 9, 1),
        ("int8-static", "builtin", 2048, 4),
        ("fp16", "builtin", 2048, 16),
        ("fp16", "builtin", 500, 3),
        ("fp16", "xnnpack", 2048, 1),
    ],
)
def test_a_part_is_judged_of_what_is_slow_or_not_needed(name: str, kernels: str, positions: int, every: int) -> None:
    subject = cast(Subject, SimpleNamespace(name=name, alternative=name.startswith("int8-")))
    assert steps.every_which(subject, kernels, positions) == every


@pytest.mark.parametrize("lot", [1, 3, 7, 100])
def test_a_file_that_has_a_part_of_the_positions_is_scored_on_these_in_its_own_order(
    lot: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    random = np.random.default_rng(5)
    hidden, targets = random.normal(size=(20, 3)).astype(np.float32), random.integers(0, 11, size=20).astype(np.int32)
    monkeypatch.setattr(Head, "rows", lot)
    exact = Grid.head.logits(hidden)
    whole = (exact + random.normal(size=exact.shape)).astype(np.float32)
    some = np.array([17, 2, 3, 19, 0, 8])
    found = Grid.head.score_each([whole, whole[some]], hidden, targets, [np.arange(20), some])
    for scores, places in zip(found, (np.arange(20), some), strict=True):
        expected = metrics.compare(exact[places], whole[places], targets[places])
        np.testing.assert_array_equal(scores.kld, expected.kld)
        np.testing.assert_array_equal(scores.nll, expected.nll)


def test_all_positions_stay_in_their_order_and_a_part_says_which_it_has() -> None:
    random = np.random.default_rng(7)
    windows, kept = random.integers(0, 11, (3, 9)).astype(np.int32), corpus.spread_positions(3, 9, 12)
    judged = step_runs.JudgedPositions(
        positions=kept,
        batches=corpus.prefix_batches(windows, kept, 2, pad=0),
        hidden=random.normal(size=(12, 3)).astype(np.float32),
        targets=windows[kept.window, kept.length],
        head=Grid.head,
    )
    whole, chosen = judged.part(1)
    assert whole is judged and list(chosen) == list(range(12))
    for every in (2, 3):
        part, chosen = judged.part(every)
        sides = {bool(batch.attention_mask[:, 0].all()) for batch in part.batches if not batch.attention_mask.all()}
        assert sides == {False, True}, "a part meets padding on the left and on the right"
        assert 0 < len(chosen) < 12 and (part.hidden == judged.hidden[chosen]).all()
        assert sorted(np.concatenate([batch.index for batch in part.batches])) == list(range(len(chosen)))
        for batch in part.batches:
            for row, place in enumerate(batch.index):
                window, length = kept.window[chosen[place]], kept.length[chosen[place]]
                assert (batch.input_ids[row][batch.attention_mask[row] == 1] == windows[window, :length]).all()
