"""4-bit weights: packing, rounding and scales; what both sets of kernels make of them; tables in pieces of rows."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from running import run
from small_graph import bytes_by_type

from pipeline.bundling import contents
from pipeline.core.recipe import Int4
from pipeline.quantize import blockwise, gptq, hessians, int4, readback, row_ranges
from pipeline.quantize import rows as quantize
from pipeline.quantize.blockwise import BLOCK
from pipeline.tflite.graph import Graph
from pipeline.tflite.lazy import Blocks, pack, unpack

Floats = NDArray[np.float32]
ROWS, WIDTH = 50, 3 * BLOCK
RANDOM = np.random.default_rng(5)
TABLE = (RANDOM.standard_normal((ROWS, WIDTH)) * np.exp(RANDOM.standard_normal((ROWS, 1)))).astype(np.float32)
IDS = np.array([3, 0, 49, 7, 12, 13, 39, 40], np.int32)
KERNELS = pytest.mark.parametrize("plain", [False, True], ids=["xnnpack", "plain"])
NOTHING = quantize.keeper([])
matrices = st.builds(
    lambda seed, rows, blocks, size: np.random.default_rng(seed).standard_normal((rows, BLOCK * blocks)) * 10.0**size,
    st.integers(0, 2**32 - 1),
    st.integers(1, 5),
    st.integers(1, 3),
    st.floats(-6, 4),
).map(lambda values: values.astype(np.float32))


def tied(table: Floats = TABLE) -> Graph:
    """ids [n] → lookup → the same table as a linear layer → [n, rows of the table]."""
    graph = Graph.empty()
    ids, weight = graph.add_tensor("ids", "INT32", (-1,)), graph.add_constant(table, "table")
    looked = graph.add_tensor("looked", "FLOAT32", (-1, table.shape[1]))
    result = graph.add_tensor("result", "FLOAT32", (-1, len(table)))
    graph.main.inputs, graph.main.outputs = [ids], [result]
    graph.main.operators = [
        graph.operator("EMBEDDING_LOOKUP", [ids, weight], [looked]),
        graph.operator("FULLY_CONNECTED", [looked, weight, -1], [result], keepNumDims=True),
    ]
    return graph


def real(table: Floats) -> NDArray[np.float64]:
    """What stands for `table` with 4 bits, by the definition of the format."""
    scale = blockwise.best_scales(table)
    return np.asarray(blockwise.round_blocks(table, scale) * np.repeat(scale.astype(np.float64), BLOCK, axis=1))


def seen(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Rows as a hybrid kernel takes them: 256 steps between the smallest and the largest value, zero among them."""
    low, high = np.minimum(x.min(-1, keepdims=True), 0), np.maximum(x.max(-1, keepdims=True), 0)
    step = (high - low) / 255
    zero = np.rint(-128 - low / step)
    return np.asarray((np.clip(np.rint(x / step) + zero, -128, 127) - zero) * step)


def error(made: NDArray[Any], wanted: NDArray[Any]) -> float:
    return float(np.abs(made - wanted).max() / np.abs(wanted).max())


# --- packing and rounding


@given(st.integers(0, 2**32 - 1), st.integers(1, 6), st.integers(1, 40))
def test_what_is_packed_comes_back(seed: int, rows: int, halves: int) -> None:
    values = np.random.default_rng(seed).integers(-8, 8, (rows, 2 * halves)).astype(np.int8)
    packed = pack(values)
    assert packed.dtype == np.uint8 and packed.shape == (rows, halves)
    assert np.array_equal(unpack(packed).reshape(values.shape), values)


def test_the_first_of_two_values_is_in_the_low_half() -> None:
    assert pack(np.array([[1, -1, -8, 7]], np.int8)).tolist() == [[0xF1, 0x78]]


@given(matrices)
def test_no_other_scale_that_is_tried_is_closer_than_the_chosen(values: Floats) -> None:
    blocks = values.reshape(len(values), -1, BLOCK)
    chosen = np.square(real(values) - values).reshape(blocks.shape).sum(-1)
    peak = np.abs(blocks).max(-1)
    for share in np.linspace(0.7, 1.0, 6):
        scale = np.maximum(peak * share / 7.5, 2.0**-24)[..., None]
        other = np.square(np.clip(np.rint(blocks / scale), -8, 7) * scale - blocks).sum(-1)
        assert (
            chosen <= other * 1.06 + 1e-12
        ).all()  # a stored scale is off by 2⁻⁹ at most, or a step of float16's end


@given(matrices)
def test_scales_are_those_that_both_short_floats_hold(values: Floats) -> None:
    scale = blockwise.best_scales(values).astype(np.float32)
    assert (scale > 0).all() and np.isfinite(scale).all()
    assert not (scale.view(np.uint32) & 0xFFFF).any(), "bfloat16 has the upper half of a float32 alone"


@pytest.mark.parametrize(("wanted", "stored"), [(1.0, 1.0), (1 + 2**-9, 1.0), (1 + 3 * 2**-9, 1 + 2**-7), (3.995, 4.0)])
def test_a_scale_is_the_nearest_that_both_short_floats_hold(wanted: float, stored: float) -> None:
    assert blockwise.storable(np.array([wanted], np.float32)) == np.float16(stored)


@given(matrices)
def test_no_value_is_further_off_than_is_said(values: Floats) -> None:
    peak = np.abs(values).reshape(len(values), -1, BLOCK).max(-1, keepdims=True)
    off = np.abs(real(values) - values).reshape(len(values), -1, BLOCK)
    assert (off <= blockwise.LARGEST_ERROR * peak + 2.0**-25).all()


def test_a_block_of_zeros_and_one_of_whole_steps_are_exact() -> None:
    values = np.zeros((1, 2 * BLOCK), np.float32)
    values[0, :16] = np.arange(-8, 8) / 4
    assert np.array_equal(real(values)[:, BLOCK:], values[:, BLOCK:])
    assert np.array_equal(real(values * 0), values * 0)


def test_values_are_read_in_blocks_of_rows() -> None:
    packed, scales = blockwise.quantise_blocks(Blocks.of(TABLE))
    assert packed.shape == (ROWS, WIDTH // 2) and scales.scale.shape == (ROWS, WIDTH // BLOCK)
    whole = packed.rows(0, ROWS)
    assert np.array_equal(packed.rows(20, 31), whole[20:31])


@pytest.mark.parametrize("is_tied", [True, False])
def test_lookups_count_where_a_table_is_the_head_too(tmp_path: Path, is_tied: bool) -> None:
    x = np.exp(np.random.default_rng(6).standard_normal((400, WIDTH))) @ RANDOM.standard_normal((WIDTH, WIDTH))
    np.save(tmp_path / "table.npy", (x.T @ x).astype(np.float32)[None])
    (tmp_path / hessians.INDEX).write_text('{"table": "table.npy"}')
    made = []
    for share in (0.0, 0.5):
        graph = tied()
        if not is_tied:
            (looked,) = graph.main.operators.pop(0).outputs
            graph.main.inputs = [int(looked)]
        int4.make_int4(graph, Int4(gptq=True, lookups=share), gptq.Hessians(tmp_path))
        weight = int(graph.main.operators[-1].inputs[1])
        made.append(unpack(graph.blocks(weight).rows(0, ROWS)))
    assert np.array_equal(*made) != is_tied


# --- in the interpreter


def written(graph: Graph, file: Path) -> Graph:
    graph.prune()
    graph.write(file)
    return Graph.read(file)


@KERNELS
def test_a_tied_table_with_four_bits_computes_what_numpy_computes(tmp_path: Path, plain: bool) -> None:
    graph, file = tied(), tmp_path / "four.tflite"
    blockwise.quantise_weights(graph, NOTHING)
    written(graph, file)
    table = real(TABLE)
    # four bits are some 0.1 off the original; the kernels break a tie of rounding differently
    assert error(run(file, IDS, plain=plain), seen(table[IDS]) @ table.T) < 1e-3 < error(table, TABLE) / 50


@KERNELS
def test_a_named_table_has_eight_bits(tmp_path: Path, plain: bool) -> None:
    graph, plainly = tied(), tied()
    blockwise.quantise_weights(graph, quantize.keeper(["looked"]))
    quantize.quantise_weights(plainly, lambda _: False)
    for each, name in ((graph, "mixed"), (plainly, "int8")):
        written(each, tmp_path / name)
    assert error(run(tmp_path / "mixed", IDS, plain=plain), run(tmp_path / "int8", IDS)) < 1e-2


def test_rows_that_are_no_whole_blocks_have_eight_bits(tmp_path: Path) -> None:
    graph = tied(TABLE[:, :40])
    blockwise.quantise_weights(graph, NOTHING)
    assert set(bytes_by_type(written(graph, tmp_path / "odd"))) == {"INT8"}


@KERNELS
@pytest.mark.parametrize(
    "fine",
    [
        *([(0, 13), (40, 50)], [(0, 13)], [(40, 50)], [(0, 50)], [(0, 30), (30, 90)], [(0, 49), (49, 50)]),
        *([(0, 1), (49, 50)], [(3, 4), (9, 30), (60, 70)]),
    ],
)
def test_a_table_in_pieces_is_the_same_table(tmp_path: Path, plain: bool, fine: list[tuple[int, int]]) -> None:
    graph, file = tied(), tmp_path / "pieces.tflite"
    row_ranges.split_rows(graph, "table", fine)
    read = written(graph, file)
    assert bytes_by_type(read)["FLOAT32"] == TABLE.nbytes
    np.testing.assert_allclose(run(file, IDS, plain=plain), TABLE[IDS] @ TABLE.T, rtol=1e-4, atol=1e-4)


@KERNELS
def test_pieces_have_the_bits_that_they_are_given(tmp_path: Path, plain: bool) -> None:
    graph, file = tied(), tmp_path / "pieces.tflite"
    frequent = row_ranges.split_rows(graph, "table", [(0, 13), (40, 50)])
    blockwise.quantise_weights(graph, NOTHING, int8_buffers=frequent)
    written(graph, file)
    table = real(TABLE)
    fine = [*range(13), *range(40, 50)]
    scale = np.abs(TABLE[fine]).max(1, keepdims=True) / 127
    table[fine] = np.rint(TABLE[fine] / scale) * scale
    assert error(run(file, IDS, plain=plain), seen(table[IDS]) @ table.T) < 1e-3


def test_a_table_whose_rows_are_all_frequent_has_8_bits(tmp_path: Path) -> None:
    graph = tied()
    frequent = row_ranges.split_rows(graph, "table", [(0, 50)])
    blockwise.quantise_weights(graph, NOTHING, int8_buffers=frequent)
    assert set(bytes_by_type(written(graph, tmp_path / "fine"))) == {"INT8", "INT32"}


# --- what is told of a file


def test_bits_per_weight_count_every_scale(tmp_path: Path) -> None:
    graph, file = tied(), tmp_path / "four.tflite"
    blockwise.quantise_weights(graph, NOTHING)
    read = written(graph, file)
    four = int(next(iter(read.operators())).inputs[1])
    assert read.stored_bytes(four) == TABLE.size // 2 + 2 * TABLE.size // BLOCK
    assert np.array_equal(read.constant(four), blockwise.round_blocks(TABLE, blockwise.best_scales(TABLE)))
    told = contents.read(file).models[0]
    assert told.bits_per_weight() == 4.5 and [each.type for each in told.constants] == ["INT4"]
    assert readback.stored_weights([file]) == (TABLE.size, TABLE.size * 4.5 / 8)


def test_two_signatures_share_values_and_scales(tmp_path: Path) -> None:
    graph = tied()
    graph.add_signature("one", {"ids": graph.main.inputs[0]}, {"result": graph.main.outputs[0]})
    graph.model.subgraphs.append(copy.deepcopy(graph.main))
    twin = Graph(graph.model, 1)
    twin.add_signature("two", {"ids": twin.main.inputs[0]}, {"result": twin.main.outputs[0]})
    blockwise.quantise_weights(graph, NOTHING)
    file = tmp_path / "two.tflite"
    read = written(graph, file)
    assert bytes_by_type(read) == {"FLOAT16": 2 * TABLE.size // BLOCK, "INT4": TABLE.size // 2}
    assert readback.stored_weights([file])[0] == TABLE.size
