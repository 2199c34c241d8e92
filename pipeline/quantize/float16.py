"""Weights in float16: tables and matrices, arithmetic stays float32.

A table is read by EMBEDDING_LOOKUP, which must give float16 then: with a float32 output its kernel copies the raw bytes
and says nothing. See `rows.py` for why the graph is rewritten here.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from pipeline.core.errors import QuantiseError
from pipeline.quantize.rows import LOOKUP
from pipeline.tflite.graph import Graph
from pipeline.tflite.lazy import Array
from pipeline.tflite.schema import Operator

# Versions that TFLite's version rules demand of operators that read float16.
LOOKUP_VERSION, DEQUANTIZE_VERSION = 4, 3
_LARGEST_HALF = 65504.0


Chosen = Callable[[Graph, int], bool]
"""Whether a constant, seen in a graph by its tensor, is one of those that are meant."""


def make_half(graph: Graph, chosen: Chosen = lambda *_: True) -> None:
    """Tables and matrices in float16, those that are `chosen`; arithmetic stays float32.

    Raises:
        QuantiseError: a weight is too large for float16.
    """
    for view in graph.views():
        _halve_weights(view, chosen)


def _halve_weights(graph: Graph, chosen: Chosen) -> None:
    widened: dict[int, int] = {}

    def change(operator: Operator) -> list[Operator]:
        before: list[Operator] = []
        if graph.code(operator) == LOOKUP:
            return _half_lookup(graph, operator)
        for place, tensor in enumerate(int(i) for i in operator.inputs):
            # Vectors are a thousandth of a file and set the scale of everything behind them: they stay float32.
            matrix = graph.is_constant(tensor) and len(graph.shape(tensor)) >= 2
            if not matrix or not chosen(graph, tensor) or graph.type_of(tensor) not in ("FLOAT32", "FLOAT16"):
                continue
            # One DEQUANTIZE for all that read the matrix: XNNPACK folds it into each, the plain kernels run it once.
            if tensor not in widened:
                _halve(graph, tensor)
                widened[tensor] = graph.add_tensor(graph.name(tensor) + ";float32", "FLOAT32", graph.shape(tensor))
                before.append(graph.operator("DEQUANTIZE", [tensor], [widened[tensor]], version=DEQUANTIZE_VERSION))
            operator.inputs[place] = widened[tensor]
        return [*before, operator]

    graph.rewrite(change)


def _half_lookup(graph: Graph, operator: Operator) -> list[Operator]:
    ids, table, result = int(operator.inputs[0]), int(operator.inputs[1]), int(operator.outputs[0])
    _halve(graph, table)
    rows = graph.add_tensor(graph.name(result) + ";float16", "FLOAT16", graph.shape(result))
    return [
        graph.operator(LOOKUP, [ids, table], [rows], version=LOOKUP_VERSION),
        graph.operator("DEQUANTIZE", [rows], [result], version=DEQUANTIZE_VERSION),
    ]


def _halve(graph: Graph, tensor: int) -> None:
    if graph.type_of(tensor) == "FLOAT16":
        return
    name = graph.name(tensor)
    graph.set_constant(tensor, graph.blocks(tensor).map(np.float16, lambda block, _: to_half(block, name)))


def to_half(values: Array, name: str) -> NDArray[np.float16]:
    """`values` of the tensor `name` in float16.

    Raises:
        QuantiseError: one is too large.
    """
    largest = float(np.abs(values).max(initial=0.0))
    if largest > _LARGEST_HALF:
        raise QuantiseError(
            f"{name} has a weight of {largest:g}, float16 ends at {_LARGEST_HALF:g}",
            remedy="use int8, or leave out fp16 for this model",
        )
    return values.astype(np.float16)
