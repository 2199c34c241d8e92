"""Telling what a model thinks from what it answers, while the text comes in pieces."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Channel:
    """The texts that stand around thoughts, e.g. `<think>` and `</think>`."""

    start: str
    end: str

    def split(self, pieces: Iterable[str]) -> Iterator[tuple[bool, str]]:
        """The same text without `start` and `end`, as soon as it is sure: whether it is thought, and a piece of it."""
        thinking, held = False, ""
        for piece in pieces:
            held += piece
            while (mark := self.end if thinking else self.start) in held:
                before, _, held = held.partition(mark)
                yield from ((thinking, before),) if before else ()
                thinking = not thinking
            sure = len(held) - _begun(held, mark)
            yield from ((thinking, held[:sure]),) if sure else ()
            held = held[sure:]
        if held:
            yield thinking, held


def _begun(text: str, mark: str) -> int:
    """How many characters at the end of `text` may be the beginning of `mark`."""
    return next((size for size in range(min(len(text), len(mark) - 1), 0, -1) if text.endswith(mark[:size])), 0)
