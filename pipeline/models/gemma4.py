"""Gemma 4, text, dense: E2B and E4B, and 12B and 31B, which have no table of per-layer embeddings.

The modules follow the Gemma 4 text models of transformers 5.24.0 (`models/gemma4`, `models/gemma4_unified`) and keep
their parameter names, so a checkpoint loads by name. Beside Gemma 3n: no AltUp, no Laurel, no sparse gates; full layers
have heads of another size and turn a part of them only; layers that share keys and values may have twice the MLP; each
layer's result is multiplied with a number that is stored. Shapes in docstrings as in `transformer.py`, L layers, P
per-layer input size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from pipeline.core.errors import FetchError
from pipeline.export.operators import Embedding, Linear
from pipeline.export.repeat import run_layers
from pipeline.models import Runtime, Tower, gemma4_audio, gemma4_vision
from pipeline.models.transformer import (
    FULL,
    SLIDING,
    Attend,
    DecoderGraph,
    EmbeddingDecoder,
    GatedMLP,
    RMSNorm,
    Rotation,
    StepGraph,
    Table,
    TextFamily,
    TokenDecoder,
    embedding_tables,
    gelu,
    split_heads,
)

_ACTIVATION = "gelu_pytorch_tanh"
_LOCAL = {"rope_theta": 1e4, "rope_type": "default"}
_GLOBAL = {"rope_theta": 1e6, "rope_type": "proportional", "partial_rotary_factor": 0.25}
"""Rotary positions of sliding and of full layers where config.json says nothing."""
_UNIFIED = ("gemma4_unified", "gemma4_unified_text")
"""12B: images and audio go straight into the text model, which has no per-layer embeddings and a longer window."""


_RUNTIME = Runtime(
    type="gemma4",
    tools=True,
    thoughts=("<|channel>thought\n", "<channel|>"),
    calls={
        "code_fence_start": "<|tool_call>",
        "code_fence_end": "<tool_call|>",
        "open_quote": '<|"|>',
        "close_quote": '<|"|>',
        "function_response_start": "<|tool_response>",
    },
    response="<|tool_response>",
)
"""As Google's own bundles have it."""


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """The numbers that define a Gemma 4 text model; names as in transformers' `Gemma4TextConfig`.

    Of each layer type, `heads` are key/value heads and their size, and `frequencies` the rotary ones in radians per
    position [D / 2]. `hidden_size_per_layer_input` is 0 where there are no per-layer embeddings.
    """

    vocab_size: int
    vocab_size_per_layer_input: int
    hidden_size: int
    hidden_size_per_layer_input: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    heads: Mapping[str, tuple[int, int]]
    attention_bias: bool
    attention_k_eq_v: bool
    rms_norm_eps: float
    sliding_window: int
    layer_types: tuple[str, ...]
    frequencies: Mapping[str, tuple[float, ...]]
    final_logit_softcapping: float | None
    num_kv_shared_layers: int
    use_double_wide_mlp: bool

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> TextConfig:
        """Read a checkpoint's `config.json` (any of the model types); absent keys have transformers' defaults.

        Raises:
            FetchError: a value that these modules do not implement.
        """
        text: Mapping[str, Any] = config.get("text_config", config)
        _refuse_unknown(text)
        unified = str(config.get("model_type")) in _UNIFIED
        layers = text.get("num_hidden_layers", 30)
        types = list(text.get("layer_types") or [SLIDING if (i + 1) % 6 else FULL for i in range(layers)])
        types[-1:] = [FULL]  # as transformers has it, whatever is said
        heads = _heads(text, types)
        numbers = cls(
            vocab_size=text.get("vocab_size", 262_144),
            vocab_size_per_layer_input=text.get("vocab_size_per_layer_input", 262_144),
            hidden_size=text.get("hidden_size", 2304),
            hidden_size_per_layer_input=text.get("hidden_size_per_layer_input", 0 if unified else 256) or 0,
            intermediate_size=text.get("intermediate_size", 9216),
            num_hidden_layers=layers,
            num_attention_heads=text.get("num_attention_heads", 8),
            heads=heads,
            attention_bias=text.get("attention_bias", False),
            attention_k_eq_v=text.get("attention_k_eq_v", False),
            rms_norm_eps=text.get("rms_norm_eps", 1e-6),
            sliding_window=text.get("sliding_window", 1024 if unified else 512),
            layer_types=tuple(types),
            frequencies={kind: _frequencies(text, kind, size) for kind, (_, size) in heads.items()},
            final_logit_softcapping=text.get("final_logit_softcapping"),
            num_kv_shared_layers=text.get("num_kv_shared_layers", 0),
            use_double_wide_mlp=text.get("use_double_wide_mlp", False),
        )
        _refuse_layers(numbers)
        return numbers

    def kv_source(self, layer: int) -> int:
        """The layer whose keys and values `layer` attends to: itself, or the last unshared layer of its type."""
        unshared = self.num_hidden_layers - self.num_kv_shared_layers
        if layer < unshared:
            return layer
        return max(i for i in range(unshared) if self.layer_types[i] == self.layer_types[layer])

    def kv_shape(self, kind: str) -> tuple[int, int]:
        """Key/value heads of the layers of type `kind`, and their size."""
        return self.heads[kind]

    def mlp_size(self, layer: int) -> int:
        """The width of a layer's MLP."""
        doubled = self.use_double_wide_mlp and self.kv_source(layer) != layer
        return self.intermediate_size * (2 if doubled else 1)


def _heads(text: Mapping[str, Any], types: list[str]) -> dict[str, tuple[int, int]]:
    """Key/value heads and head size by layer type: transformers 5.23's `per_layer_config`, or published files' keys.

    Raises:
        FetchError: layers of one type differ.
    """
    common = {"head_dim": text.get("head_dim", 256), "num_key_value_heads": text.get("num_key_value_heads", 4)}
    full = {"head_dim": text.get("global_head_dim", 512)}
    if text.get("attention_k_eq_v") and text.get("num_global_key_value_heads"):
        full["num_key_value_heads"] = text["num_global_key_value_heads"]
    table = text.get("per_layer_config")
    layers = {int(layer): own for layer, own in (table or {}).items()}  # `05` where there are more than ten
    heads: dict[str, tuple[int, int]] = {}
    for layer, kind in enumerate(types):
        own = (full if kind == FULL else {}) if table is None else layers.get(layer, {})
        if strange := own.keys() - common.keys():
            raise FetchError(f"per_layer_config with {strange.pop()!r} of layer {layer} is not supported")
        said = {**common, **own}
        shape = int(said["num_key_value_heads"]), int(said["head_dim"])
        if heads.setdefault(kind, shape) != shape:
            raise FetchError(
                f"config.json gives layers of type {kind} different heads (number, size): {heads[kind]} and {shape}"
            )
    return {kind: heads[kind] for kind in (FULL, SLIDING) if kind in heads}


def _frequencies(text: Mapping[str, Any], kind: str, size: int) -> tuple[float, ...]:
    """Radians per position of each pair of channels.

    `proportional` ones stand still beyond the first part of a head, and their exponents' denominator is the whole head
    all the same. In torch's float32, in transformers' order: a frequency that is rounded otherwise is an angle off at
    position 2,000.
    """
    usual: Mapping[str, Any] = {SLIDING: _LOCAL, FULL: _GLOBAL}[kind]
    said = (text.get("rope_parameters") or {}).get(kind)
    rope: Mapping[str, Any] = usual if said is None else said
    rope_type = rope.get("rope_type", "default")
    if rope_type not in ("default", "proportional"):
        raise FetchError(f"rope type {rope_type!r} of {kind} is not supported, only 'default' and 'proportional'")
    proportional = rope_type == "proportional"
    turning = int(rope.get("partial_rotary_factor", 1.0) * size // 2) if proportional else size // 2
    theta, factor = float(rope.get("rope_theta", usual["rope_theta"])), rope.get("factor", 1.0)
    with torch.device("cpu"):  # the modules may be made without memory
        turned = 1.0 / theta ** (torch.arange(0, 2 * turning, 2, dtype=torch.float32) / size)
        found = torch.cat((turned, torch.zeros(size // 2 - turning))) / (factor if proportional else 1.0)
    return tuple(found.tolist())


def _refuse_unknown(text: Mapping[str, Any]) -> None:
    if text.get("hidden_activation", _ACTIVATION) != _ACTIVATION:
        raise FetchError(f"hidden_activation {text['hidden_activation']!r} is not supported, only {_ACTIVATION!r}")
    if text.get("enable_moe_block"):
        raise FetchError(
            "enable_moe_block true is not supported: Gemma 4 with experts (26B-A4B)",
            cause="which experts a token goes to is decided while the model runs, and these graphs are fixed",
            remedy="take a dense one: E2B, E4B, 12B or 31B",
        )
    if text.get("use_bidirectional_attention") == "all":
        raise FetchError("use_bidirectional_attention 'all' is not supported: such a model writes no text")


def _refuse_layers(config: TextConfig) -> None:
    if len(config.layer_types) != config.num_hidden_layers or set(config.layer_types) - {FULL, SLIDING}:
        raise FetchError(f"config.json gives layer types {config.layer_types} for {config.num_hidden_layers} layers")
    if config.num_kv_shared_layers and not config.hidden_size_per_layer_input:
        raise FetchError(
            f"num_kv_shared_layers {config.num_kv_shared_layers} without per-layer embeddings is not supported: "
            "transformers 5.24.0, which files are held against, can't run it"
        )
    if set(config.layer_types) - set(config.layer_types[: config.num_hidden_layers - config.num_kv_shared_layers]):
        raise FetchError("config.json shares keys and values of a layer type that no unshared layer has")


class Attention(nn.Module):
    """Grouped-query attention with normalised queries, keys and values; scores are not scaled."""

    def __init__(self, config: TextConfig, layer: int) -> None:
        super().__init__()
        kind, bias, eps = config.layer_types[layer], config.attention_bias, config.rms_norm_eps
        self.layer, self.heads = layer, config.num_attention_heads
        self.kv_heads, size = config.kv_shape(kind)
        self.q_proj = Linear(config.hidden_size, self.heads * size, bias=bias)
        self.q_norm = RMSNorm(size, eps)
        self.shared = config.kv_source(layer) != layer
        if not self.shared:
            equal = config.attention_k_eq_v and kind == FULL
            self.k_proj = Linear(config.hidden_size, self.kv_heads * size, bias=bias)
            self.v_proj = None if equal else Linear(config.hidden_size, self.kv_heads * size, bias=bias)
            self.k_norm = RMSNorm(size, eps)
            self.v_norm = RMSNorm(size, eps, scaled=False)
        self.o_proj = Linear(self.heads * size, config.hidden_size, bias=bias)

    def forward(self, x: Tensor, rotation: Rotation, attend: Attend) -> Tensor:
        """[B, S, 1, H] → [B, S, 1, H]."""
        queries = rotation.apply(self.q_norm(split_heads(self.q_proj(x), self.heads)))
        own = None if self.shared else self._keys_values(x, rotation)
        mixed: Tensor = self.o_proj(attend(self.layer, queries, own))
        return mixed

    def _keys_values(self, x: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor]:
        """[B, S, 1, H] → keys and values, each [B, S, K, D]; without a projection of their own values are raw keys."""
        keys = split_heads(self.k_proj(x), self.kv_heads)
        values = keys if self.v_proj is None else split_heads(self.v_proj(x), self.kv_heads)
        return rotation.apply(self.k_norm(keys)), self.v_norm(values)


class DecoderLayer(nn.Module):
    """One layer. [B, S, 1, H] and, where there is one, the layer's own token embedding [B, S, 1, P] → [B, S, 1, H]."""

    def __init__(self, config: TextConfig, layer: int) -> None:
        super().__init__()
        size, eps, own = config.hidden_size, config.rms_norm_eps, config.hidden_size_per_layer_input
        self.self_attn = Attention(config, layer)
        self.mlp = GatedMLP(config.hidden_size, config.mlp_size(layer), gelu)
        self.input_layernorm = RMSNorm(size, eps)
        self.post_attention_layernorm = RMSNorm(size, eps)
        self.pre_feedforward_layernorm = RMSNorm(size, eps)
        self.post_feedforward_layernorm = RMSNorm(size, eps)
        if own:
            self.per_layer_input_gate = Linear(size, own, bias=False)
            self.per_layer_projection = Linear(own, size, bias=False)
            self.post_per_layer_input_norm = RMSNorm(size, eps)
        self.layer_scalar = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor, per_layer_input: Tensor | None, rotation: Rotation, attend: Attend) -> Tensor:
        mixed = x + self.post_attention_layernorm(self.self_attn(self.input_layernorm(x), rotation, attend))
        output = mixed + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(mixed)))
        if per_layer_input is not None:
            gate = functional.gelu(self.per_layer_input_gate(output), approximate="tanh")
            output = output + self.post_per_layer_input_norm(self.per_layer_projection(gate * per_layer_input))
        return self._scaled(output)

    def _scaled(self, x: Tensor) -> Tensor:
        return x * self.layer_scalar


class TextModel(nn.Module):
    """The text model without its head: token ids to final hidden states.

    Without `lookup` it has no per-layer table and can't `embed`: LiteRT-LM has looked that up.
    """

    def __init__(self, config: TextConfig, *, lookup: bool = True) -> None:
        super().__init__()
        self.config = config
        size, own = config.hidden_size, config.hidden_size_per_layer_input
        self.embed_tokens = Embedding(config.vocab_size, size)
        if own:
            if lookup:
                rows = config.vocab_size_per_layer_input
                self.embed_tokens_per_layer = Embedding(rows, config.num_hidden_layers * own)
            self.per_layer_model_projection = Linear(size, config.num_hidden_layers * own, bias=False)
            # As in Gemma 3n: the projection is scaled by H^(−1/2) before its norm, the same as a norm with H · ε.
            self.per_layer_projection_norm = RMSNorm(own, size * config.rms_norm_eps)
        self.layers = nn.ModuleList(DecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(size, config.rms_norm_eps)

    def forward(self, positions: Tensor, attend: Attend, embedded: Tensor, tokens: Tensor | None = None) -> Tensor:
        """Final hidden states [B, S, 1, H].

        Args:
            positions: float [B, S].
            attend: where keys and values go and what is seen of them.
            embedded: the scaled token embedding [B, S, 1, H].
            tokens: the scaled rows of the per-layer table [B, S, L, P], if there is one.
        """
        per_layer = None if tokens is None else self._per_layer_inputs(embedded, tokens)
        rotations = {kind: self._rotation(positions, kind) for kind in self.config.frequencies}
        kinds = self.config.layer_types

        def own(layer: int) -> tuple[Tensor | None, Rotation]:
            return None if per_layer is None else per_layer[:, :, layer : layer + 1], rotations[kinds[layer]]

        normed: Tensor = self.norm(run_layers(self.layers, attend, embedded, own))
        return normed

    def _rotation(self, positions: Tensor, kind: str) -> Rotation:
        return Rotation.of(positions, torch.tensor(self.config.frequencies[kind]))

    def _per_layer_inputs(self, embedded: Tensor, tokens: Tensor) -> Tensor:
        """[B, S, L, P]: the token's own rows of the per-layer table plus a projection of its embedding."""
        context = self.per_layer_projection_norm(self.per_layer_model_projection(embedded).reshape(tokens.shape))
        mixed: Tensor = (context + tokens) * (1 / math.sqrt(2))
        return mixed

    def embed(self, input_ids: Tensor) -> tuple[Tensor, ...]:
        """Token ids [B, S] → scaled embedding [B, S, 1, H], and rows of a per-layer table, scaled [B, S, L, P]."""
        config = self.config
        embedded = self.embed_tokens(input_ids)[:, :, None] * config.hidden_size**0.5
        if not config.hidden_size_per_layer_input:
            return (embedded,)
        tokens = self.embed_tokens_per_layer(input_ids) * config.hidden_size_per_layer_input**0.5
        return embedded, tokens.reshape(*input_ids.shape, config.num_hidden_layers, config.hidden_size_per_layer_input)


class Gemma4(TextFamily[TextConfig]):
    """The `Architecture` of the Gemma 4 model types, bound to a checkpoint's configuration."""

    def __init__(self, config: Mapping[str, object], *, tied: bool = True) -> None:
        self.text, self.tied = TextConfig.from_config(config), tied
        self.ties = bool(config.get("tie_word_embeddings", True))
        self._config = config

    @property
    def _looks_up(self) -> bool:
        """Whether the runtime looks embeddings up, and not the decoder: there is a per-layer table."""
        return bool(self.text.hidden_size_per_layer_input)

    def runtime(self, _template: str) -> Runtime:
        """What LiteRT-LM is told of it."""
        return _RUNTIME

    def step(self, *, all_positions: bool = False) -> StepGraph:
        """The step graph, its weights still to be assigned."""
        return StepGraph(TextModel(self.text), all_positions, tied=self.tied)

    def decoder(self, *, logits: bool) -> DecoderGraph:
        """The decoder graph, its weights still to be assigned."""
        kind = EmbeddingDecoder if self._looks_up else TokenDecoder
        return kind(TextModel(self.text, lookup=False), logits, tied=self.tied)

    def tables(self) -> tuple[Table, ...]:
        """The sections that LiteRT-LM looks tokens up in, if there is a per-layer table."""
        return embedding_tables(self.text) if self._looks_up else ()

    def towers(self) -> Mapping[str, Tower]:
        """Its eyes and ears, where config.json has them; 12B sees and hears without towers."""
        found: dict[str, Tower] = {}
        if str(self._config.get("model_type")) in _UNIFIED:
            return found
        if self._config.get("vision_config"):
            eyes = gemma4_vision.VisionConfig.from_config(self._config)
            tensors = gemma4_vision.tensors(eyes)
            rows = gemma4_vision.rows(eyes, tensors)
            found["vision"] = Tower(sections=gemma4_vision.SECTIONS, rows=rows, tensors=tensors, config=eyes)
        if self._config.get("audio_config"):
            ears = gemma4_audio.AudioConfig.from_config(self._config)
            tensors = gemma4_audio.tensors(ears)
            rows = gemma4_audio.ROWS
            found["audio"] = Tower(sections=gemma4_audio.SECTIONS, rows=rows, tensors=tensors, config=ears)
        return found


ARCHITECTURE = Gemma4
