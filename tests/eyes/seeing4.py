"""A small Gemma 4 with eyes: transformers' own classes with random weights, none as transformers begins it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import senses4
import torch
from transformers import Gemma4ForConditionalGeneration
from transformers.models.gemma4.image_processing_pil_gemma4 import Gemma4ImageProcessorPil

from pipeline.core.facts import Patches

BEGIN, END, PLACE = 2014, 2016, 2017
TOKENS = {BEGIN: "<|image>", END: "<image|>", PLACE: "<|image|>"}
PATCHES = Patches(size=16, pool=3, tokens=70)
"""The fewest that the processor knows."""
VISION: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "position_embedding_size": 256,
    "use_clipped_linears": True,
    "standardize": True,
}
TRUE: dict[str, Any] = {"use_clipped_linears": True, "standardize": True}
"""The tower of E2B, of every default: 16 layers of 768."""
SMALL = {
    "cache_length = 4096": "cache_length = 768",
    "prefill = [32, 128]": "prefill = [8, 64]",
    "decode = 128": "decode = 24",
    "positions = 2032": "positions = 930",
    "prompts = 16": "prompts = 4",
    "continuation = 128": "continuation = 16",
    'optional = ["int4"] # published where it keeps its limits, left out where not\n': "",
    "window = 128": "window = 32",
    "positions = 2048": "positions = 512",
    "prompts = 6": "prompts = 3",
    "continuation = 24": "continuation = 5",
    "ladder = true": "ladder = false",
    # What eight bits cost random weights of this width.
    "[gates.bundle-int8]\nkld = 0.01\ntop1 = 0.96\nperplexity_ratio_min = 0.993\nperplexity_ratio_max = 1.007": (
        "[gates.bundle-int8]\nkld = 0.05\ntop1 = 0.9"
    ),
    "[gates.vision-int8]\nsnr = 30.0\nkld = 0.01": "[gates.vision-int8]\nsnr = 27.0\nkld = 0.1",
    # Of so few weights scales and what stays float16 are more than of the true ones.
    "bytes_per_weight = 1.06": "bytes_per_weight = 1.2",
    "bytes_per_weight = 1.12": "bytes_per_weight = 2.2",
}
"""Changes of the recipe that make judging quick, as `line.SMALL`."""


def model(
    vision: dict[str, Any] | None = None, seed: int = 0, audio: dict[str, Any] | None = None
) -> Gemma4ForConditionalGeneration:
    """The whole model, without ears if there is no `audio`."""
    made: Gemma4ForConditionalGeneration = senses4.whole(vision or VISION, audio, seed, None)
    tower: Any = made.model.vision_tower
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in tower.named_parameters():
            if vision and name.endswith(("q_norm.weight", "k_norm.weight")):
                # Scores are not scaled: else each patch sees one of thousands alone, which makes roundings large.
                parameter.mul_(tower.config.head_dim**-0.25)
        table = tower.patch_embedder.position_embedding_table
        table.copy_(0.4 * torch.randn(table.shape, generator=draw))
        tower.std_bias.copy_(0.3 * torch.randn(tower.std_bias.shape, generator=draw))
        tower.std_scale.copy_(1 + 0.2 * torch.randn(tower.std_scale.shape, generator=draw))
    return made


def write_model(
    folder: Path,
    vision: dict[str, Any] | None = None,
    tokens: int = PATCHES.tokens,
    dtype: torch.dtype = torch.float32,
    audio: dict[str, Any] | None = None,
) -> Path:
    """A checkpoint of it in `folder`, its weights of `dtype`, with the shipped model's tokenizer."""
    shutil.copytree(senses4.TINY, folder, ignore=shutil.ignore_patterns("corpus", "*.safetensors", "*processor*"))
    made = model(vision, audio=audio).to(dtype)
    made.save_pretrained(folder)
    shutil.copy(senses4.TINY / "generation_config.json", folder)
    Gemma4ImageProcessorPil(max_soft_tokens=tokens).save_pretrained(folder)
    file = folder / "preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"image_processor_type": "Gemma4ImageProcessor"}))
    senses4.name_tokens(folder, {**TOKENS, **(senses4.TOKENS if audio else {})})
    file = folder / "chat_template.jinja"
    text, plain = file.read_text(), "{%- if item['type'] == 'text' -%}"
    assert text.count(plain) == 1
    seen = "{%- if item['type'] == 'image' -%}{{- '<|image|>' -}}{%- elif item['type'] == 'text' -%}"
    file.write_text(text.replace(plain, seen))
    if audio:
        senses4.add_ears(folder, made.config.audio_config)
    return folder
