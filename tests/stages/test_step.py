"""The converted step graph of drawn geometries against Hugging Face, and that each weight is stored once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import geometry
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from pipeline.runtime.litert import StepModel
from pipeline.tflite.graph import Graph

GRID = {"batches": (1, 2, 3, 8), "sequences": (1, 16, 17, 128, 300)}
LONG = {"batches": (2,), "sequences": (1024, 2048)}


@settings(
    max_examples=3,
    derandomize=True,  # a conversion takes many seconds: the same three each time, drawn once; more in tests/models
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)
@given(drawn=geometry.geometries(), seed=st.integers(0, 999))
def test_every_shape_is_exact(drawn: dict[str, Any], seed: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("odd")
    model = geometry.reference(drawn, seed)
    file = geometry.convert(geometry.save(model, folder / "checkpoint"), folder / "step.tflite")
    for xnnpack, grids in ((True, (GRID, LONG)), (False, (GRID,))):
        for grid in grids:
            result = geometry.compare_on_grid(StepModel(file, xnnpack=xnnpack), model, **grid)
            assert result.nmse < 1e-9 and result.top1 == 1, (xnnpack, result, drawn)


def test_each_weight_is_stored_once(built: Any) -> None:
    graph = Graph.read(built.root / "fp32" / "step.tflite")
    parameters = 2_335_920
    assert (built.root / "fp32" / "step.tflite").stat().st_size <= 1.02 * 4 * parameters
    tables = [operator for operator in graph.operators() if graph.code(operator) == "EMBEDDING_LOOKUP"]
    head = [operator for operator in graph.operators() if graph.code(operator) == "FULLY_CONNECTED"][-1]
    buffers = [graph.main.tensors[int(operator.inputs[1])].buffer for operator in tables]
    assert graph.main.tensors[int(head.inputs[1])].buffer in buffers, "the head and the table are one buffer"


def test_no_tensor_name_tells_where_the_code_lies(built: Any) -> None:
    content = (built.root / "fp32" / "step.tflite").read_bytes()
    for part in (b"pipeline/", b".py", str(Path(__file__).parents[2]).encode()):
        assert part not in content
