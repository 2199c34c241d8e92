"""int8×2: a linear layer takes its input in two int8 terms, the value and the remainder of rounding it, as two rows.

Why: int8 activations cost far more than int8 weights where some channels are many times larger than the rest, as in
Gemma 3. Scales moved between neighbouring layers (SmoothQuant, arXiv 2211.10438) make the weights worse.

How: XNNPACK quantises each row of a hybrid product's input by itself, with the step s = (max - min) / 255. Here the
graph rounds x, float32 [..., 1, inputs], to multiples of that s first, a = round(x / s) * s, which the kernel then
takes over exactly, and gives it x - a as a second row, [..., 2, inputs], whose step is some 255 times finer. The two
results are added. The weights are read once for both rows, so a decoder, which waits for its weights, hardly notices; a
prefill does these products twice.

Result: Gemma 3 270M's int8 loses what its weights cost and no more, 0.0070 nats instead of 0.041; docs/experiments.md.
"""

from __future__ import annotations

import numpy as np

from pipeline.quantize.rows import LINEAR, Keep, layer_name
from pipeline.tflite.graph import Graph
from pipeline.tflite.lazy import Array
from pipeline.tflite.schema import Operator

ROWS = "rows"
# The kernel cuts a row's range into as many steps, for its integers are −128 … 127.
_STEPS = 255.0
# Keeps a row of zeros from a division by zero; activations are many orders above.
_SMALLEST_STEP = 1e-30


def split_inputs(graph: Graph, chosen: Keep) -> None:
    """Give linear layers that `chosen` names their input as two rows, in every signature.

    A layer must see float32 [..., 1, inputs]: the rows stand on that axis, there in all graphs of this project.
    """
    for view in graph.views():
        _Int8x2(view, chosen).rewrite()


class _Int8x2:
    """The rewriting of one signature; layers with the same input share its rows."""

    def __init__(self, graph: Graph, chosen: Keep) -> None:
        self.graph, self.chosen = graph, chosen
        self.rows: dict[int, int] = {}
        self.terms: dict[int, list[int]] = {}
        self.constants: dict[str, int] = {}

    def rewrite(self) -> None:
        self.graph.rewrite(self._change)

    def _change(self, operator: Operator) -> list[Operator]:
        graph = self.graph
        if graph.code(operator) != LINEAR or not self.chosen(layer_name(graph, operator)):
            return [operator]
        x, result = int(operator.inputs[0]), int(operator.outputs[0])
        shape = graph.shape(x)
        # Rows on another axis would be other tokens; and what is no float32 has been made integer already.
        if len(shape) < 2 or shape[-2] != 1 or graph.type_of(x) != "FLOAT32":
            return [operator]
        weight = int(operator.inputs[1])
        if graph.is_constant(weight) and graph.type_of(weight) == "INT4":
            return self._as_two_layers(operator, shape)
        before = [] if x in self.rows else self._stack(x, shape)
        products = self._tensor(result, ROWS, (*graph.shape(result)[:-2], 2, graph.shape(result)[-1]))
        # A kernel would add it to each of the two rows, that is twice.
        bias = int(operator.inputs[2]) if len(operator.inputs) > 2 else -1
        total = result if bias < 0 else self._tensor(result, "sum", graph.shape(result))
        operator.inputs = [self.rows[x], weight, -1]
        operator.outputs = [products]
        operator.builtinOptions.asymmetricQuantizeInputs = True  # else the built-in kernels take another step
        after = [graph.operator("SUM", [products, self._axis(len(shape) - 2)], [total], keepDims=True)]
        if bias >= 0:  # added once, to the sum, and not to each row
            after.append(graph.operator("ADD", [total, bias], [result]))
        return [*before, operator, *after]

    def _as_two_layers(self, operator: Operator, shape: tuple[int, ...]) -> list[Operator]:
        """The layer once for each term, and the sum: of 4-bit weights XNNPACK has a fast kernel for one row alone."""
        graph, x, result = self.graph, int(operator.inputs[0]), int(operator.outputs[0])
        before = [] if x in self.terms else self._split(x, shape)
        value, remainder = self.terms[x]
        products = [self._tensor(result, name, graph.shape(result)) for name in ("coarse", "fine")]
        keep = bool(operator.builtinOptions.keepNumDims)
        # The same tensor of weights in both: the file holds it once.
        second = graph.operator(LINEAR, [remainder, int(operator.inputs[1]), -1], products[1:], keepNumDims=keep)
        operator.inputs, operator.outputs = [value, *operator.inputs[1:]], products[:1]
        for layer in (operator, second):
            layer.builtinOptions.asymmetricQuantizeInputs = True  # else the built-in kernels take another step
        return [*before, operator, second, graph.operator("ADD", products, [result])]

    def _stack(self, x: int, shape: tuple[int, ...]) -> list[Operator]:
        """The operators that make [..., 2, inputs] of `x` [..., 1, inputs]."""
        before = [] if x in self.terms else self._split(x, shape)
        # On the axis before the channels: the kernel quantises each row by itself, with a step of its own.
        self.rows[x] = self._tensor(x, ROWS, (*shape[:-2], 2, shape[-1]))
        return [*before, self.graph.operator("CONCATENATION", self.terms[x], [self.rows[x]], axis=len(shape) - 2)]

    def _split(self, x: int, shape: tuple[int, ...]) -> list[Operator]:
        """The operators that make of `x` its value in the kernel's own steps, and the remainder."""
        graph, per_row = self.graph, (*shape[:-1], 1)
        high, low, width = (self._tensor(x, name, per_row) for name in ("max", "min", "range"))
        share, step = (self._tensor(x, name, per_row) for name in ("share", "step"))
        steps, whole, value, rest = (self._tensor(x, name, shape) for name in ("steps", "whole", "coarse", "rest"))
        self.terms[x] = [value, rest]
        axis, scale = self._axis(len(shape) - 1), self._scalar("scale", 1 / _STEPS)
        least = self._scalar("least", _SMALLEST_STEP)
        return [
            graph.operator("REDUCE_MAX", [x, axis], [high], keepDims=True),
            graph.operator("REDUCE_MIN", [x, axis], [low], keepDims=True),
            graph.operator("SUB", [high, low], [width]),
            graph.operator("MUL", [width, scale], [share]),
            graph.operator("ADD", [share, least], [step]),
            graph.operator("DIV", [x, step], [steps]),
            graph.operator("ROUND", [steps], [whole]),
            graph.operator("MUL", [whole, step], [value]),
            graph.operator("SUB", [x, value], [rest]),
        ]

    def _tensor(self, of: int, name: str, shape: tuple[int, ...]) -> int:
        return self.graph.add_tensor(f"{self.graph.name(of)};{name}", "FLOAT32", shape)

    def _axis(self, axis: int) -> int:
        return self._constant(f"axis_{axis}", np.array([axis], np.int32))

    def _scalar(self, name: str, value: float) -> int:
        return self._constant(name, np.array([value], np.float32))

    def _constant(self, name: str, values: Array) -> int:
        if name not in self.constants:  # names stand in the files, whose bytes are to stay
            self.constants[name] = self.graph.add_constant(values, f"two_rows;{name}")
        return self.constants[name]
