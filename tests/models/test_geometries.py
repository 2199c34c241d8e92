"""The whole shape grid on drawn geometries: the slow, full version of `tests/stages/test_step.py`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from pipeline.core import log
from pipeline.core.recipe import PROJECT, load
from pipeline.core.stage import DEFAULT_RECIPE
from pipeline.judge.runtime import StepModel

sys.path.insert(0, str(Path(__file__).parents[1] / "stages"))
import geometry  # noqa: E402 - it lies with the tests that use it every time


@settings(
    max_examples=5, deadline=None, derandomize=True, phases=[Phase.generate], suppress_health_check=list(HealthCheck)
)
@given(drawn=geometry.geometries(), seed=st.integers(1000, 1999))
def test_every_shape_of_the_recipe_is_exact(
    drawn: dict[str, Any], seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    shapes = load(PROJECT / DEFAULT_RECIPE).shapes
    folder = tmp_path_factory.mktemp("odd")
    model = geometry.reference(drawn, seed)
    file = geometry.convert(geometry.save(model, folder / "checkpoint"), folder / "step.tflite")
    result = geometry.compare_on_grid(StepModel(file), model, batches=shapes.batch, sequences=shapes.sequence)
    log.line(f"{result.cases} shapes, worst NMSE {result.nmse:.1e} at {result.where}, top-1 {result.top1:.2%}: {drawn}")
    assert result.nmse <= 1e-6 and result.top1 == 1  # the gate; an ill-conditioned draw reached 1.3e-8
