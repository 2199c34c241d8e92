"""Linear layers as sums over blocks of columns: the float sum is the layer, and int8 comes closer."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_graph import VOCABULARY, WIDTH, Model, bytes_by_type, logits, rounded, twice

from pipeline.quantize import groups, rows
from pipeline.tflite.graph import Graph, Origin


@settings(max_examples=10)
@given(seed=st.integers(0, 2**16), width=st.sampled_from([8, 16]))
def test_the_sum_over_blocks_is_the_layer(tmp_path_factory: pytest.TempPathFactory, seed: int, width: int) -> None:
    folder, split = tmp_path_factory.mktemp("blocks"), twice(Model(seed))
    exact = logits(Model(seed).graph, folder / "whole")
    groups.split_columns(split, lambda _: True, width)
    for signature in ("one", "two"):
        made = logits(split, folder / "split", signature)
        np.testing.assert_allclose(made, exact, rtol=1e-4, atol=1e-4 * np.abs(exact).max())


def test_the_table_is_stored_once_in_blocks_of_int8(tmp_path: Path) -> None:
    graph = twice(Model())
    groups.split_columns(graph, lambda _: True, 16)
    rows.quantise_weights(graph, lambda _: False)
    assert np.isfinite(logits(graph, tmp_path / "int8")).all()
    made = Graph.read(tmp_path / "int8")
    lookups = [operator for operator in made.operators() if made.code(operator) == "EMBEDDING_LOOKUP"]
    assert [made.shape(int(lookup.inputs[1])) for lookup in lookups] == [(VOCABULARY, 16)] * (WIDTH // 16)
    assert bytes_by_type(made)["INT8"] == VOCABULARY * WIDTH + 3 * 48 * WIDTH


def test_parts_are_known_by_where_they_were_cut_from_whatever_they_are_called(tmp_path: Path) -> None:
    graph, parts = twice(Model()), set[tuple[Origin, int]]()
    groups.split_columns(graph, lambda _: True, 16)
    for view in graph.views():
        for tensor in view.main.tensors:
            tensor.name = b"any"
    graph.prune()  # which gives buffers other numbers
    rows.quantise_weights(graph, lambda _: False, lambda part, columns: parts.add((part, columns)))
    widths = {"table": WIDTH, "gate": WIDTH, "up": WIDTH, "down": 48}
    assert parts == {
        (Origin(matrix, column=column), 16) for matrix in widths for column in range(0, widths[matrix], 16)
    }


def test_int8_weights_come_closer(tmp_path: Path) -> None:
    shares = [squared_error(seed, ".", tmp_path) / squared_error(seed, "none", tmp_path) for seed in range(5)]
    assert np.median(shares) < 0.7


def squared_error(seed: int, pattern: str, folder: Path) -> float:
    """Of a model with columns of like size, whose layers that `pattern` names are split."""
    exact, graph = logits(Model(seed, 0.0).graph, folder / "float"), Model(seed, 0.0).graph
    groups.split_columns(graph, rows.keeper([pattern]), 8)
    rounded(graph)
    return float(np.square(logits(graph, folder / "int8") - exact).mean())


def test_a_matrix_that_is_no_multiple_of_the_width_stays_whole(tmp_path: Path) -> None:
    graph = Model().graph
    groups.split_columns(graph, lambda _: True, 20)
    assert np.array_equal(logits(graph, tmp_path / "split"), logits(Model().graph, tmp_path / "whole"))
