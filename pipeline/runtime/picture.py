"""Pictures as LiteRT-LM is to get them: of the encoder's size, resized as Hugging Face's processor does.

The runtime would resize them itself, by another method and in linear light (LiteRT-LM 0.18.1; a test holds it). What
has the right size already it takes as it is.

Hugging Face resizes by torch's bilinear filter with antialiasing on bytes (torch 2.13.0, `interpolate`): weights of 16
bits, rows before columns, bytes in between. Pillow's weights have more bits, and one pixel in some hundred is another.
"""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline.core.errors import UsageError

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
    """How a model sees: pictures of `size` x `size` pixels."""

    size: int

    def read(self, file: Path) -> bytes:
        """The picture in `file`, as a PNG file for the runtime.

        Raises:
            UsageError: there is none, it is no picture, or it is too large.
        """
        return self.packed(self.fitted(_pixels(file)))

    def fitted(self, pixels: Pixels) -> Pixels:
        """`pixels` in the encoder's size, whatever their proportions: Hugging Face's processor keeps none either."""
        # Each row by itself first, then each column.
        across = _resized(pixels, self.size) if pixels.shape[1] != self.size else pixels
        if across.shape[0] == self.size:
            return np.ascontiguousarray(across)
        return np.ascontiguousarray(_resized(across.swapaxes(0, 1), self.size).swapaxes(0, 1))

    def given(self, file: Path) -> NDArray[np.float32]:
        """What the runtime hands to the encoder: [1, size, size, 3] in 0 … 1."""
        return self.fitted(_pixels(file)).astype(np.float32)[None] / np.float32(255)

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


def _resized(pixels: Pixels, size: int) -> Pixels:
    """`pixels` [N, width, 3] with `size` in the place of their width."""
    begins, weights, bits = _weights(pixels.shape[1], size)
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


def _weights(before: int, after: int) -> tuple[NDArray[np.int64], NDArray[np.int32], int]:
    """For each of `after` pixels the first of those of `before` that it is made of, their weights, and whose bits."""
    scale = before / after
    reach = max(scale, 1.0)
    centres = scale * (np.arange(after) + 0.5)
    # Positive numbers: to cut is to round down, as the integers of torch do.
    begins = np.maximum((centres - reach + 0.5).astype(np.int64), 0)
    counts = np.minimum((centres + reach + 0.5).astype(np.int64), before) - begins
    taps = np.arange(int(counts.max()))
    near = 1.0 - np.abs((taps + begins[:, None] - centres[:, None] + 0.5) / reach)
    weights = np.where(taps < counts[:, None], np.maximum(near, 0.0), 0.0)
    weights /= weights.sum(axis=1, keepdims=True)
    bits = next((bits for bits in range(_MOST) if int(0.5 + weights.max() * (1 << (bits + 1))) >= 1 << 15), _MOST)
    return begins, (weights * (1 << bits) + 0.5).astype(np.int32), bits
