"""What is in a `.tflite` or `.litertlm` file, from its tables alone: weights stay in the page cache, untouched."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from google.protobuf import json_format
from litert_lm_builder.runtime.proto import llm_metadata_pb2

from pipeline.bundling import litertlm
from pipeline.core.errors import UsageError
from pipeline.core.facts import Section
from pipeline.tflite import schema
from pipeline.tflite.graph import Graph, text
from pipeline.tflite.schema import Operator, SignatureDef

_PRODUCTS = ("FULLY_CONNECTED", "BATCH_MATMUL", "CONV_2D")
_INTEGERS = ("INT4", "INT8", "INT16")
_ARITHMETIC = ("integer", "hybrid", "float")
_WORD_BITS = 8
_CACHE, _BYTES = "kv_cache", {"INT8": 1, "FLOAT16": 2}


@dataclass(frozen=True, kw_only=True)
class Port:
    """A named input or output; −1 in `shape` is chosen at run time."""

    name: str
    type: str
    shape: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Signature:
    """One way to run a model.

    `operators`: kind → how many. `products`: matrix products by arithmetic, `integer` (activations and weights are),
    `hybrid` (the kernel makes integers of float activations) or `float`.
    """

    name: str
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    operators: Mapping[str, int]
    products: Mapping[str, int]


@dataclass(frozen=True, kw_only=True)
class Constant:
    """Values that stand in a file; `bits` per element are those of its scales included."""

    name: str
    type: str
    shape: tuple[int, ...]
    size: int
    bits: float


@dataclass(frozen=True, kw_only=True)
class Model:
    """A TFLite model. `constants` come largest first; weights are those of two dimensions or more."""

    name: str
    size: int
    signatures: tuple[Signature, ...]
    constants: tuple[Constant, ...]
    metadata: tuple[str, ...]

    def weights(self) -> dict[str, tuple[int, int, float]]:
        """Element type of weights → elements, bytes with scales, and bits per weight."""
        found: dict[str, tuple[int, int, float]] = {}
        for constant in self.constants:
            if len(constant.shape) > 1:
                count = math.prod(constant.shape)
                elements, size, _ = found.get(constant.type, (0, 0, 0.0))
                elements, size = elements + count, size + round(constant.bits * count / _WORD_BITS)
                found[constant.type] = elements, size, _WORD_BITS * size / elements
        return dict(sorted(found.items(), key=lambda row: -row[1][1]))

    def bits_per_weight(self) -> float:
        """Bits of all weights, scales included, over their number."""
        counted = self.weights().values()
        return _WORD_BITS * sum(size for _, size, _ in counted) / max(1, sum(elements for elements, _, _ in counted))


@dataclass(frozen=True, kw_only=True)
class Contents:
    """What a file holds: of a bundle its sections and the runtime's metadata, and every model."""

    file: str
    size: int
    sections: tuple[Section, ...]
    metadata: Mapping[str, object]
    models: tuple[Model, ...]


def read(file: Path) -> Contents:
    """Look into `file`.

    Raises:
        UsageError: there is no such file.
        IntegrityError: it is no TFLite model, or damaged.
        BundleError: it is called a bundle and has no bundle's header.
    """
    if not file.is_file():
        raise UsageError(f"{file} is not a file", remedy="set FILE= to a .tflite or .litertlm file")
    size = file.stat().st_size
    if file.suffix != ".litertlm":
        model = _model(Graph.read(file), file.name, size)
        return Contents(file=file.name, size=size, sections=(), metadata={}, models=(model,))
    sections = tuple(litertlm.read_sections(file))
    models = tuple(
        _model(litertlm.read_model(file, sections, each.model_type), each.model_type, each.size)
        for each in sections
        if each.kind == litertlm.MODEL
    )
    texts = [litertlm.read(file, each) for each in sections if each.kind == litertlm.METADATA]
    said = json_format.MessageToDict(llm_metadata_pb2.LlmMetadata.FromString(texts[0])) if texts else {}
    return Contents(file=file.name, size=size, sections=sections, metadata=said, models=models)


def cache_bytes(decoder: Path, length: int) -> int:
    """What the cache of a decoder takes: its inputs of that name; `length` positions where it grows."""
    model = _model(Graph.read(decoder), decoder.name, 0)
    ports = [port for port in model.signatures[0].inputs if port.name.startswith(_CACHE)]
    sizes = [math.prod(length if size < 0 else size for size in port.shape) for port in ports]
    return sum(size * _BYTES.get(port.type, 4) for size, port in zip(sizes, ports, strict=True))


def _model(graph: Graph, name: str, size: int) -> Model:
    found = {int(definition.subgraphIndex): definition for definition in graph.model.signatureDefs or []}
    signatures = tuple(_signature(view, found.get(view.place)) for view in graph.views())
    metadata = tuple(text(entry.name) for entry in graph.model.metadata or [])
    return Model(name=name, size=size, signatures=signatures, constants=_constants(graph), metadata=metadata)


def _signature(graph: Graph, definition: SignatureDef | None) -> Signature:
    operators = list(graph.operators())
    products = Counter(_arithmetic(graph, each) for each in operators if graph.code(each) in _PRODUCTS)
    return Signature(
        name=graph.signature(),
        inputs=_ports(graph, definition.inputs) if definition else (),
        outputs=_ports(graph, definition.outputs) if definition else (),
        operators=dict(Counter(graph.code(operator) for operator in operators).most_common()),
        products={kind: products[kind] for kind in _ARITHMETIC},
    )


def _ports(graph: Graph, ports: Sequence[schema.Port]) -> tuple[Port, ...]:
    return tuple(
        Port(
            name=text(port.name),
            type=graph.type_of(int(port.tensorIndex)),
            shape=graph.shape(int(port.tensorIndex)),
        )
        # A signature keeps its ports in no order that means anything.
        for port in sorted(ports, key=lambda each: text(each.name))
    )


def _arithmetic(graph: Graph, operator: Operator) -> str:
    left, right = (graph.type_of(int(tensor)) for tensor in operator.inputs[:2])
    # By the weights first: a kernel is hybrid where they alone are integers.
    if right not in _INTEGERS:
        return "float"
    return "integer" if left in _INTEGERS else "hybrid"


def _constants(graph: Graph) -> tuple[Constant, ...]:
    """All constants of the file but the scales of others, one that several tensors share once, largest first."""
    found: dict[int, Constant] = {}
    for view in graph.views():
        scales = view.holds_scales()
        for tensor, entry in enumerate(view.main.tensors):
            if entry.buffer not in found and tensor not in scales and view.is_constant(tensor):
                found[entry.buffer] = _constant(view, tensor)
    return tuple(sorted(found.values(), key=lambda each: (-each.size, each.name)))


def _constant(graph: Graph, tensor: int) -> Constant:
    shape = graph.shape(tensor)
    size = len(graph.stored(tensor))
    return Constant(
        name=graph.name(tensor),
        type=graph.type_of(tensor),
        shape=shape,
        size=size,
        bits=_WORD_BITS * graph.stored_bytes(tensor) / max(1, math.prod(shape)),
    )
