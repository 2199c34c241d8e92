"""Gemma 3n, text: the graph modules that are exported, written so that every construct lowers exactly.

The modules follow the Gemma 3n text model of transformers 5.24.0 (`models/gemma3n/modeling_gemma3n.py`) and keep its
parameter names, so a checkpoint loads by name. They are our own for three reasons: some constructs there do not export
(a `torch.distributions` object in forward), some lower wrongly without an error once shapes are dynamic (an in-place
update of a slice), and buffers that are not in the checkpoint stay uninitialised when a model is built on the meta
device. So: no in-place update, no buffer at all, every constant a Python number or computed where it is used.

Shapes in docstrings: B batch, S sequence, H hidden size, V vocabulary, L layers, P per-layer input size, A AltUp
inputs, D head size, K key/value heads, G query heads per key/value head, T attended positions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from pipeline.core.errors import FetchError
from pipeline.export.operators import Embedding, Linear, matmul
from pipeline.export.repeat import run_layers
from pipeline.models import Runtime, Tower, gemma3n_audio, gemma3n_vision
from pipeline.models.gemma3n_audio import AudioConfig
from pipeline.models.gemma3n_vision import VisionConfig
from pipeline.models.transformer import (
    FULL,
    SLIDING,
    Attend,
    EmbeddingDecoder,
    RMSNorm,
    Rotation,
    StepGraph,
    Table,
    TextFamily,
    embedding_tables,
    split_heads,
)


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """The numbers that define a Gemma 3n text model; names as in transformers' `Gemma3nTextConfig`."""

    vocab_size: int
    vocab_size_per_layer_input: int
    hidden_size: int
    hidden_size_per_layer_input: int
    intermediate_size: tuple[int, ...]
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    attention_bias: bool
    rms_norm_eps: float
    sliding_window: int
    layer_types: tuple[str, ...]
    rope_theta: Mapping[str, float]
    final_logit_softcapping: float | None
    altup_num_inputs: int
    altup_active_idx: int
    altup_correct_scale: bool
    num_kv_shared_layers: int
    laurel_rank: int
    activation_sparsity_pattern: tuple[float, ...]

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> TextConfig:
        """Read a checkpoint's `config.json` (either model type); absent keys have transformers' defaults.

        Raises:
            FetchError: a value that these modules do not implement.
        """
        text: Mapping[str, Any] = config.get("text_config", config)
        layers = text.get("num_hidden_layers", 35)
        widths = text.get("intermediate_size", 16_384)
        default_types = [FULL if (i + 1) % 5 == 0 else SLIDING for i in range(layers)]
        # As transformers' configuration has it where config.json says nothing.
        sparse = 10 if layers > 10 else 0
        sparsity = text.get("activation_sparsity_pattern")
        if sparsity is None:
            sparsity = [0.95] * sparse + [0.0] * (layers - sparse)
        numbers = cls(
            vocab_size=text.get("vocab_size", 262_400),
            vocab_size_per_layer_input=text.get("vocab_size_per_layer_input", 262_144),
            hidden_size=text.get("hidden_size", 2048),
            hidden_size_per_layer_input=text.get("hidden_size_per_layer_input", 256),
            intermediate_size=tuple(widths if isinstance(widths, Sequence) else [widths] * layers),
            num_hidden_layers=layers,
            num_attention_heads=text.get("num_attention_heads", 8),
            num_key_value_heads=text.get("num_key_value_heads", 2),
            head_dim=text.get("head_dim", 256),
            attention_bias=text.get("attention_bias", False),
            rms_norm_eps=text.get("rms_norm_eps", 1e-6),
            sliding_window=text.get("sliding_window", 512),
            layer_types=tuple(text.get("layer_types") or default_types),
            rope_theta=_rope_theta(text),
            final_logit_softcapping=text.get("final_logit_softcapping", 30.0),
            altup_num_inputs=text.get("altup_num_inputs", 4),
            altup_active_idx=text.get("altup_active_idx", 0),
            altup_correct_scale=text.get("altup_correct_scale", True),
            num_kv_shared_layers=text.get("num_kv_shared_layers", 15),
            laurel_rank=text.get("laurel_rank", 64),
            activation_sparsity_pattern=tuple(sparsity),
        )
        _refuse_unknown(text, numbers)
        return numbers

    def kv_source(self, layer: int) -> int:
        """The layer whose keys and values `layer` attends to: itself, or the last unshared layer of its type."""
        unshared = self.num_hidden_layers - self.num_kv_shared_layers
        if layer < unshared:
            return layer
        return max(i for i in range(unshared) if self.layer_types[i] == self.layer_types[layer])

    def kv_shape(self, _kind: str) -> tuple[int, int]:
        """Key/value heads and their size, the same in all layers."""
        return self.num_key_value_heads, self.head_dim


def _rope_theta(text: Mapping[str, Any]) -> dict[str, float]:
    """The RoPE base of each layer type, from transformers 5's `rope_parameters` or version 4's two keys."""
    parameters = text.get("rope_parameters") or {}
    theta = {FULL: text.get("rope_theta", 1_000_000.0), SLIDING: text.get("rope_local_base_freq", 10_000.0)}
    for layer_type in theta:
        own = parameters.get(layer_type) or {}
        kind = own.get("rope_type", "default")
        if kind != "default":
            raise FetchError(f"rope type {kind!r} of {layer_type} is not supported, only 'default'")
        theta[layer_type] = own.get("rope_theta", theta[layer_type])
    scaling = text.get("rope_scaling")
    if scaling and scaling.get("rope_type", scaling.get("type", "default")) != "default":
        raise FetchError(f"rope scaling {scaling} is not supported")
    return {layer_type: float(base) for layer_type, base in theta.items()}


def _refuse_unknown(text: Mapping[str, Any], config: TextConfig) -> None:
    activation = text.get("hidden_activation", "gelu_pytorch_tanh")
    if activation != "gelu_pytorch_tanh":
        raise FetchError(f"hidden activation {activation!r} is not supported, only 'gelu_pytorch_tanh'")
    for name in ("intermediate_size", "layer_types", "activation_sparsity_pattern"):
        if len(getattr(config, name)) != config.num_hidden_layers:
            raise FetchError(f"config.json gives {len(getattr(config, name))} values of {name} for its layers")
    unshared = set(config.layer_types[: config.num_hidden_layers - config.num_kv_shared_layers])
    if set(config.layer_types) - unshared or set(config.layer_types) - {FULL, SLIDING}:
        raise FetchError("config.json shares keys and values of a layer type that no unshared layer has")


class Laurel(nn.Module):
    """Learned augmented residual layer: x + norm(right(left(x))), low rank. [B, S, 1, H] → [B, S, 1, H]."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.linear_left = Linear(config.hidden_size, config.laurel_rank, bias=False)
        self.linear_right = Linear(config.laurel_rank, config.hidden_size, bias=False)
        self.post_laurel_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.post_laurel_norm(self.linear_right(self.linear_left(x)))


class MLP(nn.Module):
    """Gated MLP; the first layers keep only gate values above a Gaussian quantile. [B, S, 1, H] → [B, S, 1, H]."""

    def __init__(self, config: TextConfig, layer: int) -> None:
        super().__init__()
        width = config.intermediate_size[layer]
        self.gate_proj = Linear(config.hidden_size, width, bias=False)
        self.up_proj = Linear(config.hidden_size, width, bias=False)
        self.down_proj = Linear(width, config.hidden_size, bias=False)
        sparsity = config.activation_sparsity_pattern[layer]
        # A Python number, not a buffer: one that is not in the checkpoint would stay uninitialised on the meta device.
        self.deviations = NormalDist().inv_cdf(sparsity) if sparsity > 0 else None

    def forward(self, x: Tensor) -> Tensor:
        gate = self.gate_proj(x)
        if self.deviations is not None:
            gate = self._sparsify(gate, self.deviations)
        return self.down_proj(functional.gelu(gate, approximate="tanh") * self.up_proj(x))

    @staticmethod
    def _sparsify(gate: Tensor, deviations: float) -> Tensor:
        """max(0, gate − (mean + deviations · standard deviation)), over the last axis."""
        mean = torch.mean(gate, dim=-1, keepdim=True)
        centred = gate - mean
        # Over n and not n − 1, as transformers' unbiased=False.
        spread = torch.sqrt(torch.mean(centred * centred, dim=-1, keepdim=True))
        return torch.maximum(gate - (mean + spread * deviations), torch.tensor(0.0))


class AltUp(nn.Module):
    """Alternating updates: A hidden states, of which a layer computes one and predicts and corrects the others.

    Baykal et al., "Alternating Updates for Efficient Transformers", NeurIPS 2023. The states are [B, S, A, H] here
    and not [A, B, S, H] as in transformers: permuting to the batched product and back would need a reshape with two
    unknown dimensions.
    """

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.inputs, self.active = config.altup_num_inputs, config.altup_active_idx
        self.correct_output_scale = nn.Parameter(torch.zeros(config.hidden_size))
        self.correction_coefs = Linear(self.inputs, self.inputs, bias=False)
        self.prediction_coefs = Linear(self.inputs, self.inputs**2, bias=False)
        self.modality_router = Linear(config.hidden_size, self.inputs, bias=False)
        self.router_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, factor=1 / config.hidden_size)

    def modalities(self, x: Tensor) -> Tensor:
        """[B, S, 1, H] → [B, S, 1, A]."""
        return torch.tanh(self.modality_router(self.router_norm(x)))

    def predict(self, states: Tensor) -> Tensor:
        """Each state plus a mixture of all, weighted by the active one's modalities. [B, S, A, H] → [B, S, A, H]."""
        coefficients = self.prediction_coefs(self.modalities(state(states, self.active)))
        mixture = coefficients.reshape(states.shape[0], states.shape[1], self.inputs, self.inputs)
        return matmul(mixture, states, False) + states

    def correct(self, predictions: Tensor, activated: Tensor) -> Tensor:
        """Move each prediction [B, S, A, H] by the layer's error on the active one."""
        # The stored coefficients are what they differ from 1 by.
        coefficients = self.correction_coefs(self.modalities(activated)) + 1.0
        innovation = activated - state(predictions, self.active)
        return innovation * coefficients.transpose(2, 3) + predictions


def state(states: Tensor, index: int) -> Tensor:
    """One AltUp state, [B, S, A, H] → [B, S, 1, H]; the axis stays, which spares the graph many reshapes."""
    return states[:, :, index : index + 1]


class Attention(nn.Module):
    """Grouped-query attention with normalised queries, keys and values; scores are not scaled."""

    def __init__(self, config: TextConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.heads, self.kv_heads = layer, config.num_attention_heads, config.num_key_value_heads
        bias, eps, size = config.attention_bias, config.rms_norm_eps, config.head_dim
        self.q_proj = Linear(config.hidden_size, self.heads * size, bias=bias)
        self.q_norm = RMSNorm(size, eps)
        self.shared = config.kv_source(layer) != layer
        if not self.shared:
            self.k_proj = Linear(config.hidden_size, self.kv_heads * size, bias=bias)
            self.v_proj = Linear(config.hidden_size, self.kv_heads * size, bias=bias)
            self.k_norm = RMSNorm(size, eps)
            self.v_norm = RMSNorm(size, eps, scaled=False)
        self.o_proj = Linear(self.heads * size, config.hidden_size, bias=bias)

    def forward(self, x: Tensor, rotation: Rotation, attend: Attend) -> Tensor:
        """[B, S, 1, H] → [B, S, 1, H]."""
        queries = rotation.apply(self.q_norm(split_heads(self.q_proj(x), self.heads)))
        return self.o_proj(attend(self.layer, queries, None if self.shared else self._keys_values(x, rotation)))

    def _keys_values(self, x: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor]:
        """[B, S, 1, H] → keys and values, each [B, S, K, D]."""
        keys = rotation.apply(self.k_norm(split_heads(self.k_proj(x), self.kv_heads)))
        return keys, self.v_norm(split_heads(self.v_proj(x), self.kv_heads))


class DecoderLayer(nn.Module):
    """One layer over the AltUp states [B, S, A, H]."""

    def __init__(self, config: TextConfig, layer: int) -> None:
        super().__init__()
        size, eps = config.hidden_size, config.rms_norm_eps
        self.active, self.scale_corrected = config.altup_active_idx, config.altup_correct_scale
        self.self_attn = Attention(config, layer)
        self.mlp = MLP(config, layer)
        self.altup = AltUp(config)
        self.laurel = Laurel(config)
        self.input_layernorm = RMSNorm(size, eps)
        self.post_attention_layernorm = RMSNorm(size, eps)
        self.pre_feedforward_layernorm = RMSNorm(size, eps)
        self.post_feedforward_layernorm = RMSNorm(size, eps)
        self.per_layer_input_gate = Linear(size, config.hidden_size_per_layer_input, bias=False)
        self.per_layer_projection = Linear(config.hidden_size_per_layer_input, size, bias=False)
        self.post_per_layer_input_norm = RMSNorm(size, eps)

    def forward(self, states: Tensor, per_layer_input: Tensor, rotation: Rotation, attend: Attend) -> Tensor:
        """The new states; `per_layer_input` is [B, S, 1, P]."""
        predictions = self.altup.predict(states)
        active = state(predictions, self.active)
        normed = self.input_layernorm(active)
        attended = self.post_attention_layernorm(self.self_attn(normed, rotation, attend))
        mixed = (active + attended + self.laurel(normed)) * (1 / math.sqrt(2))
        output = mixed + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(mixed)))
        corrected = self.altup.correct(predictions, output)
        update = self._per_layer_update(state(corrected, self.active), per_layer_input)
        # transformers: corrected[1:] += update. Such a slice update is dropped, without an error, when shapes are
        # dynamic (litert-torch 0.10.0), so the first state gets the update times zero.
        but_first = torch.tensor([0.0] + [1.0] * (corrected.shape[2] - 1))[:, None]
        return corrected + update * but_first

    def _per_layer_update(self, x: Tensor, per_layer_input: Tensor) -> Tensor:
        """What the layer's own token embedding [B, S, 1, P] adds to every state but the first."""
        if self.scale_corrected:
            x = x * self.altup.correct_output_scale
        gate = functional.gelu(self.per_layer_input_gate(x), approximate="tanh")
        return self.post_per_layer_input_norm(self.per_layer_projection(gate * per_layer_input))


class TextModel(nn.Module):
    """The text model without its head: token ids to final hidden states.

    Without `lookup` it has no per-layer table and can't `embed`: LiteRT-LM has looked that up.
    """

    def __init__(self, config: TextConfig, *, lookup: bool = True) -> None:
        super().__init__()
        self.config = config
        size, inputs = config.hidden_size, config.altup_num_inputs
        per_layer = config.num_hidden_layers * config.hidden_size_per_layer_input
        self.embed_tokens = Embedding(config.vocab_size, size)
        if lookup:
            self.embed_tokens_per_layer = Embedding(config.vocab_size_per_layer_input, per_layer)
        self.per_layer_model_projection = Linear(size, per_layer, bias=False)
        # The projection is scaled by H^(−1/2) before its norm, which is the same as a norm with H · ε. A factor on a
        # linear layer's output would be folded into a copy of its weights.
        self.per_layer_projection_norm = RMSNorm(config.hidden_size_per_layer_input, size * config.rms_norm_eps)
        self.altup_projections = nn.ModuleList(Linear(size, size, bias=False) for _ in range(1, inputs))
        self.altup_unembed_projections = nn.ModuleList(Linear(size, size, bias=False) for _ in range(1, inputs))
        self.layers = nn.ModuleList(DecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(size, config.rms_norm_eps)

    def forward(self, positions: Tensor, attend: Attend, embedded: Tensor, tokens: Tensor) -> Tensor:
        """Final hidden states [B, S, 1, H].

        Args:
            positions: float [B, S].
            attend: where keys and values go and what is seen of them.
            embedded: the scaled token embedding [B, S, 1, H].
            tokens: the scaled rows of the per-layer table [B, S, L, P].
        """
        per_layer = self._per_layer_inputs(embedded, tokens)
        rotations = {
            kind: Rotation.at(positions, theta, self.config.head_dim) for kind, theta in self.config.rope_theta.items()
        }
        states = self._spread(embedded)
        kinds = self.config.layer_types
        states = run_layers(self.layers, attend, states, lambda i: (state(per_layer, i), rotations[kinds[i]]))
        return self.norm(self._gather(states))

    def embed(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Token ids [B, S] → scaled embedding [B, S, 1, H] and scaled rows of the per-layer table [B, S, L, P].

        Ids beyond the per-layer table (image and audio tokens) use row 0, as transformers does.
        """
        config = self.config
        first, limit = (
            torch.tensor(0, dtype=torch.int32),
            torch.tensor(config.vocab_size_per_layer_input, dtype=torch.int32),
        )
        ids = torch.where(torch.lt(input_ids, limit), input_ids, first)
        tokens = self.embed_tokens_per_layer(ids) * config.hidden_size_per_layer_input**0.5
        shape = (*input_ids.shape, config.num_hidden_layers, config.hidden_size_per_layer_input)
        return self.embed_tokens(input_ids)[:, :, None] * config.hidden_size**0.5, tokens.reshape(shape)

    def _per_layer_inputs(self, embedded: Tensor, tokens: Tensor) -> Tensor:
        """[B, S, L, P]: the token's own rows of the per-layer table plus a projection of its embedding."""
        context = self.per_layer_model_projection(embedded)
        normed = self.per_layer_projection_norm(context.reshape(tokens.shape))
        return (normed + tokens) * (1 / math.sqrt(2))

    def _spread(self, embedded: Tensor) -> Tensor:
        """The initial states [B, S, A, H]: the embedding and projections of it, all of the embedding's magnitude."""
        magnitude = _rms(embedded)
        projected = [_with_magnitude(projection(embedded), magnitude) for projection in self.altup_projections]
        return torch.cat([embedded, *projected], dim=2)

    def _gather(self, states: Tensor) -> Tensor:
        """The mean [B, S, 1, H] of the first state and projections of the others, all of the first one's magnitude."""
        first = state(states, 0)
        magnitude = _rms(first)
        total = first
        for i, projection in enumerate(self.altup_unembed_projections, start=1):
            total = total + _with_magnitude(projection(state(states, i)), magnitude)
        return total * (1 / states.shape[2])


def _rms(x: Tensor) -> Tensor:
    return torch.sqrt(torch.mean(x * x, dim=-1, keepdim=True))


def _with_magnitude(x: Tensor, magnitude: Tensor) -> Tensor:
    """Scale `x` to root mean square `magnitude`; 1e-5 under the root as in transformers."""
    square = torch.mean(x * x, dim=-1, keepdim=True)
    return x * magnitude * torch.rsqrt(torch.maximum(square, torch.tensor(1e-5)))


class Gemma3nForTFLite(StepGraph):
    """The step graph of a Gemma 3n text model."""

    def __init__(self, config: TextConfig, all_positions: bool = False, *, tied: bool = True) -> None:
        super().__init__(TextModel(config), all_positions, tied=tied)


class Gemma3nDecoder(EmbeddingDecoder):
    """The decoder section of a Gemma 3n bundle: LiteRT-LM looks both embeddings up and passes them."""

    def __init__(self, config: TextConfig, logits: bool, *, tied: bool = True) -> None:
        super().__init__(TextModel(config, lookup=False), logits, tied=tied)


class Gemma3n(TextFamily[TextConfig]):
    """The `Architecture` of both Gemma 3n model types, bound to a checkpoint's configuration."""

    def __init__(self, config: Mapping[str, object], *, tied: bool = True) -> None:
        self.text, self.tied = TextConfig.from_config(config), tied
        self.ties = bool(config.get("tie_word_embeddings", True))
        self._config = config

    def runtime(self, _template: str) -> Runtime:
        """What LiteRT-LM is told of it."""
        return Runtime(type="gemma3n")

    def step(self, *, all_positions: bool = False) -> Gemma3nForTFLite:
        """The step graph, its weights still to be assigned."""
        return Gemma3nForTFLite(self.text, all_positions, tied=self.tied)

    def decoder(self, *, logits: bool) -> Gemma3nDecoder:
        """The decoder graph, its weights still to be assigned."""
        return Gemma3nDecoder(self.text, logits, tied=self.tied)

    def tables(self) -> tuple[Table, ...]:
        """The sections that LiteRT-LM looks tokens up in."""
        return embedding_tables(self.text)

    def towers(self) -> Mapping[str, Tower]:
        """Its eyes and ears, where config.json has them."""
        found: dict[str, Tower] = {}
        if self._config.get("vision_config"):
            eyes = VisionConfig.from_config(self._config)
            found["vision"] = Tower(
                sections=gemma3n_vision.SECTIONS,
                rows=gemma3n_vision.ROWS,
                tensors=gemma3n_vision.tensors(eyes),
                config=eyes,
            )
        if self._config.get("audio_config"):
            ears = AudioConfig.from_config(self._config)
            found["audio"] = Tower(
                sections=gemma3n_audio.SECTIONS,
                rows=gemma3n_audio.ROWS,
                tensors=gemma3n_audio.tensors(ears),
                config=ears,
            )
        return found


ARCHITECTURE = Gemma3n
