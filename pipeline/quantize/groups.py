"""Linear layers whose int8 weights have a scale per row and group of columns, for the most accurate file.

A row's step is set by its largest weight; in a group of 64 columns that is smaller than in a whole row. TFLite knows
one int8 scale per row, so a layer [outputs, inputs] becomes the sum of inputs / size narrower ones [outputs, size],
each over its group of the input, in float32. A table that is also the head is looked up group by group, and the rows
are put together again. Scales take 4 bytes a group: 3 % of the weights at 128 columns. Each group is an operator of its
own, so such a file is slower.

Result: Gemma 3 270M, 128 columns in head and down_proj: KL(Hugging Face || file) 0.0051 instead of 0.0108;
docs/experiments.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import numpy as np

from pipeline.quantize.rows import LINEAR, LOOKUP, Keep, layer_name
from pipeline.tflite.graph import Graph
from pipeline.tflite.lazy import Array, Blocks
from pipeline.tflite.schema import Operator

# Rows of a matrix that are read at a time to cut a group of columns out of them.
_ROWS = 4096


def split_columns(graph: Graph, chosen: Keep, group_size: int) -> None:
    """Make sums of layers `group_size` columns wide of the float32 layers that `chosen` names, in every signature.

    A matrix that is not a multiple of `group_size` wide stays whole.
    """
    group_buffers: dict[int, list[int]] = {}
    views = graph.views()
    for view in views:
        for operator in view.operators():
            if view.code(operator) == LINEAR and chosen(layer_name(view, operator)):
                _cut(view, int(operator.inputs[1]), group_size, group_buffers)
    for view in views:
        _Splitting(view, group_buffers).rewrite()


def _cut(view: Graph, matrix: int, group_size: int, group_buffers: dict[int, list[int]]) -> None:
    """Make a buffer of each group of the columns of `matrix`, once for all signatures."""
    if not view.is_constant(matrix) or view.type_of(matrix) != "FLOAT32":
        return
    buffer, values = view.buffer(matrix), view.blocks(matrix)
    columns, whole = values.shape[1], view.origin(matrix)
    # One group would be the layer itself with a name more.
    if buffer not in group_buffers and columns > group_size and not columns % group_size:
        starts = range(0, columns, group_size)
        group_buffers[buffer] = [
            view.add_buffer(_columns(values, start, group_size), replace(whole, column=start)) for start in starts
        ]


def _columns(values: Blocks, first: int, width: int) -> Blocks:
    """Columns `first` to `first + width`; rows are read in small lots, since whole ones are many times as wide."""

    def rows(start: int, stop: int) -> Array:
        lots = [values.rows(at, min(at + _ROWS, stop)) for at in range(start, stop, _ROWS)]
        # Each lot is cut before the next is read, so that a whole row of a wide table is never held.
        return np.concatenate([lot[:, first : first + width] for lot in lots])

    return Blocks((values.shape[0], width), values.dtype, rows)


class _Splitting:
    """The rewriting of one signature; layers with the same input share what it is cut into."""

    def __init__(self, graph: Graph, group_buffers: dict[int, list[int]]) -> None:
        """`group_buffers`: those of the groups by the buffer of their matrix."""
        self.graph, self.group_buffers = graph, group_buffers
        self.inputs: dict[tuple[int, int], list[int]] = {}
        self.weights: dict[int, list[int]] = {}

    def rewrite(self) -> None:
        self.graph.rewrite(self._change)

    def _change(self, operator: Operator) -> list[Operator]:
        graph, code = self.graph, self.graph.code(operator)
        matrix = int(operator.inputs[1]) if code in (LINEAR, LOOKUP) else -1
        if not graph.is_constant(matrix) or graph.buffer(matrix) not in self.group_buffers:
            return [operator]
        weights = self._groups(matrix)
        return self._sum(operator, weights) if code == LINEAR else self._join(operator, weights)

    def _groups(self, matrix: int) -> list[int]:
        """A tensor for each group of the columns of `matrix`."""
        graph = self.graph
        if matrix not in self.weights:
            buffers = self.group_buffers[graph.buffer(matrix)]
            shape = (graph.shape(matrix)[0], graph.shape(matrix)[1] // len(buffers))
            self.weights[matrix] = self._tensors(matrix, shape, len(buffers))
            for tensor, buffer in zip(self.weights[matrix], buffers, strict=True):
                graph.main.tensors[tensor].buffer = buffer
        return self.weights[matrix]

    def _sum(self, layer: Operator, weights: list[int]) -> list[Operator]:
        """`layer` as the sum of one for each group; the first adds the bias, if there is any."""
        graph, result, count = self.graph, int(layer.outputs[0]), len(weights)
        shape = graph.shape(result)
        # All layers that read x share its groups: SPLIT copies.
        before, inputs = self._split(int(layer.inputs[0]), count)
        partial_sums, totals = self._tensors(result, shape, count), self._tensors(result, shape, count - 2, "sum")
        layers = [
            graph.operator(LINEAR, [x, weight, *(layer.inputs[2:] if not i else [-1])], [partial_sum], keepNumDims=True)
            for i, (x, weight, partial_sum) in enumerate(zip(inputs, weights, partial_sums, strict=True))
        ]
        # From left to right: the order of float additions is part of what the file computes.
        lefts, results = [partial_sums[0], *totals], [*totals, result]
        adds = [
            graph.operator("ADD", [left, right], [total])
            for left, right, total in zip(lefts, partial_sums[1:], results, strict=True)
        ]
        return [*before, *layers, *adds]

    def _split(self, x: int, count: int) -> tuple[list[Operator], list[int]]:
        """What cuts `x` [..., inputs] into `count` groups of channels, unless that is done already, and the groups."""
        if (x, count) in self.inputs:
            return [], self.inputs[x, count]
        graph, shape = self.graph, self.graph.shape(x)
        groups = self._tensors(x, (*shape[:-1], shape[-1] // count), count)
        self.inputs[x, count] = groups
        # SPLIT reads its axis as its first input, a scalar.
        axis = graph.add_constant(np.array(len(shape) - 1, np.int32), f"{graph.name(x)};axis")
        return [graph.operator("SPLIT", [axis, x], groups, numSplits=count)], groups

    def _join(self, lookup: Operator, tables: list[int]) -> list[Operator]:
        """`lookup` in each group of its table, and the groups of the rows side by side."""
        graph, ids, rows = self.graph, int(lookup.inputs[0]), int(lookup.outputs[0])
        shape = graph.shape(rows)
        groups = self._tensors(rows, (*shape[:-1], shape[-1] // len(tables)), len(tables))
        lookups = [graph.operator(LOOKUP, [ids, table], [group]) for table, group in zip(tables, groups, strict=True)]
        return [*lookups, graph.operator("CONCATENATION", groups, [rows], axis=len(shape) - 1)]

    def _tensors(self, of: int, shape: Sequence[int], count: int, kind: str = "block") -> list[int]:
        name = partial("{};{}_{}".format, self.graph.name(of), kind)
        return [self.graph.add_tensor(name(i), "FLOAT32", shape) for i in range(count)]
