"""Gemma 3, text: 270M, 1B, and the text tower of the larger ones.

The modules follow the Gemma 3 text model of transformers 5.24.0 (`models/gemma3/modeling_gemma3.py`) and keep its
parameter names, so a checkpoint loads by name. Shapes in docstrings as in `transformer.py`.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from pipeline.checkpoint.names import EMBEDDING
from pipeline.core.errors import FetchError
from pipeline.export.operators import Embedding, Linear
from pipeline.export.repeat import run_layers
from pipeline.models import Runtime, Tower, gemma3_vision
from pipeline.models.gemma3_vision import VisionConfig
from pipeline.models.transformer import (
    FULL,
    SLIDING,
    Attend,
    EmbeddedDecoder,
    GatedMLP,
    RMSNorm,
    Rotation,
    StepGraph,
    Table,
    TextFamily,
    TokenDecoder,
    gelu,
    split_heads,
)

_FUNCTION_GEMMA = Runtime(type="function_gemma", tools=True, response="<start_function_response>")
"""As Google's own bundles have it: the runtime's own values serve, and a tool speaks after that token."""


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """The numbers that define a Gemma 3 text model; names as in transformers' `Gemma3TextConfig`.

    `rope` is base and linear scaling factor of each layer type.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    attention_bias: bool
    query_pre_attn_scalar: float
    rms_norm_eps: float
    sliding_window: int
    layer_types: tuple[str, ...]
    rope: Mapping[str, tuple[float, float]]
    final_logit_softcapping: float | None

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> TextConfig:
        """Read a checkpoint's `config.json` (either model type); absent keys have transformers' defaults.

        Raises:
            FetchError: a value that these modules do not implement.
        """
        text: Mapping[str, Any] = config.get("text_config", config)
        layers = text.get("num_hidden_layers", 26)
        pattern = int(text.get("sliding_window_pattern", text.get("_sliding_window_pattern", 6)))
        default_types = [SLIDING if (i + 1) % pattern else FULL for i in range(layers)]
        numbers = cls(
            vocab_size=text.get("vocab_size", 262_208),
            hidden_size=text.get("hidden_size", 2304),
            intermediate_size=text.get("intermediate_size", 9216),
            num_hidden_layers=layers,
            num_attention_heads=text.get("num_attention_heads", 8),
            num_key_value_heads=text.get("num_key_value_heads", 4),
            head_dim=text.get("head_dim", 256),
            attention_bias=text.get("attention_bias", False),
            query_pre_attn_scalar=text.get("query_pre_attn_scalar", 256),
            rms_norm_eps=text.get("rms_norm_eps", 1e-6),
            sliding_window=text.get("sliding_window", 4096),
            layer_types=tuple(text.get("layer_types") or default_types),
            rope={kind: _rope(text, kind) for kind in (FULL, SLIDING)},
            final_logit_softcapping=text.get("final_logit_softcapping"),
        )
        _refuse_unknown(text, numbers)
        return numbers

    def kv_source(self, layer: int) -> int:
        """`layer`: every layer has its own keys and values."""
        return layer

    def kv_shape(self, _kind: str) -> tuple[int, int]:
        """Key/value heads and their size, the same in all layers."""
        return self.num_key_value_heads, self.head_dim


def _rope(text: Mapping[str, Any], kind: str) -> tuple[float, float]:
    """Base and linear factor of a layer type, from transformers 5's `rope_parameters` or version 4's keys."""
    old = {FULL: ("rope_theta", 1_000_000.0), SLIDING: ("rope_local_base_freq", 10_000.0)}
    key, default = old[kind]
    scaling = (text.get("rope_parameters") or {}).get(kind) or {}
    if kind == FULL and not scaling:
        scaling = text.get("rope_scaling") or {}
    rope_type = scaling.get("rope_type", scaling.get("type", "default"))
    if rope_type not in ("default", "linear"):
        raise FetchError(f"rope type {rope_type!r} of {kind} is not supported, only 'default' and 'linear'")
    factor = scaling.get("factor", 1.0) if rope_type == "linear" else 1.0
    return float(scaling.get("rope_theta", text.get(key, default))), float(factor)


def _refuse_unknown(text: Mapping[str, Any], config: TextConfig) -> None:
    activation = text.get("hidden_activation", "gelu_pytorch_tanh")
    if activation != "gelu_pytorch_tanh":
        raise FetchError(f"hidden activation {activation!r} is not supported, only 'gelu_pytorch_tanh'")
    if text.get("attn_logit_softcapping"):
        raise FetchError("attn_logit_softcapping is not supported: Gemma 3 has none")
    if text.get("use_bidirectional_attention"):
        raise FetchError("bidirectional attention is not supported: such a model embeds text, it does not write any")
    if len(config.layer_types) != config.num_hidden_layers or set(config.layer_types) - {FULL, SLIDING}:
        raise FetchError(f"config.json gives layer types {config.layer_types} for its layers")


class Attention(nn.Module):
    """Grouped-query attention with normalised queries and keys; scores are scaled by query_pre_attn_scalar^(−1/2)."""

    def __init__(self, config: TextConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.heads, self.kv_heads = layer, config.num_attention_heads, config.num_key_value_heads
        bias, eps, size = config.attention_bias, config.rms_norm_eps, config.head_dim
        self.q_proj = Linear(config.hidden_size, self.heads * size, bias=bias)
        self.k_proj = Linear(config.hidden_size, self.kv_heads * size, bias=bias)
        self.v_proj = Linear(config.hidden_size, self.kv_heads * size, bias=bias)
        self.o_proj = Linear(self.heads * size, config.hidden_size, bias=bias)
        # A rotation is linear, so the scores' scale can stand in the norm before it.
        self.q_norm = RMSNorm(size, eps, factor=config.query_pre_attn_scalar**-0.5, offset=1.0)
        self.k_norm = RMSNorm(size, eps, offset=1.0)

    def forward(self, x: Tensor, rotation: Rotation, attend: Attend) -> Tensor:
        """[B, S, 1, H] → [B, S, 1, H]."""
        queries = rotation.apply(self.q_norm(split_heads(self.q_proj(x), self.heads)))
        keys = rotation.apply(self.k_norm(split_heads(self.k_proj(x), self.kv_heads)))
        values = split_heads(self.v_proj(x), self.kv_heads)
        mixed: Tensor = self.o_proj(attend(self.layer, queries, (keys, values)))
        return mixed


class DecoderLayer(nn.Module):
    """One layer. [B, S, 1, H] → [B, S, 1, H]."""

    def __init__(self, config: TextConfig, layer: int) -> None:
        super().__init__()
        size, eps = config.hidden_size, config.rms_norm_eps
        self.self_attn = Attention(config, layer)
        self.mlp = GatedMLP(size, config.intermediate_size, gelu)
        self.input_layernorm = RMSNorm(size, eps, offset=1.0)
        self.post_attention_layernorm = RMSNorm(size, eps, offset=1.0)
        self.pre_feedforward_layernorm = RMSNorm(size, eps, offset=1.0)
        self.post_feedforward_layernorm = RMSNorm(size, eps, offset=1.0)

    def forward(self, x: Tensor, rotation: Rotation, attend: Attend) -> Tensor:
        mixed = x + self.post_attention_layernorm(self.self_attn(self.input_layernorm(x), rotation, attend))
        output: Tensor = mixed + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(mixed)))
        return output


class TextModel(nn.Module):
    """The text model without its head: token ids to final hidden states."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, offset=1.0)

    def forward(self, positions: Tensor, attend: Attend, embedded: Tensor) -> Tensor:
        """Final hidden states [B, S, 1, H] at float `positions` [B, S] of scaled embeddings [B, S, 1, H]."""
        rotations = {
            kind: Rotation.at(positions, theta, self.config.head_dim, factor)
            for kind, (theta, factor) in self.config.rope.items()
        }
        kinds = self.config.layer_types
        normed: Tensor = self.norm(run_layers(self.layers, attend, embedded, lambda i: (rotations[kinds[i]],)))
        return normed

    def embed(self, input_ids: Tensor) -> tuple[Tensor]:
        """Token ids [B, S] → scaled embedding [B, S, 1, H]."""
        return (self.embed_tokens(input_ids)[:, :, None] * self.config.hidden_size**0.5,)


class Gemma3ForTFLite(StepGraph):
    """The step graph of a Gemma 3 text model."""

    def __init__(self, config: TextConfig, all_positions: bool = False, *, tied: bool = True) -> None:
        super().__init__(TextModel(config), all_positions, tied=tied)


class Gemma3Decoder(TokenDecoder):
    """The decoder section of a Gemma 3 bundle. It looks tokens up itself, in the table that is also its head."""

    def __init__(self, config: TextConfig, logits: bool, *, tied: bool = True) -> None:
        super().__init__(TextModel(config), logits, tied=tied)


class Gemma3EmbeddedDecoder(EmbeddedDecoder):
    """The same for a model that sees: LiteRT-LM looks tokens up and passes embeddings."""

    def __init__(self, config: TextConfig, logits: bool, *, tied: bool = True) -> None:
        super().__init__(TextModel(config), logits, tied=tied)


class Gemma3(TextFamily[TextConfig]):
    """The `Architecture` of both Gemma 3 model types, bound to a checkpoint's configuration."""

    left_out = re.compile(r"(model\.)?(vision_tower|multi_modal_projector)\.")

    def __init__(self, config: Mapping[str, object], *, tied: bool = True) -> None:
        self.text, self.tied = TextConfig.from_config(config), tied
        self.ties = bool(config.get("tie_word_embeddings", True))
        self._config, self._embedder = config, False

    def with_embedder(self) -> Gemma3:
        """As `Architecture`."""
        other = copy.copy(self)
        other._embedder = True
        return other

    def runtime(self, template: str) -> Runtime:
        """What LiteRT-LM is told of it: FunctionGemma differs in its template alone."""
        return _FUNCTION_GEMMA if "<start_function_call>" in template else Runtime(type="gemma3")

    def step(self, *, all_positions: bool = False) -> Gemma3ForTFLite:
        """The step graph, its weights still to be assigned."""
        return Gemma3ForTFLite(self.text, all_positions, tied=self.tied)

    def decoder(self, *, logits: bool) -> Gemma3Decoder | Gemma3EmbeddedDecoder:
        """The decoder graph, its weights still to be assigned."""
        kind = Gemma3EmbeddedDecoder if self._embedder else Gemma3Decoder
        return kind(self.text, logits, tied=self.tied)

    def tables(self) -> tuple[Table, ...]:
        """The section that LiteRT-LM looks tokens up in, where the decoder does not."""
        size = self.text.hidden_size
        return (Table("embedder", EMBEDDING, size**0.5, (size,)),) if self._embedder else ()

    def towers(self) -> Mapping[str, Tower]:
        """Its eyes, where config.json has them."""
        if not self._config.get("vision_config"):
            return {}
        config = VisionConfig.from_config(self._config)
        tensors = gemma3_vision.tensors(config)
        rows = gemma3_vision.rows(config, tensors)
        return {"vision": Tower(sections=gemma3_vision.SECTIONS, rows=rows, tensors=tensors, config=config)}


ARCHITECTURE = Gemma3
