"""Figures in float32 are those of metrics.py, in float64."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.judge import metrics, screening
from pipeline.judge.reference import Head


@pytest.mark.parametrize("vocabulary", [37, 40_000])
@pytest.mark.parametrize("cap", [None, 30.0])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.uint16])
def test_figures_are_those_of_float64(vocabulary: int, cap: float | None, dtype: type[np.generic]) -> None:
    random = np.random.default_rng(vocabulary)
    weight = random.standard_normal((vocabulary, 24)).astype(np.float32)
    stored = (weight.view(np.uint32) >> 16).astype(np.uint16) if dtype is np.uint16 else weight.astype(dtype)
    head = Head(weight=stored, cap=cap)
    hidden = random.standard_normal((33, 24)).astype(np.float32)
    exact = head.logits(hidden)
    logits = screening.logits(head, hidden)
    np.testing.assert_allclose(logits, exact, atol=2e-5)

    found = (exact + 0.05 * random.standard_normal(exact.shape)).astype(np.float32)
    targets = random.integers(0, vocabulary, len(hidden)).astype(np.int32)
    wide, narrow = metrics.compare(exact, found, targets), screening.compare(logits, found, targets)
    for name in ("kld", "nll", "reference_nll"):
        np.testing.assert_allclose(getattr(narrow, name), getattr(wide, name), atol=5e-6, err_msg=name)
    np.testing.assert_array_equal(narrow.top1, wide.top1)


def test_logits_that_are_no_numbers_have_no_figures() -> None:
    expected = np.zeros((3, 5), np.float32)
    found = expected.copy()
    found[0, 0], found[1, 0] = np.nan, -np.inf
    got = screening.compare(expected, found, np.full(3, 1, np.int32))
    assert np.isfinite(got.kld).tolist() == np.isfinite(got.top1).tolist() == [False, False, True]
