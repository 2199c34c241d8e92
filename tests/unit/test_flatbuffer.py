"""Reading, editing and writing of .tflite files, on small graphs built here and run in LiteRT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from running import run
from small_graph import Model, bytes_by_type

from pipeline.core.errors import IntegrityError, QuantiseError
from pipeline.quantize import float16
from pipeline.quantize import rows as quantize
from pipeline.tflite import external, lazy, schema, writer
from pipeline.tflite.graph import Graph, model_at
from pipeline.tflite.lazy import Blocks, Scales

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


def whole(blocks: Blocks) -> np.ndarray[Any, Any]:
    """All values of `blocks`."""
    return np.concatenate(list(blocks.each(lambda block: block)))


def test_a_written_graph_reads_back_and_runs(tmp_path: Path) -> None:
    file = tmp_path / "tied.tflite"
    tied().write(file)
    graph = Graph.read(file)
    assert [graph.code(operator) for operator in graph.operators()] == ["EMBEDDING_LOOKUP", "FULLY_CONNECTED"]
    assert graph.shape(int(graph.main.inputs[0])) == (-1,)
    assert bytes_by_type(graph) == {"FLOAT32": TABLE.nbytes}
    np.testing.assert_allclose(run(file, IDS), TABLE[IDS] @ TABLE.T, rtol=1e-5, atol=1e-5)


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
        patch.setattr(writer, "_INLINE_LIMIT", 0)
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
    assert bytes_by_type(graph) == {"FLOAT32": TABLE.nbytes}
    assert [graph.code(operator) for operator in graph.operators()] == ["EMBEDDING_LOOKUP", "FULLY_CONNECTED"]
    assert len(graph.model.operatorCodes) == 2
    graph.write(tmp_path / "pruned.tflite")
    np.testing.assert_allclose(run(tmp_path / "pruned.tflite", IDS), TABLE[IDS] @ TABLE.T, rtol=1e-5, atol=1e-5)


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
    assert bytes_by_type(Graph.read(file)) == {"INT8": TABLE.size}
    quantised, scales = quantize.quantise_rows(Blocks.of(TABLE))
    exact = whole(quantised) * scales.scale[:, None]
    error = run(file, IDS, plain=plain) - exact[IDS] @ exact.T
    assert np.abs(error).max() < 0.02 * np.abs(exact[IDS] @ exact.T).max()


@pytest.mark.parametrize("plain", [False, True])
def test_float16_rows_and_weights(tmp_path: Path, plain: bool) -> None:
    """LiteRT 2.3.0's lookup with float16 rows and a float32 output copies raw bytes: the file must not ask for that."""
    file = tmp_path / "half.tflite"
    graph = tied()
    float16.make_half(graph)
    graph.prune()
    graph.write(file)
    assert bytes_by_type(Graph.read(file)) == {"FLOAT16": 2 * TABLE.size}
    half = TABLE.astype(np.float16).astype(np.float32)
    np.testing.assert_allclose(run(file, IDS, plain=plain), half[IDS] @ half.T, rtol=1e-5, atol=1e-5)


def test_a_weight_beyond_float16_is_refused(tmp_path: Path) -> None:
    graph = tied(TABLE * np.float32(1e6))
    float16.make_half(graph)
    with pytest.raises(QuantiseError, match="table has a weight of .* float16 ends at"):
        graph.write(tmp_path / "half.tflite")


@given(st.integers(0, 2**32 - 1), st.integers(1, 9), st.integers(1, 40), st.floats(-30, 30))
def test_rows_are_within_half_a_step(seed: int, rows: int, columns: int, size: float) -> None:
    values = (np.random.default_rng(seed).standard_normal((rows, columns)) * 2.0**size).astype(np.float32)
    values[0] = 0
    blocks, scales = quantize.quantise_rows(Blocks.of(values))
    quantised = whole(blocks)
    assert np.isfinite(scales.scale).all() and (scales.scale > 0).all() and quantised.min() >= -127
    error = np.abs(quantised.astype(np.float64) * scales.scale[:, None] - values)
    assert (error <= scales.scale[:, None] * (0.5 + 1e-5)).all()


# --- blocks


def in_rows_of(patch: pytest.MonkeyPatch, rows: int, columns: int = WIDTH) -> None:
    """Let values be made `rows` rows at a time."""
    patch.setattr(lazy, "_BLOCK_BYTES", rows * columns * 4)


@given(st.integers(1, 60), st.integers(1, 7), st.integers(1, 70), st.sampled_from(["1", "2", "5"]))
def test_blocks_are_the_whole_array_in_order_and_can_be_read_again(
    rows: int, columns: int, step: int, threads: str
) -> None:
    values = RANDOM.standard_normal((rows, columns)).astype(np.float32)
    asked: list[tuple[int, int]] = []

    def made(start: int, stop: int) -> np.ndarray[Any, Any]:
        asked.append((start, stop))
        return values[start:stop]

    blocks = Blocks(values.shape, np.float32, made)
    changed = blocks.map(np.int8, lambda block, row: np.full(block.shape, row, np.int8))
    assert (len(blocks), changed.shape, changed.dtype, len(changed)) == (
        values.nbytes,
        values.shape,
        np.int8,
        values.size,
    )
    assert asked == [], "nothing is made before it is needed"
    with pytest.MonkeyPatch.context() as patch:
        in_rows_of(patch, step, columns)
        patch.setenv("OMP_NUM_THREADS", threads)
        ranges = [(start, min(start + step, rows)) for start in range(0, rows, step)]
        for _ in range(2):
            assert np.array_equal(whole(blocks), values)
            assert sorted(asked) == ranges
            asked.clear()
        assert [int(block[0, 0]) for block in changed.each(lambda block: block)] == [start for start, _ in ranges]


def test_no_more_is_made_than_threads_and_one_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that memory does not grow with the table."""
    in_rows_of(monkeypatch, 1)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    begun: list[int] = []
    blocks = Blocks((40, WIDTH), np.float32, lambda start, stop: begun.append(start) or TABLE[start:stop])
    for taken, _ in enumerate(blocks.each(lambda block: block), start=1):
        assert len(begun) <= taken + 3


def test_what_fails_in_a_thread_is_raised_and_the_rest_is_left() -> None:
    def made(start: int, stop: int) -> np.ndarray[Any, Any]:
        if start >= 10:
            raise IntegrityError(f"row {start}")
        return TABLE[start:stop]

    with pytest.MonkeyPatch.context() as patch:
        in_rows_of(patch, 5)
        with pytest.raises(IntegrityError, match="row 10"):
            whole(Blocks(TABLE.shape, np.float32, made))


@pytest.mark.parametrize("limit", [2**30, 0], ids=["inline", "behind"])
@pytest.mark.parametrize("rows", [1, 7, ROWS])
def test_a_streamed_constant_gives_the_bytes_of_the_array(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int, rows: int
) -> None:
    monkeypatch.setattr(writer, "_INLINE_LIMIT", limit)
    one, many = tmp_path / "one.tflite", tmp_path / "many.tflite"
    tied().write(one)
    in_rows_of(monkeypatch, rows)
    graph = tied()
    graph.set_constant(1, Blocks.of(TABLE))
    graph.write(many)
    graph.write(again := tmp_path / "again.tflite")
    assert one.read_bytes() == many.read_bytes() == again.read_bytes()
    assert np.array_equal(run(many, IDS), run(one, IDS))
    assert [file.name for file in sorted(tmp_path.iterdir())] == ["again.tflite", "many.tflite", "one.tflite"]


@pytest.mark.parametrize("limit", [2**30, 0], ids=["inline", "behind"])
@pytest.mark.parametrize("change", [-1, 1])
def test_too_few_or_too_many_values_are_refused_and_leave_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int, change: int
) -> None:
    monkeypatch.setattr(writer, "_INLINE_LIMIT", limit)
    graph, made = tied(), np.resize(TABLE, (ROWS + change, WIDTH))
    graph.set_constant(1, Blocks(TABLE.shape, np.float32, lambda start, stop: made))
    with pytest.raises(IntegrityError, match=f"{made.nbytes} bytes were made for a constant of {TABLE.nbytes}"):
        graph.write(tmp_path / "wrong.tflite")
    assert not list(tmp_path.iterdir())


@given(st.integers(0, 2**32 - 1), st.integers(1, 30), st.integers(1, 40), st.integers(1, 31))
def test_quantised_rows_do_not_depend_on_how_rows_are_cut(seed: int, rows: int, columns: int, step: int) -> None:
    values = np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32)
    one, scales = quantize.quantise_rows(Blocks.of(values))
    expected = whole(one)
    with pytest.MonkeyPatch.context() as patch:
        in_rows_of(patch, step, columns)
        other, others = quantize.quantise_rows(Blocks.of(values))
        assert np.array_equal(whole(other), expected) and np.array_equal(others.scale, scales.scale)


# --- several signatures


def two(table: np.ndarray[Any, Any] = TABLE) -> Graph:
    """Signatures `tied` and `rows` with a table in common; between their subgraphs one that nothing refers to."""
    graph = tied(table)
    graph.add_signature("tied", {"ids": 0}, {"result": 3})
    for _ in range(2):
        other = schema.classes().SubGraphT()
        other.tensors, other.operators, other.inputs, other.outputs = [], [], [], []
        graph.model.subgraphs.append(other)
    unused, second = Graph(graph.model, 1), Graph(graph.model, 2)
    unused.add_constant(np.zeros((99, 9), np.float32), "unused")
    orphan = second.add_constant(np.zeros((55, 5), np.float32), "orphan")
    ids, rows = second.add_tensor("ids", "INT32", (2,)), second.add_tensor("rows", "FLOAT32", (2, WIDTH))
    shared = second.add_tensor("table", "FLOAT32", table.shape)
    second.main.tensors[shared].buffer = graph.main.tensors[1].buffer
    second.main.inputs, second.main.outputs = [ids], [rows]
    second.main.operators = [second.operator("EMBEDDING_LOOKUP", [ids, shared], [rows])]
    second.add_signature("rows", {"ids": ids}, {"rows": rows})
    assert orphan == 0, "so that every index changes when it goes"
    return graph


def call(file: Path, signature: str, ids: np.ndarray[Any, Any]) -> dict[str, np.ndarray[Any, Any]]:
    from ai_edge_litert.interpreter import Interpreter

    found: dict[str, np.ndarray[Any, Any]] = Interpreter(model_path=str(file)).get_signature_runner(signature)(ids=ids)
    return found


def test_prune_keeps_signatures_and_what_they_share(tmp_path: Path) -> None:
    file, again = tmp_path / "two.tflite", tmp_path / "again.tflite"
    graph = two()
    graph.prune()
    graph.write(file)
    read = Graph.read(file)
    assert [(view.place, view.signature()) for view in read.views()] == [(0, "tied"), (1, "rows")]
    assert [[port.name for port in view.ports()] for view in read.views()] == [["ids"], ["ids"]]
    assert len(read.model.subgraphs) == 2 and bytes_by_type(read) == {"FLOAT32": TABLE.nbytes}
    np.testing.assert_allclose(call(file, "tied", IDS)["result"], TABLE[IDS] @ TABLE.T, rtol=1e-5, atol=1e-5)
    assert np.array_equal(call(file, "rows", IDS[:2])["rows"], TABLE[IDS[:2]])
    read.prune()
    read.write(again)
    assert again.read_bytes() == file.read_bytes()


@pytest.mark.parametrize("limit", [2**30, 0], ids=["inline", "behind"])
@pytest.mark.parametrize("kind", ["int8", "half"])
def test_what_two_signatures_share_is_made_small_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, limit: int
) -> None:
    monkeypatch.setattr(writer, "_INLINE_LIMIT", limit)
    graph, file = two(), tmp_path / "two.tflite"
    float16.make_half(graph) if kind == "half" else quantize.quantise_weights(graph, keep=lambda name: False)
    graph.prune()
    graph.write(file)
    expected = TABLE.astype(np.float16).astype(np.float32)
    if kind == "int8":
        rows, scales = quantize.quantise_rows(Blocks.of(TABLE))
        expected = whole(rows) * scales.scale[:, None]
    assert np.array_equal(call(file, "rows", IDS[:2])["rows"], expected[IDS[:2]])
    error = call(file, "tied", IDS)["result"] - expected[IDS] @ expected.T
    assert np.abs(error).max() < 0.02 * np.abs(expected[IDS] @ expected.T).max()
    if not limit:
        return  # the counting below reads constants inside the flatbuffer
    assert bytes_by_type(Graph.read(file)) == ({"INT8": TABLE.size} if kind == "int8" else {"FLOAT16": 2 * TABLE.size})


def test_a_constant_changes_type_in_every_subgraph() -> None:
    graph = two()
    graph.set_constant(1, TABLE.astype(np.float16))
    assert [view.type_of(index) for view, index in zip(graph.views(), (1, 3), strict=True)] == ["FLOAT16", "FLOAT16"]


def test_an_input_becomes_a_constant_and_is_no_input_any_more(tmp_path: Path) -> None:
    graph, file = two(), tmp_path / "fixed.tflite"
    view = graph.views()[1]
    view.make_constant(view.ports()[0], graph.add_buffer(IDS[:2]), "fixed")
    graph.prune()
    graph.write(file)
    read = Graph.read(file)
    assert [[port.name for port in view.ports()] for view in read.views()] == [["ids"], []]
    from ai_edge_litert.interpreter import Interpreter

    runner = Interpreter(model_path=str(file)).get_signature_runner("rows")
    assert np.array_equal(runner()["rows"], TABLE[IDS[:2]])


def test_numbers_of_weights_outside_are_those_of_no_weights_inside(tmp_path: Path) -> None:
    """XNNPACK's cache of packed weights looks both up in one table: a number that both have gives other logits."""
    graph = Model().graph
    down = next(graph.buffer(at) for at in range(len(graph.main.tensors)) if graph.name(at) == "down")
    external.write(graph, (down,), tmp_path / "model.tflite", tmp_path / "model.weights")
    found = model_at((tmp_path / "model.tflite").read_bytes(), 0)
    held = {place for place in range(found.BuffersLength()) if found.Buffers(place).DataLength()}
    numbers = {found.ExternalBuffers(place).Id() for place in range(found.ExternalBuffersLength())}
    named = {found.Subgraphs(0).Tensors(place).ExternalBuffer() for place in range(found.Subgraphs(0).TensorsLength())}
    assert named - {0} == numbers and len(numbers) == 1 and not numbers & (held | {0})


def test_only_what_is_read_as_weights_leaves_a_model() -> None:
    graph = Model().graph
    everything = external.split(graph, 10**6, 0)
    names = {graph.name(at) for at in range(len(graph.main.tensors)) if graph.buffer(at) in everything.moved}
    assert names == {"table", "gate", "up", "down"}
    assert [len(graph.model.buffers[buffer].data) for buffer in everything.moved] == [6144, 6144, 6144, 5120]
    few = external.split(graph, 20_000, 13_000)
    assert len(few.moved) == 2 and few.model <= 13_000 and few.weights == 2 * 6144
