"""A `.tflite` file as a graph that can be read, edited and written, byte for byte the same each time.

Quantisation here is flatbuffer surgery (see `quantize/rows.py`), so this module holds what surgery needs: constants in
and out, operators by name, new tensors and operators, clean-up. Buffers stay in the page cache until they are written.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from mmap import mmap
from pathlib import Path

import numpy as np
from numpy.typing import DTypeLike, NDArray

from pipeline.core.errors import IntegrityError
from pipeline.tflite import schema, writer
from pipeline.tflite.lazy import Array, Blocks, BlockScales, Scales, flat_bytes, unpack
from pipeline.tflite.schema import (
    BlockDetails,
    Buffer,
    Model,
    ModelReader,
    Name,
    Operator,
    OperatorCode,
    Port,
    Quantization,
    SignatureDef,
    SubGraph,
    Tensor,
)

_DTYPES: Mapping[str, DTypeLike] = {
    "FLOAT32": np.dtype(np.float32),
    "FLOAT16": np.dtype(np.float16),
    "INT32": np.dtype(np.int32),
    "INT64": np.dtype(np.int64),
    "INT8": np.dtype(np.int8),
    "UINT8": np.dtype(np.uint8),
    "INT16": np.dtype(np.int16),
    "BOOL": np.dtype(np.bool_),
}


@dataclass(frozen=True)
class Origin:
    """Which part of a model's matrix a constant holds: the matrix by its name, and its first row and column there."""

    matrix: str
    row: int = 0
    column: int = 0


class Graph:
    """A model under edit, seen through one of its subgraphs, `main`. Tensors are named by their index there.

    Each signature has a subgraph of its own, and `views` gives the model seen through every one of them; weights that
    they share are one buffer. Other subgraphs (decompositions of composite operators) are read, and dropped by `prune`
    once nothing refers to them.

    `origins` says of a constant's buffer what it was cut from. It stands beside the model and not in the file: passes
    tell each other by it, and none reads what another wrote behind a name.
    """

    def __init__(self, model: Model, place: int = 0, origins: dict[int, Origin] | None = None) -> None:
        self.model = model
        self.place, self.main = place, model.subgraphs[place]
        self.origins = {} if origins is None else origins

    def views(self) -> list[Graph]:
        """The model seen through the subgraph of each signature, in their order in the file."""
        # By place in the file, not by signature: two signatures may run one subgraph, which must be edited once.
        places = sorted({int(signature.subgraphIndex) for signature in self.model.signatureDefs or []})
        return [self.seen_through(place) for place in places or [0]]

    def all_views(self) -> list[Graph]:
        """The model seen through every subgraph."""
        return [self.seen_through(place) for place in range(len(self.model.subgraphs))]

    def seen_through(self, place: int) -> Graph:
        """The same model through its subgraph number `place`."""
        return Graph(self.model, place, self.origins)

    def signature(self) -> str:
        """The name of the signature that runs this subgraph; empty if there is none."""
        names = [s.signatureKey for s in self.model.signatureDefs or [] if int(s.subgraphIndex) == self.place]
        return text(names[0]) if names else ""

    @classmethod
    def read(cls, file: Path, offset: int = 0, size: int = 0) -> Graph:
        """Open `file`, or the model of `size` bytes that stands at `offset` in it.

        Weights stay in the page cache until they are touched.

        Raises:
            IntegrityError: there is no TFLite model.
        """
        from ai_edge_litert.tools import flatbuffer_utils, mmap_utils

        with file.open("rb") as stream:
            stream.seek(offset)
            head = stream.read(8)
        # Bytes 0 to 4 are the offset of the root table, bytes 4 to 8 name the format.
        if head[4:] != writer.IDENTIFIER:
            raise IntegrityError(f"{file} is not a TFLite file", file=file)
        try:
            model = flatbuffer_utils.read_model_from_bytearray(
                mmap_utils.get_file_contents(file, offset=offset, size=size)
            )
            for buffer in model.buffers:
                if buffer.data is not None:  # a slice of the file, which the packer would write byte by byte
                    buffer.data = np.frombuffer(buffer.data, np.uint8)
            return cls(model)
        except (struct.error, IndexError, ValueError, TypeError) as error:
            raise IntegrityError(f"{file} is damaged: {error}", cause="it was truncated", file=file) from error

    @classmethod
    def empty(cls) -> Graph:
        """A model with one subgraph that holds nothing."""
        s = schema.classes()
        model: Model = s.ModelT()
        # 3 is the version of the schema that every runtime reads; buffer 0 has to be empty: it means "no values".
        model.version, model.buffers, model.operatorCodes = 3, [s.BufferT()], []
        model.subgraphs = [_nothing()]
        return cls(model)

    def another(self) -> Graph:
        """The same model through a new subgraph that holds nothing."""
        self.model.subgraphs.append(_nothing())
        return self.seen_through(len(self.model.subgraphs) - 1)

    # --- reading

    def operators(self) -> Iterator[Operator]:
        """The operators of the main subgraph in order of execution (a copy: edit freely while looping)."""
        yield from list(self.main.operators)

    def code(self, operator: Operator) -> str:
        """What `operator` does, e.g. `FULLY_CONNECTED`."""
        entry = self.model.operatorCodes[operator.opcodeIndex]
        # Codes below 127 once stood in a field of one byte, which converters still fill; above, that field says 127.
        return schema.names("BuiltinOperator")[max(entry.builtinCode, entry.deprecatedBuiltinCode)]

    def name(self, tensor: int) -> str:
        """The name of a tensor; an operator is known by the name of its first output."""
        return text(self.main.tensors[tensor].name)

    def operator_name(self, operator: Operator) -> str:
        """The name of an operator: that of its first output."""
        return self.name(int(operator.outputs[0]))

    def type_of(self, tensor: int) -> str:
        """The element type of a tensor, e.g. `FLOAT32`."""
        return schema.names("TensorType")[self.main.tensors[tensor].type]

    def shape(self, tensor: int) -> tuple[int, ...]:
        """The shape of a tensor; −1 where it is chosen at run time."""
        entry = self.main.tensors[tensor]
        # `shape` has 1 where a size is unknown, so that old readers find something; only `shapeSignature` has −1.
        signature = entry.shapeSignature
        shape = signature if signature is not None and len(signature) else entry.shape
        return tuple(int(n) for n in shape) if shape is not None else ()

    def is_constant(self, tensor: int) -> bool:
        """Whether the tensor's values stand in the file."""
        # An input that is left out has index −1, e.g. the bias of a linear layer without one.
        return tensor >= 0 and self.model.buffers[self.main.tensors[tensor].buffer].data is not None

    def constant(self, tensor: int) -> Array:
        """The values of a constant tensor, a read-only view of the file."""
        data = self.mapped(tensor)
        if self.type_of(tensor) == "INT4":
            # NumPy knows no integers of 4 bits.
            return unpack(data).reshape(self.shape(tensor))
        return np.frombuffer(data, _DTYPES[self.type_of(tensor)]).reshape(self.shape(tensor))

    def mapped(self, tensor: int) -> NDArray[np.uint8]:
        """The bytes of a constant tensor that was read, a view of the file."""
        data = self.stored(tensor)
        assert not isinstance(data, Blocks)
        return np.frombuffer(data, np.uint8)

    def blocks(self, tensor: int) -> Blocks:
        """The values of a constant tensor, block by block, wherever they are."""
        data = self.stored(tensor)
        return data if isinstance(data, Blocks) else Blocks.of(self.constant(tensor))

    def buffer(self, tensor: int) -> int:
        """The index of the buffer that holds a constant's values, the same in all subgraphs that share them."""
        return int(self.main.tensors[tensor].buffer)

    def origin(self, tensor: int) -> Origin:
        """What a constant was cut from; where nothing is known of that, all of what its name says."""
        return self.origins.get(self.buffer(tensor)) or Origin(self.name(tensor))

    def stored(self, tensor: int) -> Blocks | NDArray[np.uint8]:
        """What holds the bytes of a constant."""
        data = self.model.buffers[self.main.tensors[tensor].buffer].data
        assert data is not None
        return data

    def ports(self) -> list[Port]:
        """The named inputs of this subgraph's signature."""
        own = [s for s in self.model.signatureDefs or [] if int(s.subgraphIndex) == self.place]
        ports = [port for signature in own for port in signature.inputs]
        for port in ports:
            port.name = text(port.name)
        return ports

    def scales(self, tensor: int) -> Scales | None:
        """How a tensor is quantised, None if it is not."""
        own = self.main.tensors[tensor].quantization
        if own is None or own.scale is None or not len(own.scale):
            return None
        # Some writers leave out zero points that are all 0.
        zero = own.zeroPoint if own.zeroPoint is not None else np.zeros(len(own.scale))
        return Scales(np.asarray(own.scale, np.float32), np.asarray(zero, np.int64), int(own.quantizedDimension))

    def block_scales(self, tensor: int) -> BlockScales | None:
        """How a matrix is quantised by blocks, None if it is not."""
        blocks = _block_details(self.main.tensors[tensor])
        return BlockScales(self.constant(blocks.scales).astype(np.float16), int(blocks.blockSize)) if blocks else None

    def holds_scales(self) -> set[int]:
        """The constants that are the scales of others."""
        return {int(blocks.scales) for blocks in map(_block_details, self.main.tensors) if blocks}

    def stored_bytes(self, tensor: int) -> int:
        """What a constant takes in the file, its scales included."""
        scales, blocks = self.scales(tensor), _block_details(self.main.tensors[tensor])
        own = scales.scale.nbytes if scales else self.stored_bytes(int(blocks.scales)) if blocks else 0
        return len(self.stored(tensor)) + own

    def consumers(self) -> dict[int, list[Operator]]:
        """Tensor → the operators that read it."""
        readers: dict[int, list[Operator]] = {}
        for operator in self.main.operators:
            # An operator that reads a tensor twice (x · x) is one reader of it.
            for tensor in dict.fromkeys(int(i) for i in operator.inputs):
                if tensor >= 0:
                    readers.setdefault(tensor, []).append(operator)
        return readers

    def producers(self) -> dict[int, Operator]:
        """Tensor → the operator that writes it."""
        return {int(tensor): operator for operator in self.main.operators for tensor in operator.outputs}

    # --- editing

    def make_constant(self, port: Port, buffer: int, name: str) -> None:
        """Turn the named input `port` into a constant called `name` with the values of `buffer`."""
        tensor = self.main.tensors[port.tensorIndex]
        tensor.buffer, tensor.name = buffer, name
        # Both lists name the inputs: the subgraph for the interpreter, the signature for its callers. They must agree.
        self.main.inputs = [i for i in self.main.inputs if i != port.tensorIndex]
        for signature in self.model.signatureDefs or []:
            if int(signature.subgraphIndex) == self.place:
                signature.inputs = [other for other in signature.inputs if other is not port]

    def set_constant(self, tensor: int, values: Array | Blocks, scales: Scales | None = None) -> None:
        """Give a constant tensor, and all that share its buffer, new values, element type and quantisation."""
        buffer = self.buffer(tensor)
        self.model.buffers[buffer].data = values if isinstance(values, Blocks) else flat_bytes(values)
        # One buffer has one type: the tensors of other signatures that point to it would misread its bytes.
        for entry in (tensor for subgraph in self.model.subgraphs for tensor in subgraph.tensors):
            if entry.buffer == buffer:
                entry.type = _type_of(values.dtype)
                entry.quantization = _parameters(scales)

    def set_four_bits(self, tensor: int, packed: Blocks, scales: BlockScales) -> None:
        """Give a constant matrix, and all that share its buffer, 4-bit values (`pack`) and a scale per block."""
        buffer, shared = self.buffer(tensor), self.add_buffer(scales.scale)
        self.model.buffers[buffer].data = packed
        for view in self.all_views():
            for entry in [entry for entry in view.main.tensors if int(entry.buffer) == buffer]:
                # A tensor can only name scales of its own subgraph, so each gets a tensor; the values behind are one
                # buffer.
                named = view.add_tensor(f"{text(entry.name)};scales", "FLOAT16", scales.scale.shape)
                view.main.tensors[named].buffer = shared
                entry.type, entry.quantization = (
                    schema.classes().TensorType.INT4,
                    _block_parameters(named, scales.block),
                )

    def add_constant(self, values: Array | Blocks, name: str, scales: Scales | None = None) -> int:
        """A new constant; returns its tensor index."""
        tensor = self.add_tensor(name, values.dtype.name.upper(), values.shape, scales)
        self.main.tensors[tensor].buffer = self.add_buffer(values)
        return tensor

    def add_buffer(self, values: Array | Blocks, origin: Origin | None = None) -> int:
        """Room for a constant's values, cut from `origin`; returns its index, for `make_constant`."""
        buffer: Buffer = schema.classes().BufferT()
        buffer.data = values if isinstance(values, Blocks) else flat_bytes(values)
        self.model.buffers.append(buffer)
        index = len(self.model.buffers) - 1
        if origin:
            self.origins[index] = origin
        return index

    def add_tensor(self, name: str, type_name: str, shape: Sequence[int], scales: Scales | None = None) -> int:
        """A new tensor without values; −1 in `shape` is chosen at run time. Returns its index."""
        entry: Tensor = schema.classes().TensorT()
        # Buffer 0 is the empty one: a tensor that points to it gets its values while the graph runs.
        entry.name, entry.type, entry.buffer = name.encode(), getattr(schema.classes().TensorType, type_name), 0
        # As the converter does: 1 stands where the signature says −1.
        entry.shape = [1 if n < 0 else n for n in shape]
        entry.shapeSignature = list(shape) if any(n < 0 for n in shape) else None
        # As the converter does: a scalar is told from a tensor of unknown rank by this flag.
        entry.hasRank = True
        entry.quantization = _parameters(scales)
        self.main.tensors.append(entry)
        return len(self.main.tensors) - 1

    def add_signature(self, name: str, inputs: Mapping[str, int], outputs: Mapping[str, int]) -> None:
        """Let callers run this subgraph by `name`, with its tensors under the names given."""
        signature: SignatureDef = schema.classes().SignatureDefT()
        signature.signatureKey, signature.subgraphIndex = name, self.place
        signature.inputs, signature.outputs = _ports(inputs), _ports(outputs)
        self.model.signatureDefs = [*(self.model.signatureDefs or []), signature]

    def operator(
        self, code: str, inputs: Sequence[int], outputs: Sequence[int], version: int = 1, **settings: int | bool
    ) -> Operator:
        """A new operator, options default but for `settings`, not yet in the graph: put it into `main.operators`."""
        s = schema.classes()
        operator: Operator = s.OperatorT()
        operator.inputs, operator.outputs = list(inputs), list(outputs)
        operator.opcodeIndex = self.opcode(code, version)
        options = _OPTIONS.get(code)
        if options:
            operator.builtinOptions, operator.builtinOptionsType = (
                getattr(s, f"{options}T")(),
                getattr(s.BuiltinOptions, options),
            )
        for name, value in settings.items():
            setattr(operator.builtinOptions, name, value)
        return operator

    def opcode(self, code: str, version: int = 1) -> int:
        """The index of an operator code, added if the model lacks it; its version is raised if it is lower."""
        builtin: int = getattr(schema.classes().BuiltinOperator, code)
        for index, entry in enumerate(self.model.operatorCodes):
            if max(entry.builtinCode, entry.deprecatedBuiltinCode) == builtin:
                # A version only says which kernels may run it, and later ones do what earlier ones did.
                entry.version = max(int(entry.version), version)
                return index
        new: OperatorCode = schema.classes().OperatorCodeT()
        # Old readers know the one-byte field alone, for which 127 says: look at the other.
        new.builtinCode, new.deprecatedBuiltinCode, new.version = builtin, min(builtin, 127), version
        self.model.operatorCodes.append(new)
        return len(self.model.operatorCodes) - 1

    def rewrite(self, change: Callable[[Operator], Iterable[Operator]]) -> None:
        """Replace each operator by what `change` makes of it, in order."""
        self.main.operators = [new for operator in self.operators() for new in change(operator)]

    def prune(self) -> None:
        """Drop what nothing uses any more: operators, tensors, buffers, operator codes and other subgraphs."""
        views = self.views()
        for view in views:
            view._drop_dead_operators()
        # A composite operator names its decomposition by number: while one is left, no subgraph can go.
        if not any(view.code(operator) == "STABLEHLO_COMPOSITE" for view in views for operator in view.main.operators):
            self._drop_subgraphs_but([view.place for view in views])
        for view in self.views():
            view._drop_unused_tensors()
        self._drop_unused_buffers()
        self._drop_unused_codes()

    def _drop_subgraphs_but(self, kept: Sequence[int]) -> None:
        place = {old: new for new, old in enumerate(kept)}
        self.model.subgraphs = [self.model.subgraphs[old] for old in kept]
        for signature in self.model.signatureDefs or []:
            signature.subgraphIndex = place[int(signature.subgraphIndex)]

    def _drop_dead_operators(self) -> None:
        wanted = {int(tensor) for tensor in self.main.outputs}
        # Against the flow, so that what feeds only a dead operator is seen to be dead as well.
        kept: list[Operator] = []
        for operator in reversed(self.main.operators):
            if any(int(tensor) in wanted for tensor in operator.outputs):
                wanted.update(int(tensor) for tensor in operator.inputs)
                kept.append(operator)
        self.main.operators = kept[::-1]

    def _drop_unused_tensors(self) -> None:
        used = {int(i) for i in (*self.main.inputs, *self.main.outputs)}
        for operator in self.main.operators:
            used.update(int(i) for i in (*operator.inputs, *operator.outputs))
            # For scratch tensors of LSTM kernels, which no graph here has; an empty list would take bytes in every
            # operator.
            operator.intermediates = None
        # Scales in blocks are named by their matrix and by no operator.
        used.update(int(blocks.scales) for i in used - {-1} if (blocks := _block_details(self.main.tensors[i])))
        for tensor in self.main.tensors:
            if tensor.quantization is not None and tensor.quantization.scale is None and not _block_details(tensor):
                tensor.quantization = None  # the converter writes empty ones
        # In their old order, so that the same edits give the same bytes, whatever was dropped between.
        order = sorted(used - {-1})
        place = {old: new for new, old in enumerate(order)} | {-1: -1}
        self.main.tensors = [self.main.tensors[old] for old in order]
        for blocks in filter(None, map(_block_details, self.main.tensors)):
            blocks.scales = place[int(blocks.scales)]
        self.main.inputs = [place[int(i)] for i in self.main.inputs]
        self.main.outputs = [place[int(i)] for i in self.main.outputs]
        for operator in self.main.operators:
            operator.inputs = [place[int(i)] for i in operator.inputs]
            operator.outputs = [place[int(i)] for i in operator.outputs]
        own = [s for s in self.model.signatureDefs or [] if int(s.subgraphIndex) == self.place]
        for port in (port for signature in own for port in (*signature.inputs, *signature.outputs)):
            port.tensorIndex = place[port.tensorIndex]

    def _drop_unused_buffers(self) -> None:
        tensors = [tensor for subgraph in self.model.subgraphs for tensor in subgraph.tensors]
        holders = [*tensors, *(self.model.metadata or [])]
        # Buffer 0 stays even if nothing points to it: it means "no values" for whoever adds a tensor.
        order = sorted({0, *(int(holder.buffer) for holder in holders)})
        place = {old: new for new, old in enumerate(order)}
        self.model.buffers = [self.model.buffers[old] for old in order]
        # An old list of buffer numbers beside `metadata`; it would go stale with the numbers.
        self.model.metadataBuffer = None
        for holder in holders:
            holder.buffer = place[int(holder.buffer)]
        kept = {place[old]: origin for old, origin in self.origins.items() if old in place}
        self.origins.clear()  # all views share the one table
        self.origins.update(kept)

    def _drop_unused_codes(self) -> None:
        operators = [operator for subgraph in self.model.subgraphs for operator in subgraph.operators]
        order = sorted({int(operator.opcodeIndex) for operator in operators})
        place = {old: new for new, old in enumerate(order)}
        self.model.operatorCodes = [self.model.operatorCodes[old] for old in order]
        for operator in operators:
            operator.opcodeIndex = place[int(operator.opcodeIndex)]

    def write(self, file: Path) -> None:
        """Write the model, whole or not at all; the same graph gives the same bytes."""
        writer.write(self.model, file)


# Operators that the quantiser adds, and the options that TFLite wants with them.
_OPTIONS = {
    "QUANTIZE": "QuantizeOptions",
    "DEQUANTIZE": "DequantizeOptions",
    "FULLY_CONNECTED": "FullyConnectedOptions",
    "BATCH_MATMUL": "BatchMatMulOptions",
    "CONV_2D": "Conv2DOptions",
    "MUL": "MulOptions",
    "ADD": "AddOptions",
    "RESHAPE": "ReshapeOptions",
    "LESS": "LessOptions",
    "SELECT_V2": "SelectV2Options",
    "SUB": "SubOptions",
    "DIV": "DivOptions",
    "SUM": "ReducerOptions",
    "REDUCE_MAX": "ReducerOptions",
    "REDUCE_MIN": "ReducerOptions",
    "CONCATENATION": "ConcatenationOptions",
    "SPLIT": "SplitOptions",
    "GATHER": "GatherOptions",
}


def _nothing() -> SubGraph:
    main: SubGraph = schema.classes().SubGraphT()
    main.tensors, main.operators, main.inputs, main.outputs = [], [], [], []
    return main


def model_at(data: mmap, start: int) -> ModelReader:
    """The schema's reader of the model that begins at byte `start` of mapped `data`; nothing is copied."""
    reader: ModelReader = schema.classes().Model.GetRootAs(data, start)
    return reader


def type_name(number: int) -> str:
    """The schema's name of an element type: 0 is FLOAT32."""
    return schema.names("TensorType")[number]


def _ports(tensors: Mapping[str, int]) -> list[Port]:
    ports = []
    for name, tensor in tensors.items():
        port: Port = schema.classes().TensorMapT()
        port.name, port.tensorIndex = name, tensor
        ports.append(port)
    return ports


def text(raw: Name) -> str:
    """A name as the schema's classes hold it: bytes, text or nothing."""
    return raw.decode("utf-8", "replace") if isinstance(raw, bytes) else str(raw)


def _type_of(dtype: DTypeLike) -> int:
    return int(getattr(schema.classes().TensorType, np.dtype(dtype).name.upper()))


def _block_details(tensor: Tensor) -> BlockDetails | None:
    """What a tensor says of its blocks, None if it has none."""
    own = tensor.quantization
    kind = schema.classes().QuantizationDetails.BlockwiseQuantization
    return own.details if own is not None and own.detailsType == kind else None


def _block_parameters(scales: int, block: int) -> Quantization:
    s = schema.classes()
    parameters: Quantization = s.QuantizationParametersT()
    details: BlockDetails = s.BlockwiseQuantizationT()
    # No tensor of zero points: −1 says that all are 0.
    details.scales, details.zeroPoints, details.blockSize = scales, -1, block
    parameters.detailsType, parameters.details = s.QuantizationDetails.BlockwiseQuantization, details
    parameters.quantizedDimension = 0
    return parameters


def _parameters(scales: Scales | None) -> Quantization | None:
    if scales is None:
        return None
    parameters: Quantization = schema.classes().QuantizationParametersT()
    parameters.scale, parameters.zeroPoint, parameters.quantizedDimension = scales.scale, scales.zero_point, scales.axis
    return parameters
