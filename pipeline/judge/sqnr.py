"""SQNR (signal to quantisation noise) of every operator's result: where a file leaves the one it was made from.

Both run with the built-in kernels on the same tokens, step graphs at once and decoders token by token, each with its
own cache. Each result is held against that of the operator of the same name. 20 dB is noise of a hundredth of the
signal's power, 40 dB of a ten-thousandth.

Names are all that relates two files. The table of origins (`tflite.graph.Origin`) stands in memory while a file is
made, and is of constants alone; a flatbuffer keeps a tensor's name, type, shape and scales, which many tensors share.
Both files may also be of another project, or of an earlier commit.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline.core import log
from pipeline.core.errors import UsageError
from pipeline.core.manifest import Fact
from pipeline.runtime import litert
from pipeline.runtime.interface import Interpreter
from pipeline.runtime.litert import Tokens
from pipeline.tflite.graph import Graph

LOUD = 20.0
"""Decibels below which a result counts as having left the reference."""
MOST = 200.0
"""Decibels of results that are the same."""
_CLEAR = 60.0
"""Decibels above which no more is asked: what is exact before an operator would make any loss in it look large."""
_MASK = 1e6
"""Attention scores beyond this are those that a mask forbids; they would drown all signal."""
_LAYER = re.compile(r"(?:^|\.)layers\.\d+")
_BEFORE, _AFTER = "before the layers", "after the layers"


@dataclass(frozen=True, kw_only=True)
class OperatorSqnr:
    """One operator: its name and kind, the layer it is in, decibels of its result, and how many it lost.

    `drop` is the difference to its noisiest input, of which no more than 60 dB count. `leaves`: another layer reads it.
    """

    name: str
    code: str
    layer: str
    decibels: float
    drop: float
    leaves: bool


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """All operators that could be compared, in the order in which they run.

    `first` is the first operator below 20 dB whose noise goes all the way to the logits; None where the logits are
    above. `steepest` is the operator that loses most decibels. `tokens` is how many both graphs were given.
    """

    tokens: int
    operators: tuple[OperatorSqnr, ...]
    first: OperatorSqnr | None
    steepest: OperatorSqnr

    def layers(self) -> dict[str, tuple[OperatorSqnr, OperatorSqnr]]:
        """Layer → the noisiest operator of those that other layers read, and of all."""
        inside: dict[str, list[OperatorSqnr]] = {}
        for operator in self.operators:
            inside.setdefault(operator.layer, []).append(operator)
        return {
            layer: (_noisiest([operator for operator in own if operator.leaves] or own[-1:]), _noisiest(own))
            for layer, own in inside.items()
        }

    def sentence(self) -> str:
        """What was found, in words."""
        steepest = f"most is lost in {_named(self.steepest)}"
        if not self.first:
            end = self.operators[-1].decibels
            return f"no operator leaves the reference for good: the logits keep {end:.1f} dB; {steepest}"
        first = f"the first to leave the reference is {_named(self.first)}"
        return first if self.first == self.steepest else f"{first}; {steepest}"

    def facts(self) -> dict[str, Fact]:
        """The comparison as JSON; `curve` has the decibels of every operator."""
        rows: list[Fact] = [
            {"layer": layer, "decibels": out.decibels, "worst": _facts(worst)}
            for layer, (out, worst) in self.layers().items()
        ]
        curve: list[Fact] = [[operator.layer, operator.decibels] for operator in self.operators]
        return {
            "tokens": self.tokens,
            "says": self.sentence(),
            "first": _facts(self.first) if self.first else None,
            "steepest": _facts(self.steepest),
            "layers": rows,
            "curve": curve,
        }


def trace(file: Path, reference: Path, samples: Sequence[Tokens]) -> Comparison:
    """Run both step graphs on `samples` [L] each, and compare what every operator makes of them.

    Raises:
        UsageError: one is no step graph, or they have no operator in common.
    """
    return compare(StepGraph(file), StepGraph(reference), samples)


def compare(ours: Running, theirs: Running, samples: Sequence[Tokens]) -> Comparison:
    """Replay `samples` [L] each on both, and compare what every operator makes of them.

    Raises:
        UsageError: they have no operator in common.
    """
    pairs = _pairs(ours, theirs)
    if not pairs:
        raise UsageError("the files have no operator of the same name", remedy="name two graphs of one model")
    signal, noise = np.zeros(len(pairs)), np.zeros(len(pairs))
    with log.progress("signal to noise", sum(map(len, samples)), "tokens") as bar:
        for sample in samples:
            for read, _ in zip(ours.replay(sample), theirs.replay(sample), strict=True):
                for place, (tensor, other) in enumerate(pairs.items()):
                    power, error = _powers(theirs.value(tensor), ours.value(other))
                    signal[place] += power
                    noise[place] += error
                bar.advance(read)
    levels = dict(zip(pairs, map(decibels, signal, noise), strict=True))
    return _comparison(theirs.graph, levels, sum(map(len, samples)))


def decibels(signal: float, noise: float) -> float:
    """10 log10(signal / noise), at most 200; −200 where either is not finite."""
    if not math.isfinite(signal) or not math.isfinite(noise):
        return -MOST
    # Both zero is the same, noise on silence is as far off as can be.
    if noise == 0 or signal == 0:
        return MOST if noise == 0 else -MOST
    return max(-MOST, min(MOST, 10 * math.log10(signal / noise)))


class Running:
    """A graph that keeps all tensors of its last run."""

    def __init__(self, graph: Graph, interpreter: Interpreter) -> None:
        self.graph, self.interpreter = graph, interpreter

    def replay(self, sample: Tokens) -> Iterator[int]:
        """Run the tokens of `sample` [L]; after each run, while its results stand, how many it has read."""
        raise NotImplementedError

    def value(self, tensor: int) -> NDArray[np.float64]:
        """What a tensor holds after a run, in real numbers."""
        values = np.asarray(self.interpreter.get_tensor(tensor, self.graph.place)).astype(np.float64)
        scales = self.graph.scales(tensor)
        if scales is not None and self.graph.type_of(tensor) != "FLOAT32":
            values = (values - float(scales.zero_point[0])) * float(scales.scale[0])
        return values

    def results(self) -> dict[tuple[str, str], int]:
        """Kind and name of each operator with float or quantised results → its first result's tensor."""
        graph = self.graph
        return {
            (graph.code(operator), _values_name(graph, int(operator.outputs[0]))): int(operator.outputs[0])
            for operator in graph.operators()
            if graph.type_of(int(operator.outputs[0])) == "FLOAT32" or graph.scales(int(operator.outputs[0]))
        }


def _values_name(graph: Graph, tensor: int) -> str:
    """The name of a tensor's values: an integer tensor is called like the float one it stands for, its type behind.

    Its type is the flatbuffer's own, so that a name which only ends like that keeps its end; that both stand for the
    same values is said by the rest of the name, which `quantize/static.py` gives it.
    """
    return graph.name(tensor).removesuffix(f";{graph.type_of(tensor).lower()}")


class StepGraph(Running):
    """A step graph, which reads a sample at once."""

    def __init__(self, file: Path) -> None:
        super().__init__(Graph.read(file), litert.open_traced(file))
        inputs = next(iter(self.interpreter.get_signature_list().values()))["inputs"]
        if set(inputs) != {"input_ids", "attention_mask"}:
            raise UsageError(
                f"{file} is not a step graph: its inputs are {', '.join(sorted(inputs))}",
                remedy="name two step.tflite, or two decoder.tflite with their embedders beside them",
            )

    def replay(self, sample: Tokens) -> Iterator[int]:
        """Run it all."""
        litert.run(self.interpreter, sample)
        yield len(sample)


def _pairs(ours: Running, theirs: Running) -> dict[int, int]:
    """The reference's tensors and the file's of the same operators, in the order in which they are made.

    Where the file has no operator of that kind and name, one of the name alone: the last of those that a layer became.
    """
    mine = ours.results()
    # Quantised layers end in another kind of operator under the same name: DEQUANTIZE, ADD, SUM.
    named = {name: tensor for (_, name), tensor in mine.items()}
    pairs = {tensor: mine.get(key, named.get(key[1])) for key, tensor in theirs.results().items()}
    return {tensor: other for tensor, other in pairs.items() if other is not None}


def _powers(reference: NDArray[np.float64], values: NDArray[np.float64]) -> tuple[float, float]:
    """Sums of squares of the reference and of the difference, where no mask stands; other shapes are infinitely off."""
    if reference.shape != values.shape:
        return float((reference**2).sum()), math.inf
    # Where the reference has a mask; the file's own value there is never looked at by anyone.
    open_ = np.abs(reference) < _MASK
    return float((reference[open_] ** 2).sum()), float(((values - reference)[open_] ** 2).sum())


def _comparison(graph: Graph, levels: Mapping[int, float], tokens: int) -> Comparison:
    operators = {int(operator.outputs[0]): operator for operator in graph.operators()}
    layers, read = _layers(graph), _read_elsewhere(graph)
    compared = {
        tensor: OperatorSqnr(
            name=graph.name(tensor),
            code=graph.code(operators[tensor]),
            layer=layers[tensor],
            decibels=level,
            drop=min([_CLEAR, *(levels[int(i)] for i in operators[tensor].inputs if int(i) in levels)]) - level,
            leaves=tensor in read,
        )
        for tensor, level in levels.items()
    }
    noisy = _reaching(graph, levels)
    first = next((operator for tensor, operator in compared.items() if tensor in noisy), None)
    steepest = max(compared.values(), key=lambda operator: operator.drop)
    return Comparison(tokens=tokens, operators=tuple(compared.values()), first=first, steepest=steepest)


def _layers(graph: Graph) -> dict[int, str]:
    """Each operator's layer by its first result; one between two layers counts to the one before."""
    layers, layer, last = dict[int, str](), _BEFORE, -1
    order = [int(operator.outputs[0]) for operator in graph.operators()]
    for place, tensor in enumerate(order):
        if named := _LAYER.search(graph.name(tensor)):
            layer, last = named[0].removeprefix("."), place
        layers[tensor] = layer
    return layers | dict.fromkeys(order[last + 1 :], _AFTER if last >= 0 else _BEFORE)


def _read_elsewhere(graph: Graph) -> set[int]:
    """Results that an operator of another layer reads, or the caller."""
    layers = _layers(graph)
    read = {int(tensor) for tensor in graph.main.outputs}
    for operator in graph.operators():
        layer = layers[int(operator.outputs[0])]
        read.update(int(tensor) for tensor in operator.inputs if layers.get(int(tensor), layer) != layer)
    return read


def _noisiest(operators: Sequence[OperatorSqnr]) -> OperatorSqnr:
    return min(operators, key=lambda operator: operator.decibels)


def _reaching(graph: Graph, levels: Mapping[int, float]) -> set[int]:
    """Results below 20 dB that are followed by such results, up to the graph's own.

    A scale that one operator takes away and the next puts back is loud for a moment, and is left out by this. What
    could not be measured lets noise through.
    """
    reached = {int(tensor) for tensor in graph.main.outputs if levels.get(int(tensor), MOST) < LOUD}
    for operator in reversed(list(graph.operators())):
        if any(int(tensor) in reached for tensor in operator.outputs):
            inputs = [int(tensor) for tensor in operator.inputs if int(tensor) >= 0]
            reached.update(tensor for tensor in inputs if levels.get(tensor, -MOST) < LOUD)
    return reached & levels.keys()


def _named(operator: OperatorSqnr) -> str:
    kind = f"{operator.name.rstrip(';')} ({operator.code.lower()})"
    return f"{kind} in {operator.layer}: {operator.decibels:.1f} dB, {operator.drop:.1f} dB below its inputs"


def _facts(operator: OperatorSqnr) -> dict[str, Fact]:
    return {
        "name": operator.name,
        "code": operator.code,
        "layer": operator.layer,
        "decibels": operator.decibels,
        "drop": operator.drop,
    }


def table(comparison: Comparison) -> list[list[str]]:
    """Rows for people: layer, decibels of the worst it hands on, its noisiest operator and that one's decibels."""
    rows = [["layer", "dB out", "noisiest operator", "kind", "dB"]]
    for layer, (out, worst) in comparison.layers().items():
        own = (worst.name.rstrip(";"), worst.code.lower(), f"{worst.decibels:.1f}")
        rows.append([layer, f"{out.decibels:.1f}", *own])
    return rows
