"""TFLite's schema as we use it: the types of a model's tables, which the generated classes have in comments alone.

The objects themselves are those of `ai_edge_litert.schema_py_generated`, by its names. Numbers come as lists where this
project made them, and as arrays where they were read.
"""

from __future__ import annotations

from collections.abc import MutableSequence
from functools import lru_cache
from types import ModuleType
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from pipeline.tflite.lazy import Array, Blocks

Name = str | bytes | None
Data = Blocks | NDArray[np.uint8] | None


class Options(Protocol):
    """Settings of an operator. Each kind has its own; these are the ones of the kinds that are looked into."""

    keepNumDims: bool
    asymmetricQuantizeInputs: bool
    adjX: bool
    adjY: bool
    strideH: int
    strideW: int


class Operator(Protocol):
    """`inputs` and `outputs` are tensors by their index; −1 is an input that is left out."""

    opcodeIndex: int
    inputs: MutableSequence[int]
    outputs: MutableSequence[int]
    builtinOptions: Options
    builtinOptionsType: int
    intermediates: MutableSequence[int] | None


class BlockDetails(Protocol):
    """Quantisation by blocks: `scales` is the tensor that holds them."""

    scales: int
    zeroPoints: int
    blockSize: int


class Quantization(Protocol):
    """`scale` and `zeroPoint` of a tensor along `quantizedDimension`, or `details`, as `detailsType` says."""

    scale: Array | None
    zeroPoint: Array | None
    quantizedDimension: int
    detailsType: int
    details: BlockDetails


class Tensor(Protocol):
    """Its values are those of the buffer with index `buffer`, or of the external one with that id; 0 has none."""

    name: Name
    type: int
    buffer: int
    shape: MutableSequence[int] | None
    shapeSignature: MutableSequence[int] | None
    hasRank: bool
    quantization: Quantization | None
    externalBuffer: int


class Buffer(Protocol):
    """The bytes of a constant; in large files they stand behind the model, at `offset`."""

    data: Data
    offset: int
    size: int


class ExternalBufferGroup(Protocol):
    """A file, or a section of a bundle, by the name that the runtime knows it by."""

    name: Name


class ExternalBuffer(Protocol):
    """The bytes of a constant outside of the model: `length` from byte `offset` of group `group`."""

    id: int
    group: int
    offset: int
    length: int


class OperatorCode(Protocol):
    """A kind of operator; before there were 128 the code stood in `deprecatedBuiltinCode`."""

    builtinCode: int
    deprecatedBuiltinCode: int
    version: int


class Port(Protocol):
    """A tensor by the name that callers use."""

    name: Name
    tensorIndex: int


class SignatureDef(Protocol):
    """What callers run by name: a subgraph with its named inputs and outputs."""

    signatureKey: Name
    subgraphIndex: int
    inputs: list[Port]
    outputs: list[Port]


class Metadata(Protocol):
    """A buffer by name."""

    name: Name
    buffer: int


class SubGraph(Protocol):
    """Operators in order of execution."""

    tensors: list[Tensor]
    operators: list[Operator]
    inputs: MutableSequence[int]
    outputs: MutableSequence[int]


class Builder(Protocol):
    """The flatbuffer that a model is packed into."""

    Bytes: memoryview

    def Head(self) -> int:
        """Where in `Bytes` it begins."""

    def Finish(self, root: int, file_identifier: bytes) -> None:
        """Close it; `root` is what packing the outermost table gave."""


class Model(Protocol):
    """The outermost table."""

    version: int
    subgraphs: list[SubGraph]
    buffers: list[Buffer]
    operatorCodes: list[OperatorCode]
    signatureDefs: list[SignatureDef] | None
    metadata: list[Metadata] | None
    metadataBuffer: MutableSequence[int] | None
    externalBufferGroups: list[ExternalBufferGroup] | None
    externalBuffers: list[ExternalBuffer] | None

    def Pack(self, builder: Builder) -> int:
        """Write it into `builder`."""


class TensorReader(Protocol):
    """A tensor in the bytes of a model; the library's names are calls here."""

    def Buffer(self) -> int: ...
    def ExternalBuffer(self) -> int: ...
    def Name(self) -> bytes | None: ...
    def Type(self) -> int: ...
    def Shape(self, axis: int) -> int: ...
    def ShapeLength(self) -> int: ...


class SubGraphReader(Protocol):
    """A subgraph in the bytes of a model."""

    def Tensors(self, index: int) -> TensorReader: ...
    def TensorsLength(self) -> int: ...


class TableReader(Protocol):
    """A table of the flatbuffer: where its fields stand; 0 is a field that is not there."""

    def Offset(self, field: int) -> int: ...
    def Vector(self, field: int) -> int: ...
    def VectorLen(self, field: int) -> int: ...


class BufferReader(Protocol):
    """A buffer in the bytes of a model."""

    _tab: TableReader

    def Offset(self) -> int: ...
    def Size(self) -> int: ...


class ExternalBufferReader(Protocol):
    """A constant outside of the model, in its bytes."""

    def Id(self) -> int: ...
    def Offset(self) -> int: ...
    def Length(self) -> int: ...


class ModelReader(Protocol):
    """A model as its bytes, of which nothing is copied."""

    def Subgraphs(self, index: int) -> SubGraphReader: ...
    def SubgraphsLength(self) -> int: ...
    def Buffers(self, index: int) -> BufferReader: ...
    def ExternalBuffers(self, index: int) -> ExternalBufferReader: ...
    def ExternalBuffersLength(self) -> int: ...


def classes() -> ModuleType:
    """The generated classes; the module is large, so it is loaded when it is needed."""
    from ai_edge_litert import schema_py_generated

    module: ModuleType = schema_py_generated
    return module


@lru_cache
def names(enumeration: str) -> dict[int, str]:
    """What the numbers of an enumeration are called."""
    members = vars(getattr(classes(), enumeration))
    return {value: name for name, value in members.items() if isinstance(value, int)}
