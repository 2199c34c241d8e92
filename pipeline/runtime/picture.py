"""Pictures as LiteRT-LM is to get them: of the encoder's size, resized as Hugging Face's processor does.

The runtime would resize them itself, by another method and in linear light (LiteRT-LM 0.18.1; a test holds it). What
has the right size already it takes as it is; a picture that keeps its proportions has it where the runtime is told how
many soft tokens are to be made of it.

Hugging Face resizes by torch's filters with antialiasing on bytes (torch 2.13.0, `interpolate`), bilinear ones or, for
pictures that keep their proportions, bicubic ones: weights of 16 bits, rows before columns, bytes in between. Pillow's
weights have more bits, and one pixel in some hundred is another.
"""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline.core.errors import UsageError
from pipeline.core.facts import Patches

Pixels = NDArray[np.uint8]
"""[height, width, 3], red first."""
_MOST = 22
"""Bits of a weight behind the point, at most."""
_BLOCK = 64
"""Rows that are resized at a time, which bounds memory."""
_LARGEST = 1 << 27
"""Pixels of a picture that is still read: 400 MB of them."""


@dataclass(frozen=True, kw_only=True)
class Sight:
    """How a model sees: pictures of `size` x `size` pixels, or of their own proportions in `patches`."""

    size: int = 0
    patches: Patches | None = None

    def read(self, file: Path) -> bytes:
        """The picture in `file`, as a PNG file for the runtime.

        Raises:
            UsageError: there is none, it is no picture, or it is too large.
        """
        return self.packed(self.fitted(_pixels(file)))

    def fitted(self, pixels: Pixels) -> Pixels:
        """`pixels` in the encoder's size, whatever their proportions, or near those."""
        height, width = (
            extent(pixels.shape[0], pixels.shape[1], self.patches) if self.patches else (self.size, self.size)
        )
        curve = _CUBIC if self.patches else _LINEAR
        # Each row by itself first, then each column.
        across = _resized(pixels, width, curve) if pixels.shape[1] != width else pixels
        if across.shape[0] == height:
            return np.ascontiguousarray(across)
        return np.ascontiguousarray(_resized(across.swapaxes(0, 1), height, curve).swapaxes(0, 1))

    def tokens(self, packed: bytes) -> int:
        """The soft tokens of a picture of its own proportions that `read` or `packed` gave; 0 of any other."""
        from PIL import Image

        if not self.patches:
            return 0
        with Image.open(io.BytesIO(packed)) as opened:
            return opened.width // self.patches.side * (opened.height // self.patches.side)

    def given(self, file: Path) -> dict[str, NDArray[np.float32] | NDArray[np.int32]]:
        """What the runtime hands to the encoder, pixels in 0 … 1.

        `images` [1, size, size, 3]; or patches, [1, P, 3 · size²], and how far each stands across and down,
        `positions_xy` [1, P, 2], −1 where there is none.
        """
        pixels = self.fitted(_pixels(file)).astype(np.float32) / np.float32(255)
        if not self.patches:
            return {"images": pixels[None]}
        size = self.patches.size
        down, across = (length // size for length in pixels.shape[:2])
        count = down * across
        images = np.zeros((1, self.patches.count, 3 * size**2), np.float32)
        # Patch by patch, and within it row by row.
        images[0, :count] = pixels.reshape(down, size, across, size, 3).swapaxes(1, 2).reshape(count, -1)
        places = np.full((1, self.patches.count, 2), -1, np.int32)
        places[0, :count] = np.stack(np.meshgrid(np.arange(across), np.arange(down)), axis=-1).reshape(count, 2)
        return {"images": images, "positions_xy": places}

    def packed(self, pixels: Pixels) -> bytes:
        """A PNG file."""
        from PIL import Image

        whole = io.BytesIO()
        Image.fromarray(pixels).save(whole, "PNG")
        return whole.getvalue()


def _pixels(file: Path) -> Pixels:
    """The picture in `file` as transformers' `load_image` has it: the way up that it says, without transparency."""
    from PIL import Image, ImageOps, UnidentifiedImageError

    if not file.is_file():
        raise UsageError(f"{file} does not exist", remedy="name a picture, e.g. a JPEG or PNG file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about sizes, of which we have our own limit, and odd metadata
            with Image.open(file) as opened:
                if opened.width * opened.height > _LARGEST:
                    raise UsageError(
                        f"{file} is too large: {opened.width} x {opened.height} pixels", remedy="make it smaller"
                    )
                return np.asarray(ImageOps.exif_transpose(opened).convert("RGB"))
    except Image.DecompressionBombError as error:
        raise UsageError(f"{file} is too large: {error}", remedy="make it smaller") from error
    # Pillow's readers raise whatever reading at a wrong place leads to.
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, EOFError, IndexError, TypeError) as error:
        raise UsageError(
            f"{file} is no picture: {str(error).splitlines()[0] if str(error) else type(error).__name__}",
            cause="it is of a kind that is not read, or damaged",
            remedy="convert it to JPEG or PNG",
        ) from error


def extent(height: int, width: int, patches: Patches) -> tuple[int, int]:
    """The height and width that Hugging Face gives a picture that keeps its proportions: the most soft tokens.

    As `get_aspect_ratio_preserving_size` of transformers 5.24.0.
    """
    side, most = patches.side, patches.tokens
    factor = math.sqrt(patches.count * patches.size**2 / (height * width))
    # Down to whole soft tokens, so that there are never more than the most.
    down, across = int(factor * height / side), int(factor * width / side)
    if down == 0:
        down, across = 1, min(width // height, most)
    elif across == 0:
        down, across = min(height // width, most), 1
    return down * side, across * side


@dataclass(frozen=True)
class _Curve:
    """How much a pixel counts by its distance: nothing from `reach` pixels on."""

    reach: float
    of: Callable[[NDArray[np.float64]], NDArray[np.float64]]


def _cubic(distance: NDArray[np.float64]) -> NDArray[np.float64]:
    """Keys' curve with a = −1/2 ("Cubic Convolution Interpolation for Digital Image Processing", 1981)."""
    near = (1.5 * distance - 2.5) * distance * distance + 1.0
    far = ((-0.5 * distance + 2.5) * distance - 4.0) * distance + 2.0
    return np.where(distance < 1.0, near, np.where(distance < 2.0, far, 0.0))


_LINEAR = _Curve(1.0, lambda distance: np.maximum(1.0 - distance, 0.0))
_CUBIC = _Curve(2.0, _cubic)


def _resized(pixels: Pixels, size: int, curve: _Curve) -> Pixels:
    """`pixels` [N, width, 3] with `size` in the place of their width."""
    begins, weights, bits = _weights(pixels.shape[1], size, curve)
    # The pixels that each new one is made of; weights behind its last one are zeros.
    taken = np.minimum(begins[:, None] + np.arange(weights.shape[1]), pixels.shape[1] - 1)
    made = np.empty((pixels.shape[0], size, 3), np.uint8)
    for start in range(0, pixels.shape[0], _BLOCK):
        block = pixels[start : start + _BLOCK]
        total = np.full((len(block), size, 3), 1 << (bits - 1), np.int32)
        for tap in range(weights.shape[1]):
            total += block[:, taken[:, tap]] * weights[:, tap, None]
        made[start : start + _BLOCK] = np.clip(total >> bits, 0, 255)
    return made


def _weights(before: int, after: int, curve: _Curve) -> tuple[NDArray[np.int64], NDArray[np.int32], int]:
    """For each of `after` pixels the first of those of `before` that it is made of, their weights, and whose bits."""
    scale = before / after
    wide = max(scale, 1.0)
    reach = curve.reach * wide
    centres = scale * (np.arange(after) + 0.5)
    # Cut, not rounded down, as the integers of torch are.
    begins = np.maximum((centres - reach + 0.5).astype(np.int64), 0)
    counts = np.minimum((centres + reach + 0.5).astype(np.int64), before) - begins
    taps = np.arange(int(counts.max()))
    near = curve.of(np.abs((taps + begins[:, None] - centres[:, None] + 0.5) / wide))
    weights = np.where(taps < counts[:, None], near, 0.0)
    weights /= weights.sum(axis=1, keepdims=True)
    bits = next((bits for bits in range(_MOST) if int(0.5 + weights.max() * (1 << (bits + 1))) >= 1 << 15), _MOST)
    scaled = weights * (1 << bits)
    return begins, (scaled + np.copysign(0.5, scaled)).astype(np.int32), bits
