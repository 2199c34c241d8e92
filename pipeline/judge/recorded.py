"""What sections say at a few places of a text, small enough for a page to carry.

Another runtime that runs the same files holds its own logits against it before it is used (web/gpu.js). Of each place
there are the log-probabilities of the likeliest tokens; all others are taken as one. The divergence over these classes
is at most the one over the whole vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypedDict

import numpy as np

from pipeline.runtime.sections import Conversation, Sections

PLACES, LIKELIEST = 8, 64
"""Decoded one after another: a runtime may be right in its first run alone."""


class Row(TypedDict):
    """The likeliest tokens of one place, and the natural logarithms of their probabilities."""

    tokens: list[int]
    logs: list[float]


class Recorded(TypedDict):
    """`ids`, of which the first `prefilled` go into the cache by prefill, and the rows of what follows the others."""

    ids: list[int]
    prefilled: int
    rows: list[Row]


def needed(sections: Sections) -> int:
    """How many tokens `record` takes: each prefill signature runs once."""
    return sum(sections.prefills) + PLACES


def record(sections: Sections, ids: Sequence[int]) -> Recorded:
    """Run `ids`, `needed` of them, and keep what follows each of the last `PLACES`."""
    conversation, place = Conversation(sections), 0
    for length in reversed(sections.prefills):
        conversation.prefill(ids[place : place + length])
        place += length
    rows = [_row(conversation.decode(token).astype(np.float64)) for token in ids[place:]]
    return {"ids": list(ids), "prefilled": place, "rows": rows}


def _row(logits: np.ndarray[tuple[int], np.dtype[np.float64]]) -> Row:
    logs = logits - logits.max()
    logs -= np.log(np.exp(logs).sum())
    tokens = np.argsort(-logs, kind="stable")[:LIKELIEST]
    return {"tokens": tokens.tolist(), "logs": logs[tokens].round(4).tolist()}
