"""Gemma 4's ears: sound to soft tokens, the vectors that stand in a prompt where a sound does.

The modules follow the audio encoder of transformers 5.24.0 (`models/gemma4/modeling_gemma4.py`) and keep its parameter
names; what Gemma 3n's is too stands in `conformer.py`, with the shapes' letters. Beside that one: a row sees one row
less, keys have a scale, linear layers have limits, a soft token is made of four frames, and the vector behind a sound
is a token's of the text.

Its processor's windows are two hops long, each a hop after the one before, the first of them half before the sound.
LiteRT-LM's type `gemma4` gives a silent frame of four hops, as a soft token has, then the sound in such frames, and
drops what is behind the last whole one (0.18.1; its own spectrogram is another, and ends with another window). So the
first frame is what the first window begins with, and no soft token.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.checkpoint.sound import Front
from pipeline.core.errors import TowerError
from pipeline.export.operators import Linear
from pipeline.models.conformer import (
    NORM_EPS,
    Adapter,
    ConvBlock,
    Encoder,
    FeedForward,
    LightConv,
    LocalAttention,
    Numbers,
    clipped,
    every,
    halved,
    padded,
)
from pipeline.models.gemma3n_embedder import stored
from pipeline.models.gemma4_tower import ClippedLinear, Embedder
from pipeline.models.transformer import RMSNorm

SECTIONS = ("audio_encoder", "audio_adapter", "end_of_audio")
ROWS = 751
"""Of a sound, whatever its length: what a parameter is multiplied with. Of 30 seconds, and one that is left out."""
_HOPS = 4
"""Of a soft token, and of a frame."""
_ACTIVATION = "silu"


@dataclass(frozen=True, kw_only=True)
class AudioConfig:
    """The numbers that define the audio encoder; names as in transformers' `Gemma4AudioConfig`.

    `text_hidden_size` is the width of the text model.
    """

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    subsampling_conv_channels: tuple[int, int]
    conv_kernel_size: int
    residual_weight: float
    attention_chunk_size: int
    attention_context_left: int
    attention_context_right: int
    attention_logit_cap: float
    use_clipped_linears: bool
    rms_norm_eps: float
    gradient_clipping: float
    output_proj_dims: int
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
        if audio.get("hidden_act", _ACTIVATION) != _ACTIVATION:
            raise TowerError(f"audio_config.hidden_act is {audio['hidden_act']}, expected {_ACTIVATION}")
        made = cls(
            hidden_size=audio.get("hidden_size", 1024),
            num_hidden_layers=audio.get("num_hidden_layers", 12),
            num_attention_heads=audio.get("num_attention_heads", 8),
            subsampling_conv_channels=tuple(audio.get("subsampling_conv_channels", (128, 32))),
            conv_kernel_size=audio.get("conv_kernel_size", 5),
            residual_weight=audio.get("residual_weight", 0.5),
            attention_chunk_size=audio.get("attention_chunk_size", 12),
            attention_context_left=audio.get("attention_context_left", 13),
            attention_context_right=audio.get("attention_context_right", 0),
            attention_logit_cap=audio.get("attention_logit_cap", 50.0),
            use_clipped_linears=audio.get("use_clipped_linears", True),
            rms_norm_eps=audio.get("rms_norm_eps", 1e-6),
            gradient_clipping=audio.get("gradient_clipping", 1e10),
            output_proj_dims=audio.get("output_proj_dims", 1536),
            text_hidden_size=config.get("text_config", {}).get("hidden_size", 2304),
            boa_token_id=config.get("boa_token_id", 256_000),
            audio_token_id=config.get("audio_token_id", 258_881),
            eoa_token_id=config.get("eoa_token_index", 258_883),
        )
        if made.attention_context_right:  # rows behind a sound's end would have to be told apart
            raise TowerError("audio_config.attention_context_right is not 0, which the audio encoder can't do")
        if made.attention_context_left < 2:
            raise TowerError("audio_config.attention_context_left is less than 2: no row would see any")
        return made

    @property
    def soft_tokens(self) -> int:
        """S, the rows of features: the last is never one of a sound."""
        return ROWS

    @property
    def frames(self) -> int:
        """T, the frames that the encoder takes: the first is silent."""
        return ROWS

    @property
    def pitches(self) -> int:
        """F, the pitches of the spectrogram: transformers has as many as the first convolution has channels."""
        return self.subsampling_conv_channels[0]

    def check(self, pitches: int) -> None:
        """Raises TowerError where the processor's spectrogram has another number of pitches."""
        if pitches != self.pitches:
            raise TowerError(
                f"the audio processor makes {pitches} pitches, and audio_config.subsampling_conv_channels says "
                f"{self.pitches}"
            )

    @property
    def numbers(self) -> Numbers:
        """Those of a block."""
        past = self.attention_context_left - 1
        return Numbers(
            size=self.hidden_size,
            heads=self.num_attention_heads,
            width=self.attention_chunk_size,
            past=past,
            seen=past - 1,
            distances=(self.attention_chunk_size + past) // 2 + 1,
            cap=self.attention_logit_cap,
            clip=self.gradient_clipping,
            share=self.residual_weight,
            kernel=self.conv_kernel_size,
            eps=self.rms_norm_eps,
            keys=math.log1p(math.e) / math.log(2.0),
            linear=partial(ClippedLinear, bounded=self.use_clipped_linears),
        )


class SubSample(nn.Module):
    """Spectrogram [1, T, F] to rows [T / 4, D]."""

    def __init__(self, config: AudioConfig) -> None:
        super().__init__()
        first, second = config.subsampling_conv_channels
        self.layer0, self.layer1 = (
            ConvBlock(inputs, outputs, LayerNorm(outputs, config.rms_norm_eps), leads=False)
            for inputs, outputs in ((1, first), (first, second))
        )
        pitches = halved(halved(config.pitches))
        self.input_proj_linear = Linear(pitches * second, config.hidden_size, bias=False)

    def forward(self, spectrogram: Tensor, valid: Tensor) -> Tensor:
        """`valid` float [T], 1 where there is sound."""
        # What is behind the sound is zeros before each convolution, as transformers pads: after a norm it would not be.
        x = self.layer0((spectrogram * valid[None, :, None])[..., None])
        x = self.layer1(x * every(valid, 2)[None, :, None, None])
        rows: Tensor = self.input_proj_linear(x.reshape(x.shape[1], x.shape[2] * x.shape[3]))
        return rows


class LayerNorm(nn.Module):
    """(x − mean) · weight / √(variance + ε) over the last axis."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        centred = x - torch.mean(x, dim=-1, keepdim=True)
        variance = torch.mean(centred * centred, dim=-1, keepdim=True)
        return centred * torch.rsqrt(variance + self.eps) * self.weight


class Attention(LocalAttention):
    """The attention of a block, and what projects its result."""

    def __init__(self, config: AudioConfig) -> None:
        super().__init__(config.numbers)
        self.post = config.numbers.linear(config.hidden_size, config.hidden_size)
        self.relative_k_proj = Linear(config.hidden_size, config.hidden_size, bias=False)

    def positions(self, waves: Tensor) -> Tensor:
        """The projection of waves."""
        projected: Tensor = self.relative_k_proj(waves)
        return projected

    def forward(self, x: Tensor, valid: Tensor) -> Tensor:
        """Rows [R, D] as they came; `valid` float [R]."""
        mixed: Tensor = self.post(super().forward(x, valid))
        return mixed


class AudioLayer(nn.Module):
    """One block of the conformer (Gulati et al., 2020). Rows [R, D] as they came."""

    def __init__(self, config: AudioConfig) -> None:
        super().__init__()
        self.clip = config.gradient_clipping
        self.feed_forward1, self.feed_forward2 = FeedForward(config.numbers), FeedForward(config.numbers)
        self.self_attn = Attention(config)
        self.lconv1d = LightConv(config.numbers)
        self.norm_pre_attn, self.norm_post_attn, self.norm_out = (
            RMSNorm(config.hidden_size, NORM_EPS) for _ in range(3)
        )

    def forward(self, x: Tensor, valid: Tensor) -> Tensor:
        x = self.feed_forward1(x)
        mixed = self.self_attn(self.norm_pre_attn(clipped(x, self.clip)), valid)
        x = x + self.norm_post_attn(clipped(mixed, self.clip))
        made: Tensor = self.norm_out(clipped(self.feed_forward2(self.lconv1d(x)), self.clip))
        return made


class AudioTower(nn.Module):
    """Spectrogram [1, T, F] to features [S, O]."""

    def __init__(self, config: AudioConfig) -> None:
        super().__init__()
        self.subsample_conv_projection = SubSample(config)
        self.layers = nn.ModuleList(AudioLayer(config) for _ in range(config.num_hidden_layers))
        self.output_proj = Linear(config.hidden_size, config.output_proj_dims)

    def forward(self, spectrogram: Tensor, valid: Tensor) -> Tensor:
        """`valid` float [T], 1 where there is sound."""
        x, rows = self.subsample_conv_projection(spectrogram, valid), every(valid, _HOPS)
        for layer in self.layers:
            x = layer(x, rows)
        # The layer's bias would make something of rows without sound.
        made: Tensor = self.output_proj(x) * rows[:, None]
        return made


class AudioEncoder(Encoder):
    """The section `audio_encoder`."""

    def __init__(self, config: AudioConfig, front: Front) -> None:
        super().__init__(AudioTower(config), front, _HOPS)

    def windows(self, frames: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        """Frames [1, T, 4 · hop] → windows [1, 4 · T, 2 · hop], the first of the second frame on; `valid` of them."""
        # A window is two hops long and begins at each; one may lie across two frames.
        hops = padded(frames.reshape(frames.shape[1] * _HOPS, frames.shape[2] // _HOPS), 0, _HOPS)
        count = valid.shape[0] * _HOPS
        windows = torch.cat([hops[_HOPS - 1 : _HOPS - 1 + count], hops[_HOPS : _HOPS + count]], dim=-1)
        there = padded(valid[1:, None], 0, 1) * torch.ones(1, _HOPS)
        return windows[None], there.reshape(count)


class AudioAdapter(Adapter):
    """The section `audio_adapter`."""

    def __init__(self, config: AudioConfig) -> None:
        super().__init__(Embedder(config.output_proj_dims, config.text_hidden_size, config.rms_norm_eps))


def tensors(config: AudioConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of tower and embedder as a checkpoint has it: name → shape. They take no memory."""
    with torch.device("meta"):
        parts = {"audio_tower": AudioTower(config), "embed_audio": AudioAdapter(config).embed_audio}
    return {
        f"{part}.{name}": stored(tuple(tensor.shape))
        for part, module in parts.items()
        for name, tensor in module.state_dict().items()
    }
