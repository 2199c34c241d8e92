"""Embedding tables as `.tflite` sections of their own, written from the checkpoint in row blocks, without a graph.

LiteRT-LM asks an embedder for one token at a time: one signature, one int32 token in, its scaled row out, rank 3 or
more. The table of Gemma 3n E2B's per-layer embedding is 8 GB in float32, so rows are read, converted and written block
by block; nothing of a table's size is ever in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from pipeline.bundling import tables
from pipeline.checkpoint.reader import Checkpoint
from pipeline.core.errors import QuantiseError
from pipeline.core.recipe import Bundle
from pipeline.models import architecture_of
from pipeline.models.build import tensor_names
from pipeline.quantize import blockwise, float16
from pipeline.quantize import rows as quantize
from pipeline.tflite import weights
from pipeline.tflite.graph import Graph
from pipeline.tflite.lazy import Blocks

Precision = Literal["fp32", "fp16", "int8", "int4"]
Choice = Callable[[str], Precision | None]
"""Of a table's tensor: the precision that it has to have, if it is another one than the rest."""
SIGNATURE, INPUT, OUTPUT = "lookup", "token_ids", "embeddings"
_VERSIONS: dict[Precision, int] = {
    "fp32": 1,
    "fp16": float16.LOOKUP_VERSION,
    "int8": quantize.LOOKUP_INT8_VERSION,
    "int4": blockwise.LOOKUP_VERSION,
}
# The largest error of a value over the largest in its row: exact, half a float16 step, half an int8 step (rounded up),
# and with 4 bits what may be clipped.
_ERROR: dict[Precision, float] = {
    "fp32": 0.0,
    "fp16": 2.0**-11 * 1.01,
    "int8": 0.5 / 127 * 1.01,
    "int4": blockwise.LARGEST_ERROR,
}


@dataclass(frozen=True, kw_only=True)
class Source:
    """A table in a checkpoint: the tensor's name there, what each row is multiplied with, and the shape of a row."""

    tensor: str
    scale: float
    shape: tuple[int, ...]


def write(checkpoint: Checkpoint, source: Source, precision: Precision, file: Path) -> None:
    """Write `file`: signature `lookup`, `token_ids` int32 [1, 1] → `embeddings` float32 [1, 1, *shape].

    A token beyond the table (Gemma 3n's image and audio tokens have no row in the per-layer table) gives row 0.

    Raises:
        IntegrityError: a value is not finite.
        QuantiseError: a value is too large for float16.
    """
    _graph(weights.rows(checkpoint, source.tensor), source, precision).write(file)


def _store(graph: Graph, table: Blocks, source: Source, precision: Precision) -> int:
    """The table as a constant of `precision`."""
    # Lazy, as the float32 that it is read as; what follows changes type and bytes of the same constant.
    tensor = graph.add_constant(table, "table")
    if precision == "int8":
        graph.set_constant(tensor, *quantize.quantise_rows(table))
    elif precision == "int4":
        graph.set_four_bits(tensor, *blockwise.quantise_blocks(table))
    elif precision == "fp16":
        graph.set_constant(tensor, table.map(np.float16, lambda block, _: float16.to_half(block, source.tensor)))
    return tensor


def _graph(table: Blocks, source: Source, precision: Precision) -> Graph:
    """token → token if it has a row else 0 → its row in float32 → times scale → [1, 1, *shape]."""
    graph = Graph.empty()
    rows, columns = table.shape

    def constant(name: str, value: Sequence[int] | float, dtype: type[np.int32] | type[np.float32] = np.int32) -> int:
        return graph.add_constant(np.array(value, dtype), name)

    def then(code: str, inputs: Sequence[int], name: str, kind: str, shape: Sequence[int], version: int = 1) -> int:
        result = graph.add_tensor(name, kind, shape)
        graph.main.operators.append(graph.operator(code, inputs, [result], version))
        return result

    token = graph.add_tensor(INPUT, "INT32", (1, 1))
    # A lookup takes a vector.
    flat = then("RESHAPE", [token, constant("one", [1])], "token", "INT32", (1,))
    # A kernel refuses an id beyond the table, and Gemma 3n's image and audio tokens have no row in the per-layer one.
    known = then("LESS", [flat, constant("rows", [rows])], "known", "BOOL", (1,))
    first = constant("first", [0])
    row = then("SELECT_V2", [known, flat, first], "row", "INT32", (1,))
    stored = _store(graph, table, source, precision)
    kind = "FLOAT16" if precision == "fp16" else "FLOAT32"
    found = then("EMBEDDING_LOOKUP", [row, stored], "found", kind, (1, columns), _VERSIONS[precision])
    if precision == "fp16":
        found = then("DEQUANTIZE", [found], "wide", "FLOAT32", (1, columns), float16.DEQUANTIZE_VERSION)
    # In the section and not in the table: int8 rows keep their scales, and the decoder gets what it was exported for.
    scaled = then("MUL", [found, constant("scale", source.scale, np.float32)], "scaled", "FLOAT32", (1, columns))
    shape = (1, 1, *source.shape)
    result = then("RESHAPE", [scaled, constant("shape", shape)], OUTPUT, "FLOAT32", shape)
    graph.main.inputs, graph.main.outputs = [token], [result]
    graph.add_signature(SIGNATURE, {INPUT: token}, {OUTPUT: result})
    return graph


def check(checkpoint: Checkpoint, source: Source, precision: Precision, file: Path) -> None:
    """Open `file` as an application would and hold a few rows against the checkpoint's.

    Raises:
        QuantiseError: a row is further from the checkpoint's than its precision allows.
    """
    from ai_edge_litert.interpreter import Interpreter

    rows = checkpoint.tensors[source.tensor].shape[0]
    # With the default kernels, which are what an application runs.
    lookup = Interpreter(model_path=str(file)).get_signature_runner(SIGNATURE)
    # Beginning, middle and end: a table that was cut, shifted or padded shows at one of them.
    for token in sorted({0, 1, rows // 3, rows // 2, rows - 1} & set(range(rows))):
        expected = checkpoint.rows(source.tensor, token, token + 1)[0] * np.float32(source.scale)
        found = lookup(**{INPUT: np.array([[token]], np.int32)})[OUTPUT]
        worst = float(np.abs(found.ravel() - expected).max(initial=0.0))
        if found.shape != (1, 1, *source.shape) or worst > _ERROR[precision] * float(np.abs(expected).max(initial=0.0)):
            raise QuantiseError(
                f"{file}: row {token} is {worst:.3g} off the checkpoint's",
                cause="the file holds another table, or LiteRT reads it differently",
                file=file,
            )


def write_tables(
    checkpoint: Checkpoint,
    bundle: Bundle,
    precision: tables.Precision,
    folder: Path,
    chosen: Choice = lambda _: None,
) -> list[Path]:
    """Write the embedding tables that are sections of their own into `folder`, straight from the checkpoint.

    In `precision`, but those of which `chosen` has another; 4-bit tables without whole blocks have 8 bits.
    """
    names, written = tensor_names(checkpoint), []
    for table in architecture_of(checkpoint, bundle).tables():
        source = tables.Source(tensor=names[table.tensor], scale=table.scale, shape=table.shape)
        file = folder / f"{table.name}.tflite"
        # As `blockwise.quantise_weights` does with the graphs' matrices.
        whole = checkpoint.tensors[source.tensor].shape[-1] % blockwise.BLOCK == 0
        wanted = chosen(table.tensor) or precision
        made: tables.Precision = "int8" if wanted == "int4" and not whole else wanted
        tables.write(checkpoint, source, made, file)
        tables.check(checkpoint, source, made, file)
        written.append(file)
    return written
