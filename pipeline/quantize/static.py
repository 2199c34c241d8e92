"""The static scheme: matrix products between integers, with ranges that calibration found.

Weights [outputs, inputs] have 8 bits and a scale per row, activations [..., channels] 8 bits or 16 and one scale and
zero point per tensor (Jacob et al., arXiv 1712.05877). Which operators that are, and why no others: `make_static`.

What LiteRT 2.3.0 does with 16 bits sets the form. XNNPACK has no such kernel. 8 bits in and 16 out, or the reverse,
gives zeros without a word. Without a bias the built-in kernel adds up in 32 bits and wraps around without a word; with
one it adds up in 64, thirty times as slowly. So a layer gets a bias, of zeros, only where its largest row could wrap
around (`_wraps`); in Gemma 3 270M, some of the `down_proj`.

With 8 bits one range must hold all channels of a tensor, and in Gemma 3 some channels are a hundred times the rest. A
layer that the recipe's `int8x2_static` names escapes from that on both sides:

- its input is two int8 tensors, the value and what rounding it leaves over, some 16 bits in all. The layer is computed
  of each, with the same weights, and the results are added: the static form of `int8x2.py`.
- each channel of its result has a range of its own: rows of the weights are divided by it in their scales, which costs
  nothing, and a multiplication in float32 puts it back.

Result: Gemma 3 270M has a KL(fp32 file || file) of 0.050 with 8 bits, 0.013 with 16; docs/experiments.md.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from pipeline.quantize.calibrate import Statistics
from pipeline.quantize.rows import LINEAR, PRODUCT, Keep, layer_name, quantise_weights
from pipeline.tflite.graph import Graph
from pipeline.tflite.lazy import Array, Scales
from pipeline.tflite.schema import Operator

Bits = Literal[8, 16]

# Operators that only move values: their output has the input's scale, so they are integer on the way into a product.
_MOVES = ("RESHAPE", "TRANSPOSE", "SQUEEZE", "EXPAND_DIMS", "STRIDED_SLICE", "SLICE", "BROADCAST_TO")
_KINDS: Mapping[Bits, str] = {8: "INT8", 16: "INT16"}
# Versions that TFLite's version rules demand of 16-bit products and of what leads there and back.
_DEQUANTIZE_VERSION: Mapping[Bits, int] = {8: 2, 16: 3}
_QUANTIZE_VERSION: Mapping[Bits, int] = {8: 1, 16: 2}
_PRODUCT_INT16_VERSION = 3
# How much wider than what calibration saw a range is, where its steps are fine enough: two rows of 8 bits, and 16 bits.
_ROOM, _ROOM_16 = 1.25, 2.0
# XNNPACK refuses a product of scales outside 2⁻³² … 2⁸; the second keeps channels that are always zero from a division.
_SMALLEST_REACH, _NOTHING = 2.0**-20, 1e-30
_DEVIATIONS = 6.0
"""Standard deviations of noise that the result's range holds where a layer takes the remainder of rounding."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What becomes integer (places in `main.operators`), and the tensors whose ranges that needs.

    `integer` operators take and give one integer tensor each; `split` linear layers take two and give float32.
    """

    integer: frozenset[int]
    split: frozenset[int]
    wanted: tuple[int, ...]


def plan_static(graph: Graph, keep: Keep, two: Keep = lambda _: False, *, float_scores: bool = False) -> Plan:
    """Choose the operators of the static scheme.

    Every matrix product becomes integer but the head, what picks its rows, and those that `keep` names; and so does
    what only moves values on the way into one. Everything else stays float32; see the measurements at `make_static`.
    Linear layers that `two` names take two tensors; with `float_scores` what a softmax reads is left in float too.
    """
    left, operators = _heads(graph) | (_scores(graph) if float_scores else set()), graph.main.operators
    products = {
        place
        for place, operator in enumerate(operators)
        if _is_product(graph, operator) and id(operator) not in left and not keep(layer_name(graph, operator))
    }
    split = {
        place for place in products if _is_plain(graph, operators[place]) and two(layer_name(graph, operators[place]))
    }
    # int8×2 layers read a float tensor, which they split themselves.
    moves = _moves_into(graph, products - split)
    moved = {int(i) for place in moves for i in operators[place].outputs}
    wanted: dict[int, None] = {}
    # In the order of the graph: calibration and rewriting then agree on it.
    for place in sorted(products | moves):
        wanted.update(dict.fromkeys(_activations(graph, operators[place])))
    return Plan(
        integer=frozenset(products - split | moves),
        split=frozenset(split),
        wanted=tuple(tensor for tensor in wanted if tensor not in moved),
    )


def _heads(graph: Graph) -> set[int]:
    """Identities of the products that give the logits, and of those that pick the rows they are given for.

    A step graph picks the last token of each row with a product by ones and zeros. As an integer product it would round
    what the head sees, and save nothing.
    """
    heads = _last_products(graph, map(int, graph.main.outputs))
    producers = graph.producers()
    # The product before a head is the one that picks rows; a linear layer there is an ordinary one.
    before = [producers.get(int(head.inputs[0])) for head in heads if graph.code(head) == LINEAR]
    picking = [operator for operator in before if operator is not None and graph.code(operator) == PRODUCT]
    return {id(operator) for operator in (*heads, *picking)}


def _scores(graph: Graph) -> set[int]:
    """Identities of the products that a softmax reads."""
    # Between the product and the softmax stand only scaling, soft-cap and mask.
    read = [int(operator.inputs[0]) for operator in graph.operators() if graph.code(operator) == "SOFTMAX"]
    return {id(operator) for operator in _last_products(graph, read)}


def _last_products(graph: Graph, tensors: Iterable[int]) -> list[Operator]:
    """The products that `tensors` come from, without another product between."""
    producers, products, waiting, seen = graph.producers(), list[Operator](), list(tensors), set[int]()
    while waiting:
        tensor = waiting.pop()
        operator = producers.get(tensor)
        if operator is None or tensor in seen:
            continue
        seen.add(tensor)
        if _multiplies(graph, operator):
            products.append(operator)
        else:
            waiting += [int(i) for i in operator.inputs if i >= 0]
    return products


def _multiplies(graph: Graph, operator: Operator) -> bool:
    return graph.code(operator) in (LINEAR, PRODUCT)


def _is_product(graph: Graph, operator: Operator) -> bool:
    return _multiplies(graph, operator) and all(graph.type_of(i) == "FLOAT32" for i in _activations(graph, operator))


def _is_plain(graph: Graph, operator: Operator) -> bool:
    """Whether it is a linear layer without a bias."""
    return graph.code(operator) == LINEAR and all(int(i) < 0 for i in operator.inputs[2:])


def _activations(graph: Graph, operator: Operator) -> list[int]:
    """The float tensors that `operator` reads and writes while running."""
    tensors = [int(i) for i in (*operator.inputs, *operator.outputs)]
    return [i for i in tensors if i >= 0 and not graph.is_constant(i) and graph.type_of(i) == "FLOAT32"]


def _moves_into(graph: Graph, chosen: set[int]) -> set[int]:
    """Operators that only move values, all of whose readers are integer."""
    integer = {id(graph.main.operators[place]) for place in chosen}
    consumers, results = graph.consumers(), {int(i) for i in graph.main.outputs}
    moves: set[int] = set()
    # Against the flow: a move into a move into a product is one too.
    for place in reversed(range(len(graph.main.operators))):
        operator = graph.main.operators[place]
        output = int(operator.outputs[0])
        if graph.code(operator) not in _MOVES or graph.type_of(output) != "FLOAT32" or output in results:
            continue
        readers = consumers.get(output, [])
        # One float reader would need a DEQUANTIZE behind the move, and nothing would be saved.
        if readers and all(id(reader) in integer for reader in readers):
            integer.add(id(operator))
            moves.add(place)
    return moves


def make_static(graph: Graph, plan: Plan, seen: Mapping[int, Statistics], keep: Keep, bits: Bits = 8) -> None:
    """int8 weights, and activations of `bits` around every operator of `plan`, with conversions at the borders.

    Only matrix products (99.9 % of multiply-adds) are integer. Each other kind of operator was tried as well: norms,
    masks and residuals lose far more than they could save, and an integer head ties logits. In attention the scores
    stay in float where the recipe says `float_scores`, which halves what Gemma 3 loses (docs/experiments.md).

    The head keeps int8 weights and quantises its one input row while it runs, so logits are float32.
    """
    quantise_weights(graph, keep)
    _Static(graph, plan, seen, bits).rewrite()


class _Static:
    """The rewriting of one graph; operators that read the same tensor share its integer twin."""

    def __init__(self, graph: Graph, plan: Plan, seen: Mapping[int, Statistics], bits: Bits) -> None:
        self.graph, self.seen, self.bits = graph, seen, bits
        # 255 steps are too few to waste on outliers; of 65,535 half may stand idle.
        choose = best_scales if bits == 8 else wide_scales
        self.scales = _activation_scales(
            graph, plan, {tensor: choose(statistics) for tensor, statistics in seen.items()}
        )
        operators, self.consumers = graph.main.operators, graph.consumers()
        self.integer = {id(operators[place]) for place in plan.integer}
        self.split = {id(operators[place]) for place in plan.split}
        self.results = {int(i) for i in graph.main.outputs}
        self.twins: dict[int, int] = {}
        self.pairs: dict[int, tuple[int, int]] = {}
        self.steps: dict[int, float] = {}

    def rewrite(self) -> None:
        if self.bits == 16:
            self.graph.opcode(PRODUCT, _PRODUCT_INT16_VERSION)
        self.graph.rewrite(self._change)

    def _change(self, operator: Operator) -> list[Operator]:
        if id(operator) in self.split:
            return self._change_int8x2(operator)
        if id(operator) not in self.integer:
            return [operator]
        result = int(operator.outputs[0])
        new = [i for i in _activations(self.graph, operator) if i != result and i not in self.twins]
        before = [self._quantise(i, self._twin(i)) for i in dict.fromkeys(new)]
        if self.graph.code(operator) == LINEAR:
            self._set_bias(operator)
        operator.inputs = [self.twins.get(int(i), int(i)) for i in operator.inputs]
        operator.outputs = [self._twin(result)]
        readers = self.consumers.get(result, [])
        # Both twins may live: float readers get theirs from the integer one, so they see the same values.
        back = result in self.results or any(id(reader) not in self.integer for reader in readers)
        return [*before, operator, *([self._dequantise(self._twin(result), result)] if back else [])]

    def _twin(self, tensor: int) -> int:
        """The integer counterpart of a float tensor."""
        if tensor not in self.twins:
            self.twins[tensor] = self._integer(tensor, f";{_KINDS[self.bits].lower()}", self.scales[tensor])
        return self.twins[tensor]

    def _integer(self, of: int, name: str, scales: Scales) -> int:
        graph = self.graph
        return graph.add_tensor(f"{graph.name(of)}{name}", _KINDS[self.bits], graph.shape(of), scales)

    def _float(self, of: int, name: str) -> int:
        return self.graph.add_tensor(f"{self.graph.name(of)}{name}", "FLOAT32", self.graph.shape(of))

    def _quantise(self, tensor: int, twin: int) -> Operator:
        return self.graph.operator("QUANTIZE", [tensor], [twin], version=_QUANTIZE_VERSION[self.bits])

    def _dequantise(self, twin: int, tensor: int) -> Operator:
        return self.graph.operator("DEQUANTIZE", [twin], [tensor], version=_DEQUANTIZE_VERSION[self.bits])

    def _set_bias(self, operator: Operator) -> None:
        """The bias in the unit in which the kernel adds up; at 16 bits a wide one also where none was but sums wrap."""
        graph, bias = self.graph, int(operator.inputs[2]) if len(operator.inputs) > 2 else -1
        weight, step = int(operator.inputs[1]), self.scales[int(operator.inputs[0])].scale[0]
        weight_scales = graph.scales(weight)
        assert weight_scales is not None
        unit, kind = step * weight_scales.scale, np.int32 if self.bits == 8 else np.int64
        values = np.zeros(unit.size) if bias < 0 else graph.constant(bias)
        if bias >= 0 or (self.bits == 16 and _wraps(graph, weight)):
            name = f"{graph.name(bias if bias >= 0 else weight)};bias;{np.dtype(kind).name}"
            constant = graph.add_constant(_steps(values, unit, kind), name, Scales.channels(unit))
            operator.inputs = [*operator.inputs[:2], constant]

    # --- int8×2: layers of two tensors

    def _change_int8x2(self, operator: Operator) -> list[Operator]:
        """A linear layer of two int8 tensors, the value and the remainder, whose results are added in float32."""
        x, result = int(operator.inputs[0]), int(operator.outputs[0])
        before = [] if x in self.pairs else self._split(x)
        value, rest = self.pairs[x]
        peak = self.seen[result].peak
        assert peak is not None
        # Rounding errors are uniform in a step.
        rounding = self.steps[x] / np.sqrt(12)  # its standard deviation
        noise = _DEVIATIONS * rounding * _row_norms(self.graph, int(operator.inputs[1]))
        reach = np.hypot(peak, noise)  # the value alone is further from zero than with its remainder
        layers = [self._layer(operator, value, ";value", reach), self._layer(operator, rest, ";rest", noise)]
        terms = [int(layer[-1].outputs[0]) for layer in layers]
        return [*before, *layers[0], *layers[1], self.graph.operator("ADD", terms, [result])]

    def _split(self, x: int) -> list[Operator]:
        """The operators that make two int8 tensors of `x`: rounded to steps, and the rest in steps 254 times finer.

        The range of the first has room beyond what calibration saw, for the second gives back what that costs.
        """
        seen = self.seen[x]
        # Symmetric: the remainder of a value beyond the range must have room on either side.
        step = _ROOM * max(-seen.low, seen.high) / 127
        self.steps[x] = step
        value, rest = (self._integer(x, n, Scales.tensor(s)) for n, s in ((";value", step), (";rest", step / 254)))
        self.pairs[x] = value, rest
        whole, left = (self._float(x, name) for name in (";whole", ";left"))
        return [
            self._quantise(x, value),
            self._dequantise(value, whole),
            self.graph.operator("SUB", [x, whole], [left]),
            self._quantise(left, rest),
        ]

    def _layer(self, operator: Operator, source: int, name: str, reach: Array) -> list[Operator]:
        """`operator` of the int8 tensor `source`; channel c of the result is at most `reach`[c], up to its sign."""
        graph, result = self.graph, int(operator.outputs[0])
        # A channel that is always zero would divide weights by zero.
        reach = np.maximum(reach, reach.max() * _SMALLEST_REACH + _NOTHING).astype(np.float32)
        # After the division every channel lies within −1 … 1: one scale serves all of them exactly.
        share = self._integer(result, name, Scales.tensor(1 / 127))
        weight = self._divided(int(operator.inputs[1]), f"{graph.name(result)}{name}", reach)
        factors = graph.add_constant(reach, f"{graph.name(result)}{name};reach")
        small, term = self._float(result, f"{name};share"), self._float(result, f"{name};float")
        return [
            graph.operator(LINEAR, [source, weight, -1], [share], keepNumDims=operator.builtinOptions.keepNumDims),
            self._dequantise(share, small),
            graph.operator("MUL", [small, factors], [term]),
        ]

    def _divided(self, weight: int, name: str, by: Array) -> int:
        """The same weights in another tensor, whose rows count as divided by `by`."""
        graph, scales = self.graph, self.graph.scales(weight)
        assert scales is not None
        divided = graph.add_tensor(
            f"{graph.name(weight)};{name}", "INT8", graph.shape(weight), Scales.channels(scales.scale / by)
        )
        # The same bytes under other scales: value and remainder, each with its division, cost the file no weights.
        graph.main.tensors[divided].buffer = graph.main.tensors[weight].buffer
        return divided


def _row_norms(graph: Graph, weight: int) -> NDArray[np.float64]:
    """Euclidean norm of each row of int8 weights, in real numbers."""
    scales = graph.scales(weight)
    assert scales is not None
    squares = graph.blocks(weight).each(lambda block: (block.astype(np.float64) ** 2).sum(axis=1))
    return np.asarray(np.sqrt(np.concatenate(list(squares))) * scales.scale)


def _wraps(graph: Graph, weight: int) -> bool:
    """Whether a row of int8 weights times the largest int16 activations can go beyond 32 bits."""
    sums = graph.blocks(weight).each(lambda block: np.abs(block.astype(np.int64)).sum(axis=1).max())
    # The worst case: every input at its limit, with the sign of its weight.
    return int(max(sums)) * 2**15 >= 2**31


def _steps(values: Array, unit: Array, kind: type[np.int32] | type[np.int64]) -> Array:
    """`values` in multiples of `unit`, as integers of `kind`."""
    limits = np.iinfo(kind)
    # In float64: beyond 2²⁴ a float32 skips integers.
    wanted = np.rint(values / unit.astype(np.float64))
    return np.clip(wanted, limits.min, limits.max).astype(kind)


def _activation_scales(graph: Graph, plan: Plan, own: Mapping[int, Scales]) -> dict[int, Scales]:
    """The scales of every integer activation: its own, or that of the tensor it is moved from."""
    scales = dict(own)
    # In order, so that a move of a move finds the scale of its source.
    for place in sorted(plan.integer):
        operator = graph.main.operators[place]
        if graph.code(operator) in _MOVES:
            scales[int(operator.outputs[0])] = scales[int(operator.inputs[0])]
    return scales


def wide_scales(seen: Statistics) -> Scales:
    """The int16 scale of a range twice as wide as what was seen; zero is 0, as the kernels demand."""
    return Scales.tensor(_ROOM_16 * max(-seen.low, seen.high) / 32767)


def best_scales(seen: Statistics) -> Scales:
    """The int8 scale and zero point with the least mean square error, zero always exact.

    Both ends of the observed range are drawn in by a common factor, 0.3 to 1; what lies outside is clipped.
    """
    values, weight = seen.centres(), seen.counts / seen.counts.sum()
    # Zero has to be exact: it pads, and it is what a mask leaves.
    low, high = min(seen.low, 0.0), max(seen.high, 0.0)
    best, least = (low, high), np.inf
    # Steps of a hundredth: between two of them the error hardly changes.
    for factor in np.linspace(0.3, 1.0, 71):
        inside = np.clip(values, low * factor, high * factor)
        step = (high - low) * factor / 255
        # What clipping costs outside, and inside a step's uniform rounding error.
        error = float((weight * ((values - inside) ** 2 + (values == inside) * step**2 / 12)).sum())
        if error < least:
            best, least = (low * factor, high * factor), error
    scale = (best[1] - best[0]) / 255
    return Scales.tensor(scale, int(np.clip(np.rint(-128 - best[0] / scale), -128, 127)))
