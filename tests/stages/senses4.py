"""A small Gemma 4 with ears: transformers' own classes with random weights, none as transformers begins it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import Gemma4Config, Gemma4ForConditionalGeneration
from transformers.models.gemma4 import Gemma4AudioFeatureExtractor

from pipeline.core.recipe import PROJECT
from pipeline.core.stage import DEFAULT_MODEL

TINY = PROJECT / DEFAULT_MODEL
BEGIN, END, SOUND = 2015, 2032, 2033
TOKENS = {BEGIN: "<|audio>", END: "<audio|>", SOUND: "<|audio|>"}
TEXT: dict[str, Any] = {
    "vocab_size": 2048,
    "vocab_size_per_layer_input": 2048,
    "hidden_size": 60,
    "hidden_size_per_layer_input": 8,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "num_kv_shared_layers": 2,
    "use_double_wide_mlp": True,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "global_head_dim": 16,
    "sliding_window": 24,
    "final_logit_softcapping": 30.0,
    "eos_token_id": 1,
    "bos_token_id": 2,
    "pad_token_id": 0,
}
AUDIO: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "subsampling_conv_channels": [32, 8],
    "output_proj_dims": 48,
}
"""Ears that convert in seconds."""
SMALL = {
    "cache_length = 4096": "cache_length = 512",
    "prefill = [32, 128]": "prefill = [32, 64]",
    "decode = 128": "decode = 24\npositions = 930",
    "prompts = 16": "prompts = 6",
    "continuation = 128": "continuation = 64",
    "window = 128": "window = 32",
    "positions = 2048": "positions = 512",
    "prompts = 6\n": "prompts = 3\n",
    "continuation = 24": "continuation = 5",
    "ladder = true": "ladder = false",
    'precisions = ["fp32", "int8"]': 'precisions = ["fp32"]',
}
"""Changes of the recipe that make judging quick, as `line.SMALL`."""


def shake(module: torch.nn.Module, seed: int) -> None:
    """Random values away from every beginning; limits that some of what a layer reads and gives is beyond."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=draw)
            if parameter.ndim > 1:
                scale = 1.0 if "embed_tokens" in name else parameter[0].numel() ** -0.5
                parameter.copy_(noise * scale)
            elif "per_dim_scale" in name or name.endswith("bias"):
                parameter.copy_(0.3 * noise)
            else:
                parameter.copy_(1 + 0.2 * noise)
        for name, buffer in module.named_buffers():
            if name.endswith(("_min", "_max")):
                limit = 1.5 + torch.rand((), generator=draw)
                buffer.copy_(-limit if name.endswith("_min") else limit)
            if name.endswith("layer_scalar"):
                buffer.copy_(1 + 0.2 * torch.randn(buffer.shape, generator=draw))


def model(audio: dict[str, Any] | None = None, text: dict[str, Any] | None = None, seed: int = 0) -> Any:
    """The whole model, without eyes."""
    config = Gemma4Config(
        text_config={**TEXT, **(text or {})},
        vision_config=None,
        audio_config=audio or AUDIO,
        boa_token_id=BEGIN,
        eoa_token_index=END,
        audio_token_id=SOUND,
        boi_token_id=2014,
        eoi_token_id=2016,
        image_token_id=2017,
        video_token_id=2018,
    )
    made = Gemma4ForConditionalGeneration(config).eval().float()
    shake(made, seed)
    return made


def write_model(folder: Path, audio: dict[str, Any] | None = None, dtype: torch.dtype = torch.float32) -> Path:
    """A checkpoint of it in `folder`, its weights of `dtype`, with the shipped model's tokenizer."""
    shutil.copytree(TINY, folder, ignore=shutil.ignore_patterns("corpus", "*.safetensors"))
    made = model(audio).to(dtype)
    made.save_pretrained(folder)
    shutil.copy(TINY / "generation_config.json", folder)
    pitches = made.config.audio_config.subsampling_conv_channels[0]
    Gemma4AudioFeatureExtractor(feature_size=pitches).save_pretrained(folder)
    name_tokens(folder, TOKENS)
    file = folder / "chat_template.jinja"
    text, plain = file.read_text(), "{%- if item['type'] == 'text' -%}"
    assert text.count(plain) == 1
    heard = "{%- if item['type'] == 'audio' -%}{{- '<|audio|>' -}}{%- elif item['type'] == 'text' -%}"
    file.write_text(text.replace(plain, heard))
    return folder


def name_tokens(folder: Path, names: dict[int, str]) -> None:
    """Give tokens of the tokenizer in `folder` names; those between must have some too, or `tokenizers` moves them."""
    file = folder / "tokenizer.json"
    table = json.loads(file.read_text(encoding="utf-8"))
    first = 1 + max(table["model"]["vocab"].values())
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    table["added_tokens"] += [
        {"id": token, "content": names.get(token, f"<unused{token}>"), **plain} for token in range(first, 2048)
    ]
    file.write_text(json.dumps(table, ensure_ascii=False), encoding="utf-8")
