"""From a checkpoint to the sections of its towers: graphs without matrices, and weights, read as they are written."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn

from pipeline.checkpoint.layout import lay_out_tower
from pipeline.checkpoint.names import EMBEDDING, outer
from pipeline.checkpoint.picture import Look, open_look, open_patches
from pipeline.checkpoint.reader import Checkpoint, Float32
from pipeline.checkpoint.sound import Front, open_front, open_front4
from pipeline.core import log
from pipeline.core.errors import TowerError
from pipeline.export.export import Inputs, Signature, export
from pipeline.models import (
    architecture_of,
    gemma3_vision,
    gemma3n_audio,
    gemma3n_vision,
    gemma4_audio,
    gemma4_vision,
    tower_of,
)
from pipeline.tflite import weights
from pipeline.tflite.graph import Graph

Make = Callable[[], nn.Module]
_TRACED, _BLOCK = 4.0, 2.0
"""Seconds of exporting an encoder, and per block of its own."""


def export_tower(tower: str, checkpoint: Checkpoint, folder: Path) -> list[Path]:
    """Write the sections of `tower`, `audio` or `vision`, into `folder`, their weights still to be attached."""
    make = {"audio": _export_audio, "vision": _export_vision}[tower]
    return make(checkpoint, _names(tower, checkpoint), folder)


def with_weights(tower: str, checkpoint: Checkpoint, file: Path) -> Graph:
    """A section that `export_tower` wrote, with the checkpoint's weights in float32, read when it is written."""
    graph = Graph.read(file)
    weights.attach(graph, checkpoint, _names(tower, checkpoint))
    return graph


def _names(tower: str, checkpoint: Checkpoint) -> Mapping[str, str]:
    """The names of the tower's tensors in the checkpoint."""
    shapes = tower_of(architecture_of(checkpoint), tower).tensors
    return lay_out_tower(checkpoint.tensors, shapes, tower, str(checkpoint.folder))


def _export_audio(checkpoint: Checkpoint, names: Mapping[str, str], folder: Path) -> list[Path]:
    tower = tower_of(architecture_of(checkpoint), "audio")
    files = [folder / f"{name}.tflite" for name in tower.sections]
    if isinstance(config := tower.config, gemma4_audio.AudioConfig):
        front, modules, width, blocks = _ears4(config, checkpoint.folder)
        # Here the end is a token of the text, in Gemma 3n one of the tower's own table.
        row = text_row(checkpoint, config.eoa_token_id)
    else:
        assert isinstance(config, gemma3n_audio.AudioConfig)
        front, modules, width, blocks = _ears3n(config, checkpoint.folder)
        row = end_row(checkpoint, names, "embed_audio", config.eoa_token_id - config.vocab_offset, config.rms_norm_eps)
    frames, rows = (1, config.frames), (1, config.soft_tokens)
    heard = {"src_inputs": torch.zeros(*frames, front.frame), "mask": torch.ones(1, *frames, dtype=torch.bool)}
    features = {"features": torch.zeros(*rows, width), "mask": torch.ones(rows, dtype=torch.bool)}
    with log.waiting("exporting the audio encoder", _TRACED + _BLOCK * blocks):
        _export(checkpoint, names, modules[0], heard, files[0])
    _export(checkpoint, names, modules[1], features, files[1])
    _write_vector(row, files[2])
    return files


_Ears = tuple[Front, tuple[Make, Make], int, int]
"""What a spectrogram is made by; what makes encoder and adapter; the width between them, and the encoder's blocks."""


def _ears3n(config: gemma3n_audio.AudioConfig, folder: Path) -> _Ears:
    front = open_front(folder)
    modules = partial(gemma3n_audio.AudioEncoder, config, front), partial(gemma3n_audio.AudioAdapter, config)
    return front, modules, config.hidden_size, config.conf_num_hidden_layers


def _ears4(config: gemma4_audio.AudioConfig, folder: Path) -> _Ears:
    front = open_front4(folder)
    config.check(len(front.mel))
    modules = partial(gemma4_audio.AudioEncoder, config, front), partial(gemma4_audio.AudioAdapter, config)
    return front, modules, config.output_proj_dims, config.num_hidden_layers


def _export_vision(checkpoint: Checkpoint, names: Mapping[str, str], folder: Path) -> list[Path]:
    tower = tower_of(architecture_of(checkpoint), "vision")
    files = [folder / f"{name}.tflite" for name in tower.sections]
    if isinstance(tower.config, gemma4_vision.VisionConfig):
        return _export_patched(checkpoint, names, tower.config, files)
    look = open_look(checkpoint.folder)
    if isinstance(config := tower.config, gemma3_vision.VisionConfig):
        modules, blocks = _eyes3(config, look), config.num_hidden_layers
    else:
        assert isinstance(config, gemma3n_vision.VisionConfig)
        modules, blocks = _eyes3n(config, look, checkpoint, names), sum(map(len, config.stages))
    config.check(look.size)
    pixels = {"images": torch.zeros(1, look.size, look.size, 3)}
    features = {"soft_tokens": torch.zeros(1, config.soft_tokens, config.hidden_size)}
    with log.waiting("exporting the vision encoder", _TRACED + blocks):
        _export(checkpoint, names, modules[0], pixels, files[0])
    _export(checkpoint, names, modules[1], features, files[1])
    return files


def _export_patched(
    checkpoint: Checkpoint, names: Mapping[str, str], config: gemma4_vision.VisionConfig, files: list[Path]
) -> list[Path]:
    """Gemma 4's, which take pictures of any proportions, in patches."""
    patches = open_patches(checkpoint.folder)
    config.check(patches)
    seen = {
        "images": torch.zeros(1, patches.count, 3 * patches.size**2),
        "positions_xy": torch.zeros(1, patches.count, 2, dtype=torch.int32),
    }
    features = {"soft_tokens": torch.zeros(1, patches.tokens, config.hidden_size)}
    with log.waiting("exporting the vision encoder", _TRACED + config.num_hidden_layers):
        _export(checkpoint, names, lambda: gemma4_vision.VisionEncoder(config, patches), seen, files[0])
    _export(checkpoint, names, lambda: gemma4_vision.VisionAdapter(config), features, files[1])
    _write_vector(text_row(checkpoint, config.eoi_token_id), files[2])
    return files


def text_row(checkpoint: Checkpoint, token: int) -> Float32:
    """The text model's embedding [H] of a token, as its decoder takes it.

    Raises:
        TowerError: the model has no such token.
    """
    stored = outer(checkpoint.tensors)[EMBEDDING]
    if not 0 <= token < (count := checkpoint.tensors[stored].shape[0]):
        raise TowerError(
            f"config.json says that token {token} ends a picture or a sound, and the model has {count} tokens"
        )
    row = checkpoint.rows(stored, token, token + 1)[0]
    made: Float32 = row * np.float32(row.size**0.5)
    return made


def _eyes3(config: gemma3_vision.VisionConfig, look: Look) -> tuple[Make, Make]:
    """Gemma 3's encoder and adapter."""
    return lambda: gemma3_vision.VisionEncoder(config, look), lambda: gemma3_vision.VisionAdapter(config)


def _eyes3n(
    config: gemma3n_vision.VisionConfig, look: Look, checkpoint: Checkpoint, names: Mapping[str, str]
) -> tuple[Make, Make]:
    """Gemma 3n's."""
    row = end_row(checkpoint, names, "embed_vision", config.eoi_token_id - config.vocab_offset, config.rms_norm_eps)
    return lambda: gemma3n_vision.VisionEncoder(config, look), lambda: gemma3n_vision.VisionAdapter(config, row)


def _export(checkpoint: Checkpoint, names: Mapping[str, str], make: Make, inputs: Inputs, file: Path) -> None:
    """A section with one signature, called like its file."""

    def vector(name: str) -> torch.Tensor:
        read = weights.vector if checkpoint.tensors[names[name]].shape else weights.limit
        return torch.from_numpy(read(checkpoint, names[name]).copy())

    with torch.device("meta"):
        module = make()
    export([Signature(file.stem, module, vector, inputs)], file)


def end_row(checkpoint: Checkpoint, names: Mapping[str, str], embedder: str, token: int, eps: float) -> Float32:
    """The vector of an `embedder`'s own `token`, as that behind a sound or a picture, [H].

    Of the tower's own table, not of the text model's: as `Gemma3nMultimodalEmbedder` of transformers embeds ids from
    `vocab_offset` on, in float64.
    """
    table, norm, matrix = (
        names[f"{embedder}.{part}.weight"] for part in ("embedding", "hard_embedding_norm", "embedding_projection")
    )
    hidden = _normed(checkpoint.rows(table, token, token + 1)[0], eps) * weights.vector(checkpoint, norm)
    width = checkpoint.tensors[matrix].shape[0]
    projected = np.concatenate(
        [checkpoint.rows(matrix, i, min(i + 256, width)).astype(np.float64) @ hidden for i in range(0, width, 256)]
    )
    return _normed(projected, eps).astype(np.float32)


def _normed(x: np.ndarray, eps: float) -> np.ndarray:
    wide = x.astype(np.float64)
    return wide / np.sqrt(np.mean(wide * wide) + eps)


def _write_vector(values: Float32, file: Path) -> None:
    """A section without inputs that gives `values` as [1, 1, H], called as litert-torch calls it."""
    graph = Graph.empty()
    shape = (1, 1, values.size)
    # An operator, since what is a constant and an output at once comes out of the runtime as zeros.
    parts = [graph.add_constant(values.reshape(shape), "row"), graph.add_constant(np.zeros(1, np.float32), "nothing")]
    name = {"end_of_audio": "eoa_embedding", "end_of_vision": "eoi_embedding"}[file.stem]
    out = graph.add_tensor(name, "FLOAT32", shape)
    graph.main.operators.append(graph.operator("ADD", parts, [out]))
    graph.main.outputs = [out]
    graph.add_signature(file.stem, {}, {name: out})
    graph.write(file)
