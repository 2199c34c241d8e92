"""Towers in fewer bits: what a model sees and hears by, in float16, or with int8 weights where most of its weights are.

Both leave every constant as it is that is not of the checkpoint: the spectrogram, the vector behind a picture. In
int8:

- Layers that mix channels (linear ones, and convolutions of 1 x 1, which are linear ones at every place) have int8
  weights with a scale per output, and take what they read in two int8 terms, place by place (`int8x2.py`): a
  convolution's own kernel would give a whole picture one step.
- All other kernels are float16. They are few, come early, and what they lose goes through all that follows: of a
  random tower the first two stages and the kernels of single channels have 1.5 % of the weights and two thirds of the
  error. `keep_float16` of the recipe names layers besides.

Result: docs/experiments.md.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np

from pipeline.core.recipe import BASELINE, Towers
from pipeline.quantize import float16, int8x2, rows
from pipeline.tflite.graph import Graph
from pipeline.tflite.lazy import Blocks
from pipeline.tflite.schema import Operator

_POINTWISE = "CONV_2D"
_MADE = ";places"
"""How products end that are computed place by place."""


def narrow(graph: Graph, precision: str, towers: Towers) -> None:
    """Give a section of a tower, its weights attached in float32, those of `precision`: fp32, fp16 or int8."""
    if precision == BASELINE:
        return
    if precision == "int8":
        keep = rows.keeper(towers.keep_float16)
        for view in graph.views():
            _Places(view, keep).rewrite()
        int8x2.split_inputs(graph, lambda name: name.endswith(_MADE))
    float16.make_half(graph, lambda view, tensor: view.buffer(tensor) in graph.origins)


def weights(graph: Graph) -> tuple[int, int]:
    """Elements of all matrices and kernels of the checkpoint in `graph`, and the bytes that they take with scales."""
    found: dict[int, tuple[int, int]] = {}
    for view in graph.views():
        for tensor, entry in enumerate(view.main.tensors):
            if int(entry.buffer) in graph.origins and len(view.shape(tensor)) > 1:
                found[int(entry.buffer)] = math.prod(view.shape(tensor)), view.stored_bytes(tensor)
    return sum(count for count, _ in found.values()), sum(size for _, size in found.values())


class _Places:
    """The rewriting of one signature: a layer that mixes channels becomes a product of places, [P, 1, inputs]."""

    def __init__(self, graph: Graph, keep: rows.Keep) -> None:
        self.graph, self.keep = graph, keep
        self.read: dict[int, int] = {}
        """The places of what several layers read."""

    def rewrite(self) -> None:
        self.graph.rewrite(self._change)

    def _change(self, operator: Operator) -> Iterable[Operator]:
        graph = self.graph
        if not self._mixes(operator) or self.keep(graph.origin(int(operator.inputs[1])).matrix):
            return [operator]
        x, weight, result = int(operator.inputs[0]), int(operator.inputs[1]), int(operator.outputs[0])
        inputs, outputs = graph.shape(x)[-1], graph.shape(result)[-1]
        before = [] if x in self.read else [self._shaped(x, (math.prod(graph.shape(x)[:-1]), 1, inputs))]
        kernel = graph.blocks(weight)
        matrix = Blocks((outputs, inputs), kernel.dtype, lambda *part: kernel.rows(*part).reshape(-1, inputs))
        graph.set_constant(weight, *rows.quantise_rows(matrix))
        graph.main.tensors[weight].shape = [outputs, inputs]
        made = graph.add_tensor(f"{graph.name(result)}{_MADE}", "FLOAT32", (graph.shape(self.read[x])[0], 1, outputs))
        bias = [int(tensor) for tensor in operator.inputs[2:] if int(tensor) >= 0 and graph.constant(int(tensor)).any()]
        layer = [self.read[x], weight, *(bias or [-1])]
        product = graph.operator(rows.LINEAR, layer, [made], rows.LINEAR_VERSION, keepNumDims=True)
        return [*before, product, self._reshape(made, result)]

    def _mixes(self, operator: Operator) -> bool:
        """Whether it is a linear layer of the checkpoint's weights, at every place by itself."""
        graph, weight = self.graph, int(operator.inputs[1]) if len(operator.inputs) > 1 else -1
        if not graph.is_constant(weight) or graph.buffer(weight) not in graph.origins:
            return False
        if graph.code(operator) == rows.LINEAR:
            return True
        options, shape = operator.builtinOptions, graph.shape(weight)
        return graph.code(operator) == _POINTWISE and (*shape[1:3], options.strideH, options.strideW) == (1, 1, 1, 1)

    def _shaped(self, x: int, shape: tuple[int, ...]) -> Operator:
        self.read[x] = self.graph.add_tensor(f"{self.graph.name(x)}{_MADE}", "FLOAT32", shape)
        return self._reshape(x, self.read[x])

    def _reshape(self, x: int, to: int) -> Operator:
        shape = np.array(self.graph.shape(to), np.int32)
        return self.graph.operator("RESHAPE", [x, self.graph.add_constant(shape, "shape")], [to])
