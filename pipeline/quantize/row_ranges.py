"""A table in pieces of rows, so that frequent tokens can be stored more finely than the others.

Why: the table that embeds tokens and is the head as well is the most fragile matrix of a small model, and the largest.
Which rows matter is known: the first ones, which a vocabulary of merged pieces (BPE) has in the order of their
frequency, and those where Gemma's vocabulary keeps the single characters, every script's, the common ones first.

A product with the table becomes one product per piece, their results side by side; an operator has its piece's name
behind its own, `;fine_0`, `;coarse_0`, `;fine_1` …, and so has the piece. A lookup becomes one per piece, of which the
one that holds the token is taken.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.quantize.rows import LINEAR, LOOKUP
from pipeline.tflite.graph import Graph
from pipeline.tflite.lazy import Blocks

FINE = (r";fine_\d+$",)
"""Patterns for the names of the pieces that are stored more finely."""


def cut(graph: Graph, table: str, fine: Sequence[tuple[int, int]]) -> None:
    """Cut the constant called `table` at the ends of the ranges `fine` of its rows, in every signature.

    Args:
        graph: with float32 weights.
        table: the constant's name.
        fine: first row and the row behind the last, ascending; rows that the table does not have are left out.
    """
    views = [view for view in graph.each() if _holders(view, table)]
    if not views:
        return
    values = views[0].blocks(_holders(views[0], table)[0])
    ranges = _ranges(fine, values.shape[0])
    parts = {name: _part(values, start, stop) for name, (start, stop) in ranges.items()}
    buffers = {name: graph.add_buffer(part) for name, part in parts.items()}
    for view in views:
        _Cutting(view, table, {name: (*ranges[name], buffers[name]) for name in parts}).rewrite()


def _ranges(fine: Sequence[tuple[int, int]], rows: int) -> dict[str, tuple[int, int]]:
    """Every piece by its name: the ranges `fine`, and the rows before, between and behind them."""
    found, end = {}, 0
    for place, (start, stop) in enumerate((*fine, (rows, rows))):
        found[f"coarse_{place}"] = (end, min(start, rows))
        found[f"fine_{place}"] = (min(start, rows), min(stop, rows))
        end = min(stop, rows)
    return {name: (start, stop) for name, (start, stop) in found.items() if start < stop}


def _holders(view: Graph, table: str) -> list[int]:
    return [tensor for tensor in range(len(view.main.tensors)) if view.name(tensor) == table]


def _part(values: Blocks, start: int, stop: int) -> Blocks:
    shape = (stop - start, *values.shape[1:])
    return Blocks(shape, values.dtype, lambda low, high: values.rows(start + low, start + high))


@dataclass(frozen=True)
class _Piece:
    """A constant of so many rows, the first of which was row `start` of the table."""

    name: str
    tensor: int
    start: int
    rows: int


class _Cutting:
    """The rewriting of one signature."""

    def __init__(self, graph: Graph, table: str, parts: Mapping[str, tuple[int, int, int]]) -> None:
        """`parts`: name → first row, the row behind the last, buffer."""
        self.graph, self.tables = graph, _holders(graph, table)
        width = graph.shape(self.tables[0])[1]
        self.pieces = []
        for part, (start, stop, made) in parts.items():
            tensor = graph.add_tensor(f"{table};{part}", "FLOAT32", (stop - start, width))
            graph.main.tensors[tensor].buffer = made
            self.pieces.append(_Piece(part, tensor, start, stop - start))

    def rewrite(self) -> None:
        self.graph.rewrite(self._change)

    def _change(self, operator: Any) -> list[Any]:
        reads = len(operator.inputs) > 1 and int(operator.inputs[1]) in self.tables
        if not reads:
            return [operator]
        return self._product(operator) if self.graph.code(operator) == LINEAR else self._lookup(operator)

    def _product(self, operator: Any) -> list[Any]:
        """x · tableᵀ as the results of all pieces side by side."""
        graph, x, result = self.graph, int(operator.inputs[0]), int(operator.outputs[0])
        shape, keep = graph.shape(result), bool(operator.builtinOptions.keepNumDims)
        products, parts = [], []
        for piece in self.pieces:
            parts.append(self._rows_of(result, piece, (*shape[:-1], piece.rows)))
            products.append(graph.operator(LINEAR, [x, piece.tensor, -1], parts[-1:], keepNumDims=keep))
        return [*products, graph.operator("CONCATENATION", parts, [result], axis=len(shape) - 1)]

    def _lookup(self, operator: Any) -> list[Any]:
        """The rows of the first piece, and from each further one those of the tokens that it holds."""
        ids, result = int(operator.inputs[0]), int(operator.outputs[0])
        rows, steps = self._look(ids, result, self.pieces[0])
        for piece in self.pieces[1:]:
            above, looked = self._look(ids, result, piece)
            rows, chosen = self._choose(ids, rows, above, piece)
            steps += [*looked, *chosen]
        steps[-1].outputs = [result]
        return steps

    def _look(self, ids: int, result: int, piece: _Piece) -> tuple[int, list[Any]]:
        """The piece's rows; of tokens outside it, its first or last row."""
        graph, count = self.graph, self.graph.shape(ids)
        moved, least, held = (self._tensor(piece, name, "INT32", count) for name in ("moved", "least", "held"))
        rows = self._rows_of(result, piece, graph.shape(result))
        return rows, [
            graph.operator("SUB", [ids, self._number(piece.start)], [moved]),
            graph.operator("MAXIMUM", [moved, self._number(0)], [least]),
            graph.operator("MINIMUM", [least, self._number(piece.rows - 1)], [held]),
            graph.operator(LOOKUP, [held, piece.tensor], [rows]),
        ]

    def _choose(self, ids: int, below: int, above: int, piece: _Piece) -> tuple[int, list[Any]]:
        """`below` for tokens before the piece, `above` for the others."""
        graph, count = self.graph, self.graph.shape(ids)
        before, column = (
            self._tensor(piece, "before", "BOOL", count),
            self._tensor(piece, "column", "BOOL", (*count, 1)),
        )
        rows = self._tensor(piece, "chosen", "FLOAT32", graph.shape(below))
        return rows, [
            graph.operator("LESS", [ids, self._number(piece.start)], [before]),
            graph.operator("EXPAND_DIMS", [before, self._number(1)], [column]),
            graph.operator("SELECT_V2", [column, below, above], [rows]),
        ]

    def _number(self, value: int) -> int:
        return self.graph.add_constant(np.array([value], np.int32), f"table;{value}")

    def _tensor(self, piece: _Piece, name: str, kind: str, shape: Sequence[int]) -> int:
        return self.graph.add_tensor(f"{self.graph.name(piece.tensor)};{name}", kind, shape)

    def _rows_of(self, result: int, piece: _Piece, shape: Sequence[int]) -> int:
        return self.graph.add_tensor(f"{self.graph.name(result)};{piece.name}", "FLOAT32", shape)
