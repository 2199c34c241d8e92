"""What the audio towers of Gemma 3n and Gemma 4 both are: blocks of a conformer over rows of a log-mel spectrogram.

As in the Universal Speech Model (Zhang et al., "Google USM", 2023), with transformers' parameter names. The encoder
takes the frames of a sound's samples, as LiteRT-LM hands them over, and makes the spectrogram itself: the runtime's own
is another. One graph of T frames serves every length: nothing of a sound reaches back in time, and what lies behind its
end is kept from the convolutions.

Our own for three reasons: a window cut by `unfold` becomes a pad of six dimensions, of which TFLite takes five; a
constant mask of booleans is written without its bytes (litert-converter 0.5); tensors of ones as large as an input
would stand in the file.

Shapes in docstrings: T frames of samples, S soft tokens, R rows (T / 4), D width of the encoder, H of the text model, N
heads, U blocks of W rows with C rows of context each.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from pipeline.checkpoint.sound import Front
from pipeline.export.operators import Linear, convolve, convolve_apart, matmul
from pipeline.models.gemma3n_embedder import Weight
from pipeline.models.transformer import RMSNorm

_NOT_SEEN = -1e9
"""Added to scores that the soft-cap holds within some tens."""
_MIN_TIMESCALE, _MAX_TIMESCALE = 1.0, 1e4
NORM_EPS = 1e-6
"""Of the norms for which transformers takes its class's own."""


def plain(inputs: int, outputs: int) -> nn.Module:
    """A linear layer."""
    return Linear(inputs, outputs, bias=False)


@dataclass(frozen=True, kw_only=True)
class Numbers:
    """What defines a conformer block: its width `size`, its `heads`, and what a row attends to.

    Blocks of `width` rows have the `past` rows before them beside themselves; of all these a row sees itself and `seen`
    before it. `distances` have a position of their own, the last of them 0. Scores are soft-capped at `cap`; keys are
    multiplied with `keys`. Sums are held within ± `clip`; `share` is a feed-forward layer's weight; `eps` of the norms
    around the convolution, whose `kernel` is so many rows. `linear` makes layers of inputs and outputs.
    """

    size: int
    heads: int
    width: int
    past: int
    seen: int
    distances: int
    cap: float
    clip: float
    share: float
    kernel: int
    eps: float
    keys: float = 1.0
    linear: Callable[[int, int], nn.Module] = plain

    @property
    def context(self) -> int:
        """C, the rows that a block of W rows has."""
        return self.width + self.past

    @property
    def head(self) -> int:
        """The size of a head."""
        return self.size // self.heads


class LocalAttention(nn.Module):
    """Attention of blocks of W rows to themselves and the rows before, scores with relative positions, soft-capped."""

    def __init__(self, numbers: Numbers) -> None:
        super().__init__()
        self.numbers = numbers
        self.per_dim_scale = nn.Parameter(torch.zeros(numbers.head))
        self.q_proj, self.k_proj, self.v_proj = (numbers.linear(numbers.size, numbers.size) for _ in range(3))

    def positions(self, waves: Tensor) -> Tensor:
        """The projection of sines and cosines of distances, [distances, D] as it came."""
        raise NotImplementedError

    def forward(self, x: Tensor, valid: Tensor) -> Tensor:
        """Rows [R, D] → [R, D]; `valid` float [R]."""
        numbers, rows, (heads, size) = self.numbers, x.shape[0], (self.numbers.heads, self.numbers.head)
        width, blocks = numbers.width, -(-rows // numbers.width)
        scale = size**-0.5 / math.log(2.0)  # over softplus(0), so that a stored 0 means 1
        softplus = torch.log(torch.exp(self.per_dim_scale) + 1.0)
        queries = self.q_proj(x).reshape(rows, heads, size) * (softplus * scale)
        queries = padded(queries, 0, blocks * width - rows).reshape(blocks, width, heads, size)
        queries = queries.permute(0, 2, 1, 3)
        keys, values = (
            self._context(part(x).reshape(rows, heads, size), blocks).permute(0, 2, 1, 3)
            for part in (self.k_proj, self.v_proj)
        )
        # Gemma 4's alone are scaled; a product with 1 would be an operator for nothing.
        keys = keys if numbers.keys == 1.0 else keys * numbers.keys
        scores = matmul(queries, keys, True) + self._moved(queries)
        # Before the mask: what is not to be seen would be capped to what is.
        scores = torch.tanh(scores * (1.0 / numbers.cap)) * numbers.cap
        near = self._context(valid[:, None], blocks).reshape(blocks, 1, 1, numbers.context)
        scores = scores + (near * self._causal() - 1.0) * -_NOT_SEEN
        mixed = matmul(torch.softmax(scores, dim=-1), values, False).permute(0, 2, 1, 3)
        mixed = mixed.reshape(blocks * width, heads * size)
        return mixed[:rows] if rows < blocks * width else mixed

    def _context(self, x: Tensor, blocks: int) -> Tensor:
        """The C rows that each block has: [R, …] → [U, C, …]."""
        width, past = self.numbers.width, self.numbers.past
        # By whole blocks side by side: a gather has a constant of booleans in it, which is written without its bytes.
        more = -(-past // width)
        rows = padded(x, more * width, blocks * width - x.shape[0]).reshape(more + blocks, width, *x.shape[1:])
        return _from(torch.cat([rows[i : i + blocks] for i in range(more + 1)], dim=1), more * width - past)

    def _causal(self) -> Tensor:
        """1 where a row of a block may look, float [W, C]: itself and `seen` rows before."""
        numbers = self.numbers
        ahead = torch.arange(numbers.context)[None, :] - torch.arange(numbers.width)[:, None]
        return ((ahead >= numbers.past - numbers.seen) & (ahead <= numbers.past)).to(torch.float32)

    def _moved(self, queries: Tensor) -> Tensor:
        """What scores gain by how far a key lies behind its query (Dai et al., Transformer-XL, 2019).

        [U, N, W, size] → [U, N, W, C].
        """
        blocks, heads, width, size = queries.shape
        distances, context = self.numbers.distances, self.numbers.context
        positions = self.positions(self._waves()).reshape(distances, heads, size).permute(1, 0, 2)
        flat = queries.permute(1, 0, 2, 3).reshape(heads, blocks * width, size)
        scores = matmul(flat, positions, True).reshape(heads, blocks, width, distances)
        # Row w moves w to the right: rows padded to one more than C, laid end to end, cut again into rows of C.
        scores = functional.pad(scores, (0, context + 1 - distances)).reshape(heads, blocks, width * (context + 1))
        scores = scores[:, :, : width * context].reshape(heads, blocks, width, context)
        return scores.permute(1, 0, 2, 3)

    def _waves(self) -> Tensor:
        """Sine and cosine of the distances, the largest first, [distances, D]."""
        count = self.numbers.size // 2
        step = math.log(_MAX_TIMESCALE / _MIN_TIMESCALE) / max(count - 1, 1)
        rates = _MIN_TIMESCALE * torch.exp(torch.arange(count) * -step)
        times = torch.arange(self.numbers.distances - 1, -1, -1).to(torch.float32)[:, None] * rates
        return torch.cat([torch.sin(times), torch.cos(times)], dim=-1)


class FeedForward(nn.Module):
    """x + weight · norm(W₂ silu(W₁ norm x))."""

    def __init__(self, numbers: Numbers) -> None:
        super().__init__()
        size = numbers.size
        self.clip, self.share = numbers.clip, numbers.share
        self.pre_layer_norm, self.post_layer_norm = RMSNorm(size, NORM_EPS), RMSNorm(size, NORM_EPS)
        self.ffw_layer_1, self.ffw_layer_2 = numbers.linear(size, 4 * size), numbers.linear(4 * size, size)

    def forward(self, x: Tensor) -> Tensor:
        inner = _silu(self.ffw_layer_1(self.pre_layer_norm(clipped(x, self.clip))))
        return x + self.post_layer_norm(clipped(self.ffw_layer_2(inner), self.clip)) * self.share


class LightConv(nn.Module):
    """A gate, a convolution of each channel over the rows before, and a linear layer."""

    def __init__(self, numbers: Numbers) -> None:
        super().__init__()
        size, eps = numbers.size, numbers.eps
        self.clip, self.kernel = numbers.clip, numbers.kernel
        self.pre_layer_norm, self.conv_norm = RMSNorm(size, eps), RMSNorm(size, eps)
        self.linear_start, self.linear_end = numbers.linear(size, 2 * size), numbers.linear(size, size)
        self.depthwise_conv1d = Weight(1, 1, self.kernel, size)

    def forward(self, x: Tensor) -> Tensor:
        both = self.linear_start(self.pre_layer_norm(x))
        gated = both[:, : x.shape[1]] * torch.sigmoid(both[:, x.shape[1] :])
        # Before alone: what lies behind the end of a sound reaches nothing of it.
        rows = padded(gated, self.kernel - 1, 0)[None, None]
        moved = convolve_apart(rows, self.depthwise_conv1d.weight, [1, 1]).reshape(x.shape)
        made: Tensor = self.linear_end(_silu(self.conv_norm(clipped(moved, self.clip)))) + x
        return made


class ConvBlock(nn.Module):
    """A convolution over time and pitch that halves both, a norm and a ReLU. [1, T, F, I] → [1, T / 2, F / 2, O].

    In time it has one row of zeros around it, or if it `leads` none before and two behind.
    """

    def __init__(self, inputs: int, outputs: int, norm: nn.Module, *, leads: bool) -> None:
        super().__init__()
        self.conv = Weight(outputs, 3, 3, inputs)
        self.norm = norm
        self.around = (0, 2) if leads else (1, 1)

    def forward(self, x: Tensor) -> Tensor:
        # From the last axis on: no channels, pitches on both sides, then time.
        rows = functional.pad(x, (0, 0, 1, 1, *self.around))
        return torch.relu(self.norm(convolve(rows, self.conv.weight, [2, 2])))


def halved(pitches: int) -> int:
    """What a `ConvBlock` makes of so many pitches."""
    return (pitches + 2 - 3) // 2 + 1


class Encoder(nn.Module):
    """The section `audio_encoder`: frames of samples to features, of which one is made of `reduce` windows."""

    def __init__(self, tower: nn.Module, front: Front, reduce: int) -> None:
        super().__init__()
        self.front, self.reduce = front, reduce
        self.audio_tower = tower

    def forward(self, src_inputs: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """What LiteRT-LM asks of an audio encoder.

        Args:
            src_inputs: float32 [1, T, samples], samples in −1 … 1.
            mask: bool [1, 1, T], true where there is sound.

        Returns:
            `features` [1, S, D], zeros where there is none, and its `mask` bool [1, S].
        """
        windows, valid = self.windows(src_inputs, mask.reshape(-1).to(torch.float32))
        features = self.audio_tower(spectrogram(self.front, windows), valid)
        return {"features": features[None], "mask": torch.gt(every(valid, self.reduce), torch.tensor(0.5))[None]}

    def windows(self, frames: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        """What the spectrogram is made of, of the frames that the runtime gives, and which are of the sound."""
        return frames, valid


class Adapter(nn.Module):
    """The section `audio_adapter`: features to soft tokens."""

    def __init__(self, embedder: nn.Module) -> None:
        super().__init__()
        self.embed_audio = embedder

    def forward(self, features: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """`features` [1, S, D] and `mask` bool [1, S] → [1, S, H], zeros where there is no sound."""
        return {"soft_tokens": self.embed_audio(features) * mask.to(torch.float32)[..., None]}


def spectrogram(front: Front, windows: Tensor) -> Tensor:
    """Log-mel, [1, T, samples] → [1, T, F]."""
    # The window stands in the two matrices of the Fourier transform.
    real, imaginary = (functional.linear(windows, torch.from_numpy(part)) for part in (front.cosine, front.sine))
    magnitude = torch.sqrt(real * real + imaginary * imaginary)
    mel, floor = functional.linear(magnitude, torch.from_numpy(front.mel)), torch.tensor(front.floor)
    # Gemma 4 adds its floor; of Gemma 3n it is the least.
    mel = torch.log(mel + floor if front.added else torch.maximum(mel, floor))
    if front.mean is not None:
        mel = mel - torch.from_numpy(front.mean)
    return mel if front.deviation is None else mel / torch.from_numpy(front.deviation)


def every(x: Tensor, step: int) -> Tensor:
    """Each `step`-th row, from the first. [R, …] → [R / step, …]."""
    return x.reshape(x.shape[0] // step, step, *x.shape[1:])[:, 0]


def padded(x: Tensor, before: int, behind: int) -> Tensor:
    """Rows of zeros before and behind. [R, …] → [before + R + behind, …]."""
    return functional.pad(x, (*[0, 0] * (x.dim() - 1), before, behind))


def clipped(x: Tensor, limit: float) -> Tensor:
    """Values within ± `limit`."""
    return torch.clamp(x, -limit, limit)


def _from(x: Tensor, first: int) -> Tensor:
    """What stands from `first` on along the second axis."""
    # torch.export refuses a slice that is all of a tensor (torch 2.13.0).
    return x[:, first:] if first else x


def _silu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)
