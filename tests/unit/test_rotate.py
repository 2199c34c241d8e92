"""Inputs rotated in blocks: the float layers stay what they are, and an outlying channel no longer costs the others."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from running import run
from small_graph import bytes_by_type

from pipeline.core.recipe import Int4, Int8
from pipeline.quantize import gptq, hessians, int4, int8, int8x2, rotate
from pipeline.quantize import rows as quantize
from pipeline.quantize.hadamard import hadamard, rotate_blocks
from pipeline.tflite.graph import Graph, Origin

TOKENS, INPUTS, OUTPUTS = 5, 64, 48
RANDOM = np.random.default_rng(3)
WEIGHTS = RANDOM.standard_normal((2, OUTPUTS, INPUTS)).astype(np.float32)
Floats = NDArray[np.float32]


def layers(signatures: int = 1) -> Graph:
    """Linear layers `q` and `k` of the same x [1, tokens, 1, inputs], and their sum; signatures share the weights."""
    graph = Graph.empty()
    x = graph.add_tensor("x", "FLOAT32", (1, -1, 1, INPUTS))
    made = [graph.add_tensor(name, "FLOAT32", (1, -1, 1, OUTPUTS)) for name in ("q", "k", "sum")]
    weights = [graph.add_constant(matrix, f"{name}.weight") for matrix, name in zip(WEIGHTS, "qk", strict=True)]
    graph.main.inputs, graph.main.outputs = [x], [made[2]]
    graph.main.operators = [
        graph.operator("FULLY_CONNECTED", [x, weight, -1], [result], keepNumDims=True)
        for weight, result in zip(weights, made, strict=False)
    ]
    graph.main.operators.append(graph.operator("ADD", made[:2], [made[2]]))
    graph.add_signature("first", {"x": x}, {"sum": made[2]})
    for place in range(1, signatures):
        graph.model.subgraphs.append(copy.deepcopy(graph.main))
        Graph(graph.model, place).add_signature(f"other{place}", {"x": x}, {"sum": made[2]})
    return graph


def inputs(seed: int = 1, outlier: float = 1.0) -> Floats:
    """[1, tokens, 1, inputs] with one channel `outlier` times as large as the rest."""
    x = np.random.default_rng(seed).standard_normal((1, TOKENS, 1, INPUTS)).astype(np.float32)
    x[..., 5] *= np.float32(outlier)
    return x


def codes(graph: Graph) -> list[str]:
    return [graph.code(operator) for operator in graph.operators()]


def error(file: Path, x: Floats, *, plain: bool = False) -> float:
    """Of the file's result: its root mean square over that of what is right."""
    wanted = x @ WEIGHTS.sum(axis=0).T
    return rms(run(file, x, plain=plain) - wanted) / rms(wanted)


def rms(values: NDArray[np.floating]) -> float:
    return float(np.sqrt(np.square(values, dtype=np.float64).mean()))


@given(st.integers(0, 9))
def test_the_matrix_is_orthogonal_and_spreads_evenly(exponent: int) -> None:
    size = 2**exponent
    made = hadamard(size)
    np.testing.assert_allclose(made @ made.T, np.eye(size), atol=1e-5)
    np.testing.assert_allclose(np.abs(made), size**-0.5, rtol=1e-6)


@given(st.integers(-4, 40).filter(lambda size: size not in (1, 2, 4, 8, 16, 32)))
def test_only_powers_of_two_have_one(size: int) -> None:
    with pytest.raises(ValueError, match="power of two"):
        hadamard(size)


@settings(max_examples=10)
@given(st.integers(0, 2**32 - 1), st.sampled_from([2, 8, 64]), st.booleans())
def test_the_float_layers_stay_what_they_are(
    tmp_path_factory: pytest.TempPathFactory, seed: int, size: int, plain: bool
) -> None:
    file, graph = tmp_path_factory.mktemp("rotate") / "rotated", layers()
    assert rotate.rotate_inputs(graph, lambda _: True, size) == {"q.weight": size, "k.weight": size}
    assert codes(graph).count("CONV_2D") == 1  # they read the same
    graph.write(file)
    assert error(file, inputs(seed), plain=plain) < 1e-5


@pytest.mark.parametrize("plain", [False, True], ids=["xnnpack", "plain"])
def test_an_outlying_channel_costs_less(tmp_path: Path, plain: bool) -> None:
    one, turned, both = layers(), layers(), layers()
    for graph in (turned, both):
        rotate.rotate_inputs(graph, lambda _: True, 64)
    found, x = [], inputs(outlier=100.0)
    for name, graph in (("one", one), ("turned", turned), ("both", both)):
        quantize.quantise_weights(graph, lambda _: False)
        if graph is both:
            int8x2.split_inputs(graph, lambda _: True)
        graph.write(tmp_path / name)
        seen = x if graph is one else rotate_blocks(x, 64)
        found.append(rms(run(tmp_path / name, x, plain=plain) - seen @ stored(tmp_path / name).T))
    assert found[1] < found[0] / 2 and found[2] < found[1] / 50


def stored(file: Path) -> NDArray[np.float64]:
    """The int8 weights of a file, as what they mean, of both layers together."""
    graph, total = Graph.read(file), np.zeros((OUTPUTS, INPUTS))
    for operator in (each for each in graph.operators() if graph.code(each) == "FULLY_CONNECTED"):
        scales = graph.scales(int(operator.inputs[1]))
        assert scales is not None
        total += graph.constant(int(operator.inputs[1])) * scales.scale[:, None]
    return total


def test_weights_that_signatures_share_are_rotated_once(tmp_path: Path) -> None:
    graph = layers(signatures=2)
    rotate.rotate_inputs(graph, lambda _: True, 16)
    graph.prune()
    graph.write(tmp_path / "file")
    read = Graph.read(tmp_path / "file")
    assert bytes_by_type(read)["FLOAT32"] == 4 * (2 * OUTPUTS * INPUTS + INPUTS * 16 + INPUTS)
    for view in read.views():
        weight = next(int(o.inputs[1]) for o in view.operators() if view.operator_name(o) == "q")
        np.testing.assert_allclose(view.constant(weight), rotate_blocks(WEIGHTS[0], 16), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(1, -1, INPUTS), (-1, INPUTS), (1, 1, -1, 1, INPUTS)])
def test_inputs_of_other_axes_are_given_four(tmp_path: Path, shape: tuple[int, ...]) -> None:
    graph = Graph.empty()
    x, result = (graph.add_tensor(name, "FLOAT32", (*shape[:-1], n)) for name, n in (("x", INPUTS), ("q", OUTPUTS)))
    graph.main.inputs, graph.main.outputs = [x], [result]
    weight = graph.add_constant(WEIGHTS[0], "q.weight")
    graph.main.operators = [graph.operator("FULLY_CONNECTED", [x, weight, -1], [result], keepNumDims=True)]
    assert rotate.rotate_inputs(graph, lambda _: True, 16) == {"q.weight": 16}
    graph.write(tmp_path / "rotated")
    given_ = inputs().reshape([TOKENS if n < 0 else n for n in shape])
    np.testing.assert_allclose(run(tmp_path / "rotated", given_), given_ @ WEIGHTS[0].T, atol=1e-4)


def test_rows_that_are_looked_up_are_rotated_back(tmp_path: Path) -> None:
    graph = Graph.empty()
    ids, rows = graph.add_tensor("ids", "INT32", (-1,)), graph.add_tensor("rows", "FLOAT32", (-1, INPUTS))
    wide, result = (
        graph.add_tensor(name, "FLOAT32", (1, -1, 1, n)) for name, n in (("wide", INPUTS), ("head", OUTPUTS))
    )
    table = graph.add_constant(WEIGHTS[0], "table")
    shape = graph.add_constant(np.array([1, -1, 1, INPUTS], np.int32), "shape")
    graph.main.inputs, graph.main.outputs = [ids], [result]
    graph.main.operators = [
        graph.operator("EMBEDDING_LOOKUP", [ids, table], [rows]),
        graph.operator("RESHAPE", [rows, shape], [wide]),
        graph.operator("FULLY_CONNECTED", [wide, table, -1], [result], keepNumDims=True),
    ]
    asked = np.array([3, 0, OUTPUTS - 1], np.int32)
    graph.write(tmp_path / "plain")
    assert rotate.rotate_inputs(graph, lambda _: True, 16) == {"table": 16}
    graph.write(tmp_path / "rotated")
    plain, rotated = (run(tmp_path / name, asked)[0, :, 0] for name in ("plain", "rotated"))
    np.testing.assert_allclose(rotated, plain, atol=1e-4)
    np.testing.assert_allclose(plain, WEIGHTS[0][asked] @ WEIGHTS[0].T, atol=1e-4)
    quantize.quantise_weights(graph, lambda _: False)
    graph.prune()
    graph.write(tmp_path / "int8")
    assert bytes_by_type(Graph.read(tmp_path / "int8"))["INT8"] == WEIGHTS[0].size  # stored once


@pytest.mark.parametrize("why", ["not chosen", "not a multiple", "read by another", "another axis"])
def test_what_can_not_be_rotated_is_left_alone(why: str) -> None:
    graph, size = layers(), 48 if why == "not a multiple" else 16
    first, second = list(graph.operators())[:2]
    if why == "read by another":
        second.inputs[1] = first.inputs[1]
    if why == "another axis":
        graph.main.tensors[int(first.inputs[0])].shapeSignature = [-1, -1, INPUTS]
    names = {"not chosen": "none", "read by another": "^q"}.get(why, ".")
    assert list(rotate.rotate_inputs(graph, quantize.keeper([names]), size)) == []


def test_both_schemes_rotate_as_their_section_says() -> None:
    for rotate_, count in (((), 0), (("^q",), 1)):
        eight, four = layers(), layers()
        int8.make_int8(eight, Int8(scheme="dynamic", calibration_samples=1, rotate=rotate_, rotation=16))
        int4.make_int4(four, Int4(rotate=rotate_, rotation=16))
        assert [codes(graph).count("CONV_2D") for graph in (eight, four)] == [count] * 2


def test_hessians_are_rotated_with_what_they_are_of(tmp_path: Path) -> None:
    x = np.random.default_rng(4).standard_normal((500, 32)) * np.exp(np.arange(32) % 7)
    factors = np.exp2(np.arange(32) % 3).astype(np.float32)
    np.save(tmp_path / "q.npy", (x.T @ x).astype(np.float32)[None])
    (tmp_path / hessians.INDEX).write_text('{"q.weight": "q.npy"}')
    rounding = gptq.Hessians(tmp_path).rounding({"q.weight": factors}, {"q.weight": 16})
    turned = rotate_blocks(x / factors, 16)
    for columns in (slice(0, 32), slice(24, 32)):
        made, wanted = (
            rounding(Origin("q.weight", column=columns.start), columns.stop - columns.start),
            gptq.Factor.of((turned.T @ turned)[columns, columns]),
        )
        assert made is not None and np.array_equal(made.factors()[0].order, wanted.order)
        np.testing.assert_allclose(made.factors()[0].upper, wanted.upper, rtol=1e-3, atol=1e-9)
