"""Sounds that ears are judged on, the same at every run: silence, noise, tones, sweeps, clicks, of many lengths.

All but silence and clicks have noise, as every recording has: tones 60 dB below full scale. Of a computed tone without
any, most of a spectrum is rounding: Hugging Face's, in float32, leaves exact arithmetic by up to 3e-7 (normalised mean
square error of log-mel, also with the noise of 16 bits; 2026-11-30), and what is held against it can't be closer.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

Samples = NDArray[np.float32]
RATE = 16_000
_HALF = 1 << 15
_SEED = 20261130
_ROOM = 1e-3


def sounds() -> Mapping[str, Samples]:
    """By name: float32 in −1 … 1, each a multiple of 2⁻¹⁵, as a WAV file of 16 bits holds them."""
    draw = np.random.default_rng(_SEED)

    def time(seconds: float) -> NDArray[np.float64]:
        return np.arange(int(seconds * RATE)) / RATE

    def noise(seconds: float, loud: float) -> NDArray[np.float64]:
        return loud * draw.standard_normal(int(seconds * RATE))

    def speech(seconds: float) -> NDArray[np.float64]:
        """Harmonics of a moving pitch, in syllables, with breath: as a voice is, without words."""
        at = time(seconds)
        pitch = 2 * np.pi * np.cumsum(120 + 40 * np.sin(2 * np.pi * 0.7 * at)) / RATE
        voice = np.sum([np.sin(k * pitch) / k for k in range(1, 12)], axis=0)
        made: NDArray[np.float64] = (0.12 * voice + noise(seconds, 0.01)) * (np.sin(2 * np.pi * 3.1 * at) > -0.3)
        return made

    made: dict[str, NDArray[np.float64]] = {
        "silence": np.zeros(RATE),
        "silence, 30 s": np.zeros(30 * RATE),
        "one click": np.eye(1, 8000, 4000)[0] * 0.9,
        "clicks": (np.arange(3 * RATE) % 1600 == 0) * 0.7,
        "full scale": np.where(time(0.7) % 0.01 < 0.005, 0.999, -1.0),
        "the shortest": noise(514 / RATE, 0.2),
        **{
            f"tone, {pitch} Hz": 0.4 * np.sin(2 * np.pi * pitch * time(1.1)) + noise(1.1, _ROOM)
            for pitch in (130, 440, 1000, 3999, 7500)
        },
        "chord": np.sum([0.2 * np.sin(2 * np.pi * pitch * time(2.05)) for pitch in (220, 277, 330)], axis=0)
        + noise(2.05, _ROOM),
        "sweep": 0.4 * np.sin(2 * np.pi * (50 + 900 * time(4)) * time(4)) + noise(4, _ROOM),
        "noise, quiet": noise(1.28, 1e-3),
        "noise, loud": noise(2.5, 0.3),
        "noise, then silence": np.concatenate([noise(0.6, 0.2), np.zeros(RATE)]),
        "constant": 0.25 + noise(0.5, _ROOM),
        **{f"speech, {seconds} s": speech(seconds) for seconds in (0.3, 1.88, 3.3, 7.77, 13.37, 29.98)},
    }
    return {name: _sixteen_bits(values) for name, values in made.items()}


def _sixteen_bits(values: NDArray[np.float64]) -> Samples:
    return (np.clip(np.rint(values * _HALF), -_HALF, _HALF - 1) / _HALF).astype(np.float32)
