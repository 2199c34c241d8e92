"""Linear layers whose inputs are rotated in blocks, so that no channel is far beyond the rest when they become int8.

One int8 scale for a token has to serve its largest channel. A Hadamard matrix B [n, n] (entries ±1/√n, B Bᵀ = 1)
spreads each channel evenly over the n of its block, and the layer's columns are rotated the same way: W x =
(W B)(Bᵀ x), W [outputs, inputs] and x [..., inputs] in float32, n a divisor of inputs. In float nothing changes but the
last bits (QuIP#, arXiv 2402.04396; QuaRot, arXiv 2404.00456). Rotations that are free at run time need a norm whose
weight can be moved behind it; Gemma has such norms on both sides of every layer, so here Bᵀ x is computed: n
multiply-adds per channel, in float, once for all layers that read x. It is a convolution of width 1 with a group for
each block, the one operator that cuts channels up where batch and sequence are both unknown. A table that is the head
as well holds rotated rows; those that are looked up are rotated back.

Result: Gemma 3 270M, one row, all layers: KL(fp32 file || int8 file) 0.0037 instead of 0.0452; docs/experiments.md.
"""

from __future__ import annotations

import math

import numpy as np

from pipeline.quantize.hadamard import hadamard, rotate_blocks
from pipeline.quantize.rows import LINEAR, LOOKUP, Keep, layer_name
from pipeline.tflite.graph import Graph
from pipeline.tflite.lazy import Array
from pipeline.tflite.schema import Operator


def rotate_inputs(graph: Graph, chosen: Keep, size: int) -> dict[str, int]:
    """Rotate the float32 layers that `chosen` names and what they read, in every signature.

    Left alone: a matrix that is no multiple of `size` wide, and one whose inputs can't be given the four axes of a
    convolution, since more than one of those they have is unknown.

    Returns:
        `size` by the name of each matrix that was rotated.
    """
    views, rotated, others = graph.views(), dict[int, tuple[Graph, int]](), set[int]()
    for view in views:
        for operator in (operator for operator in view.operators() if view.code(operator) == LINEAR):
            if _is_rotatable(view, operator, chosen, size):
                rotated[_buffer(view, operator)] = view, int(operator.inputs[1])
            else:
                others.add(_buffer(view, operator))
    # A matrix that any layer reads unrotated, in any signature, can't hold rotated columns.
    rotated = {buffer: place for buffer, place in rotated.items() if buffer not in others}
    constants: dict[int, tuple[int, int]] = {}
    for view in views:
        _Rotation(view, set(rotated), size, constants).rewrite()
    for view, tensor in rotated.values():
        view.set_constant(tensor, view.blocks(tensor).map(np.float32, lambda block, _: _columns(block, size)))
    return {view.origin(tensor).matrix: size for view, tensor in rotated.values()}


def _columns(block: Array, size: int) -> Array:
    return rotate_blocks(block, size, np.float32)


def _is_rotatable(view: Graph, operator: Operator, chosen: Keep, size: int) -> bool:
    x, weight = (int(tensor) for tensor in operator.inputs[:2])
    return (
        chosen(layer_name(view, operator))
        and view.is_constant(weight)
        and view.type_of(weight) == "FLOAT32"
        and not view.shape(weight)[-1] % size
        and (len(view.shape(x)) == 4 or view.shape(x).count(-1) < 2)
    )


def _buffer(view: Graph, operator: Operator) -> int:
    return view.buffer(int(operator.inputs[1]))


class _Rotation:
    """The rewriting of one signature; layers with the same input share what is made of it."""

    def __init__(self, graph: Graph, rotated: set[int], size: int, done: dict[int, tuple[int, int]]) -> None:
        """`rotated` are the buffers of the weights; by width, `done` has the buffers of a rotation's constants."""
        self.graph, self.rotated, self.size, self.done = graph, rotated, size, done
        self.inputs: dict[int, int] = {}

    def rewrite(self) -> None:
        self.graph.rewrite(self._change)

    def _change(self, operator: Operator) -> list[Operator]:
        graph, code = self.graph, self.graph.code(operator)
        if code not in (LINEAR, LOOKUP) or _buffer(graph, operator) not in self.rotated:
            return [operator]
        if code == LOOKUP:
            return self._rotate_back(operator)
        x = int(operator.inputs[0])
        before = []
        if x not in self.inputs:
            self.inputs[x] = self._tensor(x, "rotated", graph.shape(x))
            before = self._rotate(x, self.inputs[x])
        operator.inputs[0] = self.inputs[x]
        return [*before, operator]

    def _rotate_back(self, lookup: Operator) -> list[Operator]:
        """`lookup`, and what makes the rows [tokens, channels] of the rotated ones: B is its own inverse."""
        rows = int(lookup.outputs[0])
        looked_up = self._tensor(rows, "found", self.graph.shape(rows))
        lookup.outputs = [looked_up]
        return [lookup, *self._rotate(looked_up, rows)]

    def _rotate(self, x: int, result: int) -> list[Operator]:
        """The operators that rotate `x` [..., channels]; four axes are [batch, sequence, 1, channels]."""
        graph, shape = self.graph, self.graph.shape(x)
        constants, settings = self._constants(shape[-1]), {"strideW": 1, "strideH": 1}
        if len(shape) == 4:
            return [graph.operator("CONV_2D", [x, *constants], [result], **settings)]
        # A RESHAPE can work out one unknown size, not two.
        rows = -1 if -1 in shape else math.prod(shape[:-1])
        before, after = (self._tensor(x, name, (1, rows, 1, shape[-1])) for name in ("wide", "turned"))
        rotation = graph.operator("CONV_2D", [before, *constants], [after], **settings)
        return [self._reshape(x, before), rotation, self._reshape(after, result)]

    def _reshape(self, x: int, result: int) -> Operator:
        graph = self.graph
        shape = graph.add_constant(np.array(graph.shape(result), np.int32), f"{graph.name(result)};shape")
        return graph.operator("RESHAPE", [x, shape], [result])

    def _tensor(self, of: int, name: str, shape: tuple[int, ...]) -> int:
        return self.graph.add_tensor(f"{self.graph.name(of)};{name}", "FLOAT32", shape)

    def _constants(self, width: int) -> list[int]:
        """The filter [width, 1, 1, size] and the bias of a convolution with width / size groups."""
        graph, size = self.graph, self.size
        if width not in self.done:
            # Filters of a grouped convolution, [output channels, 1, 1, channels of a group]: the same matrix for each
            # block.
            basis = np.tile(hadamard(size), (width // size, 1)).reshape(width, 1, 1, size)
            # Both are shared by all layers of that width.
            self.done[width] = graph.add_buffer(basis), graph.add_buffer(np.zeros(width, np.float32))
        tensors = [
            graph.add_tensor(f"hadamard;{width}{end}", "FLOAT32", shape)
            for end, shape in (("", (width, 1, 1, size)), (";bias", (width,)))
        ]
        for tensor, buffer in zip(tensors, self.done[width], strict=True):
            graph.main.tensors[tensor].buffer = buffer
        return tensors
