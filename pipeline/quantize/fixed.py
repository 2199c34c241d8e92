"""Signatures of fixed shape beside a finished step graph's own, for runtimes that can't choose a shape while they run.

Each is a copy of the step graph's operators in a subgraph of its own, on the same constants, quantised or not. A run
says what shape each tensor has; what the graph computes of its inputs' shape is constant, so that nothing is left to be
planned at run time. The arithmetic is that of the step graph.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Mapping
from pathlib import Path

from pipeline.quantize import readback
from pipeline.runtime import litert
from pipeline.tflite.graph import Graph
from pipeline.tflite.lazy import Array


def add(file: Path, signatures: Mapping[str, tuple[int, int]]) -> None:
    """Give the step graph in `file` the `signatures`, each for one batch and sequence, beside the one that it has.

    Raises:
        QuantiseError: it does not run at one of them.
    """
    if not signatures:
        return
    graph = Graph.read(file)
    with tempfile.TemporaryDirectory(dir=file.parent) as scratch:
        for name, shape in signatures.items():
            sizes, values = readback.shapes_at(file, shape), _told(file, shape, Path(scratch) / "told.tflite")
            _add(graph, name, sizes, values)
        made = Path(scratch) / file.name
        graph.prune()
        graph.write(made)  # weights are read from `file` meanwhile
        made.replace(file)


def _add(graph: Graph, name: str, sizes: Mapping[int, tuple[int, ...]], values: Mapping[int, Array]) -> None:
    """A copy of the main subgraph as the signature `name`, with the `sizes` of its tensors, and constant `values`."""
    graph.model.subgraphs.append(copy.deepcopy(graph.main))
    view = graph.seen_through(len(graph.model.subgraphs) - 1)
    moving = {*map(int, view.main.inputs), *(int(tensor) for each in view.operators() for tensor in each.outputs)}
    for tensor in sorted(moving):
        view.main.tensors[tensor].shape, view.main.tensors[tensor].shapeSignature = list(sizes[tensor]), None
    for tensor, value in values.items():
        view.main.tensors[tensor].buffer = view.add_buffer(value)
    view.rewrite(lambda operator: [] if int(operator.outputs[0]) in values else [operator])
    inputs = {str(port.name): int(port.tensorIndex) for port in graph.ports()}
    view.add_signature(name, inputs, {litert.OUTPUT: int(view.main.outputs[0])})


def _told(file: Path, shape: tuple[int, int], scratch: Path) -> dict[int, Array]:
    """The values of what `_by_shape` names, by tensor: of a run of what computes them alone, a file at `scratch`."""
    graph = Graph.read(file)
    told = _by_shape(graph)
    graph.main.outputs, graph.model.signatureDefs = told, []
    graph.prune()
    graph.write(scratch)
    interpreter = readback.run_at(scratch, shape)
    return {
        tensor: interpreter.get_tensor(detail["index"])
        for tensor, detail in zip(told, interpreter.get_output_details(), strict=True)
    }


def _by_shape(graph: Graph) -> list[int]:
    """The tensors of at most one axis that are computed of the inputs' shape and of nothing else."""
    told = set[int]()
    for operator in graph.operators():
        inputs = [int(tensor) for tensor in operator.inputs if tensor >= 0]
        results = [int(tensor) for tensor in operator.outputs]
        known = bool(inputs) and all(tensor in told or graph.is_constant(tensor) for tensor in inputs)
        if (known or graph.code(operator) == "SHAPE") and all(len(graph.shape(tensor)) <= 1 for tensor in results):
            told.update(results)
    return sorted(told)
