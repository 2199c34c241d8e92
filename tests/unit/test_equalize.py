"""Scales moved between neighbouring layers: the float model stays the same to the bit, and int8 comes closer."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_graph import Floats, Model, logits, rounded, twice

from pipeline.quantize import equalize
from pipeline.tflite.graph import Graph


@settings(max_examples=15)
@given(seed=st.integers(0, 2**16), strength=st.floats(0, 2), spread=st.floats(0, 3))
def test_the_float_model_stays_the_same_to_the_bit(
    tmp_path_factory: pytest.TempPathFactory, seed: int, strength: float, spread: float
) -> None:
    folder, equalized = tmp_path_factory.mktemp("equalized"), twice(Model(seed, spread))
    plain = logits(Model(seed, spread).graph, folder / "plain")
    assert set(equalize.equalize_columns(equalized, strength)) == {"gate", "up", "down", "table"}
    for signature in ("one", "two"):
        np.testing.assert_array_equal(logits(equalized, folder / "equalized", signature), plain)


def matrices(file: Path) -> dict[str, Floats]:
    """The weights of a file's linear layers by name."""
    graph = Graph.read(file)
    layers = [operator for operator in graph.operators() if graph.code(operator) == "FULLY_CONNECTED"]
    return {graph.name(int(layer.inputs[1])): graph.constant(int(layer.inputs[1])) for layer in layers}


def test_columns_become_alike_in_each_group_of_matrices(tmp_path: Path) -> None:
    model = Model()
    equalize.equalize_columns(model.graph, 1.0)
    logits(model.graph, tmp_path / "equalized")
    found = matrices(tmp_path / "equalized")
    for group in (["gate", "up"], ["down"], ["table"]):
        undone = [found[name] if name != "up" else up_rows_undone(found) for name in group]
        sizes = np.sqrt(np.square(np.concatenate(undone)).mean(axis=0))
        assert sizes.max() / sizes.min() < 2.01


def up_rows_undone(found: dict[str, Floats]) -> Floats:
    """`up` with the factors of `down`, which its rows took, off again."""
    graph = Model().graph
    down = next(t for t in range(len(graph.main.tensors)) if graph.name(t) == "down")
    return found["up"] * (found["down"] / graph.constant(down))[:1].T


def test_int8_weights_come_closer(tmp_path: Path) -> None:
    exact, errors = logits(Model().graph, tmp_path / "float"), []
    for strength in (0.0, 0.9):
        graph = Model().graph
        equalize.equalize_columns(graph, strength)
        rounded(graph)
        errors.append(float(np.square(logits(graph, tmp_path / "int8") - exact).mean()))
    assert errors[1] < errors[0] / 2


@pytest.mark.parametrize("where", ["up", "rows", "head"])
def test_what_others_read_as_well_is_left_alone(where: str, tmp_path: Path) -> None:
    model = Model()
    read = {"up": model.up, "rows": int(model.operators[0].outputs[0]), "head": int(model.operators[-1].inputs[0])}
    model.graph.main.outputs = [model.logits, read[where]]
    plain = logits(copy.deepcopy(model.graph), tmp_path / "plain")
    assert len({factors.tobytes() for factors in equalize.equalize_columns(model.graph, 1.0).values()}) == 2
    np.testing.assert_array_equal(logits(model.graph, tmp_path / "equalized"), plain)
