"""Reading, editing and writing of .tflite files, on small graphs built here and run in LiteRT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.convert import flatbuffer, quantize
from pipeline.convert.flatbuffer import Graph, Scales
from pipeline.core.errors import IntegrityError, QuantiseError

ROWS, WIDTH = 50, 32
RANDOM = np.random.default_rng(7)
TABLE = (RANDOM.standard_normal((ROWS, WIDTH)) * np.exp(RANDOM.standard_normal((ROWS, 1)))).astype(np.float32)
IDS = np.array([3, 0, 49, 7], np.int32)


def tied(table: np.ndarray[Any, Any] = TABLE) -> Graph:
    """ids [n] → lookup → the same table as a linear layer → [n, ROWS]."""
    graph = Graph.empty()
    ids = graph.add_tensor("ids", "INT32", (-1,))
    weight = graph.add_constant(table, "table")
    rows = graph.add_tensor("rows", "FLOAT32", (-1, WIDTH))
    result = graph.add_tensor("result", "FLOAT32", (-1, ROWS))
    graph.main.inputs, graph.main.outputs = [ids], [result]
    graph.main.operators = [
        graph.operator("EMBEDDING_LOOKUP", [ids, weight], [rows]),
        graph.operator("FULLY_CONNECTED", [rows, weight, -1], [result]),
    ]
    return graph


def run(file: Path, values: np.ndarray[Any, Any], *, plain: bool = False) -> np.ndarray[Any, Any]:
    from ai_edge_litert.interpreter import Interpreter, OpResolverType

    resolver = OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES if plain else OpResolverType.AUTO
    interpreter = Interpreter(model_path=str(file), experimental_op_resolver_type=resolver)
    place = interpreter.get_input_details()[0]["index"]
    interpreter.resize_tensor_input(place, values.shape)
    interpreter.allocate_tensors()
    interpreter.set_tensor(place, values)
    interpreter.invoke()
    return np.array(interpreter.get_tensor(interpreter.get_output_details()[0]["index"]))


def test_a_written_graph_reads_back_and_runs(tmp_path: Path) -> None:
    file = tmp_path / "tied.tflite"
    tied().write(file)
    graph = Graph.read(file)
    assert [graph.code(operator) for operator in graph.operators()] == ["EMBEDDING_LOOKUP", "FULLY_CONNECTED"]
    assert graph.shape(int(graph.main.inputs[0])) == (-1,)
    assert graph.bytes_by_type() == {"FLOAT32": TABLE.nbytes}
    np.testing.assert_allclose(run(file, IDS), TABLE[IDS] @ TABLE.T, rtol=1e-5)


def test_writing_is_deterministic_and_unchanged_by_reading(tmp_path: Path) -> None:
    first, second, third = (tmp_path / name for name in "abc")
    tied().write(first)
    tied().write(second)
    Graph.read(first).write(third)
    assert first.read_bytes() == second.read_bytes() == third.read_bytes()


def test_buffers_behind_the_flatbuffer_mean_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inline, behind, again = (tmp_path / name for name in ("inline.tflite", "behind.tflite", "again.tflite"))
    tied().write(inline)
    with monkeypatch.context() as patch:
        patch.setattr(flatbuffer, "_INLINE_LIMIT", 0)
        tied().write(behind)
    assert behind.read_bytes() != inline.read_bytes()
    for plain in (False, True):
        assert np.array_equal(run(behind, IDS, plain=plain), run(inline, IDS, plain=plain))
    Graph.read(behind).write(again)
    assert again.read_bytes() == inline.read_bytes()


def test_equal_vectors_are_stored_once(tmp_path: Path) -> None:
    one, many = tmp_path / "one.tflite", tmp_path / "many.tflite"
    for file, count in ((one, 1), (many, 20)):
        graph = tied()
        for i in range(count):
            scales = Scales.channels(np.ones(1000, np.float32))
            graph.add_constant(np.zeros((1000, 1), np.int8), f"w{i}", scales)
        graph.write(file)
    assert many.stat().st_size - one.stat().st_size < 19 * 1300  # the values; not 12,000 bytes of scales each


def test_prune_drops_what_nothing_uses(tmp_path: Path) -> None:
    graph = tied()
    orphan = graph.add_constant(np.zeros((999, 9), np.float32), "orphan")
    dead = graph.add_tensor("dead", "FLOAT32", (999, 9))
    graph.main.operators.append(graph.operator("MUL", [orphan, orphan], [dead]))
    graph.prune()
    assert graph.bytes_by_type() == {"FLOAT32": TABLE.nbytes}
    assert [graph.code(operator) for operator in graph.operators()] == ["EMBEDDING_LOOKUP", "FULLY_CONNECTED"]
    assert len(graph.model.operatorCodes) == 2
    graph.write(tmp_path / "pruned.tflite")
    np.testing.assert_allclose(run(tmp_path / "pruned.tflite", IDS), TABLE[IDS] @ TABLE.T, rtol=1e-5)


@pytest.mark.parametrize("damage", [b"", b"hello, this is no model", b"\x1c\0\0\0TFL3" + b"\xff" * 40])
def test_what_is_no_model_is_refused(tmp_path: Path, damage: bytes) -> None:
    file = tmp_path / "damaged.tflite"
    file.write_bytes(damage)
    with pytest.raises(IntegrityError, match=r"damaged\.tflite"):
        Graph.read(file)


def test_a_truncated_model_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "cut.tflite"
    tied().write(file)
    file.write_bytes(file.read_bytes()[:300])
    with pytest.raises(IntegrityError, match="truncated"):
        Graph.read(file)


@pytest.mark.parametrize("plain", [False, True])
def test_one_int8_table_serves_lookup_and_head(tmp_path: Path, plain: bool) -> None:
    file = tmp_path / "int8.tflite"
    graph = tied()
    quantize.quantise_weights(graph, keep=lambda name: False)
    graph.prune()
    graph.write(file)
    assert Graph.read(file).bytes_by_type() == {"INT8": TABLE.size}
    quantised, scales = quantize.quantise_rows(TABLE)
    exact = quantised * scales.scale[:, None]
    error = run(file, IDS, plain=plain) - exact[IDS] @ exact.T
    assert np.abs(error).max() < 0.02 * np.abs(exact[IDS] @ exact.T).max()


@pytest.mark.parametrize("plain", [False, True])
def test_float16_rows_and_weights(tmp_path: Path, plain: bool) -> None:
    """LiteRT 2.3.0's lookup with float16 rows and a float32 output copies raw bytes: the file must not ask for that."""
    file = tmp_path / "half.tflite"
    graph = tied()
    quantize.make_half(graph)
    graph.prune()
    graph.write(file)
    assert Graph.read(file).bytes_by_type() == {"FLOAT16": 2 * TABLE.size}
    half = TABLE.astype(np.float16).astype(np.float32)
    np.testing.assert_allclose(run(file, IDS, plain=plain), half[IDS] @ half.T, rtol=1e-5, atol=1e-5)


def test_a_weight_beyond_float16_is_refused() -> None:
    with pytest.raises(QuantiseError, match="float16 ends at"):
        quantize.make_half(tied(TABLE * np.float32(1e6)))


@settings(deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 9), st.integers(1, 40), st.floats(-30, 30))
def test_rows_are_within_half_a_step(seed: int, rows: int, columns: int, size: float) -> None:
    values = (np.random.default_rng(seed).standard_normal((rows, columns)) * 2.0**size).astype(np.float32)
    values[0] = 0
    quantised, scales = quantize.quantise_rows(values)
    assert np.isfinite(scales.scale).all() and (scales.scale > 0).all() and quantised.min() >= -127
    error = np.abs(quantised.astype(np.float64) * scales.scale[:, None] - values)
    assert (error <= scales.scale[:, None] * (0.5 + 1e-5)).all()
