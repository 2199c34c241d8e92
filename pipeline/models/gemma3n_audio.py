"""Gemma 3n's ears: sound to soft tokens, the vectors that stand in a prompt where a sound does.

The modules follow the audio encoder of transformers 5.24.0 (`models/gemma3n/modeling_gemma3n.py`), a conformer as in
the Universal Speech Model (Zhang et al., "Google USM", 2023), and keep its parameter names. The encoder takes the
frames of a sound's samples, as LiteRT-LM hands them over, and makes the log-mel spectrogram itself: the runtime's own
has other triangles, another floor and other means. One graph of T frames serves every length: nothing of a sound
reaches back in time, and what lies behind its end is kept from the convolutions.

Our own for three reasons: a window cut by `unfold` becomes a pad of six dimensions, of which TFLite takes five; a
constant mask of booleans is written without its bytes (litert-converter 0.5); tensors of ones as large as an input
would stand in the file.

Shapes in docstrings: T frames of `Front.frame` samples, S soft tokens (T / 16), D width of the encoder, H of the text
model, N heads, U blocks of W rows with C rows of context each.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from pipeline.checkpoint.sound import Front
from pipeline.core.errors import TowerError
from pipeline.export.operators import Linear, convolve, convolve_apart, matmul
from pipeline.models.gemma3n_embedder import Embedder, Weight, stored
from pipeline.models.transformer import RMSNorm

_NOT_SEEN = -1e9
"""Added to scores that the soft-cap holds within some tens."""
_MIN_TIMESCALE, _MAX_TIMESCALE = 1.0, 1e4
_NORM_EPS = 1e-6
"""Of the norms for which transformers takes its class's own."""


SECTIONS = ("audio_encoder", "audio_adapter", "end_of_audio")
ROWS = 752
"""Of a sound, whatever its length: what a parameter is multiplied with."""


@dataclass(frozen=True, kw_only=True)
class AudioConfig:
    """The numbers that define the audio encoder; names as in transformers' `Gemma3nAudioConfig`.

    `soft_tokens` is the most that a sound becomes, `text_hidden_size` the width of the text model.
    """

    vocab_size: int
    vocab_offset: int
    input_feat_size: int
    hidden_size: int
    rms_norm_eps: float
    gradient_clipping: float
    conf_attention_chunk_size: int
    conf_attention_context_left: int
    conf_attention_context_right: int
    conf_attention_logit_cap: float
    conf_num_attention_heads: int
    conf_num_hidden_layers: int
    conf_conv_kernel_size: int
    conf_reduction_factor: int
    conf_residual_weight: float
    sscp_conv_channel_size: tuple[int, int]
    sscp_conv_group_norm_eps: float
    soft_tokens: int
    text_hidden_size: int
    boa_token_id: int
    audio_token_id: int
    eoa_token_id: int

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> AudioConfig:
        """Read a checkpoint's `config.json`; absent keys have transformers' defaults.

        Raises:
            TowerError: a value that these modules do not implement.
        """
        audio: Mapping[str, Any] = config.get("audio_config") or {}
        for key in ("sscp_conv_kernel_size", "sscp_conv_stride_size"):
            wanted = [[3, 3], [3, 3]] if "kernel" in key else [[2, 2], [2, 2]]
            if [list(pair) for pair in audio.get(key, wanted)] != wanted:
                raise TowerError(f"audio_config.{key} is {audio[key]}, expected {wanted}")
        made = cls(
            vocab_size=audio.get("vocab_size", 128),
            vocab_offset=audio.get("vocab_offset", 262_272),
            input_feat_size=audio.get("input_feat_size", 128),
            hidden_size=audio.get("hidden_size", 1536),
            rms_norm_eps=audio.get("rms_norm_eps", 1e-6),
            gradient_clipping=audio.get("gradient_clipping", 1e10),
            conf_attention_chunk_size=audio.get("conf_attention_chunk_size", 12),
            conf_attention_context_left=audio.get("conf_attention_context_left", 13),
            conf_attention_context_right=audio.get("conf_attention_context_right", 0),
            conf_attention_logit_cap=audio.get("conf_attention_logit_cap", 50.0),
            conf_num_attention_heads=audio.get("conf_num_attention_heads", 8),
            conf_num_hidden_layers=audio.get("conf_num_hidden_layers", 12),
            conf_conv_kernel_size=audio.get("conf_conv_kernel_size", 5),
            conf_reduction_factor=audio.get("conf_reduction_factor", 4),
            conf_residual_weight=audio.get("conf_residual_weight", 0.5),
            sscp_conv_channel_size=tuple(audio.get("sscp_conv_channel_size", (128, 32))),
            sscp_conv_group_norm_eps=audio.get("sscp_conv_group_norm_eps", 1e-3),
            soft_tokens=config.get("audio_soft_tokens_per_image", 188),
            text_hidden_size=config.get("text_config", {}).get("hidden_size", 2048),
            boa_token_id=config.get("boa_token_id", 256_000),
            audio_token_id=config.get("audio_token_id", 262_273),
            eoa_token_id=config.get("eoa_token_id", 262_272),
        )
        if made.conf_attention_context_right:  # rows behind a sound's end would have to be told apart
            raise TowerError("audio_config.conf_attention_context_right is not 0, which the audio encoder can't do")
        return made

    @property
    def frames(self) -> int:
        """T, the frames that the encoder takes."""
        return self.soft_tokens * 4 * self.conf_reduction_factor

    @property
    def context(self) -> int:
        """C, the rows that a block of W rows sees."""
        return self.conf_attention_chunk_size + self.past

    @property
    def past(self) -> int:
        """The rows before its own that a row sees."""
        return max(0, self.conf_attention_context_left - 1)


class Norm(RMSNorm):
    """RMSNorm with transformers' own ε for the encoder's norms that name none."""

    def __init__(self, size: int, eps: float = _NORM_EPS) -> None:
        super().__init__(size, eps)


class CumulativeNorm(nn.Module):
    """(x - mean) · weight / √(variance + ε) over all of a row and of the rows before it. [1, T, F, C] as it came."""

    def __init__(self, channels: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        rows, size = x.shape[1], x.shape[2] * x.shape[3]
        count = (torch.arange(1, rows + 1, dtype=torch.float32) * size).reshape(1, rows, 1, 1)
        centred = x - torch.cumsum(torch.sum(x, dim=(2, 3), keepdim=True), dim=1) / count
        variance = torch.cumsum(torch.sum(centred * centred, dim=(2, 3), keepdim=True), dim=1) / count
        return centred * torch.rsqrt(variance + self.eps) * self.weight


class ConvBlock(nn.Module):
    """A convolution over time and pitch that halves both, its norm and a ReLU. [1, T, F, I] → [1, T / 2, F / 2, O]."""

    def __init__(self, inputs: int, outputs: int, eps: float) -> None:
        super().__init__()
        self.conv = Weight(outputs, 3, 3, inputs)
        self.norm = CumulativeNorm(outputs, eps)

    def forward(self, x: Tensor) -> Tensor:
        # In time nothing before and two rows behind, in pitch one on each side.
        return torch.relu(self.norm(convolve(functional.pad(x, (0, 0, 1, 1, 0, 2)), self.conv.weight, [2, 2])))


class SubSample(nn.Module):
    """Spectrogram [1, T, F] to rows [T / 4, D]."""

    def __init__(self, config: AudioConfig) -> None:
        super().__init__()
        first, second = config.sscp_conv_channel_size
        self.conv_0 = ConvBlock(1, first, config.sscp_conv_group_norm_eps)
        self.conv_1 = ConvBlock(first, second, config.sscp_conv_group_norm_eps)
        pitches = config.input_feat_size
        for _ in range(2):
            pitches = (pitches + 2 - 3) // 2 + 1
        self.input_proj_linear = Linear(pitches * second, config.hidden_size, bias=False)

    def forward(self, spectrogram: Tensor, valid: Tensor) -> Tensor:
        """`valid` float [T], 1 where there is sound."""
        # What lies behind the end must be as zeros as the padding that transformers has there, at each convolution: a
        # norm and silence make other numbers of it.
        x = self.conv_0((spectrogram * valid[None, :, None])[..., None])
        x = self.conv_1(x * _every(valid, 2)[None, :, None, None])
        return self.input_proj_linear(x.reshape(x.shape[1], x.shape[2] * x.shape[3]))


class Attention(nn.Module):
    """Attention of blocks of W rows to themselves and the rows before, scores with relative positions, soft-capped."""

    def __init__(self, config: AudioConfig) -> None:
        super().__init__()
        self.config = config
        self.heads, self.size = config.conf_num_attention_heads, config.hidden_size // config.conf_num_attention_heads
        width = self.heads * self.size
        self.per_dim_scale = nn.Parameter(torch.zeros(self.size))
        self.q_proj, self.k_proj, self.v_proj = (Linear(config.hidden_size, width, bias=False) for _ in range(3))
        self.relative_position_embedding = RelativePositions(config)

    def forward(self, x: Tensor, valid: Tensor) -> Tensor:
        """Rows [R, D] → [R, N · size]; `valid` float [R]."""
        config, rows = self.config, x.shape[0]
        width, blocks = config.conf_attention_chunk_size, -(-rows // config.conf_attention_chunk_size)
        scale = self.size**-0.5 / math.log(2.0)  # over softplus(0), so that a stored 0 means 1
        softplus = torch.log(torch.exp(self.per_dim_scale) + 1.0)
        queries = self.q_proj(x).reshape(rows, self.heads, self.size) * (softplus * scale)
        queries = _padded(queries, 0, blocks * width - rows).reshape(blocks, width, self.heads, self.size)
        queries = queries.permute(0, 2, 1, 3)
        keys, values = (
            self._context(part(x).reshape(rows, self.heads, self.size), blocks).permute(0, 2, 1, 3)
            for part in (self.k_proj, self.v_proj)
        )
        scores = matmul(queries, keys, True) + self.relative_position_embedding(queries)
        scores = torch.tanh(scores * (1.0 / config.conf_attention_logit_cap)) * config.conf_attention_logit_cap
        near = self._context(valid[:, None], blocks).reshape(blocks, 1, 1, config.context)
        scores = scores + (near * self._causal() - 1.0) * -_NOT_SEEN
        mixed = matmul(torch.softmax(scores, dim=-1), values, False).permute(0, 2, 1, 3)
        mixed = mixed.reshape(blocks * width, self.heads * self.size)
        return mixed[:rows] if rows < blocks * width else mixed

    def _context(self, x: Tensor, blocks: int) -> Tensor:
        """The C rows that each block sees: [R, …] → [U, C, …]."""
        width, past = self.config.conf_attention_chunk_size, self.config.past
        # By whole blocks side by side: a gather has a constant of booleans in it, which is written without its bytes.
        more = -(-past // width)
        padded = _padded(x, more * width, blocks * width - x.shape[0]).reshape(more + blocks, width, *x.shape[1:])
        return _from(torch.cat([padded[i : i + blocks] for i in range(more + 1)], dim=1), more * width - past)

    def _causal(self) -> Tensor:
        """1 where a row of a block may look, float [W, C]: itself and `past` rows before."""
        behind = (
            torch.arange(self.config.context)[None, :] - torch.arange(self.config.conf_attention_chunk_size)[:, None]
        )
        return ((behind >= 0) & (behind <= self.config.past)).to(torch.float32)


class RelativePositions(nn.Module):
    """What scores gain by how far a key lies behind its query (Dai et al., Transformer-XL, 2019)."""

    def __init__(self, config: AudioConfig) -> None:
        super().__init__()
        self.config = config
        self.pos_proj = Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, queries: Tensor) -> Tensor:
        """[U, N, W, size] → [U, N, W, C]."""
        config = self.config
        blocks, heads, width, size = queries.shape
        span, context = config.past + 1, config.context
        positions = self.pos_proj(self._waves()).reshape(span, heads, size).permute(1, 0, 2)
        flat = queries.permute(1, 0, 2, 3).reshape(heads, blocks * width, size)
        scores = matmul(flat, positions, True).reshape(heads, blocks, width, span)
        # Row w moves w to the right: rows padded to one more than C, laid end to end, cut again into rows of C.
        scores = functional.pad(scores, (0, context + 1 - span)).reshape(heads, blocks, width * (context + 1))
        scores = scores[:, :, : width * context].reshape(heads, blocks, width, context)
        return scores.permute(1, 0, 2, 3)

    def _waves(self) -> Tensor:
        """Sine and cosine of the distances `past` … 0, [past + 1, D]."""
        count = self.config.hidden_size // 2
        step = math.log(_MAX_TIMESCALE / _MIN_TIMESCALE) / max(count - 1, 1)
        rates = _MIN_TIMESCALE * torch.exp(torch.arange(count) * -step)
        times = torch.arange(self.config.past, -1, -1).to(torch.float32)[:, None] * rates
        return torch.cat([torch.sin(times), torch.cos(times)], dim=-1)


class ConformerAttention(nn.Module):
    """x + norm(post(attention(norm x)))."""

    def __init__(self, config: AudioConfig) -> None:
        super().__init__()
        self.clip = config.gradient_clipping
        self.pre_attn_norm, self.post_norm = Norm(config.hidden_size), Norm(config.hidden_size)
        self.attn = Attention(config)
        self.post = Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor, valid: Tensor) -> Tensor:
        mixed = self.attn(self.pre_attn_norm(_clipped(x, self.clip)), valid)
        normed: Tensor = self.post_norm(_clipped(self.post(mixed), self.clip))
        return x + normed


class FeedForward(nn.Module):
    """x + weight · norm(W₂ silu(W₁ norm x))."""

    def __init__(self, config: AudioConfig) -> None:
        super().__init__()
        size = config.hidden_size
        self.clip, self.share = config.gradient_clipping, config.conf_residual_weight
        self.pre_layer_norm, self.post_layer_norm = Norm(size), Norm(size)
        self.ffw_layer_1, self.ffw_layer_2 = Linear(size, 4 * size, bias=False), Linear(4 * size, size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        inner = _silu(self.ffw_layer_1(self.pre_layer_norm(_clipped(x, self.clip))))
        return x + self.post_layer_norm(_clipped(self.ffw_layer_2(inner), self.clip)) * self.share


class LightConv(nn.Module):
    """A gate, a convolution of each channel over the rows before, and a linear layer."""

    def __init__(self, config: AudioConfig) -> None:
        super().__init__()
        size, eps = config.hidden_size, config.rms_norm_eps
        self.clip, self.kernel = config.gradient_clipping, config.conf_conv_kernel_size
        self.pre_layer_norm, self.conv_norm = Norm(size, eps), Norm(size, eps)
        self.linear_start, self.linear_end = Linear(size, 2 * size, bias=False), Linear(size, size, bias=False)
        self.depthwise_conv1d = Weight(1, 1, self.kernel, size)

    def forward(self, x: Tensor) -> Tensor:
        both = self.linear_start(self.pre_layer_norm(x))
        gated = both[:, : x.shape[1]] * torch.sigmoid(both[:, x.shape[1] :])
        padded = _padded(gated, self.kernel - 1, 0)[None, None]
        moved = convolve_apart(padded, self.depthwise_conv1d.weight, [1, 1]).reshape(x.shape)
        return self.linear_end(_silu(self.conv_norm(_clipped(moved, self.clip)))) + x


class ConformerBlock(nn.Module):
    """One block of the conformer (Gulati et al., 2020). Rows [R, D] as they came."""

    def __init__(self, config: AudioConfig) -> None:
        super().__init__()
        self.clip = config.gradient_clipping
        self.ffw_layer_start, self.ffw_layer_end = FeedForward(config), FeedForward(config)
        self.attention = ConformerAttention(config)
        self.lconv1d = LightConv(config)
        self.norm = Norm(config.hidden_size)

    def forward(self, x: Tensor, valid: Tensor) -> Tensor:
        x = self.attention(self.ffw_layer_start(x), valid)
        normed: Tensor = self.norm(_clipped(self.ffw_layer_end(self.lconv1d(x * valid[:, None])), self.clip))
        return normed


class AudioTower(nn.Module):
    """Spectrogram [1, T, F] to features [S, D]."""

    def __init__(self, config: AudioConfig) -> None:
        super().__init__()
        self.reduce = config.conf_reduction_factor
        self.subsample_conv_projection = SubSample(config)
        self.conformer = nn.ModuleList(ConformerBlock(config) for _ in range(config.conf_num_hidden_layers))

    def forward(self, spectrogram: Tensor, valid: Tensor) -> Tensor:
        """`valid` float [T], 1 where there is sound."""
        x, rows = self.subsample_conv_projection(spectrogram, valid), _every(valid, 4)
        for block in self.conformer:
            x = block(x, rows)
        return _every(x, self.reduce) * _every(rows, self.reduce)[:, None]


class AudioEncoder(nn.Module):
    """The section `audio_encoder`: frames of samples to features."""

    def __init__(self, config: AudioConfig, front: Front) -> None:
        super().__init__()
        self.front, self.reduce = front, 4 * config.conf_reduction_factor
        self.audio_tower = AudioTower(config)

    def forward(self, src_inputs: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """What LiteRT-LM asks of an audio encoder.

        Args:
            src_inputs: float32 [1, T, frame], samples in −1 … 1.
            mask: bool [1, 1, T], true where there is sound.

        Returns:
            `features` [1, S, D], zeros where there is none, and its `mask` bool [1, S].
        """
        valid = mask.reshape(-1).to(torch.float32)
        features = self.audio_tower(self._spectrogram(src_inputs), valid)
        return {"features": features[None], "mask": torch.gt(_every(valid, self.reduce), torch.tensor(0.5))[None]}

    def _spectrogram(self, frames: Tensor) -> Tensor:
        """Log-mel, [1, T, frame] → [1, T, F]."""
        front = self.front
        real, imaginary = (functional.linear(frames, torch.from_numpy(part)) for part in (front.cosine, front.sine))
        magnitude = torch.sqrt(real * real + imaginary * imaginary)
        mel = torch.log(
            torch.maximum(functional.linear(magnitude, torch.from_numpy(front.mel)), torch.tensor(front.floor))
        )
        if front.mean is not None:
            mel = mel - torch.from_numpy(front.mean)
        return mel if front.deviation is None else mel / torch.from_numpy(front.deviation)


class AudioAdapter(nn.Module):
    """The section `audio_adapter`: features to soft tokens."""

    def __init__(self, config: AudioConfig) -> None:
        super().__init__()
        self.embed_audio = Embedder(config.hidden_size, config.text_hidden_size, config.rms_norm_eps)

    def forward(self, features: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """`features` [1, S, D] and `mask` bool [1, S] → [1, S, H], zeros where there is no sound."""
        return {"soft_tokens": self.embed_audio(features) * mask.to(torch.float32)[..., None]}


def tensors(config: AudioConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of tower and embedder as a checkpoint has it: name → shape. They take no memory."""
    with torch.device("meta"):
        parts = {"audio_tower": AudioTower(config), "embed_audio": AudioAdapter(config).embed_audio}
    shapes = {
        f"{part}.{name}": stored(tuple(tensor.shape))
        for part, module in parts.items()
        for name, tensor in module.state_dict().items()
    }
    own = {"embedding": (config.vocab_size, config.hidden_size), "hard_embedding_norm": (config.hidden_size,)}
    return shapes | {f"embed_audio.{name}.weight": shape for name, shape in own.items()}


def _every(x: Tensor, step: int) -> Tensor:
    """Each `step`-th row, from the first. [R, …] → [R / step, …]."""
    return x.reshape(x.shape[0] // step, step, *x.shape[1:])[:, 0]


def _from(x: Tensor, first: int) -> Tensor:
    """What stands from `first` on along the second axis."""
    # torch.export refuses a slice that is all of a tensor (torch 2.13.0).
    return x[:, first:] if first else x


def _padded(x: Tensor, before: int, behind: int) -> Tensor:
    """Rows of zeros before and behind. [R, …] → [before + R + behind, …]."""
    return functional.pad(x, (*[0, 0] * (x.dim() - 1), before, behind))


def _clipped(x: Tensor, limit: float) -> Tensor:
    return torch.clamp(x, -limit, limit)


def _silu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)
