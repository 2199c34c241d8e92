"""Gemma 3n's eyes: a picture to soft tokens, the 256 vectors that stand in a prompt where a picture does.

The modules follow MobileNetV5 as Hugging Face runs it (timm 1.0.31, `models/mobilenetv5.py`, of the blocks of
MobileNetV4, Qin et al., 2024) and keep its parameter names. They are our own, so that building a file needs no timm,
which asks for torchvision; the reference runs timm's (pipeline/reference/seeing.py). Channels stand last, as TFLite has
them: nothing is transposed. The heads of an attention share keys and values, so heads are rows like any other.

Shapes in docstrings: a picture of S x S pixels, C channels, P places of queries, M of keys, N heads, H width of the
text model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from pipeline.checkpoint.picture import Look
from pipeline.core.errors import TowerError
from pipeline.export.operators import convolve, convolve_apart, matmul
from pipeline.models.gemma3n_embedder import Embedder, Weight, stored
from pipeline.models.transformer import RMSNorm

SECTIONS = ("vision_encoder", "vision_adapter")
ROWS = 1481
"""Places that a parameter is multiplied with at each run, in the mean over all of the true tower's."""
_ARCHITECTURE = "mobilenetv5_300m_enc"
_EPS = 1e-6
_STEM = 64
_SIDE = 16
"""Soft tokens stand in a square of so many a side."""
_STRIDE = 32
"""Pixels of a picture to one place of the last stage."""
_FUSED = 2.0
"""How much wider the fusion is inside than out of it."""


@dataclass(frozen=True, kw_only=True)
class Block:
    """A block of the tower, that makes `out` channels.

    `er`: a convolution of `kernel` into `expand` times the channels, then back. `uir`: each channel by itself
    (`kernel`, none: 0), `expand` times the channels, again by itself (`middle`), then back. `mqa`: attention of `heads`
    of `size`, over every `every`-th place each way.
    """

    kind: Literal["er", "uir", "mqa"]
    out: int
    stride: int = 1
    expand: float = 4.0
    kernel: int = 0
    middle: int = 0
    heads: int = 0
    size: int = 0
    every: int = 1


def _standard() -> tuple[tuple[Block, ...], ...]:
    """The four stages of `mobilenetv5_300m_enc`."""

    def attend(heads: int, size: int, out: int, every: int) -> tuple[Block, Block]:
        both = Block(kind="mqa", out=out, heads=heads, size=size, every=every)
        return both, Block(kind="uir", out=out, expand=2.0)

    edge = Block(kind="er", out=128, kernel=3)
    five = Block(kind="uir", out=256, kernel=5)
    wide = replace(five, out=640)
    return (
        (replace(edge, stride=2), edge, edge),
        (
            Block(kind="uir", out=256, stride=2, expand=6.0, kernel=3, middle=5),
            *(five, replace(five, kernel=3)) * 2,
        ),
        (
            replace(wide, stride=2, expand=6.0, middle=5),
            *(wide,) * 7,
            Block(kind="uir", out=640, expand=1.0),
            *attend(12, 64, 640, 2) * 14,
        ),
        (
            Block(kind="uir", out=1280, stride=2, expand=6.0, kernel=5, middle=5),
            *attend(16, 96, 1280, 1) * 19,
        ),
    )


@dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """The numbers that define the vision tower; names as in transformers' `Gemma3nVisionConfig`.

    `stem` are the channels of its first convolution. `text_hidden_size` is the width of the text model.
    """

    vocab_size: int
    vocab_offset: int
    hidden_size: int
    rms_norm_eps: float
    stem: int
    stages: tuple[tuple[Block, ...], ...]
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
        settings: Mapping[str, Any] = vision.get("model_args") or {}
        made = cls(
            vocab_size=vision.get("vocab_size", 128),
            vocab_offset=vision.get("vocab_offset", 262_144),
            hidden_size=vision.get("hidden_size", 2048),
            rms_norm_eps=vision.get("rms_norm_eps", 1e-6),
            **_tower(settings),
            soft_tokens=config.get("vision_soft_tokens_per_image", _SIDE**2),
            text_hidden_size=config.get("text_config", {}).get("hidden_size", 2048),
            boi_token_id=config.get("boi_token_id", 255_999),
            image_token_id=config.get("image_token_id", 262_145),
            eoi_token_id=config.get("eoi_token_id", 262_144),
        )
        for name, found, wanted in (
            ("vision_config.architecture", vision.get("architecture", _ARCHITECTURE), _ARCHITECTURE),
            ("vision_config.hidden_size", made.hidden_size, 2048),
            ("vision_soft_tokens_per_image", made.soft_tokens, _SIDE**2),
        ):
            if found != wanted:
                raise TowerError(f"{name} is {found}, expected {wanted}")
        return made

    def check(self, size: int) -> None:
        """Refuse pictures of `size` x `size` pixels if the tower can't make soft tokens of them.

        Raises:
            TowerError: it can't.
        """
        if size % _STRIDE or (size // (_STRIDE // 2)) % _SIDE:
            raise TowerError(f"the processor makes pictures of {size} pixels, and the vision encoder takes n x 256")


def _tower(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Stem and stages as timm makes them of `model_args`: all channels times a number, or blocks of its own."""
    if unknown := settings.keys() - {"channel_multiplier", "block_args"}:
        raise TowerError(f"vision_config.model_args has {min(unknown)}, which the vision encoder can't do")
    times = settings.get("channel_multiplier", 1.0)
    stages = tuple(tuple(map(_block, stage)) for stage in settings["block_args"]) if "block_args" in settings else None
    scaled = tuple(
        tuple(replace(block, out=_rounded(block.out * times)) for block in stage) for stage in stages or _standard()
    )
    if len(scaled) != 4 or any([block.stride for block in stage] != [2] + [1] * (len(stage) - 1) for stage in scaled):
        raise TowerError("vision_config.model_args.block_args are not four stages that halve the picture each")
    return {"stem": _STEM if times < 1 else _rounded(_STEM * times), "stages": scaled}


_NEUTRAL: Mapping[str, object] = {
    "act_layer": None, "pw_kernel_size": 1, "force_in_chs": 0, "se_ratio": 0.0, "noskip": False,
    "dw_kernel_size_end": 0, "dw_kernel_size": 3,
}  # fmt: skip
_NAMES = {
    "block_type": "kind", "out_chs": "out", "stride": "stride", "exp_ratio": "expand", "exp_kernel_size": "kernel",
    "dw_kernel_size_start": "kernel", "dw_kernel_size_mid": "middle", "num_heads": "heads", "key_dim": "size",
    "value_dim": "size", "kv_stride": "every",
}  # fmt: skip


def _block(told: Mapping[str, Any]) -> Block:
    """A block as timm describes it."""
    odd = [name for name, value in told.items() if name not in _NAMES and _NEUTRAL.get(name, value) != value]
    unknown = [name for name in told if name not in _NAMES and name not in _NEUTRAL]
    if told.get("key_dim") != told.get("value_dim") or odd or unknown or told["block_type"] not in ("er", "uir", "mqa"):
        raise TowerError(f"the vision encoder can't do the block {dict(told)} of vision_config.model_args")
    return Block(**{_NAMES[name]: value for name, value in told.items() if name in _NAMES})


def _rounded(channels: float) -> int:
    """A multiple of 8, not less than nine tenths of `channels`, as timm has it."""
    made = max(8, int(channels + 4) // 8 * 8)
    return made + 8 if made < 0.9 * channels else made


class Norm(RMSNorm):
    """RMSNorm over channels."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, _EPS)


class Convolution(nn.Module):
    """A convolution over all channels with zeros around. [1, H, W, I] → [1, H / stride, W / stride, O]."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 1, stride: int = 1) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(outputs, kernel, kernel, inputs))
        self.stride = [stride, stride]

    def forward(self, x: Tensor) -> Tensor:
        return convolve(x, self.weight, self.stride, True)


class Apart(Weight):
    """A convolution of each channel by itself."""

    def __init__(self, channels: int, kernel: int, stride: int) -> None:
        super().__init__(1, kernel, kernel, channels)
        self.stride = [stride, stride]

    def forward(self, x: Tensor) -> Tensor:
        return convolve_apart(x, self.weight, self.stride, True)


class ConvNorm(nn.Module):
    """A convolution, the norm behind it and, where it `acts`, a GELU."""

    def __init__(self, convolution: nn.Module, channels: int, *, acts: bool = False) -> None:
        super().__init__()
        self.conv, self.bn, self.acts = convolution, Norm(channels), acts

    def forward(self, x: Tensor) -> Tensor:
        normed: Tensor = self.bn(self.conv(x))
        return _gelu(normed) if self.acts else normed


class Stem(nn.Module):
    """Pixels [1, S, S, 3] → [1, S / 2, S / 2, C]."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv, self.bn = Convolution(3, channels, 3, 2), Norm(channels)
        self.conv.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        return _gelu(self.bn(self.conv(x) + self.conv.bias))


class LayerScale(nn.Module):
    """A factor for each channel."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Edge(nn.Module):
    """Block `er`."""

    def __init__(self, inputs: int, block: Block) -> None:
        super().__init__()
        inner = _rounded(inputs * block.expand)
        self.conv_exp, self.bn1 = Convolution(inputs, inner, block.kernel, block.stride), Norm(inner)
        self.conv_pwl, self.bn2 = Convolution(inner, block.out), Norm(block.out)
        self.skips = _skips(inputs, block)

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.bn2(self.conv_pwl(_gelu(self.bn1(self.conv_exp(x)))))
        return made + x if self.skips else made


class Inverted(nn.Module):
    """Block `uir`; where it `fuses`, what it makes is neither scaled nor added."""

    def __init__(self, inputs: int, block: Block, *, fuses: bool = False) -> None:
        super().__init__()
        inner = _rounded(inputs * block.expand)
        first, last = (1, block.stride) if block.middle else (block.stride, 1)
        self.dw_start = ConvNorm(Apart(inputs, block.kernel, first), inputs) if block.kernel else None
        self.pw_exp = ConvNorm(Convolution(inputs, inner), inner, acts=True)
        # Without a convolution in the middle `last` is not used: all strides are the first one's.
        self.dw_mid = ConvNorm(Apart(inner, block.middle, last), inner, acts=True) if block.middle else None
        self.pw_proj = ConvNorm(Convolution(inner, block.out), block.out)
        self.layer_scale = None if fuses else LayerScale(block.out)
        self.skips = _skips(inputs, block) and not fuses

    def forward(self, x: Tensor) -> Tensor:
        made = x
        for part in (self.dw_start, self.pw_exp, self.dw_mid, self.pw_proj, self.layer_scale):
            made = made if part is None else part(made)
        return made + x if self.skips else made


class Keys(nn.Module):
    """Keys or values: [1, H, W, C] → [1, M, size], over every `every`-th place each way."""

    def __init__(self, channels: int, block: Block) -> None:
        super().__init__()
        self.down_conv = Apart(channels, 3, block.every) if block.every > 1 else None
        self.norm = Norm(channels) if block.every > 1 else None
        self.proj = Convolution(channels, block.size)

    def forward(self, x: Tensor) -> Tensor:
        if self.down_conv is not None and self.norm is not None:
            x = self.norm(self.down_conv(x))
        made: Tensor = self.proj(x)
        return made.reshape(1, made.shape[1] * made.shape[2], made.shape[3])


class Projected(nn.Module):
    """A projection under timm's name for it."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.proj = Convolution(inputs, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


class Attention(nn.Module):
    """Attention of all places to keys and values that the heads share (Shazeer, 2019)."""

    def __init__(self, channels: int, block: Block) -> None:
        super().__init__()
        width = block.heads * block.size
        self.size = block.size
        self.query, self.output = Projected(channels, width), Projected(width, block.out)
        self.key, self.value = Keys(channels, block), Keys(channels, block)

    def forward(self, x: Tensor) -> Tensor:
        """[1, H, W, C] → [1, H, W, O]."""
        queries = self.query(x)
        shape = queries.shape
        rows = (queries * self.size**-0.5).reshape(1, -1, self.size)  # [1, P · N, size]
        weights = torch.softmax(matmul(rows, self.key(x), True), dim=-1)
        made: Tensor = self.output(matmul(weights, self.value(x), False).reshape(shape))
        return made


class Attends(nn.Module):
    """Block `mqa`."""

    def __init__(self, inputs: int, block: Block) -> None:
        super().__init__()
        self.norm, self.attn, self.layer_scale = Norm(inputs), Attention(inputs, block), LayerScale(block.out)
        self.skips = _skips(inputs, block)

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.layer_scale(self.attn(self.norm(x)))
        return made + x if self.skips else made


class Fusion(nn.Module):
    """The last two stages, side by side, to soft tokens: [1, 2n, 2n, C₁], [1, n, n, C₂] → [1, 16, 16, D]."""

    def __init__(self, channels: int, config: VisionConfig) -> None:
        super().__init__()
        self.ffn = Inverted(channels, Block(kind="uir", out=config.hidden_size, expand=_FUSED), fuses=True)
        self.norm = Norm(config.hidden_size)

    def forward(self, fine: Tensor, coarse: Tensor) -> Tensor:
        made: Tensor = self.norm(_pooled(self.ffn(torch.cat([fine, _doubled(coarse)], dim=-1))))
        return made


def _doubled(x: Tensor) -> Tensor:
    """Each place four times: [1, H, W, C] → [1, 2H, 2W, C]."""
    height, width, channels = x.shape[1:]
    across = torch.cat([x, x], dim=-1).reshape(1, height, 2 * width, channels)
    return torch.cat([across, across], dim=2).reshape(1, 2 * height, 2 * width, channels)


def _pooled(x: Tensor) -> Tensor:
    """Means of squares: [1, n · 16, n · 16, C] → [1, 16, 16, C]."""
    side, channels = x.shape[1] // _SIDE, x.shape[3]
    if side == 1:
        return x
    down = torch.mean(x.reshape(_SIDE, side, _SIDE * side * channels), dim=1)
    return torch.mean(down.reshape(_SIDE, _SIDE, side, channels), dim=2)[None]


class MobileNet(nn.Module):
    """Pixels [1, S, S, 3] → [1, 16, 16, D]."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.conv_stem = Stem(config.stem)
        stages, inputs = [], config.stem
        for stage in config.stages:
            blocks: list[nn.Module] = []
            for block in stage:
                blocks.append({"er": Edge, "uir": Inverted, "mqa": Attends}[block.kind](inputs, block))
                inputs = block.out
            stages.append(nn.Sequential(*blocks))
        self.blocks = nn.ModuleList(stages)
        self.msfa = Fusion(config.stages[-2][-1].out + config.stages[-1][-1].out, config)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_stem(x)
        seen: Sequence[Tensor] = ()
        for stage in self.blocks:
            x = stage(x)
            seen = (*seen, x)
        return self.msfa(*seen[-2:])


class VisionTower(nn.Module):
    """The tower under the names that checkpoints have."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.timm_model = MobileNet(config)

    def forward(self, x: Tensor) -> Tensor:
        return self.timm_model(x)


class VisionEncoder(nn.Module):
    """The section `vision_encoder`: pixels to features."""

    def __init__(self, config: VisionConfig, look: Look) -> None:
        super().__init__()
        self.look, self.width = look, config.hidden_size
        self.vision_tower = VisionTower(config)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """What LiteRT-LM asks of a vision encoder.

        Args:
            images: float32 [1, S, S, 3] in 0 … 1.

        Returns:
            `features` [1, 256, D].
        """
        factor, shift = (torch.from_numpy(part) for part in (self.look.factor, self.look.shift))
        pixels = images * factor + shift if self.look.changes else images
        made = self.vision_tower(pixels)
        return {"features": made.reshape(1, _SIDE**2, self.width) * self.width**0.5}


class VisionAdapter(nn.Module):
    """The section `vision_adapter`: features to soft tokens, and behind them the vector of the picture's end.

    LiteRT-LM puts as many vectors into a prompt as the adapter has rows, and none behind a picture by itself.
    """

    def __init__(self, config: VisionConfig, end: np.ndarray) -> None:
        super().__init__()
        self.embed_vision = Embedder(config.hidden_size, config.text_hidden_size, config.rms_norm_eps)
        self.end = end.reshape(1, 1, config.text_hidden_size)

    def forward(self, soft_tokens: Tensor) -> dict[str, Tensor]:
        """[1, 256, D] → `mm_embedding` [1, 257, H]."""
        return {"mm_embedding": torch.cat([self.embed_vision(soft_tokens), torch.from_numpy(self.end)], dim=1)}


def tensors(config: VisionConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of tower and embedder as a checkpoint has it: name → shape. They take no memory."""
    with torch.device("meta"):
        embedder = Embedder(config.hidden_size, config.text_hidden_size, config.rms_norm_eps)
        parts = {"vision_tower": VisionTower(config), "embed_vision": embedder}
    shapes = {
        f"{part}.{name}": stored(tuple(tensor.shape))
        for part, module in parts.items()
        for name, tensor in module.state_dict().items()
    }
    own = {"embedding": (config.vocab_size, config.hidden_size), "hard_embedding_norm": (config.hidden_size,)}
    return shapes | {f"embed_vision.{name}.weight": shape for name, shape in own.items()}


def _skips(inputs: int, block: Block) -> bool:
    return inputs == block.out and block.stride == 1


def _gelu(x: Tensor) -> Tensor:
    return functional.gelu(x, approximate="tanh")
