"""Calibration text in, token windows and statistics out; no model."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.core.errors import QuantiseError, UsageError
from pipeline.judge.corpus import read_texts
from pipeline.quantize import calibrate, static
from pipeline.quantize.calibrate import Statistics, make_samples

BOS = 2
WORDS = [f"word{i}" for i in range(300)]


def render(messages: Sequence[Mapping[str, str]]) -> str:
    return "|".join(f"{message['role']}:{message['content']}" for message in messages)


def encode(text: str) -> list[int]:
    return [3 + WORDS.index(word) for word in text.split()]


def real_text(documents: int = 40, words: int = 60) -> list[str]:
    random = np.random.default_rng(5)
    return [" ".join(random.choice(WORDS, words)) for _ in range(documents)]


def test_text_and_both_kinds_of_json_lines_are_read(tmp_path: Path) -> None:
    plain, lines = tmp_path / "c.txt", tmp_path / "c.jsonl"
    plain.write_text("one\n\ntwo  \n", encoding="utf-8")
    chat = {"messages": [{"role": "user", "content": "ⵣ?"}, {"role": "model", "content": "!"}]}
    lines.write_text("\n".join(map(json.dumps, [{"text": "one", "id": 1}, chat])), encoding="utf-8")
    assert read_texts(plain, render) == ["one", "two  "]
    assert read_texts(lines, render) == ["one", "user:ⵣ?|model:!"]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("missing.txt", None, "No such file"),
        ("empty.txt", b"\n \n", "is empty"),
        ("latin.txt", "é".encode("latin-1"), "not UTF-8"),
        ("c.csv", b"a,b", "neither .txt nor .jsonl"),
        ("c.jsonl", b'{"text": "a"}\n{oops', "line 2 is not JSON"),
        ("c.jsonl", b'{"text": 3}', "line 1 has neither"),
        ("c.jsonl", b'["a"]', "line 1 has neither"),
        ("c.jsonl", b'{"messages": [{"role": "user"}]}', "line 1 has neither"),
    ],
)
def test_a_wrong_file_is_a_usage_error_that_says_why(
    tmp_path: Path, name: str, content: bytes | None, says: str
) -> None:
    file = tmp_path / name
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UsageError, match=says) as caught:
        read_texts(file, render)
    assert name in caught.value.what and ".jsonl" in caught.value.remedy


def test_samples_begin_with_bos_and_spread_over_the_text() -> None:
    texts = real_text()
    samples = make_samples(map(encode, texts), BOS, count=20, window=32)
    assert len(samples) == 20 and all(sample[0] == BOS and 2 <= len(sample) <= 32 for sample in samples)
    assert samples[0][1:].tolist() == encode(texts[0])[:31]
    assert samples[-1][-1] in encode(texts[-2])


def test_a_bos_inside_a_text_belongs_to_it() -> None:
    texts = [[BOS, *range(10 * i + 20, 10 * i + 24), BOS, 7] for i in range(9)]
    samples = make_samples(texts, BOS, count=9, window=32)
    assert [sample.tolist() for sample in samples] == texts


@pytest.mark.parametrize("text", ["word1", "word1 word2 word3"])
def test_constant_text_is_refused(text: str) -> None:
    with pytest.raises(QuantiseError, match="constant"):
        make_samples(map(encode, [" ".join([text] * 50)] * 40), BOS, count=20, window=32)


def test_too_little_text_is_refused() -> None:
    with pytest.raises(QuantiseError, match="gives 4 samples, the recipe wants 128"):
        make_samples(map(encode, real_text(2)), BOS, count=128, window=32)


@given(st.lists(st.floats(-1e4, 1e4, width=32), min_size=2, max_size=200), st.integers(1, 4))
def test_a_histogram_counts_everything_whatever_the_order(values: list[float], parts: int) -> None:
    seen = Statistics()
    for part in np.array_split(np.array(values, np.float32), min(parts, len(values))):
        seen.add(part)
    assert seen.counts.sum() == len(values)
    assert seen.low == min(np.float32(v) for v in values) and seen.high == max(np.float32(v) for v in values)
    mean = float((seen.counts * seen.centres()).sum()) / len(values)
    assert abs(mean - float(np.mean(np.array(values, np.float32), dtype=np.float64))) <= 2 * seen.bound / 4096 + 1e-6


@given(st.integers(0, 2**32 - 1), st.floats(-5, 5), st.floats(0.01, 100))
@settings(max_examples=25)
def test_scales_hold_zero_exactly_and_fit_the_values(seed: int, shift: float, spread: float) -> None:
    values = (np.random.default_rng(seed).standard_normal(5000) * spread + shift).astype(np.float32)
    seen = Statistics()
    seen.add(values)
    scales = static.best_scales(seen)
    scale, zero = float(scales.scale[0]), int(scales.zero_point[0])
    assert -128 <= zero <= 127
    restored = (np.clip(np.rint(values / scale) + zero, -128, 127) - zero) * scale
    assert np.mean((restored - values) ** 2) < 1e-3 * np.mean(values.astype(np.float64) ** 2)


def test_the_chosen_range_beats_the_whole_range_on_heavy_tails() -> None:
    values = np.random.default_rng(1).standard_t(3, 100_000).astype(np.float32)
    seen = Statistics()
    seen.add(values)

    def error(scale: float) -> float:
        return float(np.mean((np.clip(np.rint(values / scale), -127, 127) * scale - values) ** 2))

    assert error(float(static.best_scales(seen).scale[0])) < 0.8 * error(float(np.abs(values).max()) / 127)


def test_effective_tokens_of_a_uniform_text() -> None:
    assert calibrate._effective_tokens([np.arange(100, dtype=np.int32)]) == pytest.approx(99)
