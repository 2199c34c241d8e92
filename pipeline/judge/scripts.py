"""Which script each judged position is written in, so that what one language loses does not hide in another's mean.

A token is often no whole character (Tifinagh's are several bytes each in most vocabularies), so a position has the
script of its token where that has a letter, else the one that most letters around it have.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial

import numpy as np
from numpy.typing import NDArray

from pipeline.judge.corpus import Tokens
from pipeline.judge.metrics import Doubles, Draws, Estimate, Scores, bootstrap, estimate

BASIS = "Latin"
"""The script that others are held against."""
EMOJI, CODE, NONE = "emoji", "code", ""
_CJK = ("CJK", "HIRAGANA", "KATAKANA", "HANGUL", "BOPOMOFO")
_AROUND = 4
"""Tokens on each side whose letters say what a token without one belongs to."""
_PUNCTUATION, _CODE_SHARE = frozenset("{}[]()<>=;_\\|&*+#@`$%^~/"), 0.05
"""Characters that code has more of than prose, and their share from which on a text is code: this project's files have
0.08, full of sentences as they are, and no line of its texts more than 0.043."""


@cache
def of_character(character: str) -> str:
    """`Latin`, `Tifinagh`, `Arabic`, `CJK`, `emoji` …; empty of digits, marks, spaces and punctuation."""
    if 0x2600 <= ord(character) < 0x27C0 or 0x1F000 <= ord(character) < 0x1FB00:
        return EMOJI
    if not character.isalpha():
        return NONE
    first = unicodedata.name(character, "").split(" ")[0]
    return "CJK" if first.split("-")[0] in _CJK else first.capitalize()


def of_text(text: str) -> str:
    """The script that most of its letters have; `code` by its punctuation; empty where there is none."""
    shown = [character for character in text if not character.isspace()]
    if shown and sum(character in _PUNCTUATION for character in shown) >= _CODE_SHARE * len(shown) and len(shown) > 7:
        return CODE
    counted = Counter(filter(None, map(of_character, text)))
    return counted.most_common(1)[0][0] if counted else NONE


def of_tokens(ids: Sequence[int] | Tokens, decode: Callable[[list[int]], str]) -> list[str]:
    """The script of each of the tokens `ids` of one text; `decode` gives their text."""
    tokens = [int(token) for token in ids]
    if of_text(decode(tokens)) == CODE:
        return [CODE] * len(tokens)
    found = []
    for place, token in enumerate(tokens):
        around = tokens[max(0, place - _AROUND) : place + _AROUND + 1]
        counted = Counter(filter(None, map(of_character, decode([token])))) or Counter(
            filter(None, map(of_character, decode(around)))
        )
        found.append(counted.most_common(1)[0][0] if counted else NONE)
    return found


@dataclass(frozen=True, kw_only=True)
class ScriptFigures:
    """A file on the positions of one script: KLD, top-1, and the KLD over Latin's (None of Latin, and without any)."""

    positions: int
    kld: Estimate
    top1: Estimate
    kld_ratio: Estimate | None


def figures(scores: Scores, blocks: NDArray[np.int64], found: Sequence[str]) -> dict[str, ScriptFigures]:
    """Figures of every script that positions in `blocks` [n] are `found` in [n], most positions first."""
    scripts, counted = np.array(found), Counter(name for name in found if name)
    result = {}
    for name, count in counted.most_common():
        own = scripts == name
        mean = partial(bootstrap, lambda means: means[..., 0], draws=Draws.of(blocks[own]))
        result[name] = ScriptFigures(
            positions=count,
            kld=mean(columns=[scores.kld[own]]),
            top1=mean(columns=[scores.top1[own]]),
            kld_ratio=ratio(scores.kld, blocks, scripts, name) if name != BASIS and counted[BASIS] else None,
        )
    return result


def ratio(kld: Doubles, blocks: NDArray[np.int64], scripts: NDArray[np.str_], script: str) -> Estimate:
    """The mean KLD of positions in a script over that of positions in Latin, with an interval over whole `blocks`.

    Each script's blocks are drawn by themselves: among all, a rare script would be in some draws not at all.
    """
    drawn, values = list[Doubles](), list[float]()
    for name in (script, BASIS):
        own, draws = kld[scripts == name], Draws.of(blocks[scripts == name])
        sums, counts = (np.bincount(draws.member, weights) for weights in (own, None))
        values.append(float(own.mean()))
        drawn.append((draws.times @ sums) / (draws.times @ counts))
    # From one seed: in reverse order the draws of one say nothing of the other's.
    return estimate(values[0] / values[1], drawn[0] / drawn[1][::-1])
