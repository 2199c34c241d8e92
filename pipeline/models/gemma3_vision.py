"""Gemma 3's eyes: a picture to soft tokens, the vectors that stand in a prompt where a picture does.

The modules follow SigLIP and Gemma 3's projector in transformers 5.24.0 (`models/siglip/modeling_siglip.py`,
`models/gemma3/modeling_gemma3.py`; Zhai et al., "Sigmoid Loss for Language Image Pre-Training", 2023) and keep their
parameter names. Channels stand last, as TFLite has them.

Shapes in docstrings: a picture of S x S pixels, P patches, N heads, C channels, T soft tokens, H width of the text
model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.checkpoint.picture import Look
from pipeline.core.errors import TowerError
from pipeline.export.operators import Linear, convolve, matmul
from pipeline.models.gemma3n_embedder import Weight, stored
from pipeline.models.transformer import RMSNorm, gelu

SECTIONS = ("vision_encoder", "vision_adapter")
_KIND = "siglip_vision_model"
_ACTIVATION = "gelu_pytorch_tanh"


@dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """The numbers that define the tower; names as in transformers' `SiglipVisionConfig`.

    `soft_tokens` stand for a picture. `text_hidden_size` is the width of the text model.
    """

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    image_size: int
    patch_size: int
    layer_norm_eps: float
    soft_tokens: int
    text_hidden_size: int
    boi_token_id: int
    image_token_id: int
    eoi_token_id: int

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> VisionConfig:
        """Read a checkpoint's `config.json`; absent keys have transformers' defaults.

        Raises:
            TowerError: a value that these modules do not implement.
        """
        vision: Mapping[str, Any] = config.get("vision_config") or {}
        for name, wanted in (("model_type", _KIND), ("hidden_act", _ACTIVATION), ("num_channels", 3)):
            if (found := vision.get(name, wanted)) != wanted:
                raise TowerError(f"vision_config.{name} is {found}, expected {wanted}")
        made = cls(
            hidden_size=vision.get("hidden_size", 768),
            intermediate_size=vision.get("intermediate_size", 3072),
            num_hidden_layers=vision.get("num_hidden_layers", 12),
            num_attention_heads=vision.get("num_attention_heads", 12),
            image_size=vision.get("image_size", 224),
            patch_size=vision.get("patch_size", 16),
            layer_norm_eps=vision.get("layer_norm_eps", 1e-6),
            soft_tokens=config.get("mm_tokens_per_image", 256),
            text_hidden_size=config.get("text_config", {}).get("hidden_size", 2304),
            boi_token_id=_token(config, "boi", 255_999),
            image_token_id=_token(config, "image", 262_144),
            eoi_token_id=_token(config, "eoi", 256_000),
        )
        if made.hidden_size % made.num_attention_heads:
            raise TowerError(
                f"vision_config.hidden_size is {made.hidden_size}, no multiple of its {made.num_attention_heads} heads"
            )
        if made.side**2 != made.soft_tokens or made.image_size % made.patch_size or made.patches % made.side:
            raise TowerError(
                f"vision_config has pictures of {made.image_size} pixels in patches of {made.patch_size}, of which "
                f"{made.soft_tokens} soft tokens can't be made in squares"
            )
        return made

    @property
    def patches(self) -> int:
        """Patches a side."""
        return self.image_size // self.patch_size

    @property
    def side(self) -> int:
        """Soft tokens a side."""
        return math.isqrt(self.soft_tokens)

    def check(self, size: int) -> None:
        """Refuse pictures of `size` x `size` pixels if the tower can't make soft tokens of them.

        Raises:
            TowerError: it can't.
        """
        if size != self.image_size:
            raise TowerError(
                f"the processor makes pictures of {size} pixels, and the vision encoder takes {self.image_size}"
            )


def _token(config: Mapping[str, Any], name: str, default: int) -> int:
    """The id of a token, which Gemma 3's config.json calls an index."""
    found: int = config.get(f"{name}_token_index", config.get(f"{name}_token_id", default))
    return found


class LayerNorm(nn.Module):
    """(x − mean) / √(variance + ε) · weight + bias over the last axis."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight, self.bias = nn.Parameter(torch.ones(size)), nn.Parameter(torch.zeros(size))

    def forward(self, x: Tensor) -> Tensor:
        centred = x - torch.mean(x, dim=-1, keepdim=True)
        inverse = torch.rsqrt(torch.mean(centred * centred, dim=-1, keepdim=True) + self.eps)
        # As in `operators.normalise`: a factor on a linear layer's input would be folded into a copy of its weights.
        return centred * (inverse * self.weight) + self.bias


class Patches(Weight):
    """Squares of pixels to vectors. [1, S, S, 3] → [1, √P, √P, C]."""

    def __init__(self, channels: int, size: int) -> None:
        super().__init__(channels, size, size, 3)
        self.bias = nn.Parameter(torch.zeros(channels))
        self.stride = [size, size]

    def forward(self, x: Tensor) -> Tensor:
        return convolve(x, self.weight, self.stride) + self.bias


class Embeddings(nn.Module):
    """Patches, and where each stands. [1, S, S, 3] → [1, P, C]."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.shape = (1, config.patches**2, config.hidden_size)
        self.patch_embedding = Patches(config.hidden_size, config.patch_size)
        self.position_embedding = Weight(*self.shape[1:])

    def forward(self, x: Tensor) -> Tensor:
        return self.patch_embedding(x).reshape(self.shape) + self.position_embedding.weight


class Attention(nn.Module):
    """Attention of all patches to all. [1, P, C] → [1, P, C]."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        size, self.heads = config.hidden_size, config.num_attention_heads
        self.scale = (size // self.heads) ** -0.5
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (Linear(size, size) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        queries, keys, values = (self._apart(part(x)) for part in (self.q_proj, self.k_proj, self.v_proj))
        # One head after the other: the scores of all at once would be a gigabyte with 4,096 patches.
        mixed = [
            matmul(torch.softmax(matmul(query * self.scale, key, True), dim=-1), value, False)
            for query, key, value in zip(queries, keys, values, strict=True)
        ]
        made: Tensor = self.out_proj(torch.cat(mixed, dim=-1))
        return made

    def _apart(self, x: Tensor) -> list[Tensor]:
        """The heads' parts, each [1, P, C / N]."""
        size = x.shape[-1] // self.heads
        return [x[:, :, head * size : (head + 1) * size] for head in range(self.heads)]


class MLP(nn.Module):
    """[1, P, C] → [1, P, C]."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.fc1 = Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.fc2(gelu(self.fc1(x)))
        return made


class EncoderLayer(nn.Module):
    """[1, P, C] → [1, P, C]."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.layer_norm1, self.layer_norm2 = (LayerNorm(config.hidden_size, config.layer_norm_eps) for _ in range(2))
        self.self_attn, self.mlp = Attention(config), MLP(config)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        made: Tensor = x + self.mlp(self.layer_norm2(x))
        return made


class Encoder(nn.Module):
    """All layers under the name that checkpoints have."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.num_hidden_layers))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class VisionTower(nn.Module):
    """SigLIP without a head. Pixels [1, S, S, 3] → [1, P, C]."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.embeddings, self.encoder = Embeddings(config), Encoder(config)
        self.post_layernorm = LayerNorm(config.hidden_size, config.layer_norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.post_layernorm(self.encoder(self.embeddings(x)))
        return made


class VisionEncoder(nn.Module):
    """The section `vision_encoder`: pixels to features, the means of squares of patches.

    Hugging Face's projector has these means; here they keep what goes from section to section small.
    """

    def __init__(self, config: VisionConfig, look: Look) -> None:
        super().__init__()
        self.look, self.config = look, config
        self.vision_tower = VisionTower(config)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """What LiteRT-LM asks of a vision encoder.

        Args:
            images: float32 [1, S, S, 3] in 0 … 1.

        Returns:
            `features` [1, T, C].
        """
        factor, shift = (torch.from_numpy(part) for part in (self.look.factor, self.look.shift))
        pixels = images * factor + shift if self.look.changes else images
        side, channels = self.config.side, self.config.hidden_size
        wide = self.config.patches // side
        made = self.vision_tower(pixels)
        down = torch.mean(made.reshape(side, wide, side * wide * channels), dim=1)
        means = torch.mean(down.reshape(side, side, wide, channels), dim=2)
        return {"features": means.reshape(1, side * side, channels)}


class Projector(nn.Module):
    """Features to soft tokens: a norm and a projection. [1, T, C] → [1, T, H]."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        # [inputs, outputs], as checkpoints have it: no linear layer of torch.
        self.mm_input_projection_weight = nn.Parameter(torch.zeros(config.hidden_size, config.text_hidden_size))
        self.mm_soft_emb_norm = RMSNorm(config.hidden_size, config.layer_norm_eps, offset=1.0)

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = matmul(self.mm_soft_emb_norm(x), self.mm_input_projection_weight[None], False)
        return made


class VisionAdapter(nn.Module):
    """The section `vision_adapter`: features to soft tokens.

    No row stands behind them: what ends a picture is a token of the text model, and is not seen by the soft tokens.
    """

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.multi_modal_projector = Projector(config)

    def forward(self, soft_tokens: Tensor) -> dict[str, Tensor]:
        """[1, T, C] → `mm_embedding` [1, T, H]."""
        return {"mm_embedding": self.multi_modal_projector(soft_tokens)}


def tensors(config: VisionConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of tower and projector as a checkpoint has it: name → shape. They take no memory."""
    with torch.device("meta"):
        parts = {"vision_tower": VisionTower(config), "multi_modal_projector": Projector(config)}
    return {
        f"{part}.{name}": stored(tuple(tensor.shape))
        for part, module in parts.items()
        for name, tensor in module.state_dict().items()
    }


def rows(config: VisionConfig, held: Mapping[str, tuple[int, ...]]) -> int:
    """What each parameter that is `held` is multiplied with at a run: patches, and their attention's share."""
    patches = config.patches**2
    attention = 2 * patches**2 * config.hidden_size * config.num_hidden_layers
    return patches + attention // sum(map(math.prod, held.values()))
