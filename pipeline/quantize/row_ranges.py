"""A table in ranges of rows, so that frequent tokens can be stored with more bits than the others.

Why: the table that embeds tokens and is the head as well is the most fragile matrix of a small model, and the largest.
Which rows matter is known: the first ones, which a vocabulary of merged pieces (BPE) has in the order of their
frequency, and those where Gemma's vocabulary keeps the single characters, every script's, the common ones first.

A product with the table becomes one product per range, their results side by side; an operator has its range's name
behind its own, `;fine_0`, `;coarse_0`, `;fine_1` …, and so has the range. A lookup becomes one per range, of which the
one that holds the token is taken.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.quantize.rows import LINEAR, LOOKUP
from pipeline.tflite.graph import Graph, Origin
from pipeline.tflite.lazy import Blocks
from pipeline.tflite.schema import Operator

_FINE, _COARSE = "fine", "coarse"


def split_rows(graph: Graph, table: str, int8: Sequence[tuple[int, int]]) -> frozenset[int]:
    """Cut the matrix called `table` at the ends of the ranges `int8` of its rows, in every signature.

    Args:
        graph: with float32 weights.
        table: the matrix's name.
        int8: first row and the row behind the last, ascending; rows that the table does not have are left out.

    Returns:
        The buffers of the ranges that are to have 8 bits.
    """
    # A prefill has no head and a decoder no table: a signature may lack the matrix.
    views = [view for view in graph.views() if _holders(view, table)]
    if not views:
        return frozenset()
    values = views[0].blocks(_holders(views[0], table)[0])
    ranges = _ranges(int8, values.shape[0])
    buffers = {
        name: graph.add_buffer(_rows(values, start, stop), Origin(table, row=start))
        for name, (start, stop) in ranges.items()
    }
    for view in views:
        _Splitting(view, table, {name: (*ranges[name], buffers[name]) for name in ranges}).rewrite()
    return frozenset(buffers[name] for name in ranges if name.startswith(_FINE))


def _ranges(int8: Sequence[tuple[int, int]], rows: int) -> dict[str, tuple[int, int]]:
    """Every range by its name: those of `int8`, and the rows before, between and behind them."""
    ranges, end = {}, 0
    # An empty range behind the last closes the loop: what is before it are the rows that no range names.
    for place, (start, stop) in enumerate((*int8, (rows, rows))):
        # Cut at the end of the table: a recipe is for checkpoints of several vocabularies.
        ranges[f"{_COARSE}_{place}"] = (end, min(start, rows))
        ranges[f"{_FINE}_{place}"] = (min(start, rows), min(stop, rows))
        end = min(stop, rows)
    # Empty ranges would be operators on nothing.
    return {name: (start, stop) for name, (start, stop) in ranges.items() if start < stop}


def _holders(view: Graph, table: str) -> list[int]:
    tensors = range(len(view.main.tensors))
    return [tensor for tensor in tensors if view.is_constant(tensor) and view.origin(tensor).matrix == table]


def _rows(values: Blocks, start: int, stop: int) -> Blocks:
    shape = (stop - start, *values.shape[1:])
    return Blocks(shape, values.dtype, lambda low, high: values.rows(start + low, start + high))


@dataclass(frozen=True)
class _RowRange:
    """A constant of so many rows, the first of which was row `start` of the table."""

    name: str
    tensor: int
    start: int
    rows: int


class _Splitting:
    """The rewriting of one signature."""

    def __init__(self, graph: Graph, table: str, ranges: Mapping[str, tuple[int, int, int]]) -> None:
        """`ranges`: name → first row, the row behind the last, buffer."""
        self.graph, self.tables = graph, _holders(graph, table)
        width = graph.shape(self.tables[0])[1]
        self.ranges = []
        for name, (start, stop, buffer) in ranges.items():
            tensor = graph.add_tensor(f"{table};{name}", "FLOAT32", (stop - start, width))
            graph.main.tensors[tensor].buffer = buffer
            self.ranges.append(_RowRange(name, tensor, start, stop - start))

    def rewrite(self) -> None:
        self.graph.rewrite(self._change)

    def _change(self, operator: Operator) -> list[Operator]:
        reads = len(operator.inputs) > 1 and int(operator.inputs[1]) in self.tables
        if not reads:
            return [operator]
        return self._product(operator) if self.graph.code(operator) == LINEAR else self._lookup(operator)

    def _product(self, operator: Operator) -> list[Operator]:
        """x · tableᵀ as the results of all ranges side by side."""
        graph, x, result = self.graph, int(operator.inputs[0]), int(operator.outputs[0])
        shape, keep = graph.shape(result), bool(operator.builtinOptions.keepNumDims)
        products, results = [], []
        for part in self.ranges:
            results.append(self._result(result, part, (*shape[:-1], part.rows)))
            products.append(graph.operator(LINEAR, [x, part.tensor, -1], results[-1:], keepNumDims=keep))
        # In the order of rows: column i of the logits stays token i.
        return [*products, graph.operator("CONCATENATION", results, [result], axis=len(shape) - 1)]

    def _lookup(self, operator: Operator) -> list[Operator]:
        """The rows of the first range, and from each further one those of the tokens that it holds."""
        ids, result = int(operator.inputs[0]), int(operator.outputs[0])
        rows, steps = self._look_up(ids, result, self.ranges[0])
        for part in self.ranges[1:]:
            above, lookup = self._look_up(ids, result, part)
            rows, choice = self._choose(ids, rows, above, part)
            steps += [*lookup, *choice]
        # The last step gives what the lookup gave, so whoever reads it need not change.
        steps[-1].outputs = [result]
        return steps

    def _look_up(self, ids: int, result: int, part: _RowRange) -> tuple[int, list[Operator]]:
        """The range's rows; of tokens outside it, its first or last row."""
        graph, count = self.graph, self.graph.shape(ids)
        moved, least, held = (self._tensor(part, name, "INT32", count) for name in ("moved", "least", "held"))
        rows = self._result(result, part, graph.shape(result))
        return rows, [
            graph.operator("SUB", [ids, self._number(part.start)], [moved]),
            # Every range is looked up for every token, and a kernel refuses an id outside its table: it is held inside.
            graph.operator("MAXIMUM", [moved, self._number(0)], [least]),
            graph.operator("MINIMUM", [least, self._number(part.rows - 1)], [held]),
            graph.operator(LOOKUP, [held, part.tensor], [rows]),
        ]

    def _choose(self, ids: int, below: int, above: int, part: _RowRange) -> tuple[int, list[Operator]]:
        """`below` for tokens before the range, `above` for the others."""
        graph, count = self.graph, self.graph.shape(ids)
        before, column = (
            self._tensor(part, "before", "BOOL", count),
            self._tensor(part, "column", "BOOL", (*count, 1)),
        )
        rows = self._tensor(part, "chosen", "FLOAT32", graph.shape(below))
        return rows, [
            graph.operator("LESS", [ids, self._number(part.start)], [before]),
            # [tokens, 1], which SELECT_V2 spreads over a row.
            graph.operator("EXPAND_DIMS", [before, self._number(1)], [column]),
            graph.operator("SELECT_V2", [column, below, above], [rows]),
        ]

    def _number(self, value: int) -> int:
        return self.graph.add_constant(np.array([value], np.int32), f"table;{value}")

    def _tensor(self, part: _RowRange, name: str, kind: str, shape: Sequence[int]) -> int:
        return self.graph.add_tensor(f"{self.graph.name(part.tensor)};{name}", kind, shape)

    def _result(self, result: int, part: _RowRange, shape: Sequence[int]) -> int:
        return self.graph.add_tensor(f"{self.graph.name(result)};{part.name}", "FLOAT32", shape)
