"""Gemma 4's eyes: a picture of any proportions to soft tokens, as many as its proportions give.

The modules follow transformers 5.24.0 (`models/gemma4/modeling_gemma4.py`) and keep its parameter names. What comes in
are patches, and where each stands; LiteRT-LM fills the rest up with patches of zeros at (−1, −1), which no patch may
see: litert-torch 0.10.0's own export lets all see them.

Shapes in docstrings: P patches, places of padding included, T soft tokens at most, N heads of D channels each, C
channels, H width of the text model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.core.errors import TowerError
from pipeline.core.facts import Patches
from pipeline.export.operators import Linear, lookup, matmul
from pipeline.models.gemma4_tower import ClippedLinear, Embedder
from pipeline.models.transformer import MASKED, RMSNorm, Rotation, gelu, split_heads

SECTIONS = ("vision_encoder", "vision_adapter", "end_of_vision")
_TABLE = "vision_tower.patch_embedder.position_embedding_table"
_USUAL = Patches(size=16, pool=3, tokens=280)
"""What the processor makes where nobody says otherwise."""


@dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """The numbers that define the tower; names as in transformers' `Gemma4VisionConfig`.

    `text_hidden_size` is the width of the text model.
    """

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    pooling_kernel_size: int
    patch_size: int
    position_embedding_size: int
    use_clipped_linears: bool
    standardize: bool
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
        text: Mapping[str, Any] = config.get("text_config") or {}
        rope: Mapping[str, Any] = vision.get("rope_parameters") or {}
        for name, found, wanted in (
            ("vision_config.hidden_activation", vision.get("hidden_activation", _ACTIVATION), _ACTIVATION),
            ("vision_config.attention_bias", bool(vision.get("attention_bias")), False),
            ("vision_config.rope_parameters.rope_type", rope.get("rope_type", _AXIAL), _AXIAL),
        ):
            if found != wanted:
                raise TowerError(f"{name} is {found}, expected {wanted}")
        if text.get("use_bidirectional_attention") == "vision":
            raise TowerError(
                "text_config.use_bidirectional_attention is vision: soft tokens are to see their whole picture in "
                "sliding layers alone, and LiteRT-LM gives all layers one mask"
            )
        made = cls(
            hidden_size=vision.get("hidden_size", 768),
            intermediate_size=vision.get("intermediate_size", 3072),
            num_hidden_layers=vision.get("num_hidden_layers", 16),
            num_attention_heads=vision.get("num_attention_heads", 12),
            num_key_value_heads=vision.get("num_key_value_heads", 12),
            head_dim=vision.get("head_dim", 64),
            rms_norm_eps=vision.get("rms_norm_eps", 1e-6),
            rope_theta=rope.get("rope_theta", 100.0),
            pooling_kernel_size=vision.get("pooling_kernel_size", _USUAL.pool),
            patch_size=vision.get("patch_size", _USUAL.size),
            position_embedding_size=vision.get("position_embedding_size", 10 * 1024),
            use_clipped_linears=vision.get("use_clipped_linears", False),
            standardize=vision.get("standardize", False),
            text_hidden_size=text.get("hidden_size", 2304),
            boi_token_id=config.get("boi_token_id", 255_999),
            image_token_id=config.get("image_token_id", 258_880),
            eoi_token_id=config.get("eoi_token_id", 258_882),
        )
        if made.num_attention_heads % made.num_key_value_heads or made.head_dim % 4:
            raise TowerError(
                f"vision_config has {made.num_attention_heads} heads of {made.head_dim} channels and "
                f"{made.num_key_value_heads} of keys and values, which don't go together"
            )
        return made

    def check(self, patches: Patches) -> None:
        """Refuse patches that the tower can't make soft tokens of.

        Raises:
            TowerError: it can't.
        """
        if (patches.size, patches.pool) != (self.patch_size, self.pooling_kernel_size):
            raise TowerError(
                f"the processor makes patches of {patches.size} pixels, {patches.pool} x {patches.pool} a soft token, "
                f"and the vision encoder takes {self.patch_size}, {self.pooling_kernel_size} x "
                f"{self.pooling_kernel_size}"
            )
        if patches.longest > self.position_embedding_size:
            raise TowerError(
                f"the processor makes pictures of up to {patches.longest} patches a side, and the vision encoder has "
                f"places for {self.position_embedding_size}"
            )


_ACTIVATION, _AXIAL = "gelu_pytorch_tanh", "axial"


class PatchEmbedder(nn.Module):
    """Patches, and where each stands. [1, P, 3 · size²] in 0 … 1, int32 [1, P] twice → [1, P, C]."""

    def __init__(self, config: VisionConfig, longest: int) -> None:
        super().__init__()
        self.longest = longest
        self.input_proj = Linear(3 * config.patch_size**2, config.hidden_size, bias=False)
        # One for each axis, one under the other; of each as many rows as a picture can be long.
        self.position_embedding_table = nn.Parameter(torch.zeros(2 * longest, config.hidden_size))

    def forward(self, patches: Tensor, across: Tensor, down: Tensor) -> Tensor:
        # The processor leaves pixels in 0 … 1; the model moves them.
        made: Tensor = self.input_proj(patches * 2.0 - 1.0)
        return made + self._of(across) + self._of(down + self.longest)

    def _of(self, places: Tensor) -> Tensor:
        return lookup(places.reshape(-1), self.position_embedding_table)[None]


class Attention(nn.Module):
    """Attention of all patches to all that are none of padding; scores are not scaled. [1, P, C] → [1, P, C]."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        size, bounded = config.head_dim, config.use_clipped_linears
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.q_proj = ClippedLinear(config.hidden_size, self.heads * size, bounded=bounded)
        self.k_proj, self.v_proj = (
            ClippedLinear(config.hidden_size, self.kv_heads * size, bounded=bounded) for _ in range(2)
        )
        self.o_proj = ClippedLinear(self.heads * size, config.hidden_size, bounded=bounded)
        self.q_norm, self.k_norm = (RMSNorm(size, config.rms_norm_eps) for _ in range(2))
        self.v_norm = RMSNorm(size, config.rms_norm_eps, scaled=False)

    def forward(self, x: Tensor, rotations: tuple[Rotation, Rotation], mask: Tensor) -> Tensor:
        wide = x[:, :, None]
        queries = _apart(_turned(self.q_norm(split_heads(self.q_proj(wide), self.heads)), rotations))
        keys = _apart(_turned(self.k_norm(split_heads(self.k_proj(wide), self.kv_heads)), rotations))
        values = _apart(self.v_norm(split_heads(self.v_proj(wide), self.kv_heads)))
        shared = self.heads // self.kv_heads
        # One head after the other: the scores of all at once would be a third of a gigabyte with 2,520 patches.
        mixed = [
            matmul(torch.softmax(matmul(query, keys[i // shared], True) + mask, dim=-1), values[i // shared], False)
            for i, query in enumerate(queries)
        ]
        made: Tensor = self.o_proj(torch.cat(mixed, dim=-1))
        return made


def _turned(x: Tensor, rotations: tuple[Rotation, Rotation]) -> Tensor:
    """[1, P, N, D]: the first half of each head by where its patch stands across, the second by where down."""
    half = x.shape[-1] // 2
    across, down = rotations
    return torch.cat([across.apply(x[..., :half]), down.apply(x[..., half:])], dim=-1)


def _apart(x: Tensor) -> list[Tensor]:
    """The heads of [1, P, N, D], each [1, P, D]."""
    heads, size = x.shape[2:]
    flat = x.reshape(1, x.shape[1], heads * size)
    return [flat[:, :, head * size : (head + 1) * size] for head in range(heads)]


class MLP(nn.Module):
    """down(gelu(gate x) · up x). [1, P, C] → [1, P, C]."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        size, inner, bounded = config.hidden_size, config.intermediate_size, config.use_clipped_linears
        self.gate_proj, self.up_proj = (ClippedLinear(size, inner, bounded=bounded) for _ in range(2))
        self.down_proj = ClippedLinear(inner, size, bounded=bounded)

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.down_proj(gelu(self.gate_proj(x)) * self.up_proj(x))
        return made


class EncoderLayer(nn.Module):
    """[1, P, C] → [1, P, C]."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.self_attn, self.mlp = Attention(config), MLP(config)
        self.input_layernorm, self.post_attention_layernorm = (_norm(config) for _ in range(2))
        self.pre_feedforward_layernorm, self.post_feedforward_layernorm = (_norm(config) for _ in range(2))

    def forward(self, x: Tensor, rotations: tuple[Rotation, Rotation], mask: Tensor) -> Tensor:
        x = x + self.post_attention_layernorm(self.self_attn(self.input_layernorm(x), rotations, mask))
        made: Tensor = x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))
        return made


def _norm(config: VisionConfig) -> RMSNorm:
    return RMSNorm(config.hidden_size, config.rms_norm_eps)


class Encoder(nn.Module):
    """All layers under the name that checkpoints have. [1, P, C], bool-like float [1, P] → [1, P, C]."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.num_hidden_layers))

    def forward(self, x: Tensor, across: Tensor, down: Tensor, there: Tensor) -> Tensor:
        half = self.config.head_dim // 2
        rotations = (
            Rotation.at(across, self.config.rope_theta, half),
            Rotation.at(down, self.config.rope_theta, half),
        )
        # What is added to scores, not a mask of zeros: a softmax would see those.
        mask = (1.0 - there)[:, None] * MASKED
        for layer in self.layers:
            x = layer(x, rotations, mask)
        return x


class VisionTower(nn.Module):
    """Patches and their places to features: [1, P, 3 · size²], int32 [1, P, 2] → [1, T, C], and which are there."""

    def __init__(self, config: VisionConfig, patches: Patches) -> None:
        super().__init__()
        self.config, self.patches = config, patches
        self.patch_embedder, self.encoder = PatchEmbedder(config, patches.longest), Encoder(config)
        if config.standardize:
            self.std_bias = nn.Parameter(torch.zeros(config.hidden_size))
            self.std_scale = nn.Parameter(torch.ones(config.hidden_size))

    def forward(self, images: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        # In floats from here on: XNNPACK runs few operators on integers, and places are small.
        told = positions.to(torch.float32)
        # 0 where a place is −1, else 1.
        there = torch.clamp(told[:, :, 0] + 1.0, 0.0, 1.0)
        # Padding stands at (0, 0), where its embedding is finite; the mask hides it.
        places = torch.clamp(told, 0.0)
        across, down = places[:, :, 0], places[:, :, 1]
        embedded = self.patch_embedder(images, across.to(torch.int32), down.to(torch.int32))
        pooled, seen = self._pooled(self.encoder(embedded, across, down, there), across, down, there)
        features = pooled * self.config.hidden_size**0.5
        if self.config.standardize:
            features = (features - self.std_bias) * self.std_scale
        return features, seen

    def _pooled(self, x: Tensor, across: Tensor, down: Tensor, there: Tensor) -> tuple[Tensor, Tensor]:
        """The mean of the patches of each soft token, row by row, and which have any: [1, T, C], bool [1, T]."""
        pool, count = self.patches.pool, self.patches.tokens
        # Half a patch in, so that a quotient which is rounded down a little stays in its soft token.
        column, row = (torch.floor((place + 0.5) * (1.0 / pool)) for place in (across, down))
        wide = torch.amax(column, dim=1, keepdim=True) + 1.0
        # How wide a picture is, the tower sees by its places alone: the sections have one shape for all pictures.
        token = (column + wide * row)[:, None]
        own = torch.arange(count, dtype=torch.float32, device="cpu").reshape(1, count, 1)
        near = torch.clamp(1.0 - torch.abs(token - own), 0.0) * there[:, None]
        # A mean over patches that lie anywhere, as a product: row by row, which patches are a soft token's.
        return matmul(near * (1.0 / pool**2), x, False), torch.amax(near, dim=2) > 0.5


class VisionEncoder(nn.Module):
    """The section `vision_encoder`: patches to features."""

    def __init__(self, config: VisionConfig, patches: Patches) -> None:
        super().__init__()
        self.vision_tower = VisionTower(config, patches)

    def forward(self, images: Tensor, positions_xy: Tensor) -> dict[str, Tensor]:
        """What LiteRT-LM asks of a vision encoder that takes patches.

        Args:
            images: float32 [1, P, 3 · size²] in 0 … 1, row by row, a pixel's red first; zeros behind the last.
            positions_xy: int32 [1, P, 2], how far each stands across and down; −1 behind the last.

        Returns:
            `features` [1, T, C], and `mask`, bool [1, T]: the runtime takes as many rows as are true.
        """
        features, seen = self.vision_tower(images, positions_xy)
        return {"features": features, "mask": seen}


class VisionAdapter(nn.Module):
    """The section `vision_adapter`: features to soft tokens; what ends a picture is a section of its own."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.embed_vision = Embedder(config.hidden_size, config.text_hidden_size, config.rms_norm_eps)

    def forward(self, soft_tokens: Tensor) -> dict[str, Tensor]:
        """[1, T, C] → `mm_embedding` [1, T, H]."""
        return {"mm_embedding": self.embed_vision(soft_tokens)}


def tensors(config: VisionConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of tower and embedder as a checkpoint has it: name → shape. They take no memory."""
    with torch.device("meta"):
        embedder = Embedder(config.hidden_size, config.text_hidden_size, config.rms_norm_eps)
        parts = {"vision_tower": VisionTower(config, _USUAL), "embed_vision": embedder}
    shapes = {
        f"{part}.{name}": tuple(tensor.shape)
        for part, module in parts.items()
        for name, tensor in module.state_dict().items()
    }
    # Checkpoints have every row that the table was made with, as one tensor of both axes; the file has what is reached.
    return shapes | {_TABLE: (2, config.position_embedding_size, config.hidden_size)}


def rows(config: VisionConfig, held: Mapping[str, tuple[int, ...]]) -> int:
    """What each parameter that is `held` is multiplied with at a run: patches, and their attention's share."""
    attention = 2 * _USUAL.count**2 * config.num_attention_heads * config.head_dim * config.num_hidden_layers
    return _USUAL.count + attention // sum(map(math.prod, held.values()))
