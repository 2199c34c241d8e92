"""Gemma 3n's ears: sound to soft tokens, the vectors that stand in a prompt where a sound does.

The modules follow the audio encoder of transformers 5.24.0 (`models/gemma3n/modeling_gemma3n.py`) and keep its
parameter names; what Gemma 4's is too stands in `conformer.py`, with the shapes' letters. A soft token is made of 16
frames.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
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
)
from pipeline.models.gemma3n_embedder import Embedder, stored
from pipeline.models.transformer import RMSNorm

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
    def numbers(self) -> Numbers:
        """Those of a block."""
        past = max(0, self.conf_attention_context_left - 1)
        return Numbers(
            size=self.hidden_size,
            heads=self.conf_num_attention_heads,
            width=self.conf_attention_chunk_size,
            past=past,
            seen=past,
            distances=past + 1,
            cap=self.conf_attention_logit_cap,
            clip=self.gradient_clipping,
            share=self.conf_residual_weight,
            kernel=self.conf_conv_kernel_size,
            eps=self.rms_norm_eps,
        )


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


class SubSample(nn.Module):
    """Spectrogram [1, T, F] to rows [T / 4, D]."""

    def __init__(self, config: AudioConfig) -> None:
        super().__init__()
        (first, second), eps = config.sscp_conv_channel_size, config.sscp_conv_group_norm_eps
        self.conv_0 = ConvBlock(1, first, CumulativeNorm(first, eps), leads=True)
        self.conv_1 = ConvBlock(first, second, CumulativeNorm(second, eps), leads=True)
        pitches = halved(halved(config.input_feat_size))
        self.input_proj_linear = Linear(pitches * second, config.hidden_size, bias=False)

    def forward(self, spectrogram: Tensor, valid: Tensor) -> Tensor:
        """`valid` float [T], 1 where there is sound."""
        # What lies behind the end must be as zeros as the padding that transformers has there, at each convolution: a
        # norm and silence make other numbers of it.
        x = self.conv_0((spectrogram * valid[None, :, None])[..., None])
        x = self.conv_1(x * every(valid, 2)[None, :, None, None])
        return self.input_proj_linear(x.reshape(x.shape[1], x.shape[2] * x.shape[3]))


class Attention(LocalAttention):
    """The attention of a block, its positions by a layer of their own."""

    def __init__(self, config: AudioConfig) -> None:
        super().__init__(config.numbers)
        self.relative_position_embedding = RelativePositions(config)

    def positions(self, waves: Tensor) -> Tensor:
        """The projection of waves."""
        projected: Tensor = self.relative_position_embedding.pos_proj(waves)
        return projected


class RelativePositions(nn.Module):
    """The projection of sines and cosines of distances."""

    def __init__(self, config: AudioConfig) -> None:
        super().__init__()
        self.pos_proj = Linear(config.hidden_size, config.hidden_size, bias=False)


class ConformerAttention(nn.Module):
    """x + norm(post(attention(norm x)))."""

    def __init__(self, config: AudioConfig) -> None:
        super().__init__()
        self.clip = config.gradient_clipping
        self.pre_attn_norm, self.post_norm = (RMSNorm(config.hidden_size, NORM_EPS) for _ in range(2))
        self.attn = Attention(config)
        self.post = Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor, valid: Tensor) -> Tensor:
        mixed = self.attn(self.pre_attn_norm(clipped(x, self.clip)), valid)
        normed: Tensor = self.post_norm(clipped(self.post(mixed), self.clip))
        return x + normed


class ConformerBlock(nn.Module):
    """One block of the conformer (Gulati et al., 2020). Rows [R, D] as they came."""

    def __init__(self, config: AudioConfig) -> None:
        super().__init__()
        self.clip = config.gradient_clipping
        self.ffw_layer_start, self.ffw_layer_end = FeedForward(config.numbers), FeedForward(config.numbers)
        self.attention = ConformerAttention(config)
        self.lconv1d = LightConv(config.numbers)
        self.norm = RMSNorm(config.hidden_size, NORM_EPS)

    def forward(self, x: Tensor, valid: Tensor) -> Tensor:
        x = self.attention(self.ffw_layer_start(x), valid)
        normed: Tensor = self.norm(clipped(self.ffw_layer_end(self.lconv1d(x * valid[:, None])), self.clip))
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
        x, rows = self.subsample_conv_projection(spectrogram, valid), every(valid, 4)
        for block in self.conformer:
            x = block(x, rows)
        return every(x, self.reduce) * every(rows, self.reduce)[:, None]


class AudioEncoder(Encoder):
    """The section `audio_encoder`."""

    def __init__(self, config: AudioConfig, front: Front) -> None:
        super().__init__(AudioTower(config), front, 4 * config.conf_reduction_factor)


class AudioAdapter(Adapter):
    """The section `audio_adapter`."""

    def __init__(self, config: AudioConfig) -> None:
        super().__init__(Embedder(config.hidden_size, config.text_hidden_size, config.rms_norm_eps))


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
