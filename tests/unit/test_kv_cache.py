"""How a decoder is fed when it is judged: what the two conversations cross, and which positions count."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.core import log
from pipeline.core.errors import UsageError
from pipeline.core.recipe import PROJECT, Bundle, load
from pipeline.core.stage import DEFAULT_RECIPE
from pipeline.judge import bundles, kv_cache
from pipeline.judge.kv_cache import Schedule, Trace
from pipeline.runtime.sections import Sections


def bundle(prefill: tuple[int, ...], decode: int = 64, length: int = 100_000) -> Bundle:
    return Bundle(cache_length=length, prefill=prefill, precisions=("fp32",), decode=decode, prompts=1, continuation=1)


lengths = st.lists(st.integers(1, 300), min_size=1, max_size=3).map(tuple)


def before_the_end(schedule: Schedule) -> int:
    """Tokens before the last run of `decode`."""
    assert schedule.calls[-1][0] == "decode"
    return schedule.length - schedule.calls[-1][1]


@given(lengths, st.integers(1, 600), st.integers(1, 128))
def test_conversations_cross_the_window_twice_and_the_longest_prefill(
    prefill: tuple[int, ...], window: int, decode: int
) -> None:
    for schedule in kv_cache.schedules(bundle(prefill, decode), window):
        assert before_the_end(schedule) > max(2 * window, max(prefill))
        assert schedule.calls[-1] == ("decode", decode)


@given(lengths, st.integers(1, 600), st.integers(1, 128), st.integers(2, 400))
def test_conversations_are_equally_long_and_fit_into_the_cache(
    prefill: tuple[int, ...], window: int, decode: int, room: int
) -> None:
    """Also into a short one: `room` is what a conversation can have beside the tokens that are decoded at its end."""
    short = bundle(prefill, decode, length=max(prefill) - 1 + decode + room)
    first, second = kv_cache.schedules(short, window)
    assert first.length == second.length <= short.max_tokens
    for schedule in (first, second):
        assert all(count > 0 for _, count in schedule.calls)
        assert all(count <= max(prefill) for kind, count in schedule.calls if kind == "prefill")
        start = 0
        for kind, count in schedule.calls:  # each prefill is padded to a signature that holds it, and is written whole
            taken = min(length for length in prefill if length >= count) if kind == "prefill" else 1
            assert start + (taken if kind == "prefill" else count) <= short.cache_length
            start += count


@given(lengths, st.integers(1, 600))
def test_chunks_are_uneven(prefill: tuple[int, ...], window: int) -> None:
    for schedule in kv_cache.schedules(bundle(prefill), window):
        sizes = [count for kind, count in schedule.calls if kind == "prefill"]
        assert sizes[0] == max(prefill)
        assert len(set(sizes)) > 1 or max(prefill) == 1


def test_the_second_conversation_decodes_first() -> None:
    first, second = kv_cache.schedules(bundle((32, 128)), 16)
    assert first.calls[0][0] == "prefill" and second.calls[0][0] == "decode"


def test_judged_positions_are_those_that_are_decoded() -> None:
    schedule = Schedule((("decode", 2), ("prefill", 5), ("prefill", 1), ("decode", 3)))
    assert schedule.length == 11
    assert schedule.judged.tolist() == [0, 1, 8, 9, 10]


def test_what_is_expected_follows_the_order_of_playing() -> None:
    """First conversation, second, first again; with a cache only where the reference has one."""
    schedules = (Schedule((("prefill", 3), ("decode", 2))), Schedule((("decode", 2), ("prefill", 1), ("decode", 2))))
    hidden = np.arange(10, dtype=np.float32).reshape(2, 5, 1)
    cached = 100 + np.arange(4, dtype=np.float32).reshape(2, 2, 1)
    tokens = np.arange(12, dtype=np.int32).reshape(2, 6)
    trace = Trace(schedules=schedules, tokens=tokens, hidden=hidden, cached=cached)
    without, with_cache = trace.expected()
    assert without.ravel().tolist() == [3, 4, 5, 6, 8, 9, 3, 4]
    assert with_cache.ravel().tolist() == [100, 101, 5, 6, 102, 103, 100, 101]
    assert trace.targets.tolist() == [4, 5, 7, 8, 10, 11, 4, 5]
    assert trace.described == "8 decoded positions: 3–4, 0–1 and 3–4, 3–4 of 3 conversations"


def test_an_fp32_bundle_is_not_held_against_a_cache_that_was_not_asked() -> None:
    """A golden of a recipe with int8 alone; else figures without a cache would be called those with one."""
    schedule, nothing = Schedule((("decode", 2),)), np.zeros((2, 0, 1), np.float32)
    trace = Trace((schedule, schedule), np.zeros((2, 3), np.int32), np.zeros((2, 2, 1), np.float32), nothing)
    subject, setting = SimpleNamespace(precision="fp32"), SimpleNamespace(trace=trace)
    with pytest.raises(UsageError, match="not asked through its own cache"):
        bundles.ask(cast(bundles.Subject, subject), cast(bundles.Setting, setting))


def test_what_litert_lm_is_asked_is_begun_first() -> None:
    """Of all shards of a bundle it takes longest: begun last, it would leave the other workers idle."""
    schedule, begun = Schedule((("decode", 2),)), list[str]()
    setting = SimpleNamespace(
        trace=Trace((schedule, schedule), *np.zeros((3, 2, 3, 1), np.float32)),
        greedy=(),
        conversations=(),
        stop=set[int](),
        asked=SimpleNamespace(
            speak=lambda *_: begun.append("spoken"),
            replay=lambda *_, exact: begun.append("replayed"),
        ),
    )
    bundles.ask(cast(bundles.Subject, SimpleNamespace(precision="int8")), cast(bundles.Setting, setting))
    assert begun == ["spoken", "replayed"]


def test_texts_follow_the_conversations_each_a_block_of_its_own() -> None:
    schedules = (Schedule((("prefill", 3), ("decode", 2))), Schedule((("decode", 2), ("prefill", 1), ("decode", 2))))
    hidden, cached = np.zeros((2, 5, 1), np.float32), np.zeros((2, 2, 1), np.float32)
    texts = np.arange(100, 108, dtype=np.int32).reshape(2, 4)
    states = np.arange(6, dtype=np.float32).reshape(2, 3, 1) + 1
    tokens = np.arange(12, dtype=np.int32).reshape(2, 6)
    trace = Trace(schedules=schedules, tokens=tokens, hidden=hidden, cached=cached, texts=texts, states=states)
    without, with_cache = trace.expected()
    assert without.ravel().tolist() == [0] * 8 + [1, 2, 3, 4, 5, 6] and len(with_cache) == 8
    assert trace.targets[8:].tolist() == [101, 102, 103, 105, 106, 107]
    first, second = np.split(trace.blocks[8:], 2)
    assert len(set(first)) == len(set(second)) == 1 and len({*first, *second, *trace.blocks[:8]}) == 4
    assert trace.described == trace.conversation_positions + ", and 6 in 2 texts of 3 tokens"


@given(st.integers(0, 10_000), st.integers(2, 512))
def test_as_many_texts_as_hold_the_positions(positions: int, window: int) -> None:
    count = kv_cache.texts(dataclasses.replace(bundle((8,)), positions=positions), window)
    assert (count - 1) * (window - 1) < positions <= count * (window - 1) or count == positions == 0


class Talking:
    """Sections that answer each token with its own number, its position, and what their cache has seen."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, int]] = []

    def empty_cache(self) -> dict[str, np.ndarray]:
        return {}

    def grown(self, cache: dict[str, np.ndarray], _positions: int) -> dict[str, np.ndarray]:
        return cache

    def signature_for(self, tokens: int) -> str:
        return f"prefill_{tokens}"

    def run(self, signature: str, tokens: list[int], position: int, _cache: object) -> dict[str, np.ndarray]:
        self.seen += [(token, position + place) for place, token in enumerate(tokens)]
        return {"logits": np.array([[[tokens[-1], position]]], np.float32)} if signature == "decode" else {}


def test_texts_are_decoded_from_their_first_token_to_the_last_but_one() -> None:
    schedules = (Schedule((("prefill", 3), ("decode", 2))), Schedule((("decode", 2), ("prefill", 1), ("decode", 2))))
    texts = np.arange(100, 108, dtype=np.int32).reshape(2, 4)
    tokens = np.arange(12, dtype=np.int32).reshape(2, 6)
    nothing = np.zeros((2, 5, 1), np.float32)
    trace = Trace(schedules=schedules, tokens=tokens, hidden=nothing, cached=nothing, texts=texts)
    logits = played(trace)
    assert logits.tolist()[:8] == [[3, 3], [4, 4], [6, 0], [7, 1], [9, 3], [10, 4], [3, 3], [4, 4]]
    assert logits.tolist()[8:] == [[100, 0], [101, 1], [102, 2], [104, 0], [105, 1], [106, 2]]
    assert len(logits) == len(trace.targets) == len(trace.blocks)


def played(trace: Trace) -> np.ndarray:
    """What `Talking` gives; the progress is the trace's amount."""
    bar = log.unshown()
    logits = kv_cache.replay(cast(Sections, Talking()), trace, bar)
    assert bar.done == trace.amount
    return logits


def test_a_lot_of_texts_is_that_part_of_the_whole() -> None:
    schedules = (Schedule((("prefill", 3), ("decode", 2))), Schedule((("decode", 2), ("prefill", 1), ("decode", 2))))
    texts, tokens = np.arange(100, 120, dtype=np.int32).reshape(5, 4), np.arange(12, dtype=np.int32).reshape(2, 6)
    hidden, cached = np.arange(10, dtype=np.float32).reshape(2, 5, 1), np.zeros((2, 2, 1), np.float32)
    states = np.arange(15, dtype=np.float32).reshape(5, 3, 1)
    trace = Trace(schedules, tokens=tokens, hidden=hidden, cached=cached, texts=texts, states=states)
    parts = [trace.conversations(), trace.lot(0, 2), trace.lot(2, 4), trace.lot(4, 5)]
    for whole, of in (
        (played(trace), played),
        (trace.targets, lambda part: part.targets),
        (trace.expected()[0], lambda part: part.expected()[0]),
    ):
        assert np.array_equal(whole, np.concatenate([of(part) for part in parts]))
    assert trace.amount == sum(part.amount for part in parts)
    assert len(trace.lot(2, 4).expected()[1]) == 0


def test_a_conversation_that_is_played_twice_is_no_second_sample() -> None:
    schedules = (Schedule((("prefill", 8), ("decode", 40))), Schedule((("decode", 17), ("prefill", 1), ("decode", 30))))
    trace = Trace(schedules, np.zeros((2, 49), np.int32), np.zeros((2, 48, 1)), np.zeros((2, 30, 1)))
    first, second, again = np.split(trace.blocks, [40, 40 + 47])
    assert np.array_equal(first, again) and not set(first) & set(second)
    assert np.bincount(first).tolist() == [8, 16, 16] and len(set(second)) == 3


@pytest.mark.parametrize("file", sorted((PROJECT / DEFAULT_RECIPE).parent.glob("*.toml")), ids=lambda file: file.stem)
@pytest.mark.parametrize("window", [16, 512])
def test_the_shipped_recipes_decode_at_least_64_tokens_past_it_all(file: Path, window: int) -> None:
    wanted = load(file).bundle
    assert wanted.decode >= 64 and wanted.prompts >= 16 and wanted.continuation >= 64
    for schedule in kv_cache.schedules(wanted, window):
        assert before_the_end(schedule) > max(2 * window, max(wanted.prefill))
