"""Sounds on their way to LiteRT-LM: files of many kinds, lengths as Hugging Face's frames have them."""

from __future__ import annotations

import io
import wave
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.io import wavfile

from pipeline.core.errors import UsageError
from pipeline.judge.sounds import RATE, sounds
from pipeline.runtime.sound import Hearing

HEARS, APART = Hearing(rate=16_000, frame=512, hop=160), Hearing(rate=16_000, frame=640, hop=640)


def unpacked(data: bytes) -> np.ndarray:
    with wave.open(io.BytesIO(data)) as file:
        assert (file.getframerate(), file.getnchannels(), file.getsampwidth()) == (16_000, 1, 2)
        return np.frombuffer(file.readframes(file.getnframes()), "<i2") / 32768


@given(st.integers(513, 480_000))
def test_the_runtime_makes_as_many_frames_as_hugging_face(samples: int) -> None:
    """Hugging Face: filled up to 128, 513 samples a frame. The runtime: 512, nothing filled."""
    filled = samples + -samples % 128
    fitted = HEARS.fitted(np.ones(samples, np.float32))
    assert 1 + (len(fitted) - 512) // 160 == (filled - 513) // 160 + 1 == HEARS.count(samples)
    assert (fitted[:samples] == 1).all()
    assert not fitted[samples:].any()


@given(st.integers(161, 480_000))
def test_gemma_4_gets_whole_soft_tokens(samples: int) -> None:
    """Four windows each, of which its processor makes one for every 160 samples that another sample follows."""
    fitted = APART.fitted(np.ones(samples, np.float32))
    windows = (samples - 1) // 160
    assert len(fitted) == 640 * APART.count(samples) == 640 * -(-windows // 4)
    assert not fitted[samples:].any()
    frames, mask = APART.frames(np.ones(samples, np.float32), 751)
    assert mask.sum() == 1 + APART.count(samples)
    assert not frames[0, 0].any(), "the runtime begins with a silent one"


def test_frames_are_windows_of_the_sound() -> None:
    sound = np.arange(4000, dtype=np.float32) / 4000
    frames, mask = HEARS.frames(sound, 64)
    assert mask.sum() == HEARS.count(4000) == 23
    assert all((frames[0, i] == sound[i * 160 : i * 160 + 512]).all() for i in range(22))
    assert not frames[0, 23:].any()


@pytest.mark.parametrize(("name", "kind", "scale"), [("16", np.int16, 32767), ("32", np.int32, 2**31 - 1)])
def test_integers_and_channels(name: str, kind: type, scale: int, tmp_path: Path) -> None:
    left, right = (np.sin(np.arange(16_000) / pitch) * 0.4 for pitch in (9, 17))
    file = tmp_path / f"{name}.wav"
    wavfile.write(file, 16_000, (np.stack([left, right], 1) * scale).astype(kind))
    heard = unpacked(HEARS.read(file))
    assert np.abs(heard[:16_000] - (left + right)[: len(heard)] / 2).max() < 2e-4


def test_a_file_of_sixteen_bits_arrives_bit_by_bit(tmp_path: Path) -> None:
    sound = sounds()["speech, 1.88 s"]
    (tmp_path / "a.wav").write_bytes(HEARS.packed(sound))
    heard = unpacked(HEARS.read(tmp_path / "a.wav"))
    assert (heard[: len(sound)] == sound[: len(heard)]).all()


def test_other_rates_are_brought_to_the_models(tmp_path: Path) -> None:
    wavfile.write(tmp_path / "a.wav", 44_100, (np.sin(2 * np.pi * 440 * np.arange(44_100) / 44_100) * 0.5).astype("f4"))
    heard = unpacked(HEARS.read(tmp_path / "a.wav"))
    spectrum = np.abs(np.fft.rfft(heard[:15_000] * np.hanning(15_000)))
    assert abs(spectrum.argmax() * 16_000 / 15_000 - 440) < 2
    assert np.abs(heard).max() == pytest.approx(0.5, abs=0.02)


def short(file: Path) -> None:
    wavfile.write(file, 16_000, np.zeros(300, np.int16))


def long(file: Path) -> None:
    wavfile.write(file, 16_000, np.zeros(31 * 16_000, np.int16))


def text(file: Path) -> None:
    file.write_text("no sound")


def cut(file: Path) -> None:
    wavfile.write(file, 16_000, np.zeros(3000, np.int16))
    file.write_bytes(file.read_bytes()[:30])


def infinite(file: Path) -> None:
    wavfile.write(file, 16_000, np.full(3000, np.inf, np.float32))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (short, "is too short: 0.019 s"),
        (long, "is too long: 31.0 s, and the model hears 30"),
        (text, "is no WAV file"),
        (cut, "is no WAV file"),
        (infinite, "samples that are not finite"),
        (lambda _: None, "does not exist"),
    ],
)
def test_what_is_no_sound_is_said_in_a_sentence(make: object, said: str, tmp_path: Path) -> None:
    file = tmp_path / "a.wav"
    assert callable(make)
    make(file)
    with pytest.raises(UsageError, match=said):
        HEARS.read(file)


def test_judged_sounds_are_the_same_at_every_run_and_many() -> None:
    first, second = sounds(), sounds()
    assert len(first) >= 20
    assert len({HEARS.count(len(sound)) for sound in first.values()}) >= 12
    assert all((first[name] == second[name]).all() for name in first)
    assert all((sound * 32768 == np.rint(sound * 32768)).all() for sound in first.values())
    assert max(map(len, first.values())) <= 30 * RATE
