"""Weights beside a model: a `.tflite` file within a size, and a file of bytes alone with what did not fit.

The model names each such constant by the place of its bytes (schema.fbs, `ExternalBuffer`), and LiteRT maps them one by
one when it opens the model. LiteRT's `Interpreter` knows nothing of them; its `CompiledModel`, and so LiteRT-LM, does.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.core import log
from pipeline.tflite import schema
from pipeline.tflite.graph import Graph

GROUP = "tflite_weights"
"""The name under which LiteRT-LM (0.18.1) offers a model its section of weights; there is one for each model."""
_READS_WEIGHTS = ("FULLY_CONNECTED", "EMBEDDING_LOOKUP")
"""Operators that read their second input when they run; others may want theirs while the model is laid out."""
_NAMED = 256
"""Bytes that a model grows by at most for a constant that leaves it."""
_ALIGNMENT = 64


@dataclass(frozen=True, kw_only=True)
class Split:
    """How a file is divided: constants that leave it by index of their buffer, and the bytes of model and weights."""

    moved: tuple[int, ...]
    model: int
    weights: int


def split(graph: Graph, size: int, limit: int) -> Split:
    """How to bring a file of `size` bytes below `limit`: the largest constants leave it, no more than have to."""
    sizes = _weights(graph)
    moved: list[int] = []
    model, weights = size, 0
    for buffer in sorted(sizes, key=lambda each: (-sizes[each], each)):
        if model <= limit:
            break
        moved.append(buffer)
        model, weights = model - sizes[buffer] + _NAMED, _aligned(weights) + sizes[buffer]
    return Split(moved=tuple(moved), model=model, weights=weights)


def write(graph: Graph, moved: tuple[int, ...], model: Path, weights: Path) -> None:
    """Write `graph`, without the constants in buffers `moved`, and those; it is another graph after that."""
    s, buffers = schema.classes(), graph.model.buffers
    group = s.ExternalBufferGroupT()
    group.name = GROUP
    graph.model.externalBufferGroups, graph.model.externalBuffers = [group], []
    with weights.open("wb") as stream, log.progress(f"writing {weights.name}", _size(graph, moved)) as bar:
        for buffer in moved:
            # Zeros and not a seek: the bytes between are part of the file.
            stream.write(b"\0" * (_aligned(stream.tell()) - stream.tell()))
            data, entry = buffers[buffer].data, s.ExternalBufferT()
            assert isinstance(data, np.ndarray)  # of a graph that was read
            # By the buffer's own number: XNNPACK's cache of packed weights knows constants of both kinds by one list of
            # numbers, and would take one for another.
            entry.id, entry.group, entry.offset, entry.length = buffer, 0, stream.tell(), len(data)
            graph.model.externalBuffers.append(entry)
            bar.advance(stream.write(data.data))
            buffers[buffer].data = None
    for tensor in (tensor for subgraph in graph.model.subgraphs for tensor in subgraph.tensors):
        if tensor.buffer in moved:
            tensor.externalBuffer, tensor.buffer = tensor.buffer, 0
    graph.write(model)


def join(graph: Graph, file: Path, offset: int) -> None:
    """Give `graph` back what stands beside it, from byte `offset` of `file`; it stays in the page cache."""
    whole = np.memmap(file, np.uint8, mode="r")
    places = {}
    for entry in graph.model.externalBuffers or []:
        start = offset + int(entry.offset)
        places[int(entry.id)] = graph.add_buffer(np.asarray(whole[start : start + int(entry.length)]))
    for tensor in (tensor for subgraph in graph.model.subgraphs for tensor in subgraph.tensors):
        if tensor.externalBuffer:
            tensor.buffer, tensor.externalBuffer = places[int(tensor.externalBuffer)], 0
    graph.model.externalBufferGroups, graph.model.externalBuffers = None, None


def _weights(graph: Graph) -> dict[int, int]:
    """The constants that can leave a model, by buffer, and their bytes: what only such operators read."""
    found: dict[int, int] = {}
    others = {0}
    for view in graph.all_views():
        scales = view.holds_scales()
        for operator in view.operators():
            weights = int(operator.inputs[1]) if view.code(operator) in _READS_WEIGHTS else -1
            for tensor in (int(each) for each in operator.inputs):
                if view.is_constant(tensor) and tensor == weights and tensor not in scales:
                    found[view.buffer(tensor)] = len(view.stored(tensor))
                elif tensor >= 0:
                    others.add(view.buffer(tensor))
    return {buffer: size for buffer, size in found.items() if buffer not in others}


def _size(graph: Graph, buffers: tuple[int, ...]) -> int:
    held = (graph.model.buffers[buffer].data for buffer in buffers)
    return sum(len(data) for data in held if data is not None)


def _aligned(offset: int) -> int:
    return -(-offset // _ALIGNMENT) * _ALIGNMENT
