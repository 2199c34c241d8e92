"""Judging a decoder through its cache: conversations that are read in uneven chunks, then decoded token by token.

The golden stage stores what Hugging Face says of the same tokens; prefill gives no logits, so positions are judged
where the script decodes. Two conversations run in turns, so that a mix-up of caches would show, and the first is run
again in the second's used cache after a reset, so that what an old conversation left behind would.

Few positions tell faults of a conversion; to weigh what a precision costs takes thousands. So texts may follow, each
decoded from its first token to its last, in the used cache as well.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import cycle, zip_longest
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline.core import log
from pipeline.core.recipe import Bundle
from pipeline.judge.corpus import POSITIONS_PER_WINDOW, Tokens
from pipeline.judge.reference import Floats
from pipeline.runtime.sections import Conversation, Sections

Logits = NDArray[np.float32]
ORDER = (0, 1, 0)
"""The scripts whose judged positions `play` gives, one after the other; the last in a used cache."""
_EARLY = 24
"""Tokens that the second conversation decodes before its first prefill."""
_UNEVEN = 41
"""Prefilled tokens beyond what crosses the window and the longest prefill, so that chunks come out uneven."""


@dataclass(frozen=True)
class Script:
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


def scripts(bundle: Bundle, window: int) -> tuple[Script, Script]:
    """Two scripts of one length: past the sliding window twice and past the longest prefill, then `decode` tokens."""
    wanted = max(max(bundle.prefill), 2 * window) + _UNEVEN
    wanted = min(wanted, bundle.max_tokens - bundle.decode)
    early = min(_EARLY, (wanted + 1) // 2)
    first = (*_chunks(bundle.prefill, wanted), ("decode", bundle.decode))
    second = (("decode", early), *_chunks(bundle.prefill, wanted - early), ("decode", bundle.decode))
    return Script(first), Script(second)


def _chunks(lengths: Sequence[int], total: int) -> tuple[tuple[str, int], ...]:
    """`total` tokens in calls of uneven sizes, up to the longest prefill."""
    longest, shortest = max(lengths), min(lengths)
    sizes = cycle([longest, min(7, longest), shortest, 1, max(1, longest - 3)])
    found: list[tuple[str, int]] = []
    while total > 0:
        found.append(("prefill", min(next(sizes), total)))
        total -= found[-1][1]
    return tuple(found)


def texts(bundle: Bundle, window: int) -> int:
    """How many texts of `window` tokens have `bundle.positions` predictions."""
    return -(-bundle.positions // max(1, window - 1))


@dataclass(frozen=True)
class Recital:
    """The reference of both scripts, and of the texts.

    `tokens` int32 [2, L + 1], the last of which is only predicted; `hidden` float32 [2, L, H] of Hugging Face without
    a cache; `cached` [2, D, H] of the last D positions with its cache, one token at a time; `texts` int32 [N, T + 1]
    and `states` float32 [N, T, H] without a cache.
    """

    scripts: tuple[Script, Script]
    tokens: Tokens
    hidden: Floats
    cached: Floats
    texts: Tokens = field(default_factory=lambda: np.empty((0, 1), np.int32))
    states: Floats = field(default_factory=lambda: np.empty((0, 0, 0), np.float32))

    def conversations(self) -> Recital:
        """The same without the texts."""
        return replace(self, texts=self.texts[:0], states=self.states[:0])

    @property
    def described(self) -> str:
        """Which positions are judged, in words."""
        told = self.texts[:, 1:]
        return self.conversed + (
            f", and {told.size} in {len(told)} texts of {told.shape[1]} tokens" if told.size else ""
        )

    @property
    def conversed(self) -> str:
        """Those of the conversations, in words."""
        runs = []
        for row in ORDER:
            positions = self.scripts[row].judged
            edges = np.flatnonzero(np.diff(positions) != 1) + 1
            runs.append(" and ".join(f"{part[0]}–{part[-1]}" for part in np.split(positions, edges)))
        judged = sum(len(self.scripts[row].judged) for row in ORDER)
        return f"{judged} decoded positions: {', '.join(runs)} of {len(runs)} conversations"

    @property
    def targets(self) -> Tokens:
        """The token that really follows each judged position, in the order of `play`."""
        spoken = [self.tokens[row, self.scripts[row].judged + 1] for row in ORDER]
        return np.concatenate([*spoken, self.texts[:, 1:].ravel()])

    @property
    def blocks(self) -> NDArray[np.int64]:
        """Which text, or stretch of 16 tokens of a conversation, each judged position is in.

        What resampling draws: two conversations would be two blocks, and one that is played twice says nothing new, so
        the first one's stretches are the same when it returns.
        """
        stretches = self.scripts[0].length // POSITIONS_PER_WINDOW + 1
        spoken = [row * stretches + self.scripts[row].judged // POSITIONS_PER_WINDOW for row in ORDER]
        told = self.texts[:, 1:]
        return np.concatenate([*spoken, np.repeat(2 * stretches + np.arange(len(told)), told.shape[1])])

    def expected(self) -> tuple[Floats, Floats]:
        """Hidden states [n, H] of the judged positions in the order of `play`, without a cache and with.

        The second ends before the texts, and holds those without a cache where the reference has none with.
        """
        without, withal = [], []
        for row in ORDER:
            positions = self.scripts[row].judged
            plain = self.hidden[row, positions]
            last = self.cached.shape[1]
            without.append(plain)
            withal.append(np.concatenate([plain[: len(plain) - last], self.cached[row]]))
        return np.concatenate([*without, *self.states]), np.concatenate(withal)


def play(folder: Path, recital: Recital, label: str, scratch: Path | None = None) -> Logits:
    """The logits [n, V] of the sections in `folder` at every judged position: scripts as in `ORDER`, then texts.

    Args:
        folder: where the sections are.
        recital: what they are given.
        label: how progress calls them.
        scratch: a folder for what would take gigabytes of memory: the logits, and weights as XNNPACK repacks them.
    """
    weights = scratch / f"{label}.weights" if scratch else None
    sections = Sections(folder, weights=weights) if weights else Sections(folder)
    total = 2 * recital.scripts[0].length + recital.scripts[1].length + recital.texts[:, 1:].size
    judged = len(recital.blocks)
    room: Logits | None = None
    with log.progress(f"{label}: through the cache", total, "tokens") as bar:
        for place, logits in _spoken(sections, recital, bar):
            if room is None:
                room = _room((judged, len(logits)), scratch / label if scratch else None)
            room[place] = logits
    assert room is not None
    if weights:
        weights.unlink()  # as large as the decoder, and of no use to anyone else
    return room


def _room(shape: tuple[int, int], file: Path | None) -> Logits:
    return np.memmap(file, dtype=np.float32, mode="w+", shape=shape) if file else np.empty(shape, np.float32)


def _spoken(sections: Sections, recital: Recital, bar: log.Progress) -> Iterator[tuple[int, Logits]]:
    """Logits [V] as they are spoken, each with its place in what `play` gives."""
    first, second = (len(script.judged) for script in recital.scripts)
    places = iter(range(first)), iter(range(first, first + second))
    conversations = Conversation(sections), Conversation(sections)
    turns = [
        _perform(conversation, script, tokens, bar)
        for conversation, script, tokens in zip(conversations, recital.scripts, recital.tokens, strict=True)
    ]
    for pair in zip_longest(*turns):  # in turns, call by call
        for place, logits in zip(places, pair, strict=False):
            yield from ((next(place), row) for row in logits or [])
    after, whole = itertools.count(first + second), Script((("decode", recital.texts.shape[1] - 1),))
    for script, tokens in [(recital.scripts[0], recital.tokens[0]), *((whole, text) for text in recital.texts)]:
        conversations[1].reset()
        for logits in _perform(conversations[1], script, tokens, bar):
            yield from ((next(after), row) for row in logits)


def _perform(conversation: Conversation, script: Script, tokens: Tokens, bar: log.Progress) -> Iterator[list[Logits]]:
    """Run the script call by call; each gives the logits it has decoded."""
    start = 0
    for kind, count in script.calls:
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
