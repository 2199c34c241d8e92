"""A bundle with another decoder, all else as it stands in the file: what verify reads LiteRT-LM's own numbers with."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
from litert_lm_builder import litertlm_builder
from litert_lm_builder.runtime.proto import llm_metadata_pb2

from pipeline.bundling import litertlm
from pipeline.core.facts import Section
from pipeline.tflite.graph import Graph
from pipeline.tflite.lazy import Blocks

_TABLE, _ROWS = "table", "rows"
"""The constants of an embedder (tables.py)."""
_MOST = 1 << 26
"""Bytes of a table from which on its first rows alone are taken: of tokens behind them the embedder gives row 0."""
_CHUNK = 1 << 20


def with_decoder(bundle: Path, decoder: Path, length: int, out: Path) -> None:
    """Write `out`: what is in `bundle`, but with the TFLite file `decoder`, for conversations of `length` tokens."""
    sections = litertlm.read_sections(bundle)
    builder = litertlm_builder.LitertLmFileBuilder()
    # The builder wants some.
    builder.add_system_metadata(
        litertlm_builder.Metadata(key="Authors", value="none", dtype=litertlm_builder.DType.STRING)
    )
    kinds = {kind.value: (name, kind) for name, kind in litertlm.MODEL_KINDS.items()}
    with tempfile.TemporaryDirectory(dir=out.parent) as scratch:
        for place, section in enumerate(sections):
            file = Path(scratch) / f"{place}.tflite"
            name, kind = kinds.get(section.model_type, ("", None))
            if section.kind == litertlm.EXECUTOR:
                file = file.with_suffix(".pb")
                file.write_bytes(litertlm.seeing_whole(decoder))
                builder.add_executor_metadata(str(file))
            elif kind is None:
                _describe(builder, bundle, section, length, file)
            elif name == "decoder":
                # Weights of the old one, where they have a section of their own, are left out.
                if section.kind == litertlm.MODEL:
                    builder.add_tflite_model(str(decoder), kind)
            elif name.endswith("embedder"):
                if section.kind == litertlm.MODEL:
                    _begun(litertlm.read_model(bundle, sections, section.model_type)).write(file)
                    builder.add_tflite_model(str(file), kind)
            else:
                _copy(bundle, section, file)
                add = builder.add_tflite_weights if section.kind == litertlm.WEIGHTS else builder.add_tflite_model
                add(str(file), kind)
        with out.open("wb") as stream:
            builder.build(stream)


def _describe(
    builder: litertlm_builder.LitertLmFileBuilder, bundle: Path, section: Section, length: int, file: Path
) -> None:
    """Add metadata or tokenizer."""
    file = file.with_suffix(".pb" if section.kind == litertlm.METADATA else ".zlib")
    _copy(bundle, section, file)
    if section.kind != litertlm.METADATA:
        builder.add_hf_tokenizer(str(file))
        return
    message = llm_metadata_pb2.LlmMetadata.FromString(file.read_bytes())
    message.max_num_tokens = length
    file.write_bytes(message.SerializeToString(deterministic=True))
    builder.add_llm_metadata(str(file))


def _begun(embedder: Graph) -> Graph:
    """An embedder with as many of its first rows as are not too large."""
    tensors = {embedder.name(tensor): tensor for tensor in range(len(embedder.main.tensors))}
    table = embedder.blocks(tensors[_TABLE])
    rows = min(table.shape[0], max(1, _MOST * table.shape[0] // len(table)))
    if rows < table.shape[0]:
        embedder.set_constant(tensors[_TABLE], Blocks((rows, *table.shape[1:]), table.dtype, table.rows))
        embedder.main.tensors[tensors[_TABLE]].shape = [rows, *table.shape[1:]]
        embedder.set_constant(tensors[_ROWS], np.array([rows], np.int32))
    return embedder


def _copy(bundle: Path, section: Section, file: Path) -> None:
    with bundle.open("rb") as source, file.open("wb") as out:
        source.seek(section.offset)
        left = section.size
        while left:
            left -= out.write(source.read(min(_CHUNK, left)))
