"""How a decoder is fed when it is judged: what the two conversations cross, and which positions count."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.core.recipe import PROJECT, Bundle, load
from pipeline.core.stage import DEFAULT_RECIPE
from pipeline.judge import cache
from pipeline.judge.cache import Recital, Script


def bundle(prefill: tuple[int, ...], decode: int = 64, length: int = 100_000) -> Bundle:
    return Bundle(cache_length=length, prefill=prefill, precisions=("fp32",), decode=decode, prompts=1, continuation=1)


lengths = st.lists(st.integers(1, 300), min_size=1, max_size=3).map(tuple)


def before_the_end(script: Script) -> int:
    """Tokens before the last run of `decode`."""
    assert script.calls[-1][0] == "decode"
    return script.length - script.calls[-1][1]


@given(lengths, st.integers(1, 600), st.integers(1, 128))
def test_conversations_cross_the_window_twice_and_the_longest_prefill(
    prefill: tuple[int, ...], window: int, decode: int
) -> None:
    for script in cache.scripts(bundle(prefill, decode), window):
        assert before_the_end(script) > max(2 * window, max(prefill))
        assert script.calls[-1] == ("decode", decode)


@given(lengths, st.integers(1, 600), st.integers(1, 128), st.integers(2, 400))
def test_conversations_are_equally_long_and_fit_into_the_cache(
    prefill: tuple[int, ...], window: int, decode: int, room: int
) -> None:
    """Also into a short one: `room` is what a conversation can have beside the tokens that are decoded at its end."""
    short = bundle(prefill, decode, length=max(prefill) - 1 + decode + room)
    first, second = cache.scripts(short, window)
    assert first.length == second.length <= short.max_tokens
    for script in (first, second):
        assert all(count > 0 for _, count in script.calls)
        assert all(count <= max(prefill) for kind, count in script.calls if kind == "prefill")
        start = 0
        for kind, count in script.calls:  # each prefill is padded to a signature that holds it, and is written whole
            taken = min(length for length in prefill if length >= count) if kind == "prefill" else 1
            assert start + (taken if kind == "prefill" else count) <= short.cache_length
            start += count


@given(lengths, st.integers(1, 600))
def test_chunks_are_uneven(prefill: tuple[int, ...], window: int) -> None:
    for script in cache.scripts(bundle(prefill), window):
        sizes = [count for kind, count in script.calls if kind == "prefill"]
        assert sizes[0] == max(prefill)
        assert len(set(sizes)) > 1 or max(prefill) == 1


def test_the_second_conversation_decodes_first() -> None:
    first, second = cache.scripts(bundle((32, 128)), 16)
    assert first.calls[0][0] == "prefill" and second.calls[0][0] == "decode"


def test_judged_positions_are_those_that_are_decoded() -> None:
    script = Script((("decode", 2), ("prefill", 5), ("prefill", 1), ("decode", 3)))
    assert script.length == 11
    assert script.judged.tolist() == [0, 1, 8, 9, 10]


def test_what_is_expected_follows_the_order_of_playing() -> None:
    """First conversation, second, first again; with a cache only where the reference has one."""
    scripts = (Script((("prefill", 3), ("decode", 2))), Script((("decode", 2), ("prefill", 1), ("decode", 2))))
    hidden = np.arange(10, dtype=np.float32).reshape(2, 5, 1)
    cached = 100 + np.arange(4, dtype=np.float32).reshape(2, 2, 1)
    tokens = np.arange(12, dtype=np.int32).reshape(2, 6)
    recital = Recital(scripts=scripts, tokens=tokens, hidden=hidden, cached=cached)
    without, withal = recital.expected()
    assert without.ravel().tolist() == [3, 4, 5, 6, 8, 9, 3, 4]
    assert withal.ravel().tolist() == [100, 101, 5, 6, 102, 103, 100, 101]
    assert recital.targets.tolist() == [4, 5, 7, 8, 10, 11, 4, 5]
    assert recital.described == "8 decoded positions: 3–4, 0–1 and 3–4, 3–4 of 3 conversations"


def test_a_conversation_that_is_played_twice_is_no_second_sample() -> None:
    scripts = (Script((("prefill", 8), ("decode", 40))), Script((("decode", 17), ("prefill", 1), ("decode", 30))))
    recital = Recital(scripts, np.zeros((2, 49), np.int32), np.zeros((2, 48, 1)), np.zeros((2, 30, 1)))
    first, second, again = np.split(recital.blocks, [40, 40 + 47])
    assert np.array_equal(first, again) and not set(first) & set(second)
    assert np.bincount(first).tolist() == [8, 16, 16] and len(set(second)) == 3


@pytest.mark.parametrize("file", sorted((PROJECT / DEFAULT_RECIPE).parent.glob("*.toml")), ids=lambda file: file.stem)
@pytest.mark.parametrize("window", [16, 512])
def test_the_shipped_recipes_decode_at_least_64_tokens_past_it_all(file: Path, window: int) -> None:
    wanted = load(file).bundle
    assert wanted.decode >= 64 and wanted.prompts >= 16 and wanted.continuation >= 64
    for script in cache.scripts(wanted, window):
        assert before_the_end(script) > max(2 * window, max(wanted.prefill))
