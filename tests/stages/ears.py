"""The shipped model with ears: its text model, and an audio tower of random weights, none as transformers begins it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import Gemma3nAudioConfig
from transformers.models.gemma3n import Gemma3nAudioFeatureExtractor
from transformers.models.gemma3n.modeling_gemma3n import Gemma3nAudioEncoder, Gemma3nMultimodalEmbedder

from pipeline.core.recipe import PROJECT
from pipeline.core.stage import DEFAULT_MODEL
from tools.named_tokens import name_tokens

TINY = PROJECT / DEFAULT_MODEL
BEGIN, END, SOUND = 2015, 2032, 2033
TOKENS = {BEGIN: "<start_of_audio>", END: "<end_of_audio>", SOUND: "<audio_soft_token>"}
SMALL = {
    "hidden_size": 64,
    "conf_num_attention_heads": 4,
    "conf_num_hidden_layers": 2,
    "sscp_conv_channel_size": [16, 8],
    "vocab_size": 16,
    "vocab_offset": 2032,
}
"""An audio tower that converts in seconds."""


def shake(module: torch.nn.Module, seed: int) -> None:
    """Random values away from every beginning, so that a factor which is left out shows; activations of order one."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=draw)
            if parameter.ndim > 1:
                parameter.copy_(noise * parameter[0].numel() ** -0.5)
            else:
                parameter.copy_(0.3 * noise if "per_dim_scale" in name else 1 + 0.2 * noise)


def ears(settings: dict[str, object], width: int, seed: int = 0) -> tuple[Gemma3nAudioEncoder, torch.nn.Module]:
    """Hugging Face's audio tower and embedder with random weights, for a text model `width` wide."""
    config = Gemma3nAudioConfig(**settings)

    class Text:
        hidden_size = width

    tower = Gemma3nAudioEncoder(config).eval()
    embedder = Gemma3nMultimodalEmbedder(config, Text()).eval()  # type: ignore[arg-type]  # all that it asks for
    shake(tower, seed)
    shake(embedder, seed + 1)
    return tower, embedder


def tensors(tower: torch.nn.Module, embedder: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Their weights by the names of a whole checkpoint."""
    parts = {"model.audio_tower": tower, "model.embed_audio": embedder}
    return {
        f"{part}.{name}": parameter.detach().clone()
        for part, module in parts.items()
        for name, parameter in module.named_parameters()
    }


def write_model(folder: Path, settings: dict[str, object] | None = None, dtype: torch.dtype = torch.float32) -> Path:
    """A checkpoint of Gemma 3n's whole model, without eyes, in `folder`; its tower's weights are of `dtype`."""
    settings = settings or SMALL
    shutil.copytree(TINY, folder, ignore=shutil.ignore_patterns("corpus", "*.safetensors"))
    text = json.loads((TINY / "config.json").read_text())
    config = {
        "model_type": "gemma3n",
        "architectures": ["Gemma3nForConditionalGeneration"],
        "text_config": text,
        "audio_config": {"model_type": "gemma3n_audio", **settings},
        "tie_word_embeddings": True,
        "boa_token_id": BEGIN,
        "eoa_token_id": END,
        "audio_token_id": SOUND,
        "boi_token_id": 2014,
        "eoi_token_id": 2016,
        "image_token_id": 2017,
    }
    (folder / "config.json").write_text(json.dumps(config))
    stored = load_file(TINY / "model.safetensors")
    whole = {f"model.language_model.{name.removeprefix('model.')}": value for name, value in stored.items()}
    tower = {name: value.to(dtype) for name, value in tensors(*ears(settings, text["hidden_size"])).items()}
    save_file(whole | tower, folder / "model.safetensors", {"format": "pt"})
    Gemma3nAudioFeatureExtractor().save_pretrained(folder)
    name_tokens(folder, TOKENS, 2048)
    template = (folder / "chat_template.jinja").read_text()
    heard = "{%- if item['type'] == 'audio' -%}{{- '<audio_soft_token>' -}}{%- elif item['type'] == 'text' -%}"
    assert "{%- if item['type'] == 'text' -%}" in template
    (folder / "chat_template.jinja").write_text(template.replace("{%- if item['type'] == 'text' -%}", heard))
    return folder
