"""A small Gemma 3 that sees: transformers' own classes with random weights, none as transformers begins it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import Gemma3Config, Gemma3ForConditionalGeneration
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from pipeline.core.recipe import PROJECT
from pipeline.core.stage import DEFAULT_MODEL
from tools.named_tokens import name_tokens

TINY = PROJECT / DEFAULT_MODEL
BEGIN, END, PLACE = 2014, 2016, 2048
TOKENS = {BEGIN: "<start_of_image>", END: "<end_of_image>", PLACE: "<image_soft_token>"}
SIZE, ROWS = 112, 16
"""Pixels a side, eight patches of 14, and the soft tokens that four of them each make one of."""
TEXT: dict[str, Any] = {
    "vocab_size": 2048,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "query_pre_attn_scalar": 16,
    "sliding_window": 12,
    "eos_token_id": 1,
    "bos_token_id": 2,
    "pad_token_id": 0,
}
"""The window is shorter than a picture, so that what it hides within one shows."""
VISION: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": SIZE,
    "patch_size": 14,
    "vision_use_head": False,
}

SMALL = {
    "cache_length = 4096": "cache_length = 512",
    "prefill = [512]": "prefill = [64]",
    "decode = 128": "decode = 24",
    "positions = 5080": "positions = 930",
    "prompts = 16": "prompts = 4",
    "continuation = 64": "continuation = 12",
    "window = 128": "window = 32",
    "positions = 2048": "positions = 512",
    "prompts = 6": "prompts = 3",
    "continuation = 24": "continuation = 5",
    "ladder = true": "ladder = false",
    "gptq = true": "gptq = false",
    # Of so few weights scales and what stays float16 are more than of the true ones.
    "bytes_per_weight = 1.06": "bytes_per_weight = 1.2",
    "bytes_per_weight = 1.12": "bytes_per_weight = 1.6",
    "top1 = 0.96\n": "top1 = 0.9\n",
}
"""Changes of the recipe that make judging quick, as `line.SMALL`."""
TRUE: dict[str, Any] = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "image_size": 896,
    "patch_size": 14,
    "vision_use_head": False,
}
"""The tower of Gemma 3 4B, 12B and 27B."""


def model(vision: dict[str, Any] | None = None, rows: int = ROWS, seed: int = 0) -> Gemma3ForConditionalGeneration:
    """One with random weights: every norm, bias and position away from its beginning."""
    config = Gemma3Config(
        text_config=TEXT,
        vision_config=vision or VISION,
        mm_tokens_per_image=rows,
        image_token_index=PLACE,
        boi_token_index=BEGIN,
        eoi_token_index=END,
    )
    made = Gemma3ForConditionalGeneration(config).eval().float()
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            noise = torch.randn(parameter.shape, generator=draw)
            if "mm_input_projection" in name:
                value = noise * parameter.shape[0] ** -0.5
            elif parameter.ndim > 1:
                value = noise * parameter[0].numel() ** -0.5
            elif "bias" in name or "language_model" in name or "mm_soft" in name:
                value = 0.2 * noise
            else:
                value = 1 + 0.2 * noise
            parameter.copy_(value)
    return made


def write_model(
    folder: Path, vision: dict[str, Any] | None = None, rows: int = ROWS, dtype: torch.dtype = torch.float32
) -> Path:
    """A checkpoint of it in `folder`, its weights of `dtype`, with the shipped model's tokenizer."""
    shutil.copytree(TINY, folder, ignore=shutil.ignore_patterns("corpus", "*.safetensors", "*processor*"))
    made = model(vision, rows).to(dtype)
    made.save_pretrained(folder)
    file = folder / "generation_config.json"
    shutil.copy(TINY / file.name, file)
    size = {"height": made.config.vision_config.image_size, "width": made.config.vision_config.image_size}
    SiglipImageProcessorPil(size=size, resample=2, image_mean=[0.5] * 3, image_std=[0.5] * 3).save_pretrained(folder)
    file = folder / "preprocessor_config.json"
    seen = {"image_processor_type": "Gemma3ImageProcessor", "image_seq_length": rows}
    file.write_text(json.dumps(json.loads(file.read_text()) | seen))
    name_tokens(folder, TOKENS, PLACE + 1)
    file = folder / "chat_template.jinja"
    text = file.read_text()
    plain = "{%- if item['type'] == 'text' -%}"
    assert text.count(plain) == 1
    seen_at = "{%- if item['type'] == 'image' -%}{{- '<start_of_image>' -}}{%- elif item['type'] == 'text' -%}"
    file.write_text(text.replace(plain, seen_at))
    return folder
