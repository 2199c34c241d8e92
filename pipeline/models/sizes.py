"""How large the files of each precision become, from the configuration alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from pipeline.checkpoint.names import EMBEDDING, HEAD
from pipeline.core.recipe import DECODER, STEP, Bundle, Graphs
from pipeline.models import Architecture

_BYTES = {"fp32": 4, "fp16": 2, "int8": 1, "int4": 0.75}
"""Of int4 a guess: half a byte and its scales, and some matrices that keep a byte."""
_PER_ROW = 12
"""Bytes of an int8 row's scale (float32) and zero point (int64)."""
_PER_LAYER = 12_000
"""Bytes of one signature's operators and tensors per layer, in Gemma 3n's decoder."""
_TRACED, _COPIED = 2.0, 0.007
"""Seconds of exporting a graph per signature, in which a layer of each kind is traced, and per signature and tensor of
all layers, which stands for operators: Gemma 3n has 25 of them a layer, Llama 9."""
EXPORT_BYTES = 1_100_000
"""Memory per layer and signature of exporting a graph, beyond what the libraries take."""


@dataclass(frozen=True, kw_only=True)
class Weights:
    """What a file stores: elements and rows of its matrices, elements of its vectors, layers times signatures."""

    elements: int
    rows: int
    vectors: int
    graph_layers: int

    def bytes(self, precision: str) -> int:
        """The size of the file in `precision`, to a few per cent of a small model, closer of a large one."""
        scales = _PER_ROW * self.rows if precision == "int8" else 0
        return int(_BYTES[precision] * self.elements) + scales + 4 * self.vectors + _PER_LAYER * self.graph_layers


def of_files(architecture: Architecture, prefills: int, graphs: Graphs) -> dict[str, Weights]:
    """The files that each precision has, by name, the bundle's sections among them.

    Args:
        architecture: the model's.
        prefills: how many prefill signatures the decoder has.
        graphs: which graphs are made.
    """
    shapes = architecture.tensors()
    tables = {table.tensor: table for table in architecture.tables()}
    count = layers(shapes)
    files = {}
    if graphs != "bundle":
        files[STEP] = _weights(shapes, count)
    if graphs != "step":
        inside = {name: shape for name, shape in shapes.items() if name not in tables or is_head(name, shapes)}
        files[DECODER] = _weights(inside, count * (prefills + 1))
        for name, table in tables.items():
            files[f"{table.name}.tflite"] = _weights({name: shapes[name]}, 0)
    return files


def layers(shapes: Mapping[str, tuple[int, ...]]) -> int:
    """How many layers a text model with these tensors has."""
    return len({name.split(".")[1] for name in shapes if name.startswith("layers.")})


def export_seconds(signatures: int, shapes: Mapping[str, tuple[int, ...]]) -> float:
    """How long exporting graphs of so many signatures takes (2 cores, 2026-11-29)."""
    return signatures * (_TRACED + _COPIED * sum(name.startswith("layers.") for name in shapes))


def cache_bytes(architecture: Architecture, bundle: Bundle) -> int:
    """Bytes of one KV cache in float32, as long as it can become."""
    with torch.device("meta"):  # where no length is too much
        kept = architecture.decoder_inputs(1, bundle.cache_length, max(bundle.prefill))["kv_cache"]
    return 4 * sum(math.prod(tensor.shape) for tensor in kept.values())


def multiplied(architecture: Architecture) -> int:
    """Parameters that a token is multiplied with: all but those of tables where it is only looked up."""
    shapes = architecture.tensors()
    tables = {EMBEDDING, *(table.tensor for table in architecture.tables())}
    return sum(math.prod(shape) for name, shape in shapes.items() if name not in tables or is_head(name, shapes))


def is_head(name: str, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether the logits come of this tensor."""
    return name == (HEAD if HEAD in shapes else EMBEDDING)


def _weights(shapes: Mapping[str, tuple[int, ...]], graph_layers: int) -> Weights:
    matrices = [shape for shape in shapes.values() if len(shape) > 1]
    return Weights(
        elements=sum(map(math.prod, matrices)),
        rows=sum(shape[0] for shape in matrices),
        vectors=sum(shape[0] for shape in shapes.values() if len(shape) == 1),
        graph_layers=graph_layers,
    )
