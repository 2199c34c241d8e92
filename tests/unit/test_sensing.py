"""What is asked about pictures and sounds, and when soft tokens are good enough."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.core.recipe import RECIPES, Gate, load
from pipeline.judge import sensing


@pytest.mark.parametrize("spoilt", ["first", "second"])
@pytest.mark.parametrize("value", [1.0, np.nan, np.inf])
def test_one_input_whose_soft_tokens_are_no_numbers_is_enough_to_fail(spoilt: str, value: float) -> None:
    right = {name: np.full((2, 3), 4.0, np.float32) for name in ("first", "second")}
    given = {name: rows.copy() for name, rows in right.items()}
    given["first"] += 0.01  # an error that is within the limits
    given[spoilt][1, 2] = value if np.isnan(value) else 4.0 * value
    checks = sensing.judge_soft(
        "vision-int8", right, tuple(right), lambda _: given.__getitem__, Gate(nmse=1e-3, snr=30.0)
    ).checks
    assert all(check.passed for check in checks) == (value == 1.0)


def test_a_large_model_is_asked_less() -> None:
    bundle = load(RECIPES / "gemma3n.toml").bundle
    assert sensing.asked(bundle, 2_300_000) == (bundle.prompts, bundle.continuation) == (16, 128)
    assert sensing.asked(bundle, 4_500_000_000) == (2, 64)
