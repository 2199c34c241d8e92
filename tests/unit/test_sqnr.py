"""Signal to noise operator by operator, and what a file holds: on a small step graph of three layers, run in LiteRT."""

from __future__ import annotations

import json
import math
import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline import inspection
from pipeline.bundling import contents
from pipeline.core.errors import IntegrityError, UsageError
from pipeline.judge import sqnr
from pipeline.quantize import rows
from pipeline.tflite import writer
from pipeline.tflite.graph import Graph

ROWS, WIDTH, LAYERS = 60, 32, 3
SAMPLES = [np.arange(start, start + 20, dtype=np.int32) % ROWS for start in (0, 7)]


def weights(seed: int = 3) -> dict[str, np.ndarray[Any, Any]]:
    random = np.random.default_rng(seed)
    names = [f"layers.{layer}.{name}.weight" for layer in range(LAYERS) for name in ("up", "down")]
    return {
        "table": random.standard_normal((ROWS, WIDTH)).astype(np.float32),
        **{name: (random.standard_normal((WIDTH, WIDTH)) / 6).astype(np.float32) for name in names},
    }


def model(values: dict[str, np.ndarray[Any, Any]]) -> Graph:
    """ids, mask [B, S] → lookup → three layers that add down(up(x)) to x → the table as head → logits [B · S, ROWS]."""
    graph = Graph.empty()
    ids, mask = (graph.add_tensor(name, "INT32", (-1, -1)) for name in ("input_ids", "attention_mask"))
    flat = graph.add_constant(np.array([-1], np.int32), "flat")
    row, table = graph.add_tensor("flat_ids", "INT32", (-1,)), graph.add_constant(values["table"], "table")
    state = graph.add_tensor("embed", "FLOAT32", (-1, WIDTH))
    operators = [graph.operator("RESHAPE", [ids, flat], [row])]
    operators.append(graph.operator("EMBEDDING_LOOKUP", [row, table], [state]))
    for layer in range(LAYERS):
        made = [
            graph.add_tensor(f"layers.{layer}.{name}", "FLOAT32", (-1, WIDTH)) for name in ("up;", "down;", "add;1")
        ]
        matrices = [
            graph.add_constant(values[name], name)
            for name in (f"layers.{layer}.up.weight", f"layers.{layer}.down.weight")
        ]
        operators += [
            graph.operator("FULLY_CONNECTED", [state, matrices[0], -1], [made[0]]),
            graph.operator("FULLY_CONNECTED", [made[0], matrices[1], -1], [made[1]]),
            graph.operator("ADD", [state, made[1]], [made[2]]),
        ]
        state = made[2]
    logits = graph.add_tensor("logits", "FLOAT32", (-1, ROWS))
    operators.append(graph.operator("FULLY_CONNECTED", [state, table, -1], [logits]))
    graph.main.operators, graph.main.inputs, graph.main.outputs = operators, [ids, mask], [logits]
    graph.add_signature("serving_default", {"input_ids": ids, "attention_mask": mask}, {"logits": logits})
    return graph


def written(file: Path, values: dict[str, np.ndarray[Any, Any]]) -> Path:
    model(values).write(file)
    return file


@pytest.fixture
def exact(tmp_path: Path) -> Path:
    return written(tmp_path / "exact.tflite", weights())


def quantised(file: Path) -> Path:
    graph = model(weights())
    rows.quantise_weights(graph, rows.keeper(()))
    graph.prune()
    graph.write(file)
    return file


@pytest.mark.parametrize(("signal", "error", "expected"), [(100.0, 1.0, 20.0), (1.0, 1e-4, 40.0), (1.0, 4.0, -6.0206)])
def test_decibels_are_ten_times_the_logarithm_of_the_ratio(signal: float, error: float, expected: float) -> None:
    assert sqnr.decibels(signal, error) == pytest.approx(expected, abs=1e-3)


def test_decibels_stay_within_what_json_holds() -> None:
    assert sqnr.decibels(1.0, 0.0) == sqnr.MOST == sqnr.decibels(0.0, 0.0)
    for signal, error in ((0.0, 1.0), (1.0, math.inf), (math.nan, 1.0), (1.0, math.nan)):
        assert sqnr.decibels(signal, error) == -sqnr.MOST


def test_a_file_does_not_leave_itself(exact: Path) -> None:
    found = sqnr.trace(exact, exact, SAMPLES)
    assert found.tokens == 40 and found.first is None
    assert {each.decibels for each in found.operators} == {sqnr.MOST}
    assert [each.name for each in found.operators][:2] == ["embed", "layers.0.up;"]
    assert "the logits keep 200.0 dB" in found.sentence()


@pytest.mark.parametrize("layer", range(LAYERS))
@pytest.mark.parametrize("name", ["up", "down"])
def test_the_operator_with_a_wrong_matrix_is_named(exact: Path, tmp_path: Path, layer: int, name: str) -> None:
    values = weights()
    values[f"layers.{layer}.{name}.weight"] *= -1
    found = sqnr.trace(written(tmp_path / "wrong.tflite", values), exact, SAMPLES)
    assert found.first == found.steepest and found.first
    assert (found.first.name, found.first.code, found.first.layer) == (
        f"layers.{layer}.{name};", "FULLY_CONNECTED", f"layers.{layer}"
    )  # fmt: skip
    assert found.first.decibels == pytest.approx(-6.02, abs=0.01), "the difference is twice the signal"
    clear = [row for row, (out, _) in found.layers().items() if out.decibels == sqnr.MOST]
    assert clear == ["before the layers", *(f"layers.{before}" for before in range(layer))]


def test_the_ratio_is_that_of_the_results(exact: Path, tmp_path: Path) -> None:
    values = weights()
    values["layers.1.up.weight"] *= 1.01
    found = sqnr.trace(written(tmp_path / "wrong.tflite", values), exact, SAMPLES)
    wrong = next(each for each in found.operators if each.name == "layers.1.up;")
    assert wrong.decibels == pytest.approx(40.0, abs=0.01) and wrong.drop == pytest.approx(20.0, abs=0.01)
    assert found.first is None and found.steepest == wrong


def test_a_scale_that_is_taken_away_and_put_back_is_not_where_a_file_leaves(exact: Path, tmp_path: Path) -> None:
    values = weights()
    values["layers.1.up.weight"] *= 8
    values["layers.1.down.weight"] /= 8
    found = sqnr.trace(written(tmp_path / "folded.tflite", values), exact, SAMPLES)
    assert next(each for each in found.operators if each.name == "layers.1.up;").decibels < 0
    assert found.first is None and "the logits keep" in found.sentence()


def test_an_int8_file_is_near_everywhere_and_json_tells_so(exact: Path, tmp_path: Path) -> None:
    found = sqnr.trace(quantised(tmp_path / "int8.tflite"), exact, SAMPLES)
    assert found.first is None and all(25 < each.decibels < 60 for each in found.operators)
    told = json.loads(json.dumps(found.facts(), allow_nan=False))
    assert len(told["curve"]) == len(found.operators) == 2 + 3 * LAYERS
    assert [row["layer"] for row in told["layers"]] == [
        "before the layers", "layers.0", "layers.1", "layers.2", "after the layers"
    ]  # fmt: skip
    assert [row[0] for row in sqnr.table(found)][1:] == [row["layer"] for row in told["layers"]]


def test_files_that_are_no_step_graphs_are_refused(exact: Path, tmp_path: Path) -> None:
    graph = model(weights())
    graph.model.signatureDefs[0].inputs[0].name = "tokens"
    graph.write(tmp_path / "other.tflite")
    with pytest.raises(UsageError, match="is not a step graph"):
        sqnr.trace(tmp_path / "other.tflite", exact, SAMPLES)


def test_contents_are_those_of_the_graph(tmp_path: Path) -> None:
    found = contents.read(quantised(tmp_path / "int8.tflite"))
    (one,) = found.models
    (signature,) = one.signatures
    assert (found.size, found.sections, found.metadata) == ((tmp_path / "int8.tflite").stat().st_size, (), {})
    assert [(port.name, port.type, port.shape) for port in signature.inputs] == [
        ("attention_mask", "INT32", (-1, -1)), ("input_ids", "INT32", (-1, -1))
    ]  # fmt: skip
    assert [(port.name, port.shape) for port in signature.outputs] == [("logits", (-1, ROWS))]
    assert signature.operators["FULLY_CONNECTED"] == 2 * LAYERS + 1
    assert signature.products == {"integer": 0, "hybrid": 2 * LAYERS + 1, "float": 0}
    elements, size, bits = one.weights()["INT8"]
    assert elements == ROWS * WIDTH + 2 * LAYERS * WIDTH**2
    assert bits == pytest.approx(8 + 32 / WIDTH) == one.bits_per_weight() and size == elements * bits / 8
    assert one.constants[0].name == "table" and one.constants[0].shape == (ROWS, WIDTH)


def test_products_of_floats_are_counted(exact: Path) -> None:
    (one,) = contents.read(exact).models
    assert one.signatures[0].products == {"integer": 0, "hybrid": 0, "float": 2 * LAYERS + 1}
    assert one.bits_per_weight() == 32


def test_a_file_of_twenty_gigabytes_is_looked_into_without_reading_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its values are a hole in the file: reading them would take longer than any test."""
    file, graph = tmp_path / "large.tflite", model(weights())
    monkeypatch.setattr(writer, "_INLINE_LIMIT", 0)
    graph.write(file)
    data = bytearray(file.read_bytes())
    from ai_edge_litert import schema_py_generated as schema

    parsed = schema.ModelT.InitFromPackedBuf(data, 0)
    buffer = max(parsed.buffers, key=lambda each: each.size)
    start, size = len(data), 20 << 30
    old, new = (struct.pack("<QQ", *pair) for pair in ((buffer.size, buffer.offset), (size, start)))
    assert data.count(old) == 1
    data[:] = data.replace(old, new)
    file.write_bytes(data)
    os.truncate(file, start + size)
    (one,) = contents.read(file).models
    assert file.stat().st_size > 20 << 30 and one.constants[0].size == size


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is not a file"):
        contents.read(tmp_path / "absent.tflite")
    (tmp_path / "a.tflite").write_bytes(b"no model at all")
    with pytest.raises(IntegrityError, match="is not a TFLite file"):
        contents.read(tmp_path / "a.tflite")


def test_the_command_prints_a_table_or_json(exact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = quantised(tmp_path / "int8.tflite")
    assert inspection.main([str(small), "--against", str(exact)]) == 0
    text = capsys.readouterr().out
    assert "int8.tflite: " in text and "products: 0 integer, 7 hybrid, 0 float" in text
    assert "random tokens" in text and "after the layers" in text and "the logits keep" in text
    assert inspection.main([str(small), "--json", "--biggest", "2"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert len(told["models"][0]["constants"]) == 2 < told["models"][0]["constants_in_all"]
    assert inspection.main([str(tmp_path)]) == 2


@pytest.mark.parametrize("name", ["notes.tflite", "notes.bin"])
def test_a_file_of_ones_own_is_refused_without_a_word_on_removing_its_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    (tmp_path / name).write_text("milk, eggs")
    assert inspection.main([str(tmp_path / name)]) == 4
    said = capsys.readouterr().err
    assert str(tmp_path / name) in said and "remove" not in said
