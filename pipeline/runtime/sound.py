"""Sounds as LiteRT-LM is to get them: mono, at the model's rate, as many samples as Hugging Face's frames have.

Hugging Face's processor of Gemma 3n fills a sound up to a multiple of 128 samples and wants one sample more of a frame
than it uses; the runtime does neither, so of three sounds one would have a frame more or less. What is cut here, or
filled with silence, has the same frames in both. Of Gemma 4 the runtime drops what fills no frame of 40 ms, a soft
token: there a sound is filled up to as many as Hugging Face makes of it, which hears it so too.
"""

from __future__ import annotations

import io
import warnings
import wave
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline.core.errors import UsageError
from pipeline.runtime.interface import Array

Samples = NDArray[np.float32]
_FILLED_TO = 128
_LONGEST = 30
"""Seconds to which Hugging Face's processor cuts a sound."""
_HALF = 1 << 15


@dataclass(frozen=True, kw_only=True)
class Hearing:
    """How a model hears: `rate` samples a second, frames of `frame` of them, each `hop` after the one before."""

    rate: int
    frame: int
    hop: int

    @property
    def apart(self) -> bool:
        """Whether frames lie side by side, as Gemma 4's: a silent one is before them then."""
        return self.frame == self.hop

    def count(self, samples: int) -> int:
        """The frames that Hugging Face makes of so many samples; side by side, the soft tokens."""
        if self.apart:  # of four windows, each ending a sample before the sound does
            return -(-(max(0, samples - 1) // (self.frame // 4)) // 4)
        filled = -(-samples // _FILLED_TO) * _FILLED_TO
        return max(0, (filled - self.frame - 1) // self.hop + 1)

    def fitted(self, sound: Samples, name: str = "the sound") -> Samples:
        """`sound`, as long as its frames.

        Raises:
            UsageError: it is too short for a frame, or longer than the model takes.
        """
        frames = self.count(len(sound))
        if not frames:
            raise UsageError(f"{name} is too short: {len(sound) / self.rate:.3f} s", remedy="give a longer one")
        if len(sound) > _LONGEST * self.rate:
            raise UsageError(
                f"{name} is too long: {len(sound) / self.rate:.1f} s, and the model hears {_LONGEST}",
                remedy="cut it, and ask about each part",
            )
        length = self.frame + (frames - 1) * self.hop
        return np.pad(sound, (0, max(0, length - len(sound))))[:length]

    def frames(self, sound: Samples, most: int) -> tuple[Samples, NDArray[np.bool_]]:
        """What the runtime hands to the encoder: frames [1, most, frame], and which are there [1, 1, most]."""
        fitted = self.fitted(sound)
        windows = np.lib.stride_tricks.sliding_window_view(fitted, self.frame)[:: self.hop]
        frames, mask = np.zeros((1, most, self.frame), np.float32), np.zeros((1, 1, most), np.bool_)
        # Before frames that lie side by side the runtime puts a silent one (LiteRT-LM 0.18.1).
        first = int(self.apart)
        frames[0, first : first + len(windows)], mask[..., : first + len(windows)] = windows, True
        return frames, mask

    def read(self, file: Path) -> bytes:
        """The sound in a WAV `file`, as a WAV file for the runtime.

        Raises:
            UsageError: there is none, it is no WAV file, or the model does not hear so long or short a sound.
        """
        return self.packed(self.fitted(self._samples(file), str(file)))

    def packed(self, sound: Samples) -> bytes:
        """A WAV file of 16 bits."""
        whole = io.BytesIO()
        with wave.open(whole, "wb") as out:
            out.setnchannels(1)
            out.setsampwidth(2)
            out.setframerate(self.rate)
            out.writeframes(np.clip(np.rint(sound * _HALF), -_HALF, _HALF - 1).astype("<i2").tobytes())
        return whole.getvalue()

    def _samples(self, file: Path) -> Samples:
        """The samples of a file: channels averaged, brought to the model's rate."""
        from scipy.io import wavfile
        from scipy.signal import resample_poly

        if not file.is_file():
            raise UsageError(f"{file} does not exist", remedy="name a WAV file")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about chunks that say nothing of the sound
                rate, stored = wavfile.read(file)
        except Exception as error:  # scipy raises whatever reading at a wrong place leads to
            raise UsageError(
                f"{file} is no WAV file: {error}",
                cause="other formats are not read, or it is damaged",
                remedy=f"convert it, e.g. `ffmpeg -i {file.name} -ar {self.rate} -ac 1 sound.wav`",
            ) from error
        samples = _unit(stored)
        mono = samples.mean(axis=1) if samples.ndim > 1 else samples
        if not np.isfinite(mono).all():
            raise UsageError(f"{file} holds samples that are not finite", remedy="make it anew")
        shared = int(np.gcd(rate, self.rate))
        moved = mono if rate == self.rate else resample_poly(mono, self.rate // shared, rate // shared)
        return np.clip(moved, -1.0, 1.0).astype(np.float32)


def _unit(stored: Array) -> Array:
    """Samples of any type in −1 … 1."""
    if stored.dtype == np.uint8:
        return (stored.astype(np.float64) - 128.0) / 128.0
    # What is narrower than its type, as 24 bits are, stands at its upper end.
    whole = np.issubdtype(stored.dtype, np.integer)
    return stored.astype(np.float64) / (2.0 ** (8 * stored.dtype.itemsize - 1) if whole else 1.0)
