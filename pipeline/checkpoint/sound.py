"""How a checkpoint's processor hears: the numbers by which a sound's samples become a spectrogram."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from pipeline.core.errors import FetchError

if TYPE_CHECKING:
    from transformers.models.gemma3n import Gemma3nAudioFeatureExtractor
    from transformers.models.gemma4 import Gemma4AudioFeatureExtractor

PREPROCESSOR = ("preprocessor_config.json", "processor_config.json")
"""Where a processor says how it makes a spectrogram, and what it makes of a picture."""
RATE4, FRAME4 = 16_000, 640
"""Samples a second, and of a frame, in LiteRT-LM's type `gemma4`: no field of a bundle says them."""
Float32 = npt.NDArray[np.float32]


@dataclass(frozen=True, kw_only=True, eq=False)
class Front:
    """Log-mel of windows: log(max(|window · (cosine + i sine)ᵀ| · melᵀ, floor)), less `mean`, over `deviation`.

    `floor` is `added` instead, where that is said. `rate` in samples a second, of which the runtime gives frames of
    `frame`, each `hop` after the one before. Pre-emphasis, window and Fourier transform are all linear in the samples:
    together they are `cosine` and `sine`, float32 [frequencies, samples]. `mel` is float32 [bins, frequencies].
    """

    rate: int
    frame: int
    hop: int
    cosine: Float32
    sine: Float32
    mel: Float32
    floor: float
    mean: Float32 | None = None
    deviation: Float32 | None = None
    added: bool = False


def check(names: Collection[str], where: str) -> None:
    """Refuse a checkpoint, whose files are `names`, that does not say how it hears and sees.

    Raises:
        FetchError: it does not.
    """
    if not {*PREPROCESSOR} & {*names}:
        raise FetchError(
            f"{where} has no {PREPROCESSOR[0]}, which says what becomes of sounds and pictures",
            cause="the model was saved without its processor",
            remedy="save it beside the model: `AutoProcessor.from_pretrained(BASE).save_pretrained(FOLDER)`, or "
            "say TOWERS=none",
        )


def open_front(checkpoint: Path) -> Front:
    """The front of the processor in the folder `checkpoint`, by transformers' `Gemma3nAudioFeatureExtractor`.

    Raises:
        FetchError: it does what the graph can't.
    """
    from transformers.models.gemma3n import Gemma3nAudioFeatureExtractor

    told = Gemma3nAudioFeatureExtractor.from_pretrained(checkpoint, local_files_only=True)
    return _front(told, checkpoint, frame=told.frame_length, hop=told.hop_length, added=False)


def open_front4(checkpoint: Path) -> Front:
    """The same by `Gemma4AudioFeatureExtractor`, whose first window begins half of one before the sound.

    Raises:
        FetchError: it does what the graph can't, or wants other frames than LiteRT-LM gives.
    """
    from transformers.models.gemma4 import Gemma4AudioFeatureExtractor

    told = Gemma4AudioFeatureExtractor.from_pretrained(checkpoint, local_files_only=True)
    found = told.sampling_rate, told.frame_length, told.hop_length
    if found != (RATE4, FRAME4 // 2, FRAME4 // 4):
        raise FetchError(
            f"the audio processor in {checkpoint} has {found[0]} samples a second and windows of {found[1]}, each "
            f"{found[2]} after the one before; LiteRT-LM's type gemma4 allows for {RATE4}, {FRAME4 // 2} and "
            f"{FRAME4 // 4}",
            remedy="use the settings of the training: frame_length_ms 20, hop_length_ms 10, or TOWERS=none",
        )
    return _front(told, checkpoint, frame=FRAME4, hop=FRAME4, added=True)


def _front(
    told: Gemma3nAudioFeatureExtractor | Gemma4AudioFeatureExtractor,
    checkpoint: Path,
    *,
    frame: int,
    hop: int,
    added: bool,
) -> Front:
    """That of an extractor, for which the runtime gives frames of so many samples, so many apart."""
    if told.dither or not (told.preemphasis_htk_flavor or not told.preemphasis):
        raise FetchError(
            f"the audio processor in {checkpoint} has dither or a pre-emphasis across frames",
            remedy="use the settings of the training: dither 0, preemphasis_htk_flavor true, or TOWERS=none",
        )
    size, length = told.frame_length, told.fft_length
    # y₀ = (1 − a) x₀, yᵢ = xᵢ − a xᵢ₋₁, then the window, then the transform of a window with zeros behind.
    emphasis = np.eye(size) - told.preemphasis * np.eye(size, k=-1)
    emphasis[0, 0] = 1.0 - told.preemphasis
    angles = np.arange(length // 2 + 1)[:, None] * np.arange(size)[None, :] * (2 * np.pi / length)
    window = told.window.astype(np.float64) * told.input_scale_factor
    cosine, sine = ((wave(angles) * window) @ emphasis for wave in (np.cos, np.sin))

    def row(values: npt.NDArray[np.float64] | None) -> Float32 | None:
        return None if values is None else values.reshape(-1).astype(np.float32)

    return Front(
        rate=told.sampling_rate,
        frame=frame,
        hop=hop,
        cosine=cosine.astype(np.float32),
        sine=sine.astype(np.float32),
        mel=np.ascontiguousarray(told.mel_filters.T.astype(np.float32)),
        floor=float(told.mel_floor),
        mean=row(told.per_bin_mean),
        deviation=row(told.per_bin_stddev),
        added=added,
    )
