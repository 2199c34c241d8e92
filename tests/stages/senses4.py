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
TRUE: dict[str, Any] = {"model_type": "gemma4_audio"}
"""Those of E2B and E4B: every default, 12 layers of 1,024."""
SMALL = {
    "cache_length = 4096": "cache_length = 512",
    "prefill = [32, 128]": "prefill = [8, 64]",
    "decode = 128": "decode = 24",
    "positions = 2032": "positions = 930",
    "continuation = 128": "continuation = 64",
    'optional = ["int4"] # published where it keeps its limits, left out where not\n': "",
    "window = 128": "window = 32",
    "positions = 2048": "positions = 512",
    "prompts = 6": "prompts = 3",
    "continuation = 24": "continuation = 5",
    "ladder = true": "ladder = false",
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
    return whole(None, audio or AUDIO, seed, text)


def whole(vision: dict[str, Any] | None, audio: dict[str, Any] | None, seed: int, text: dict[str, Any] | None) -> Any:
    """A model with the eyes and ears that are given."""
    config = Gemma4Config(
        text_config={**TEXT, **(text or {})},
        vision_config=vision,
        audio_config=audio,
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
    with torch.no_grad():
        for name, parameter in made.model.language_model.named_parameters():
            if "layers" in name and ".post_" in name:
                # Else a token's embedding outweighs what is seen or heard, and it is said again and again.
                parameter.mul_(4)
    return made


def write_model(folder: Path, audio: dict[str, Any] | None = None, dtype: torch.dtype = torch.float32) -> Path:
    """A checkpoint of it in `folder`, its weights of `dtype`, with the shipped model's tokenizer."""
    shutil.copytree(TINY, folder, ignore=shutil.ignore_patterns("corpus", "*.safetensors"))
    made = model(audio).to(dtype)
    made.save_pretrained(folder)
    shutil.copy(TINY / "generation_config.json", folder)
    name_tokens(folder, TOKENS)
    add_ears(folder, made.config.audio_config)
    return folder


def add_ears(folder: Path, audio: Any) -> None:
    """Tell processor and template in `folder` of sounds, beside what they are told of already."""
    file = folder / "preprocessor_config.json"
    told = json.loads(file.read_text()) if file.is_file() else {}
    Gemma4AudioFeatureExtractor(feature_size=audio.subsampling_conv_channels[0]).save_pretrained(folder)
    file.write_text(json.dumps(json.loads(file.read_text()) | told))
    file = folder / "chat_template.jinja"
    text, plain = file.read_text(), "if item['type'] == 'text' -%}"
    assert text.count(plain) == 1
    file.write_text(text.replace(plain, "if item['type'] == 'audio' -%}{{- '<|audio|>' -}}{%- el" + plain))


def name_tokens(folder: Path, names: dict[int, str]) -> None:
    """Give tokens of the tokenizer in `folder` names; those between must have some too, or `tokenizers` moves them."""
    file = folder / "tokenizer.json"
    table = json.loads(file.read_text(encoding="utf-8"))
    first = 1 + max(table["model"]["vocab"].values())
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    table["added_tokens"] += [
        # What an answer may hold is not special: transformers would leave it out of the text.
        {"id": token, "content": names.get(token, f"<unused{token}>"), "special": token in names, **plain}
        for token in range(first, 2048)
    ]
    file.write_text(json.dumps(table, ensure_ascii=False), encoding="utf-8")
