"""Linear layers that take their input as two int8 rows: what that gains, in both sets of kernels, and its edges."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from running import run

from pipeline.quantize import blockwise, int8x2, readback, rows
from pipeline.tflite.graph import Graph

TOKENS, INPUTS, OUTPUTS = 3, 64, 32
RANDOM = np.random.default_rng(11)
WEIGHTS = RANDOM.standard_normal((2, OUTPUTS, INPUTS)).astype(np.float32)
Floats = NDArray[np.float32]


def layers(inner: int = 1, bias: float = 0.0, quantise: Callable[..., None] = rows.quantise_weights) -> Graph:
    """Two int8 linear layers, `q` and `k`, that see the same x [1, tokens, inner, inputs]; their sum comes out.

    A `bias` other than 0 is added to every output of both.
    """
    graph = Graph.empty()
    x = graph.add_tensor("x", "FLOAT32", (1, -1, inner, INPUTS))
    made = [graph.add_tensor(name, "FLOAT32", (1, -1, inner, OUTPUTS)) for name in ("q", "k", "sum")]
    graph.main.inputs, graph.main.outputs = [x], [made[2]]
    weights = [graph.add_constant(matrix, f"weight_{name}") for matrix, name in zip(WEIGHTS, "qk", strict=True)]
    added = graph.add_constant(np.full(OUTPUTS, bias, np.float32), "bias") if bias else -1
    graph.main.operators = [
        graph.operator("FULLY_CONNECTED", [x, weight, added], [result], keepNumDims=True)
        for weight, result in zip(weights, made, strict=False)
    ]
    graph.main.operators.append(graph.operator("ADD", made[:2], [made[2]]))
    quantise(graph, lambda _: False)
    return graph


def expected(file: Path, x: Floats) -> Floats:
    """What float activations give with the int8 weights of `file`."""
    graph, total = Graph.read(file), np.zeros((*x.shape[:-1], OUTPUTS))
    for operator in graph.operators():
        if graph.code(operator) == "FULLY_CONNECTED":
            scales = graph.scales(int(operator.inputs[1]))
            assert scales is not None
            total += x @ (graph.constant(int(operator.inputs[1])) * scales.scale[:, None]).T
    return total.astype(np.float32)


def split(pattern: str = ".") -> Graph:
    graph = layers()
    int8x2.split_inputs(graph, rows.keeper([pattern]))
    return graph


def outliers(seed: int = 1) -> Floats:
    """[1, tokens, 1, inputs] with one channel a hundred times the others."""
    x = np.random.default_rng(seed).standard_normal((1, TOKENS, 1, INPUTS)).astype(np.float32)
    x[..., 5] *= 100
    return x


def error(made: Floats, wanted: Floats) -> float:
    return float(np.abs(made - wanted).max() / np.abs(wanted).max())


@pytest.mark.parametrize("plain", [False, True], ids=["xnnpack", "plain"])
def test_two_rows_bring_an_outlying_channel_a_hundred_times_closer(tmp_path: Path, plain: bool) -> None:
    one, two, x = layers(), split(), outliers()
    one.write(tmp_path / "one")
    two.write(tmp_path / "two")
    wanted = expected(tmp_path / "one", x)
    far, near = (error(run(tmp_path / name, x, plain=plain), wanted) for name in ("one", "two"))
    assert far > 1e-3 and near < far / 100


@settings(max_examples=20)
@given(st.integers(0, 2**32 - 1), st.floats(1e-6, 1e6), st.booleans())
def test_any_row_is_exact_to_some_sixteen_bits(
    tmp_path_factory: pytest.TempPathFactory, seed: int, size: float, positive: bool
) -> None:
    graph, x = split(), outliers(seed) * np.float32(size)
    x = np.abs(x) if positive else x  # all of one sign: the kernel's range then begins at zero
    file = tmp_path_factory.mktemp("any") / "two"
    graph.write(file)
    assert error(run(file, x), expected(file, x)) < (4e-3 if positive else 1e-4)


def test_a_row_of_zeros_gives_zeros(tmp_path: Path) -> None:
    split().write(tmp_path / "two")
    x = outliers()
    x[0, 1] = 0
    made = run(tmp_path / "two", x)
    assert np.isfinite(made).all() and not made[0, 1].any()


@pytest.mark.parametrize("plain", [False, True], ids=["xnnpack", "plain"])
def test_a_bias_is_added_once(tmp_path: Path, plain: bool) -> None:
    graph, x = layers(bias=7.0), outliers()
    int8x2.split_inputs(graph, rows.keeper(["."]))
    graph.write(tmp_path / "two")
    assert error(run(tmp_path / "two", x, plain=plain), expected(tmp_path / "two", x) + 14) < 1e-4


def test_layers_with_the_same_input_share_its_rows() -> None:
    codes = [graph.code(operator) for graph in [split()] for operator in graph.operators()]
    assert codes.count("CONCATENATION") == 1 and codes.count("SUM") == 2


def multiply_adds(graph: Graph) -> list[int]:
    """Of each layer that is counted, at batch 1 and `TOKENS` tokens."""
    shapes = [tuple(TOKENS if n < 0 else n for n in graph.shape(t)) for t in range(len(graph.main.tensors))]
    products = readback._products(graph)
    return [readback._product(graph, operator, shapes, terms).multiply_adds for operator, terms in products]


def test_a_layer_counts_once_in_one_row_in_two_and_in_two_products() -> None:
    four_bits = layers(quantise=blockwise.quantise_weights)
    int8x2.split_inputs(four_bits, rows.keeper(["."]))
    assert [four_bits.code(operator) for operator in four_bits.operators()].count("FULLY_CONNECTED") == 4
    for graph in (layers(), split(), four_bits):
        assert multiply_adds(graph) == [TOKENS * INPUTS * OUTPUTS] * 2


def test_a_matrix_that_two_layers_share_counts_for_each() -> None:
    graph = layers()
    first, second, _ = graph.main.operators
    second.inputs = [second.inputs[0], first.inputs[1], -1]
    graph.main.operators = [first, second]  # as Gemma 3n's router, which predicts and then corrects
    assert multiply_adds(graph) == [TOKENS * INPUTS * OUTPUTS] * 2


def test_only_named_layers_change() -> None:
    graph = split("^q")
    assert [graph.code(operator) for operator in graph.operators()].count("SUM") == 1


def test_a_layer_without_a_spare_axis_is_left_alone() -> None:
    graph = layers(inner=2)
    before = [graph.code(operator) for operator in graph.operators()]
    int8x2.split_inputs(graph, rows.keeper(["."]))
    assert [graph.code(operator) for operator in graph.operators()] == before
