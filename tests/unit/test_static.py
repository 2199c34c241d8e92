"""The static schemes on small graphs: how close they come, in both sets of kernels, and which products they leave."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from running import run
from small_graph import bytes_by_type

from pipeline.quantize import readback, static
from pipeline.quantize import rows as quantize
from pipeline.quantize.calibrate import Statistics
from pipeline.tflite.graph import Graph
from pipeline.tflite.lazy import Scales

TOKENS, INPUTS, OUTPUTS = 400, 64, 32
RANDOM = np.random.default_rng(5)
WEIGHTS = RANDOM.standard_normal((OUTPUTS, INPUTS)).astype(np.float32)
UNEVEN = (WEIGHTS * np.geomspace(1e-3, 1e3, OUTPUTS)[:, None]).astype(np.float32)
KERNELS = pytest.mark.parametrize("plain", [False, True], ids=["xnnpack", "plain"])
Floats = NDArray[np.float32]


def never(_: str) -> bool:
    return False


def head(name: str) -> bool:
    return name == "head"


def graph_of(weights: Floats) -> tuple[Graph, int, int]:
    """x [1, tokens, 1, inputs] → `layer` → `head`, which hands on what it gets; the tensors of x and the layer."""
    graph, (outputs, inputs) = Graph.empty(), weights.shape
    x = graph.add_tensor("x", "FLOAT32", (1, -1, 1, inputs))
    layer, out = (graph.add_tensor(name, "FLOAT32", (1, -1, 1, outputs)) for name in ("layer", "head"))
    graph.main.inputs, graph.main.outputs = [x], [out]
    matrix = graph.add_constant(weights, "matrix")
    same = graph.add_constant(np.eye(outputs, dtype=np.float32), "same")
    graph.main.operators = [
        graph.operator("FULLY_CONNECTED", [x, matrix, -1], [layer], keepNumDims=True),
        graph.operator("FULLY_CONNECTED", [layer, same, -1], [out], keepNumDims=True),
    ]
    return graph, x, layer


def statistics(values: Floats) -> Statistics:
    seen = Statistics()
    seen.add(values)
    return seen


def made(file: Path, x: Floats, weights: Floats, *, bits: static.Bits = 8, twice: bool = False) -> Graph:
    """The graph with static activations, calibrated on `x`; its head stays float."""
    graph, taken, given_ = graph_of(weights)
    seen = {taken: statistics(x), given_: statistics((x @ weights.T).astype(np.float32))}
    plan = static.plan_static(graph, never, lambda _: twice)
    assert set(plan.wanted) == set(seen)
    static.make_static(graph, plan, seen, head, bits)
    graph.write(file)
    return graph


def rounded(weights: Floats) -> NDArray[np.float64]:
    """The weights as int8 gives them back."""
    scale = quantize.scales_of_peaks(quantize.row_peaks(weights))
    return np.asarray(quantize.round_rows(weights, scale) * scale[:, None].astype(np.float64))


def text(outlier: float = 100.0, seed: int = 1) -> Floats:
    """[1, tokens, 1, inputs] with one channel `outlier` times the others."""
    x = np.random.default_rng(seed).standard_normal((1, TOKENS, 1, INPUTS)).astype(np.float32)
    x[..., 7] *= outlier
    return x


def decibels(result: Floats, wanted: NDArray[np.float64]) -> NDArray[np.float64]:
    """Signal to noise of each channel of [1, tokens, 1, channels]."""
    noise = ((result - wanted) ** 2).mean(axis=(0, 1, 2))
    return np.asarray(10 * np.log10((wanted**2).mean(axis=(0, 1, 2)) / noise))


@KERNELS
def test_int8x2_and_a_range_per_channel_keep_every_channel_near(tmp_path: Path, plain: bool) -> None:
    x = text()
    for name, twice in (("one", False), ("two", True)):
        made(tmp_path / name, x, UNEVEN, twice=twice)
    one, two = (decibels(run(tmp_path / name, x, plain=plain), x @ rounded(UNEVEN).T) for name in ("one", "two"))
    assert np.median(one) < 1, "eight bits for all channels leave nothing of the small ones"
    assert two.min() > 30 and np.median(two) > 40


@KERNELS
def test_sixteen_bits_keep_all_but_what_the_weights_lost(tmp_path: Path, plain: bool) -> None:
    x = text()
    made(tmp_path / "wide", x, WEIGHTS, bits=16)
    assert decibels(run(tmp_path / "wide", x, plain=plain), x @ rounded(WEIGHTS).T).min() > 40


@settings(max_examples=15)
@given(st.integers(0, 2**32 - 1), st.floats(1, 1e4), st.floats(1e-3, 1e3))
def test_any_outlier_leaves_an_int8x2_layer_its_channels(
    tmp_path_factory: pytest.TempPathFactory, seed: int, outlier: float, size: float
) -> None:
    x, file = text(outlier, seed) * np.float32(size), tmp_path_factory.mktemp("any") / "two"
    made(file, x, WEIGHTS, twice=True)
    wanted = x @ rounded(WEIGHTS).T
    # Channels that hardly read the outlier have less: they share the steps that it needs.
    assert np.median(decibels(run(file, x), wanted)) > 38


@pytest.mark.parametrize("plain", [False, True], ids=["xnnpack", "plain"])
@pytest.mark.parametrize(("inputs", "wide"), [(256, False), (640, True)])
def test_sums_beyond_32_bits_get_a_wide_bias(tmp_path: Path, inputs: int, wide: bool, plain: bool) -> None:
    weights, x = np.ones((4, inputs), np.float32), np.ones((1, 8, 1, inputs), np.float32)
    graph = made(tmp_path / "sums", np.concatenate([x, -x], axis=1), weights, bits=16)
    layer = next(operator for operator in graph.operators() if graph.code(operator) == "FULLY_CONNECTED")
    bias = int(layer.inputs[2])
    assert (graph.type_of(bias) if bias >= 0 else None) == ("INT64" if wide else None)
    np.testing.assert_allclose(run(tmp_path / "sums", x, plain=plain), inputs, rtol=1e-3)
    # Calibrated ranges have room: text may be twice as large, and is cut beyond that, never turned around.
    np.testing.assert_allclose(run(tmp_path / "sums", 5 * x, plain=plain), 2 * inputs, rtol=1e-3)


def test_litert_still_wraps_around_without_a_bias(tmp_path: Path) -> None:
    """Seen in LiteRT 2.3.0. If this fails, `_wraps` and the biases that it asks for are needed no more."""
    graph, taken, given_ = graph_of(np.ones((4, 640), np.float32))
    graph.main.operators = graph.main.operators[:1]
    quantize.quantise_weights(graph, never)
    twins = [
        graph.add_tensor(f"{t};q", "INT16", graph.shape(t), Scales.tensor(s))
        for t, s in ((taken, 1 / 32767), (given_, 0.05))
    ]
    layer = graph.main.operators[0]
    layer.inputs, layer.outputs = [twins[0], layer.inputs[1], -1], [twins[1]]
    graph.main.operators = [
        graph.operator("QUANTIZE", [taken], [twins[0]], version=2),
        layer,
        graph.operator("DEQUANTIZE", [twins[1]], [given_], version=3),
    ]
    graph.main.outputs = [given_]
    graph.write(tmp_path / "wraps")
    assert run(tmp_path / "wraps", np.ones((1, 1, 1, 640), np.float32)).max() < 0


def test_a_bias_is_added_in_both_widths(tmp_path: Path) -> None:
    x, bias = text(1.0), np.linspace(-300, 300, OUTPUTS, dtype=np.float32)
    for bits in (8, 16):
        graph, taken, given_ = graph_of(WEIGHTS)
        layer = graph.main.operators[0]
        layer.inputs = [*layer.inputs[:2], graph.add_constant(bias, "bias")]
        wanted = x @ rounded(WEIGHTS).T + bias
        seen = {taken: statistics(x), given_: statistics(wanted.astype(np.float32))}
        plan = static.plan_static(graph, never, lambda _: True)
        assert not plan.split, "a layer with a bias takes one tensor"
        static.make_static(graph, plan, seen, head, bits)
        graph.write(tmp_path / str(bits))
        assert np.abs(run(tmp_path / str(bits), x) - wanted).max() < 700 / 2**bits * 3


def picking() -> Graph:
    """x → layer → a product by ones and zeros that picks a row → head."""
    graph, _, layer = graph_of(WEIGHTS)
    chosen = graph.add_tensor("chosen", "FLOAT32", (1, 1, 1, TOKENS))
    rows = graph.add_tensor("rows", "FLOAT32", (1, 1, TOKENS, OUTPUTS))
    row = graph.add_tensor("row", "FLOAT32", (1, 1, 1, OUTPUTS))
    first, last = graph.main.operators
    last.inputs = [row, *last.inputs[1:]]
    graph.main.inputs = [*graph.main.inputs, chosen]
    pick = [
        graph.operator("TRANSPOSE", [layer, graph.add_constant(np.array([0, 2, 1, 3], np.int32), "order")], [rows]),
        graph.operator("BATCH_MATMUL", [chosen, rows], [row]),
    ]
    graph.main.operators = [first, *pick, last]
    return graph


def test_the_head_and_what_picks_its_rows_stay_float() -> None:
    graph = picking()
    assert static.plan_static(graph, never).integer == {0}
    assert static.plan_static(graph, lambda name: name == "layer").integer == set()
    split = static.plan_static(graph, never, lambda name: name == "layer")
    assert not split.integer and split.split == {0}


def test_what_a_softmax_reads_can_stay_float() -> None:
    graph, x, layer = graph_of(WEIGHTS)
    scaled, share = (graph.add_tensor(name, "FLOAT32", graph.shape(layer)) for name in ("scaled", "share"))
    first, last = graph.main.operators
    last.inputs = [share, *last.inputs[1:]]
    graph.main.operators = [
        first,
        graph.operator("MUL", [layer, graph.add_constant(np.array([0.1], np.float32), "factor")], [scaled]),
        graph.operator("SOFTMAX", [scaled], [share]),
        last,
    ]
    assert static.plan_static(graph, never).integer == {0}
    assert static.plan_static(graph, never).wanted == (x, layer)
    assert not static.plan_static(graph, never, float_scores=True).integer


@pytest.mark.parametrize(("bits", "twice"), [(8, False), (8, True), (16, False)])
def test_products_are_counted_once_in_every_width(tmp_path: Path, bits: static.Bits, twice: bool) -> None:
    graph = made(tmp_path / "file", text(), WEIGHTS, bits=bits, twice=twice)
    shapes = [tuple(TOKENS if n < 0 else n for n in graph.shape(t)) for t in range(len(graph.main.tensors))]
    products = [readback._product(graph, o, shapes, rows) for o, rows in readback._products(graph)]
    assert [(product.arithmetic, product.multiply_adds) for product in products] == [
        ("integer", TOKENS * INPUTS * OUTPUTS),
        ("float", TOKENS * OUTPUTS * OUTPUTS),
    ]


def test_both_terms_of_an_int8x2_layer_read_the_same_weights(tmp_path: Path) -> None:
    sizes = [bytes_by_type(made(tmp_path / "file", text(), WEIGHTS, twice=twice))["INT8"] for twice in (False, True)]
    assert sizes == [WEIGHTS.size, WEIGHTS.size]
