"""Gemma 3n, text: the graph modules that are exported, written so that every construct lowers exactly.

The modules follow the Gemma 3n text model of transformers 5.23.0 (`models/gemma3n/modeling_gemma3n.py`) and keep its
parameter names, so a checkpoint loads by name. They are our own for three reasons: some constructs there do not export
(a `torch.distributions` object in forward), some lower wrongly without an error once shapes are dynamic (an in-place
update of a slice), and buffers that are not in the checkpoint stay uninitialised when a model is built on the meta
device. So: no in-place update, no buffer at all, every constant a Python number or computed where it is used.

Shapes in docstrings: B batch, S sequence, H hidden size, V vocabulary, L layers, P per-layer input size, A AltUp
inputs, D head size, K key/value heads, G query heads per key/value head, T attended positions.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from pipeline.convert.operators import Embedding, Linear, matmul, normalise
from pipeline.core.errors import FetchError

FULL, SLIDING = "full_attention", "sliding_attention"
# Far below any score (queries and keys are normalised, so scores stay within ± head size × the norms' weights), yet
# finite: a row with nothing to attend to must not become NaN.
MASKED = -1e9


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
        layers = int(text.get("num_hidden_layers", 35))
        widths = text.get("intermediate_size", 16_384)
        default_types = [FULL if (i + 1) % 5 == 0 else SLIDING for i in range(layers)]
        sparse = 10 if layers > 10 else 0
        sparsity = text.get("activation_sparsity_pattern")
        if sparsity is None:
            sparsity = [0.95] * sparse + [0.0] * (layers - sparse)
        made = cls(
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
        _refuse_unknown(text, made)
        return made

    def kv_source(self, layer: int) -> int:
        """The layer whose keys and values `layer` attends to: itself, or the last unshared layer of its type."""
        unshared = self.num_hidden_layers - self.num_kv_shared_layers
        if layer < unshared:
            return layer
        return max(i for i in range(unshared) if self.layer_types[i] == self.layer_types[layer])


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
    if not text.get("tie_word_embeddings", True):
        raise FetchError("an output head that is not tied to the token embedding is not supported")
    for name in ("intermediate_size", "layer_types", "activation_sparsity_pattern"):
        if len(getattr(config, name)) != config.num_hidden_layers:
            raise FetchError(f"config.json gives {len(getattr(config, name))} values of {name} for its layers")
    unshared = set(config.layer_types[: config.num_hidden_layers - config.num_kv_shared_layers])
    if set(config.layer_types) - unshared or set(config.layer_types) - {FULL, SLIDING}:
        raise FetchError("config.json shares keys and values of a layer type that no unshared layer has")


class RMSNorm(nn.Module):
    """factor · weight · x / √(mean(x²) + ε) over the last axis; without `weight` for values."""

    def __init__(self, size: int, eps: float, *, scaled: bool = True, factor: float = 1.0) -> None:
        super().__init__()
        self.eps, self.factor = eps, factor
        self.weight = nn.Parameter(torch.ones(size)) if scaled else None

    def forward(self, x: Tensor) -> Tensor:
        normed: Tensor = normalise(x, self.eps)
        return normed if self.weight is None else normed * (self.weight * self.factor)


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
        coefficients = self.correction_coefs(self.modalities(activated)) + 1.0
        innovation = activated - state(predictions, self.active)
        return innovation * coefficients.transpose(2, 3) + predictions


def state(states: Tensor, index: int) -> Tensor:
    """One AltUp state, [B, S, A, H] → [B, S, 1, H]; the axis stays, which spares the graph many reshapes."""
    return states[:, :, index : index + 1]


@dataclass(frozen=True)
class Rotation:
    """Cosine and signed sine of the rotary position embedding, each [B, S, 1, D]."""

    cos: Tensor
    sin: Tensor

    @classmethod
    def at(cls, positions: Tensor, theta: float, head_dim: int) -> Rotation:
        """Angles positions / theta^(2i/D) (Su et al., RoFormer, 2021); `positions` is float [B, S]."""
        exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu") / head_dim
        angles = positions[:, :, None, None] * (1.0 / (theta**exponents))
        cos, sin = torch.cos(angles), torch.sin(angles)
        return cls(torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1))

    def apply(self, x: Tensor) -> Tensor:
        """Rotate [B, S, heads, D]: the first half of D against the second."""
        half = x.shape[-1] // 2
        return x * self.cos + torch.cat((x[..., half:], x[..., :half]), dim=-1) * self.sin


class Attention(nn.Module):
    """Grouped-query attention with normalised queries, keys and values; scores are not scaled."""

    def __init__(self, config: TextConfig, layer: int) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = (
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
        )
        bias, eps = config.attention_bias, config.rms_norm_eps
        self.q_proj = Linear(config.hidden_size, self.heads * self.head_dim, bias=bias)
        self.q_norm = RMSNorm(self.head_dim, eps)
        if config.kv_source(layer) == layer:
            self.k_proj = Linear(config.hidden_size, self.kv_heads * self.head_dim, bias=bias)
            self.v_proj = Linear(config.hidden_size, self.kv_heads * self.head_dim, bias=bias)
            self.k_norm = RMSNorm(self.head_dim, eps)
            self.v_norm = RMSNorm(self.head_dim, eps, scaled=False)
        self.o_proj = Linear(self.heads * self.head_dim, config.hidden_size, bias=bias)

    def keys_values(self, x: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor]:
        """[B, S, 1, H] → keys and values, each [B, K · G, S, D]."""
        keys = rotation.apply(self.k_norm(self._split(self.k_proj(x), self.kv_heads)))
        values = self.v_norm(self._split(self.v_proj(x), self.kv_heads))
        return self._repeat(keys).transpose(1, 2), self._repeat(values).transpose(1, 2)

    def forward(self, x: Tensor, rotation: Rotation, mask: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Attend from `x` [B, S, 1, H] to `keys` and `values` [B, K · G, T, D] under additive `mask` [B, 1, S, T]."""
        queries = rotation.apply(self.q_norm(self._split(self.q_proj(x), self.heads))).transpose(1, 2)
        mixed = matmul(torch.softmax(matmul(queries, keys, True) + mask, dim=-1), values, False)
        return self.o_proj(mixed.transpose(1, 2).reshape(x.shape[0], x.shape[1], 1, self.heads * self.head_dim))

    def _repeat(self, x: Tensor) -> Tensor:
        """[B, S, K, D] → [B, S, K · G, D], each head G times.

        By concatenation: an `expand` to a symbolic batch fails at run time. Folding the G query heads into S instead
        would repeat nothing, but merging two unknown dimensions makes torch.export guard on their values.
        """
        groups = self.heads // self.kv_heads
        return torch.cat([x] * groups, dim=-1).reshape(x.shape[0], x.shape[1], self.heads, self.head_dim)

    def _split(self, x: Tensor, heads: int) -> Tensor:
        """[B, S, 1, heads · D] → [B, S, heads, D]."""
        return x.reshape(x.shape[0], x.shape[1], heads, self.head_dim)


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

    def forward(
        self,
        states: Tensor,
        per_layer_input: Tensor,
        rotation: Rotation,
        mask: Tensor,
        shared: tuple[Tensor, Tensor] | None,
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """The new states, and the keys and values that were attended to (`shared` if given, else the layer's own)."""
        predictions = self.altup.predict(states)
        active = state(predictions, self.active)
        normed = self.input_layernorm(active)
        keys, values = shared or self.self_attn.keys_values(normed, rotation)
        attended = self.post_attention_layernorm(self.self_attn(normed, rotation, mask, keys, values))
        mixed = (active + attended + self.laurel(normed)) * (1 / math.sqrt(2))
        output = mixed + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(mixed)))
        corrected = self.altup.correct(predictions, output)
        update = self._per_layer_update(state(corrected, self.active), per_layer_input)
        # transformers: corrected[1:] += update. Such a slice update is dropped, without an error, when shapes are
        # dynamic (litert-torch 0.10.0), so the first state gets the update times zero.
        but_first = torch.tensor([0.0] + [1.0] * (corrected.shape[2] - 1))[:, None]
        return corrected + update * but_first, (keys, values)

    def _per_layer_update(self, x: Tensor, per_layer_input: Tensor) -> Tensor:
        """What the layer's own token embedding [B, S, 1, P] adds to every state but the first."""
        if self.scale_corrected:
            x = x * self.altup.correct_output_scale
        gate = functional.gelu(self.per_layer_input_gate(x), approximate="tanh")
        return self.post_per_layer_input_norm(self.per_layer_projection(gate * per_layer_input))


class TextModel(nn.Module):
    """The text model without its head: token ids to final hidden states."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.config = config
        size, inputs = config.hidden_size, config.altup_num_inputs
        per_layer = config.num_hidden_layers * config.hidden_size_per_layer_input
        self.embed_tokens = Embedding(config.vocab_size, size)
        self.embed_tokens_per_layer = Embedding(config.vocab_size_per_layer_input, per_layer)
        self.per_layer_model_projection = Linear(size, per_layer, bias=False)
        self.per_layer_projection_norm = RMSNorm(config.hidden_size_per_layer_input, config.rms_norm_eps)
        self.altup_projections = nn.ModuleList(Linear(size, size, bias=False) for _ in range(1, inputs))
        self.altup_unembed_projections = nn.ModuleList(Linear(size, size, bias=False) for _ in range(1, inputs))
        self.layers = nn.ModuleList(DecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(size, config.rms_norm_eps)

    def forward(self, input_ids: Tensor, positions: Tensor, masks: Mapping[str, Tensor]) -> Tensor:
        """[B, S] token ids, [B, S] float positions, one additive [B, 1, S, S] mask per layer type → [B, S, 1, H]."""
        embedded = self.embed_tokens(input_ids)[:, :, None] * self.config.hidden_size**0.5
        per_layer = self._per_layer_inputs(input_ids, embedded)
        rotations = {
            kind: Rotation.at(positions, theta, self.config.head_dim) for kind, theta in self.config.rope_theta.items()
        }
        states = self._spread(embedded)
        cache: dict[int, tuple[Tensor, Tensor]] = {}
        for i, layer in enumerate(self.layers):
            kind = self.config.layer_types[i]
            shared = cache.get(self.config.kv_source(i))
            states, cache[i] = layer(states, state(per_layer, i), rotations[kind], masks[kind], shared)
        return self.norm(self._gather(states))

    def _per_layer_inputs(self, input_ids: Tensor, embedded: Tensor) -> Tensor:
        """[B, S, L, P]: the token's own rows of the per-layer table plus a projection of its embedding.

        Ids beyond the per-layer table (image and audio tokens) use row 0, as transformers does.
        """
        config = self.config
        shape = (*input_ids.shape, config.num_hidden_layers, config.hidden_size_per_layer_input)
        first, limit = (
            torch.tensor(0, dtype=torch.int32),
            torch.tensor(config.vocab_size_per_layer_input, dtype=torch.int32),
        )
        ids = torch.where(torch.lt(input_ids, limit), input_ids, first)
        tokens = self.embed_tokens_per_layer(ids) * config.hidden_size_per_layer_input**0.5
        context = self.per_layer_model_projection(embedded) * config.hidden_size**-0.5
        normed = self.per_layer_projection_norm(context.reshape(shape))
        return (normed + tokens.reshape(shape)) * (1 / math.sqrt(2))

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


class Gemma3nForTFLite(nn.Module):
    """The step graph: next-token logits of whole prompts, any batch and length, left or right padding."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.model = TextModel(config)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        """Logits of each row's last attended position.

        Args:
            input_ids: int32 [B, S] token ids; what stands at masked positions does not matter.
            attention_mask: int32 [B, S], 1 for tokens and 0 for padding.

        Returns:
            `logits`, float32 [B, V], soft-capped: cap · tanh(x / cap).
        """
        config = self.model.config
        attended = attention_mask.to(torch.float32)
        index = torch.arange(0, attention_mask.shape[1], dtype=torch.int32).to(torch.float32)
        distance = index[None, :, None] - index[None, None, :]  # query − key, [1, S, S]
        causal = torch.gt(distance, torch.tensor(-0.5)) & torch.gt(attended[:, None, :], torch.tensor(0.5))
        near = causal & torch.lt(distance, torch.tensor(config.sliding_window - 0.5))
        hidden = self.model(input_ids, _positions(causal), {FULL: _additive(causal), SLIDING: _additive(near)})
        cap = config.final_logit_softcapping
        # Dividing by the cap before the head, not after it: the converter folds a factor on the head's output into a
        # second copy of the tied embedding.
        chosen = self._last(hidden, attended, distance, 1 / cap if cap else 1.0)
        logits = matmul(chosen, self.model.embed_tokens.weight, True).squeeze(1)
        return {"logits": torch.tanh(logits) * cap if cap else logits}

    @staticmethod
    def _last(hidden: Tensor, attended: Tensor, distance: Tensor, factor: float) -> Tensor:
        """[B, S, 1, H] → [B, 1, H] at each row's last attended position, so that the head runs on one position only.

        A product with a row that is `factor` there and 0 elsewhere: free of the negative index, which lowers to an
        empty slice (litert-torch 0.10.0).
        """
        after = torch.where(torch.lt(distance, torch.tensor(-0.5)), torch.tensor(1.0), torch.tensor(0.0))
        later = torch.sum(after * attended[:, None, :], dim=-1)
        last = torch.where(torch.gt(later, torch.tensor(0.5)), torch.tensor(0.0), attended * factor)
        return matmul(last[:, None, :], hidden.squeeze(2), False)


def _positions(causal: Tensor) -> Tensor:
    """Each token's position among its row's attended ones, from 0: bool [B, S, S] → float [B, S]."""
    count = torch.sum(torch.where(causal, torch.tensor(1.0), torch.tensor(0.0)), dim=-1)
    return torch.maximum(count - 1.0, torch.tensor(0.0))


def _additive(allowed: Tensor) -> Tensor:
    """bool [B, S, S] → float [B, 1, S, S], 0 where allowed."""
    return torch.where(allowed, torch.tensor(0.0), torch.tensor(MASKED))[:, None]


class Gemma3n:
    """The `Architecture` of both Gemma 3n model types."""

    model_types: tuple[str, ...] = ("gemma3n", "gemma3n_text")
    _prefixes = ("model.language_model.", "language_model.model.", "model.")
    _left_out = re.compile(
        r"(model\.)?(vision_tower|audio_tower|embed_vision|embed_audio)\.|(language_model\.)?lm_head\.weight$"
    )
    _own_kv = re.compile(r"layers\.(\d+)\.self_attn\.(k_proj|v_proj|k_norm|v_norm)\.")

    def tensors(self, config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        """Every tensor of the text model: canonical name → shape."""
        with torch.device("meta"):
            state = TextModel(TextConfig.from_config(config)).state_dict()
        return {name: tuple(tensor.shape) for name, tensor in state.items()}

    def step(self, config: Mapping[str, Any]) -> Gemma3nForTFLite:
        """The step graph, its weights still to be assigned."""
        return Gemma3nForTFLite(TextConfig.from_config(config))

    def canonical(self, name: str, config: Mapping[str, Any]) -> str | None:
        """The text model's name of checkpoint tensor `name`.

        None for the vision and audio towers, the head (tied to the embedding), and keys and values of layers that
        share another layer's.
        """
        if self._left_out.match(name):
            return None
        prefix = next((p for p in self._prefixes if name.startswith(p)), "")
        own = name.removeprefix(prefix)
        text = TextConfig.from_config(config)
        match = self._own_kv.match(own)
        if match and int(match[1]) < text.num_hidden_layers and text.kv_source(int(match[1])) != int(match[1]):
            return None
        return own


ARCHITECTURE = Gemma3n()
