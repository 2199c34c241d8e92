"""The shipped model that sees and hears, and the shipped text model with a vision tower of the true size."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ears
import torch
from line import Line
from safetensors.torch import load_file, save_file
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from pipeline.core.recipe import PROJECT
from pipeline.judge.sensing import Reference
from pipeline.models import gemma3n_vision as vision
from pipeline.runtime.picture import Sight
from pipeline.runtime.sound import Hearing
from pipeline.tflite.graph import Graph
from tools.named_tokens import name_tokens

TRAINED = PROJECT / "examples/tiny-gemma3n-senses"
TOKENS = {2014: "<start_of_image>", 2016: "<end_of_image>", 2017: "<image_soft_token>"}
TAKE = ("--towers", "vision,audio", "--graphs", "bundle")
KINDS = ("vision", "audio")
END = 2016
SIZE = 256
"""Pixels a side: of each place of the last stage but one one soft token is made, where 768 make one of nine."""


PLACES = "inputs with positions that see others than those before them, in LiteRT-LM"
SEES, HEARS = Sight(size=SIZE), Hearing(rate=16_000, frame=512, hop=160)


def tower(config: Mapping[str, Any], seed: int = 0) -> dict[str, torch.Tensor]:
    """Random weights of tower and embedder by the names of a whole checkpoint, none as timm begins it."""
    draw = torch.Generator().manual_seed(seed)
    made = {}
    for name, shape in vision.tensors(vision.VisionConfig.from_config(config)).items():
        noise = torch.randn(shape, generator=draw)
        if len(shape) > 1:
            value = noise * noise[0].numel() ** -0.5
        elif name.endswith("gamma"):
            value = 0.3 + 0.1 * noise  # timm begins with 1e-5, which hides the block
        else:
            value = 0.2 * noise if name.endswith("bias") else 1 + 0.2 * noise
        made[f"model.{name}"] = value
    return made


def write_model(folder: Path) -> Path:
    """A checkpoint of Gemma 3n's whole model in `folder`, whose vision tower has the true size and random weights."""
    ears.write_model(folder)
    file = folder / "config.json"
    config = json.loads(file.read_text())
    eyes = {"model_type": "gemma3n_vision", "vocab_offset": 2016, "vocab_size": 16, "hidden_size": 2048}
    config["vision_config"] = eyes
    file.write_text(json.dumps(config))
    whole = load_file(folder / "model.safetensors") | tower(config)
    save_file(whole, folder / "model.safetensors", {"format": "pt"})
    _add_processor(folder, 768)
    name_tokens(folder, TOKENS, 2048)
    template = folder / "chat_template.jinja"
    text = template.read_text()
    seen = "{%- if item['type'] == 'image' -%}{{- '<image_soft_token>' -}}{%- elif item['type'] == 'audio' -%}"
    assert "{%- if item['type'] == 'audio' -%}" in text
    template.write_text(text.replace("{%- if item['type'] == 'audio' -%}", seen))
    return folder


def _add_processor(folder: Path, size: int) -> None:
    """Into the file that holds the audio processor's settings, as Gemma 3n's repositories have it."""
    file = folder / "preprocessor_config.json"
    heard = json.loads(file.read_text())
    sized = {"height": size, "width": size}
    SiglipImageProcessorPil(size=sized, resample=2, do_normalize=False).save_pretrained(folder)
    file.write_text(json.dumps(heard | json.loads(file.read_text()) | {"image_processor_type": "SiglipImageProcessor"}))


def bundle_of(line: Line) -> Path:
    return line.root / "bundle" / "fp32.litertlm"


def told(line: Line) -> Reference:
    return Reference.stored(line.root / "golden", "vision")


def changed(file: Path, change: Callable[[Graph], None], out: Path) -> Path:
    made = Graph.read(file)
    change(made)
    made.write(out)
    return out


def sections(line: Line) -> dict[str, Path]:
    text = {name: line.root / "fp32" / f"{name}.tflite" for name in ("decoder", "embedder", "per_layer_embedder")}
    return text | {file.stem: file for file in (line.root / "towers" / "fp32").glob("*.tflite")}
