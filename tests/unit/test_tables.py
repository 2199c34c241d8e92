"""Tables as sections, and weights attached to graphs: straight from a checkpoint, block by block, run in LiteRT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file
from small_graph import bytes_by_type

from pipeline.bundling import tables
from pipeline.checkpoint.reader import Checkpoint, open_checkpoint
from pipeline.core.errors import IntegrityError, QuantiseError
from pipeline.quantize import blockwise
from pipeline.tflite import lazy, schema, weights, writer
from pipeline.tflite.graph import Graph

ROWS, SHAPE = 37, (3, 8)
RANDOM = np.random.default_rng(11)
VALUES = (RANDOM.standard_normal((ROWS, 24)) * np.exp(RANDOM.standard_normal((ROWS, 1)))).astype(np.float32)
SOURCE = tables.Source(tensor="table", scale=24**0.5, shape=SHAPE)
DTYPES = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
PRECISIONS: tuple[tables.Precision, ...] = ("fp32", "fp16", "int8")


def stored(folder: Path, dtype: Any = np.float32, **tensors: np.ndarray[Any, Any]) -> Checkpoint:
    folder.mkdir(exist_ok=True)
    save_file({name: values.astype(dtype) for name, values in tensors.items()}, folder / "model.safetensors")
    return open_checkpoint(folder)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    return stored(tmp_path / "checkpoint", table=VALUES)


def in_blocks_of(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    """Let tensors be read and written `size` bytes at a time."""
    monkeypatch.setattr(lazy, "_BLOCK_BYTES", size)


def lookup(file: Path, token: int) -> np.ndarray[Any, Any]:
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(model_path=str(file))
    assert list(interpreter.get_signature_list()) == ["lookup"]
    found = interpreter.get_signature_runner("lookup")(token_ids=np.array([[token]], np.int32))["embeddings"]
    assert found.shape == (1, 1, *SHAPE) and found.dtype == np.float32
    return np.array(found).ravel()


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_token_gives_its_scaled_row(tmp_path: Path, precision: tables.Precision, dtype: str) -> None:
    checkpoint, file = stored(tmp_path / "checkpoint", DTYPES[dtype], table=VALUES), tmp_path / "table.tflite"
    tables.write(checkpoint, SOURCE, precision, file)
    tables.check(checkpoint, SOURCE, precision, file)
    rows = VALUES.astype(DTYPES[dtype]).astype(np.float32) * np.float32(SOURCE.scale)
    error = {"fp32": 0.0, "fp16": 2.0**-11, "int8": 0.51 / 127}[precision]
    for token in range(ROWS):
        assert np.abs(lookup(file, token) - rows[token]).max() <= error * np.abs(rows[token]).max()


@pytest.mark.parametrize("precision", PRECISIONS)
def test_tokens_beyond_the_table_give_row_0(
    checkpoint: Checkpoint, tmp_path: Path, precision: tables.Precision
) -> None:
    file = tmp_path / "table.tflite"
    tables.write(checkpoint, SOURCE, precision, file)
    for token in (ROWS, ROWS + 1, 2**31 - 1):
        assert np.array_equal(lookup(file, token), lookup(file, 0))


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("size", [1, 5 * 24 * 4])
def test_small_blocks_give_the_same_bytes(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: tables.Precision, size: int
) -> None:
    one, many = tmp_path / "one.tflite", tmp_path / "many.tflite"
    tables.write(checkpoint, SOURCE, precision, one)
    in_blocks_of(monkeypatch, size)
    assert len(list(weights.rows(checkpoint, "table").each(len))) > 7
    tables.write(checkpoint, SOURCE, precision, many)
    assert one.read_bytes() == many.read_bytes()


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_table_behind_the_flatbuffer_gives_the_same_rows(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: tables.Precision
) -> None:
    inline, behind = tmp_path / "inline.tflite", tmp_path / "behind.tflite"
    tables.write(checkpoint, SOURCE, precision, inline)
    monkeypatch.setattr(writer, "_INLINE_LIMIT", 64)
    in_blocks_of(monkeypatch, 400)
    tables.write(checkpoint, SOURCE, precision, behind)
    tables.check(checkpoint, SOURCE, precision, behind)
    assert behind.read_bytes() != inline.read_bytes()
    for token in range(ROWS):
        assert np.array_equal(lookup(behind, token), lookup(inline, token))


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("size", [1, 1 << 20])
def test_a_value_that_is_not_finite_is_named_and_leaves_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: tables.Precision, value: float, size: int
) -> None:
    in_blocks_of(monkeypatch, size)
    spoilt = VALUES.copy()
    spoilt[ROWS - 1, 5] = value
    checkpoint = stored(tmp_path / "checkpoint", table=spoilt)
    with pytest.raises(IntegrityError, match="tensor table holds values that are not finite"):
        tables.write(checkpoint, SOURCE, precision, tmp_path / "table.tflite")
    assert [file.name for file in tmp_path.iterdir()] == ["checkpoint"]


def test_a_value_beyond_float16_is_refused(tmp_path: Path) -> None:
    checkpoint = stored(tmp_path / "checkpoint", table=VALUES * np.float32(1e6))
    with pytest.raises(QuantiseError, match="table has a weight of .* float16 ends at"):
        tables.write(checkpoint, SOURCE, "fp16", tmp_path / "table.tflite")
    assert not (tmp_path / "table.tflite").exists()


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("wrong", ["rows", "scale"])
def test_a_file_of_another_table_does_not_pass(
    checkpoint: Checkpoint, tmp_path: Path, precision: tables.Precision, wrong: str
) -> None:
    file = tmp_path / "table.tflite"
    if wrong == "rows":
        tables.write(stored(tmp_path / "other", table=VALUES[::-1]), SOURCE, precision, file)
    else:
        tables.write(checkpoint, tables.Source(tensor="table", scale=1.0, shape=SHAPE), precision, file)
    with pytest.raises(QuantiseError, match=r"row \d+ is .* off the checkpoint's"):
        tables.check(checkpoint, SOURCE, precision, file)


# --- weights of a graph


def with_ports() -> Graph:
    """Signatures `a` and `b`, each x [2, 24] times the transposed input `weights.model.head.weight`."""
    graph = Graph.empty()
    second = schema.classes().SubGraphT()
    second.tensors, second.operators, second.inputs, second.outputs = [], [], [], []
    graph.model.subgraphs.append(second)
    for view, name in ((graph, "a"), (Graph(graph.model, 1), "b")):
        x, weight = view.add_tensor("x", "FLOAT32", (2, 24)), view.add_tensor("weight", "FLOAT32", VALUES.shape)
        result = view.add_tensor("y", "FLOAT32", (2, ROWS))
        view.main.inputs, view.main.outputs = [weight, x], [result]
        view.main.operators = [view.operator("FULLY_CONNECTED", [x, weight, -1], [result])]
        view.add_signature(name, {"weights.model.head.weight": weight, "x": x}, {"y": result})
    return graph


def test_attached_weights_are_constants_stored_once(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ai_edge_litert.interpreter import Interpreter

    files = []
    for size in (1 << 20, 300):
        in_blocks_of(monkeypatch, size)
        graph = with_ports()
        weights.attach(graph, checkpoint, {"head.weight": "table"})
        graph.prune()
        files.append(tmp_path / f"{size}.tflite")
        graph.write(files[-1])
    assert files[0].read_bytes() == files[1].read_bytes()
    read = Graph.read(files[0])
    assert [[port.name for port in view.ports()] for view in read.views()] == [["x"], ["x"]]
    assert bytes_by_type(read) == {"FLOAT32": VALUES.nbytes}
    assert "head.weight" in [read.name(tensor) for tensor in range(len(read.main.tensors))]
    x = RANDOM.standard_normal((2, 24)).astype(np.float32)
    interpreter = Interpreter(model_path=str(files[0]))
    for name in ("a", "b"):
        np.testing.assert_allclose(interpreter.get_signature_runner(name)(x=x)["y"], x @ VALUES.T, rtol=1e-5, atol=1e-5)


def test_a_weight_that_is_not_finite_leaves_no_graph(tmp_path: Path) -> None:
    spoilt = VALUES.copy()
    spoilt[3, 3] = np.nan
    graph = with_ports()
    weights.attach(graph, stored(tmp_path / "checkpoint", table=spoilt), {"head.weight": "table"})
    with pytest.raises(IntegrityError, match="tensor table holds values that are not finite"):
        graph.write(tmp_path / "graph.tflite")
    assert [file.name for file in tmp_path.iterdir()] == ["checkpoint"]


def test_a_table_with_four_bits_gives_its_rounded_rows(tmp_path: Path) -> None:
    values = RANDOM.standard_normal((ROWS, 64)).astype(np.float32)
    checkpoint, file = stored(tmp_path / "checkpoint", table=values), tmp_path / "table.tflite"
    source = tables.Source(tensor="table", scale=8.0, shape=(2, 32))
    tables.write(checkpoint, source, "int4", file)
    tables.check(checkpoint, source, "int4", file)
    assert bytes_by_type(Graph.read(file))["INT4"] == values.size // 2
    scale = blockwise.best_scales(values)
    rounded = blockwise.round_blocks(values, scale) * np.repeat(scale.astype(np.float32), blockwise.BLOCK, axis=1)
    from ai_edge_litert.interpreter import Interpreter

    run = Interpreter(model_path=str(file)).get_signature_runner("lookup")
    for token in range(ROWS):
        made = run(token_ids=np.array([[token]], np.int32))["embeddings"]
        np.testing.assert_allclose(made.ravel(), rounded[token] * 8, rtol=1e-6)
