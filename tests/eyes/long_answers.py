"""Long answers about pictures and sounds, in LiteRT-LM and by Hugging Face: `nox -s senses`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import count, islice
from pathlib import Path

import pytest
from line import Line
from whole import HEARS, KINDS, SEES, bundle_of

from pipeline.judge import media
from pipeline.judge.sensing import Answer, Kind, Reference, judge_words
from pipeline.judge.sounds import Samples
from pipeline.reference import hearing, seeing
from pipeline.reference.answers import Heard, Sense, answer
from pipeline.reference.model import HuggingFace
from pipeline.runtime.litert_lm import Medium
from tools.senses_data import held_out

PROMPTS, LEAST, TOKENS = 16, 64, 128
QUESTION = "Tell me about it."
Equal = Callable[[Iterator[Heard], Callable[[Kind, str], Medium], str], list[Answer]]


@pytest.fixture
def equal(line: Line, tmp_path: Path) -> Equal:
    """Ask sixteen times, of messages and the media in them, and hold LiteRT-LM's answers against the reference's."""
    checkpoint = line.root / "fetch" / "checkpoint"
    reference = HuggingFace.load(checkpoint, "cpu")
    senses: dict[Kind, Sense] = {
        "audio": hearing.Ears.load(checkpoint).sense,
        "image": seeing.Eyes.load(checkpoint).sense,
    }

    def judged(messages: Iterator[Heard], given: Callable[[Kind, str], Medium], tower: str) -> list[Answer]:
        told = [answer(reference, senses, QUESTION, each, TOKENS)[0] for each in islice(messages, PROMPTS)]
        words, said = judge_words(bundle_of(line), given, told, tmp_path, tower)
        assert words.passed, words.detail
        assert len(told) == PROMPTS and all(row.same for row in said)
        assert all(LEAST <= len(row.tokens) < TOKENS for row in told), [len(row.tokens) for row in told]
        print(tower, sorted(len(row.tokens) for row in told))
        return told

    return judged


def test_long_answers_about_pictures_are_hugging_faces(line: Line, equal: Equal, tmp_path: Path) -> None:
    """Two of them about two pictures and a sound."""
    seen, heard = (Reference.stored(line.root / "golden", kind).soft for kind in KINDS)
    with media.given(SEES, HEARS, tmp_path) as given:
        told = equal(seeing.messages(seen, hearing.messages(heard)), given, "vision")
    assert sum(len(row.media) > 2 for row in told) == 2


def test_long_answers_about_sounds_are_hugging_faces(line: Line, equal: Equal) -> None:
    """Keys of a telephone that nothing was trained on; of a note the model says 61 or 62 tokens."""
    drawn = ((index, *held_out(index)[2:]) for index in count())
    keys = ((f"key {tone.name}, {index}", sound) for index, tone, sound in drawn if tone.key)
    sounds: dict[str, Samples] = {name: HEARS.fitted(sound) for name, sound in islice(keys, PROMPTS)}
    heard = hearing.listen(hearing.Ears.load(line.root / "fetch" / "checkpoint"), sounds)
    messages: Iterator[Heard] = iter([[("audio", name, soft)] for name, soft in heard.items()])
    equal(messages, lambda kind, name: Medium(kind=kind, data=HEARS.packed(sounds[name])), "audio")
