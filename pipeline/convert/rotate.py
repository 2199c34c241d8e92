"""Linear layers whose inputs are rotated in blocks, so that no channel is far beyond the rest when they become int8.

One int8 scale for a token has to serve its largest channel. A Hadamard matrix B (entries ±1/√n, B Bᵀ = 1) spreads each
channel evenly over the n of its block, and the layer's columns are rotated the same way: W x = (W B)(Bᵀ x). In float
nothing changes but the last bits (QuIP#, arXiv 2402.04396; QuaRot, arXiv 2404.00456). Rotations that are free at run
time need a norm whose weight can be moved behind it; Gemma has such norms on both sides of every layer, so here Bᵀ x is
computed: n multiply-adds per channel, in float, once for all layers that read x.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from pipeline.convert.flatbuffer import Array, Graph
from pipeline.convert.hadamard import hadamard, rotate_blocks
from pipeline.convert.quantize import LINEAR, LOOKUP, PRODUCT, Keep


def rotate_inputs(graph: Graph, chosen: Keep, size: int) -> dict[str, int]:
    """Rotate the float32 layers that `chosen` names and what they read, in every signature.

    Left alone: a matrix that is no multiple of `size` wide, one that is looked up as well (the rows of a table are
    what they are), and an input whose last axis but one is not of size 1.

    Returns:
        `size` by the name of each matrix that was rotated.
    """
    views = graph.each()
    matrices = {buffer: name for view in views for buffer, name in _matrices(view, chosen, size).items()}
    spoken_for = {buffer for view in views for buffer in _others(view, chosen, size)}
    turned = {buffer: name for buffer, name in matrices.items() if buffer not in spoken_for}
    if not turned:
        return {}
    basis = graph.add_buffer(hadamard(size))
    done: set[int] = set()
    for view in views:
        _Rotation(view, set(turned), basis, size, done).rewrite()
    return dict.fromkeys(turned.values(), size)


def _matrices(view: Graph, chosen: Keep, size: int) -> dict[int, str]:
    """Buffer → name of the weights that can be rotated."""
    wanted = [operator for operator in view.operators() if _is_rotatable(view, operator, chosen, size)]
    return {_buffer(view, operator): view.name(int(operator.inputs[1])) for operator in wanted}


def _others(view: Graph, chosen: Keep, size: int) -> set[int]:
    """Buffers that operators read which stay as they are."""
    rest = [operator for operator in view.operators() if not _is_rotatable(view, operator, chosen, size)]
    return {_buffer(view, operator) for operator in rest if view.code(operator) in (LINEAR, LOOKUP)}


def _is_rotatable(view: Graph, operator: Any, chosen: Keep, size: int) -> bool:
    if view.code(operator) != LINEAR or not chosen(view.operator_name(operator)):
        return False
    taken, weight = (int(tensor) for tensor in operator.inputs[:2])
    return (
        view.is_constant(weight)
        and view.type_of(weight) == "FLOAT32"
        and not view.shape(weight)[-1] % size
        and view.shape(taken)[-2:-1] == (1,)
    )


def _buffer(view: Graph, operator: Any) -> int:
    return int(view.main.tensors[int(operator.inputs[1])].buffer)


class _Rotation:
    """The rewriting of one signature; layers with the same input share what is made of it."""

    def __init__(self, graph: Graph, turned: set[int], basis: int, size: int, done: set[int]) -> None:
        """`turned` are the buffers of the weights, `basis` that of the matrix; `done` of them are rotated already."""
        self.graph, self.turned, self.basis, self.size, self.done = graph, turned, basis, size, done
        self.inputs: dict[int, int] = {}

    def rewrite(self) -> None:
        self.matrix = self.graph.add_tensor("hadamard", "FLOAT32", (self.size, self.size))
        self.graph.main.tensors[self.matrix].buffer = self.basis
        self.graph.rewrite(self._change)

    def _change(self, operator: Any) -> list[Any]:
        if self.graph.code(operator) != LINEAR or _buffer(self.graph, operator) not in self.turned:
            return [operator]
        taken, weight = (int(tensor) for tensor in operator.inputs[:2])
        before = [] if taken in self.inputs else self._turn(taken)
        operator.inputs[0] = self.inputs[taken]
        if _buffer(self.graph, operator) not in self.done:
            self.done.add(_buffer(self.graph, operator))
            self.graph.set_constant(weight, self.graph.blocks(weight).map(np.float32, self._columns))
        return [*before, operator]

    def _columns(self, block: Array, _row: int) -> Array:
        return rotate_blocks(block, self.size).astype(np.float32)

    def _turn(self, x: int) -> list[Any]:
        """The operators that rotate `x` [..., 1, inputs]: the axis before the last is there for the blocks.

        Cut and joined, not reshaped: a shape with batch and sequence both unknown can't be said.
        """
        graph, shape, size = self.graph, self.graph.shape(x), self.size
        count, last = shape[-1] // size, len(shape) - 1
        tensor = partial(self._tensor, x)
        pieces, turned = ([tensor(f"{name}_{i}", 1, size) for i in range(count)] for name in ("piece", "turned"))
        blocks, product = tensor("blocks", count, size), tensor("rotation", count, size)
        self.inputs[x] = tensor("rotated", 1, shape[-1])
        axes = (graph.add_constant(np.array(axis, np.int32), f"{graph.name(x)};axis") for axis in (last, last - 1))
        along, across = axes
        return [
            graph.operator("SPLIT", [along, x], pieces, numSplits=count),
            graph.operator("CONCATENATION", pieces, [blocks], axis=last - 1),
            graph.operator(PRODUCT, [blocks, self.matrix], [product]),
            graph.operator("SPLIT", [across, product], turned, numSplits=count),
            graph.operator("CONCATENATION", turned, [self.inputs[x]], axis=last),
        ]

    def _tensor(self, x: int, name: str, *end: int) -> int:
        """A new tensor with the leading axes of `x` and the last two as `end`."""
        graph = self.graph
        return graph.add_tensor(f"{graph.name(x)};{name}", "FLOAT32", (*graph.shape(x)[:-2], *end))
