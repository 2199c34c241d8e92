"""Decoders of the common kind, dense: Llama 3.x, SmolLM2, Qwen 2.5, Qwen 3.

One residual stream, a norm before attention and one before a gated MLP with SiLU, rotary positions. Families differ in
what is on: normalised queries and keys (Qwen 3), biases of queries, keys and values (Qwen 2.5), rotary scaling (Llama).
The modules follow transformers 5.24.0 (`models/llama`, `models/qwen2`, `models/qwen3`) and keep its parameter names, so
a checkpoint loads by name. Shapes in docstrings as in `transformer.py`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from pipeline.core.errors import FetchError
from pipeline.export.operators import Embedding, Linear
from pipeline.export.repeat import run_layers
from pipeline.models import Runtime
from pipeline.models.transformer import (
    FULL,
    Attend,
    GatedMLP,
    RMSNorm,
    Rotation,
    StepGraph,
    TextFamily,
    TokenDecoder,
    split_heads,
)


@dataclass(frozen=True, kw_only=True)
class Family:
    """What a model type has, whatever its config.json says.

    `runtime` is what LiteRT-LM is told; biases and the head size are None where config.json sets them.
    """

    runtime: Runtime
    qk_norm: bool = False
    qkv_bias: bool | None = None
    o_bias: bool | None = None
    head_dim: int | None = None


FAMILIES = {
    "llama": Family(runtime=Runtime(type="generic_model")),
    "qwen2": Family(runtime=Runtime(type="qwen2p5", tools=True), qkv_bias=True, o_bias=False),
    "qwen3": Family(
        runtime=Runtime(type="qwen3", tools=True, thoughts=("<think>\n", "\n</think>")), qk_norm=True, head_dim=128
    ),
}
_DEFAULTS = {
    "vocab_size": 151_936,
    "hidden_size": 4096,
    "intermediate_size": 22_016,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
}
"""transformers' for Qwen. Checkpoints of all families say all of it."""


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """The numbers that define such a model; names as in transformers' configurations.

    `frequencies` are the rotary ones in radians per position [D / 2], `rotary_scale` a factor on rotated queries and
    keys.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    frequencies: tuple[float, ...]
    rotary_scale: float
    layer_types: tuple[str, ...]
    sliding_window: None = None
    final_logit_softcapping: None = None

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> TextConfig:
        """Read a `config.json`; absent keys have transformers' defaults.

        Raises:
            FetchError: a value that these modules do not implement.
        """
        _refuse_unknown(config)
        family = FAMILIES[config["model_type"]]
        values = {**_DEFAULTS, **config}
        heads, layers = values["num_attention_heads"], values["num_hidden_layers"]
        size = values.get("head_dim") or family.head_dim or values["hidden_size"] // heads
        bias = values.get("attention_bias", False)
        frequencies, scale = _rope(values, size)
        return cls(
            vocab_size=values["vocab_size"],
            hidden_size=values["hidden_size"],
            intermediate_size=values["intermediate_size"],
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=values.get("num_key_value_heads") or heads,
            head_dim=size,
            rms_norm_eps=values.get("rms_norm_eps", 1e-6),
            qkv_bias=bias if family.qkv_bias is None else family.qkv_bias,
            o_bias=bias if family.o_bias is None else family.o_bias,
            mlp_bias=values.get("mlp_bias", False),
            qk_norm=family.qk_norm,
            frequencies=frequencies,
            rotary_scale=scale,
            layer_types=(FULL,) * layers,
        )

    def kv_source(self, layer: int) -> int:
        """`layer`: every layer has its own keys and values."""
        return layer

    def kv_shape(self, _kind: str) -> tuple[int, int]:
        """Key/value heads and their size, the same in all layers."""
        return self.num_key_value_heads, self.head_dim


def _refuse_unknown(config: Mapping[str, Any]) -> None:
    if config.get("hidden_act", "silu") != "silu":
        raise FetchError(f"hidden_act {config['hidden_act']!r} is not supported, only 'silu'")
    if config.get("use_sliding_window"):
        raise FetchError(f"use_sliding_window {config['use_sliding_window']!r} is not supported here, only false")
    if set(config.get("layer_types") or ()) - {FULL}:
        raise FetchError(f"config.json gives layer types {config['layer_types']}; only {FULL!r} is supported here")


def _rope(config: Mapping[str, Any], size: int) -> tuple[tuple[float, ...], float]:
    """Frequencies [D / 2] and scale, from transformers 5's `rope_parameters` or version 4's two keys.

    In torch's float32, in transformers' order: a frequency that is rounded otherwise is an angle off at position 2,000.
    """
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in _SCALINGS:
        raise FetchError(f"rope type {kind!r} is not supported, only {', '.join(map(repr, _SCALINGS))}")
    if rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0)) != 1.0:
        raise FetchError("partial_rotary_factor is not supported: whole heads are rotated here")
    theta = rope.get("rope_theta") or config.get("rope_theta") or 10_000.0
    with torch.device("cpu"):  # the modules may be made without memory
        periods = theta ** (torch.arange(0, size, 2, dtype=torch.float32) / size)
        try:
            frequencies, scale = _SCALINGS[kind](periods, theta, rope)
        except KeyError as error:
            raise FetchError(f"rope type {kind!r} needs {error} in config.json, which is not there") from error
    return tuple(frequencies.tolist()), scale


def _unscaled(periods: Tensor, _theta: float, _rope: Mapping[str, Any]) -> tuple[Tensor, float]:
    """Su et al., RoFormer, 2021."""
    return 1.0 / periods, 1.0


def _linear(periods: Tensor, _theta: float, rope: Mapping[str, Any]) -> tuple[Tensor, float]:
    """Chen et al., Position Interpolation, 2023."""
    return 1.0 / periods / rope["factor"], 1.0


def _yarn(periods: Tensor, theta: float, rope: Mapping[str, Any]) -> tuple[Tensor, float]:
    """Peng et al., YaRN, 2023: fast pairs as they are, slow ones interpolated, a ramp between."""
    factor, length, pairs = rope["factor"], rope["original_max_position_embeddings"], len(periods)

    def pair(turns: float) -> float:
        """The pair (not a whole number) that turns so often over the original length."""
        return pairs * math.log(length / (turns * 2 * math.pi)) / math.log(theta)

    edges = pair(rope.get("beta_fast") or 32), pair(rope.get("beta_slow") or 1)
    if rope.get("truncate", True):
        edges = math.floor(edges[0]), math.ceil(edges[1])
    first, last = max(edges[0], 0), min(edges[1], 2 * pairs - 1)
    ramp = (torch.arange(pairs, dtype=torch.float32) - first) / (last - first if last != first else 0.001)
    kept = 1 - ramp.clamp(0, 1)
    return 1.0 / (factor * periods) * (1 - kept) + 1.0 / periods * kept, _yarn_scale(rope)


def _yarn_scale(rope: Mapping[str, Any]) -> float:
    """What makes up for attention spread over more tokens: given, or 0.1 · ln(factor) + 1, in DeepSeek's form too."""

    def scale(weight: float) -> float:
        return 0.1 * weight * math.log(rope["factor"]) + 1.0 if rope["factor"] > 1 else 1.0

    if (given := rope.get("attention_factor")) is not None:
        return float(given)
    if rope.get("mscale") and rope.get("mscale_all_dim"):
        return scale(rope["mscale"]) / scale(rope["mscale_all_dim"])
    return scale(1.0)


def _llama3(periods: Tensor, _theta: float, rope: Mapping[str, Any]) -> tuple[Tensor, float]:
    """Llama 3.1's: waves that are long beside the original context are stretched, short ones kept, a ramp between."""
    turned, length = 1.0 / periods, rope["original_max_position_embeddings"]
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    kept = ((length * turned / (2 * math.pi) - low) / (high - low)).clamp(0, 1)
    return (1 - kept) * turned / rope["factor"] + kept * turned, 1.0


_SCALINGS = {"default": _unscaled, "linear": _linear, "yarn": _yarn, "llama3": _llama3}


class Attention(nn.Module):
    """Grouped-query attention; the scores' scale D^(−1/2) stands in the queries' rotation, which is linear."""

    def __init__(self, config: TextConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.heads, self.kv_heads = layer, config.num_attention_heads, config.num_key_value_heads
        size, width, bias = config.head_dim, config.hidden_size, config.qkv_bias
        self.q_proj = Linear(width, self.heads * size, bias=bias)
        self.k_proj = Linear(width, self.kv_heads * size, bias=bias)
        self.v_proj = Linear(width, self.kv_heads * size, bias=bias)
        self.o_proj = Linear(self.heads * size, width, bias=config.o_bias)
        self.q_norm = RMSNorm(size, config.rms_norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(size, config.rms_norm_eps) if config.qk_norm else None

    def forward(self, x: Tensor, rotations: tuple[Rotation, Rotation], attend: Attend) -> Tensor:
        """[B, S, 1, H] → [B, S, 1, H]; `rotations` of queries and of keys."""
        queries, keys = split_heads(self.q_proj(x), self.heads), split_heads(self.k_proj(x), self.kv_heads)
        if self.q_norm is not None and self.k_norm is not None:
            queries, keys = self.q_norm(queries), self.k_norm(keys)
        values = split_heads(self.v_proj(x), self.kv_heads)
        own = (rotations[1].apply(keys), values)
        mixed: Tensor = self.o_proj(attend(self.layer, rotations[0].apply(queries), own))
        return mixed


class DecoderLayer(nn.Module):
    """One layer. [B, S, 1, H] → [B, S, 1, H]."""

    def __init__(self, config: TextConfig, layer: int) -> None:
        super().__init__()
        self.self_attn = Attention(config, layer)
        self.mlp = GatedMLP(config.hidden_size, config.intermediate_size, functional.silu, bias=config.mlp_bias)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor, rotations: tuple[Rotation, Rotation], attend: Attend) -> Tensor:
        mixed = x + self.self_attn(self.input_layernorm(x), rotations, attend)
        output: Tensor = mixed + self.mlp(self.post_attention_layernorm(mixed))
        return output


class TextModel(nn.Module):
    """The text model without its head: token ids to final hidden states."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, positions: Tensor, attend: Attend, embedded: Tensor) -> Tensor:
        """Final hidden states [B, S, 1, H] at float `positions` [B, S] of embeddings [B, S, 1, H]."""
        config = self.config
        turned = Rotation.of(positions, torch.tensor(config.frequencies)).scaled(config.rotary_scale)
        rotations = turned.scaled(config.head_dim**-0.5), turned
        normed: Tensor = self.norm(run_layers(self.layers, attend, embedded, lambda _: (rotations,)))
        return normed

    def embed(self, input_ids: Tensor) -> tuple[Tensor]:
        """Token ids [B, S] → embedding [B, S, 1, H]."""
        return (self.embed_tokens(input_ids)[:, :, None],)


class Plain(TextFamily[TextConfig]):
    """The `Architecture` of the model types in `FAMILIES`, bound to a checkpoint's configuration."""

    left_out = re.compile(r".*rotary_emb\.inv_freq$")
    """Frequencies that old versions stored."""

    def __init__(self, config: Mapping[str, object], *, tied: bool = True) -> None:
        self.text, self.tied = TextConfig.from_config(config), tied
        self.ties = bool(config.get("tie_word_embeddings", False))
        self._family = FAMILIES[str(config["model_type"])]

    def runtime(self, _template: str) -> Runtime:
        """What LiteRT-LM is told of it."""
        return self._family.runtime

    def step(self, *, all_positions: bool = False) -> StepGraph:
        """The step graph, its weights still to be assigned."""
        return StepGraph(TextModel(self.text), all_positions, tied=self.tied)

    def decoder(self, *, logits: bool) -> TokenDecoder:
        """The decoder graph, its weights still to be assigned."""
        return TokenDecoder(TextModel(self.text), logits, tied=self.tied)


ARCHITECTURE = Plain
