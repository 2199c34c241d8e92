"""The shape grid on a model made by hand: which cases run, and what is said of them."""

from __future__ import annotations

import math
from itertools import product
from typing import cast

import numpy as np
import pytest
from numpy.typing import NDArray

from pipeline.judge import corpus, step_runs
from pipeline.judge.reference import Floats, Head, Reference
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


def run(model: Model, most: float = math.inf) -> step_runs.GridResult:
    return step_runs.run_grid(cast(StepModel, model), GRID, "by hand", most)


def test_without_a_limit_every_case_runs_and_shapes_change_least() -> None:
    model = Model()
    found = run(model)
    assert (found.cases, found.all_cases, found.rows) == (21, 21, 3 * (6 + 6 + 1))
    shapes = [shape for shape, _ in model.ran]
    assert set(shapes) == RUN and len(shapes) == 21
    assert found.nmse < 1e-12 and found.kld < 1e-12 and found.top1 == 1.0


def test_with_a_limit_each_shape_runs_once_paddings_in_turn_and_one_longest_row() -> None:
    model = Model()
    found = run(model, SMALL)
    assert sorted(shape for shape, _ in model.ran) == sorted(RUN)
    assert (found.cases, found.all_cases) == (7, 21)
    at_8 = {padding for shape, padding in model.ran if shape[1] == 8}
    assert at_8 == set(PADDINGS)
    less = Model()
    assert run(less, 8**2).cases == 5 and sorted({shape for shape, _ in less.ran}) == [
        (1, 1), (1, 8), (1, 32), (2, 1), (3, 1)
    ]  # fmt: skip


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
    least = Model((1, 1), math.nan)
    assert step_runs.count_unsound(cast(StepModel, least), GRID, 0)[0] == 1 and len(least.ran) == 1
