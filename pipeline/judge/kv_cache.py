"""Judging a decoder through its cache: conversations that are read in uneven chunks, then decoded token by token.

The golden stage stores what Hugging Face says of the same tokens; prefill gives no logits, so positions are judged
where the schedule decodes. Two conversations run in turns, so that a mix-up of caches would show, and the first is run
again in the second's used cache after a reset, so that what an old conversation left behind would.

Few positions tell faults of a conversion; to weigh what a precision costs takes thousands. So texts may follow, each
decoded from its first token to its last, in the used cache as well.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import cycle, zip_longest
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline.core import log
from pipeline.core.recipe import Bundle
from pipeline.judge import scripts
from pipeline.judge.corpus import POSITIONS_PER_WINDOW, Tokens
from pipeline.judge.reference import Floats
from pipeline.runtime.sections import Conversation, Sections

Logits = NDArray[np.float32]
ORDER = (0, 1, 0)
"""The schedules whose judged positions `replay` gives, one after the other; the last in a used cache."""
_EARLY = 24
"""Tokens that the second conversation decodes before its first prefill."""
_UNEVEN = 41
"""Prefilled tokens beyond what crosses the window and the longest prefill, so that chunks come out uneven."""


@dataclass(frozen=True)
class Schedule:
    """How one conversation is fed: calls of so many tokens, a call of `decode` for each token of the others."""

    calls: tuple[tuple[str, int], ...]

    @property
    def judged(self) -> NDArray[np.int64]:
        """The positions that are decoded."""
        positions, start = [], 0
        for kind, count in self.calls:
            positions += list(range(start, start + count)) if kind == "decode" else []
            start += count
        return np.array(positions)

    @property
    def length(self) -> int:
        """Tokens in all."""
        return sum(count for _, count in self.calls)


def schedules(bundle: Bundle, window: int) -> tuple[Schedule, Schedule]:
    """Two schedules of one length: past the sliding window twice and past the longest prefill, then `decode` tokens."""
    wanted = max(max(bundle.prefill), 2 * window) + _UNEVEN
    wanted = min(wanted, bundle.max_tokens - bundle.decode)
    early = min(_EARLY, (wanted + 1) // 2)
    first = (*_chunks(bundle.prefill, wanted), ("decode", bundle.decode))
    second = (("decode", early), *_chunks(bundle.prefill, wanted - early), ("decode", bundle.decode))
    return Schedule(first), Schedule(second)


def _chunks(lengths: Sequence[int], total: int) -> tuple[tuple[str, int], ...]:
    """`total` tokens in calls of uneven sizes, up to the longest prefill."""
    longest, shortest = max(lengths), min(lengths)
    sizes = cycle([longest, min(7, longest), shortest, 1, max(1, longest - 3)])
    calls: list[tuple[str, int]] = []
    while total > 0:
        calls.append(("prefill", min(next(sizes), total)))
        total -= calls[-1][1]
    return tuple(calls)


def texts(bundle: Bundle, window: int) -> int:
    """How many texts of `window` tokens have `bundle.positions` predictions."""
    return -(-bundle.positions // max(1, window - 1))


@dataclass(frozen=True)
class Trace:
    """What is replayed through the cache, conversations by both schedules and texts, and the reference of it.

    `tokens` int32 [2, L + 1], the last of which is only predicted; `hidden` float32 [2, L, H] of Hugging Face without
    a cache; `cached` [2, D, H] of the last D positions with its cache, one token at a time; `texts` int32 [N, T + 1]
    and `states` float32 [N, T, H] without a cache.
    """

    schedules: tuple[Schedule, Schedule]
    tokens: Tokens
    hidden: Floats
    cached: Floats
    texts: Tokens = field(default_factory=lambda: np.empty((0, 1), np.int32))
    states: Floats = field(default_factory=lambda: np.empty((0, 0, 0), np.float32))

    def conversations(self) -> Trace:
        """The same without the texts."""
        return replace(self, texts=self.texts[:0], states=self.states[:0])

    def lot(self, first: int, last: int) -> Trace:
        """The texts `first` to `last` alone, without the conversations."""
        bare = replace(self, tokens=self.tokens[:0], hidden=self.hidden[:0], cached=self.cached[:0])
        return replace(bare, texts=self.texts[first:last], states=self.states[first:last])

    @property
    def order(self) -> tuple[int, ...]:
        """Whose judged positions `replay` gives before those of the texts."""
        return ORDER if len(self.tokens) else ()

    @property
    def amount(self) -> int:
        """Tokens that `replay` runs."""
        return sum(self.schedules[row].length for row in self.order) + self.texts[:, 1:].size

    @property
    def described(self) -> str:
        """Which positions are judged, in words."""
        predicted = self.texts[:, 1:]
        return self.conversation_positions + (
            f", and {predicted.size} in {len(predicted)} texts of {predicted.shape[1]} tokens" if predicted.size else ""
        )

    @property
    def conversation_positions(self) -> str:
        """Those of the conversations, in words."""
        runs = []
        for row in ORDER:
            positions = self.schedules[row].judged
            edges = np.flatnonzero(np.diff(positions) != 1) + 1
            runs.append(" and ".join(f"{part[0]}–{part[-1]}" for part in np.split(positions, edges)))
        judged = sum(len(self.schedules[row].judged) for row in ORDER)
        return f"{judged} decoded positions: {', '.join(runs)} of {len(runs)} conversations"

    @property
    def targets(self) -> Tokens:
        """The token that really follows each judged position, in the order of `replay`."""
        conversations = [self.tokens[row, self.schedules[row].judged + 1] for row in self.order]
        return np.concatenate([*conversations, self.texts[:, 1:].ravel()])

    @property
    def blocks(self) -> NDArray[np.int64]:
        """Which text, or stretch of 16 tokens of a conversation, each judged position is in.

        What resampling draws: two conversations would be two blocks, and one that is replayed says nothing new, so
        the first one's stretches are the same when it returns.
        """
        stretches = self.schedules[0].length // POSITIONS_PER_WINDOW + 1
        conversations = [row * stretches + self.schedules[row].judged // POSITIONS_PER_WINDOW for row in self.order]
        count, length = self.texts[:, 1:].shape
        return np.concatenate([*conversations, np.repeat(2 * stretches + np.arange(count), length)])

    def scripts(self, decode: Callable[[list[int]], str]) -> list[str]:
        """The script of the token that follows each judged position, in the order of `replay`; `decode` gives text."""
        conversations = [scripts.of_tokens(tokens, decode) for tokens in self.tokens]
        found = [conversations[row][place + 1] for row in ORDER for place in self.schedules[row].judged]
        return found + [name for text in self.texts for name in scripts.of_tokens(text, decode)[1:]]

    def expected(self) -> tuple[Floats, Floats]:
        """Hidden states [n, H] of the judged positions in the order of `replay`, without a cache and with.

        The second ends before the texts, and holds those without a cache where the reference has none with.
        """
        without, cached = [], [np.empty((0, self.hidden.shape[2]), np.float32)]
        for row in self.order:
            positions = self.schedules[row].judged
            plain = self.hidden[row, positions]
            last = self.cached.shape[1]
            without.append(plain)
            cached.append(np.concatenate([plain[: len(plain) - last], self.cached[row]]))
        return np.concatenate([*without, *self.states]), np.concatenate(cached)


def replay(sections: Sections, trace: Trace, bar: log.Progress, file: Path | None = None) -> Logits:
    """The logits [n, V] of `sections` at every judged position: schedules as in `ORDER`, then texts.

    They stand in a memory map at `file`, if one is given: those of a large vocabulary are gigabytes. `bar` is advanced
    by the trace's amount.
    """
    room: Logits | None = None
    for place, logits in _logits(sections, trace, bar):
        if room is None:
            room = _room((len(trace.blocks), len(logits)), file)
        room[place] = logits
    assert room is not None
    return room


def _room(shape: tuple[int, int], file: Path | None) -> Logits:
    return np.memmap(file, dtype=np.float32, mode="w+", shape=shape) if file else np.empty(shape, np.float32)


def _logits(sections: Sections, trace: Trace, bar: log.Progress) -> Iterator[tuple[int, Logits]]:
    """Logits [V] as they are decoded, each with its place in what `replay` gives."""
    first, second = (len(schedule.judged) if trace.order else 0 for schedule in trace.schedules)
    places = iter(range(first)), iter(range(first, first + second))
    conversations = Conversation(sections), Conversation(sections)
    turns = [
        _run(conversation, schedule, tokens, bar)
        for conversation, schedule, tokens in zip(conversations, trace.schedules, trace.tokens, strict=False)
    ]
    # If the two shared any state, each would now and then read the other's.
    for pair in zip_longest(*turns):  # in turns, call by call
        for place, logits in zip(places, pair, strict=False):
            yield from ((next(place), row) for row in logits or [])
    after, whole = itertools.count(first + second), Schedule((("decode", trace.texts.shape[1] - 1),))
    again = [(trace.schedules[0], trace.tokens[0])] if trace.order else []
    for schedule, tokens in [*again, *((whole, text) for text in trace.texts)]:
        # The cache keeps what the conversation before left in it; only the position goes back to 0.
        conversations[1].reset()
        for logits in _run(conversations[1], schedule, tokens, bar):
            yield from ((next(after), row) for row in logits)


def _run(conversation: Conversation, schedule: Schedule, tokens: Tokens, bar: log.Progress) -> Iterator[list[Logits]]:
    """Run the schedule call by call; each gives the logits it has decoded."""
    start = 0
    for kind, count in schedule.calls:
        part = [int(token) for token in tokens[start : start + count]]
        start += count
        if kind == "prefill":
            conversation.prefill(part)
            bar.advance(count)
            yield []
            continue
        for token in part:
            logits = conversation.decode(token)
            bar.advance()
            yield [logits]
