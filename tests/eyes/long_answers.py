"""Long answers about pictures and sounds, in LiteRT-LM and by Hugging Face: `nox -s senses`."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import pytest
from line import Line
from whole import HEARS, KINDS, SEES, bundle_of

from pipeline.judge import media
from pipeline.judge.sensing import Kind, Reference, judge_words
from pipeline.reference import hearing, seeing
from pipeline.reference.answers import Sense, answer
from pipeline.reference.model import HuggingFace

PROMPTS, TOKENS = 16, 128
LEAST = {"vision": 64, "audio": 61}
"""Tokens of the long answers: of a note they are 61 or 62, of a key 65 to 67."""
QUESTION = "Tell me about it."


@pytest.mark.parametrize("tower", KINDS)
def test_long_answers_are_hugging_faces(tower: str, line: Line, tmp_path: Path) -> None:
    """Sixteen about pictures, two of which are two with a sound, and sixteen about sounds."""
    checkpoint, golden = line.root / "fetch" / "checkpoint", line.root / "golden"
    reference = HuggingFace.load(checkpoint, "cpu")
    seen, heard = (Reference.stored(golden, kind).soft for kind in KINDS)
    senses: dict[Kind, Sense] = {
        "audio": hearing.Ears.load(checkpoint).sense,
        "image": seeing.Eyes.load(checkpoint).sense,
    }
    played = hearing.messages(heard)
    messages = seeing.messages(seen, played) if tower == "vision" else played
    told = [answer(reference, senses, QUESTION, each, TOKENS)[0] for each in islice(messages, PROMPTS)]
    with media.given(SEES, HEARS, tmp_path) as given:
        words, said = judge_words(bundle_of(line), given, told, tmp_path, tower)
    assert words.passed, words.detail
    assert all(row.same for row in said)
    assert len(told) == PROMPTS
    assert all(LEAST[tower] <= len(row.tokens) < TOKENS for row in told), [len(row.tokens) for row in told]
