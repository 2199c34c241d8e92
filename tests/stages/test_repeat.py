"""Layers of one kind are traced once: the same files as if each were traced, and no kind taken for another."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import geometry
import pytest
import torch
from torch import Tensor, nn

from pipeline.checkpoint.reader import open_checkpoint
from pipeline.core.recipe import StepLimits
from pipeline.export import repeat
from pipeline.models import build
from pipeline.tflite.graph import Graph

FULL, SLIDING = geometry.FULL, geometry.SLIDING
SMALL = {"vocab_size": 64, "hidden_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
MODELS: dict[str, tuple[Callable[[], Any], int]] = {
    "gemma3n": (
        lambda: geometry.reference(
            {
                **SMALL,
                "vocab_size_per_layer_input": 60,
                "num_hidden_layers": 5,
                "num_kv_shared_layers": 2,
                "layer_types": [SLIDING, SLIDING, FULL, SLIDING, SLIDING],
                "intermediate_size": [24, 24, 24, 40, 40],
                "activation_sparsity_pattern": [0.9, 0.9, 0.0, 0.0, 0.0],
                "hidden_size_per_layer_input": 4,
                "laurel_rank": 3,
                "altup_num_inputs": 2,
                "sliding_window": 5,
            },
            1,
        ),
        3,
    ),
    "gemma3": (
        lambda: geometry.reference(
            {
                **SMALL,
                "num_hidden_layers": 4,
                "layer_types": [SLIDING, FULL, SLIDING, FULL],
                "sliding_window": 5,
            },
            2,
            geometry.Gemma3ForCausalLM,
        ),
        2,
    ),
    "gemma4": (
        lambda: geometry.gemma4_reference(
            {
                **SMALL,
                "model_type": "gemma4_unified_text",
                "intermediate_size": 24,
                "num_hidden_layers": 4,
                "layer_types": [SLIDING, FULL, SLIDING, FULL],
                "global_head_dim": 16,
                "attention_k_eq_v": False,
                "sliding_window": 5,
            },
            4,
        ),
        2,
    ),
    "qwen3": (
        lambda: geometry.plain_reference(
            {**SMALL, "model_type": "qwen3", "num_hidden_layers": 2, "tie_word_embeddings": True}, 3
        ),
        1,
    ),
}


BUT_FOR_NAMES = ("gemma4", "qwen3")
"""Of whose decoders constants that layers share may be called after one of them or after none, and others count on."""


def exported(checkpoint: Path, folder: Path) -> tuple[bytes, bytes]:
    """Step graph and decoder."""
    folder.mkdir()
    opened = open_checkpoint(checkpoint)
    build.export_step(opened, StepLimits(max_batch=8, max_sequence=2048), folder / "step.tflite")
    build.export_decoder(opened, geometry.BUNDLE, folder / "decoder.tflite")
    return (folder / "step.tflite").read_bytes(), (folder / "decoder.tflite").read_bytes()


def without_names(content: bytes) -> bytes:
    """The same file whose constants are called nothing, and all else by its layer and part alone."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "graph.tflite"
        file.write_bytes(content)
        graph = Graph.read(file)
        for view in graph.views():
            for place, tensor in enumerate(view.main.tensors):
                tensor.name = b"" if view.is_constant(place) else view.name(place).rstrip("0123456789").encode()
        graph.write(Path(folder) / "nameless.tflite")
        return (Path(folder) / "nameless.tflite").read_bytes()


@pytest.mark.parametrize("name", MODELS)
def test_the_files_are_those_of_a_trace_of_every_layer(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, kinds = MODELS[name]
    checkpoint = geometry.save(make(), tmp_path / "checkpoint")
    traced: list[str] = []
    entered = repeat.enter

    def counted(inputs: list[Tensor], kind: str) -> Any:
        traced.append(kind)
        return entered(inputs, kind)

    monkeypatch.setattr(repeat, "enter", counted)
    once: tuple[bytes, ...] = exported(checkpoint, tmp_path / "once")
    # The step graph, decode, prefill; in the first's first layer torch.export learns that its inputs have one size.
    assert 3 * kinds <= len(traced) <= 3 * kinds + 1
    monkeypatch.setattr(repeat, "once", nullcontext)
    before = len(traced)
    each: tuple[bytes, ...] = exported(checkpoint, tmp_path / "each")
    if name in BUT_FOR_NAMES:
        once, each = (tuple(map(without_names, files)) for files in (once, each))
    assert each == once
    assert len(traced) == before


class Part(nn.Module):
    def __init__(self, layer: int, factor: float, width: int) -> None:
        super().__init__()
        self.layer, self.factor = layer, factor
        self.weight = nn.Parameter(torch.randn(width))

    def forward(self, x: Tensor, state: Any) -> Tensor:
        del state
        return torch.cat([x * self.factor, x * self.weight.sum()], dim=0)[: len(x)]


class Nothing:
    def kind(self, index: int) -> Any:
        return 0

    def taken(self, index: int) -> list[Tensor]:
        return []

    given = lambda self, index, taken: self  # noqa: E731
    left = taken

    def leave(self, index: int, left: Any) -> None:
        assert not left


@pytest.mark.parametrize(
    ("parts", "kinds"),
    [
        ([(1.0, 3), (1.0, 3), (1.0, 3)], 1),
        ([(1.0, 3), (2.0, 3), (1.0, 3)], 2),
        ([(1.0, 3), (1.0, 4), (1.0, 3)], 2),
        ([(1.0, 3), (1, 3), (True, 3)], 3),
    ],
)
def test_layers_are_of_one_kind_if_all_but_values_and_place_is_the_same(
    parts: list[tuple[float, int]], kinds: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    layers = nn.ModuleList(Part(layer, *part) for layer, part in enumerate(parts))
    met: list[str] = []

    def entered(inputs: list[Tensor], kind: str) -> list[Tensor]:
        met.append(kind)
        return inputs

    monkeypatch.setattr(repeat, "enter", entered)
    monkeypatch.setattr(repeat, "layer", lambda inputs, like, kind, name: like)
    with repeat.once():
        repeat.run_layers(layers, Nothing(), torch.ones(2, 1), lambda _: ())
    assert met == [str(kind) for kind in range(kinds)]
    x = torch.ones(2, 1)
    for part in layers:
        x = part(x, None)
    torch.testing.assert_close(repeat.run_layers(layers, Nothing(), torch.ones(2, 1), lambda _: ()), x)
