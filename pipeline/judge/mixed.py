"""Logits after prompts in which pictures and sounds stand, through the sections and the cache, against Hugging Face."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from pipeline.core import log
from pipeline.core.recipe import Gate
from pipeline.judge import gates, metrics
from pipeline.judge.gates import REFERENCE, Check, Measurement
from pipeline.judge.hearing import Ears
from pipeline.judge.pictures import write
from pipeline.judge.reference import Head
from pipeline.judge.seeing import Eyes
from pipeline.judge.sensing import Answer, Floats, Kind, Reference, runner
from pipeline.judge.sounds import sounds
from pipeline.runtime.picture import Sight
from pipeline.runtime.sections import Conversation, Sections
from pipeline.runtime.sound import Hearing

PROMPTS = 4
"""Prompts whose answers are judged, the second of them with two pictures and a sound; all of them would take long."""
Vectors = Callable[[Kind, str], Floats]
"""What stands in a prompt for a picture or sound, by kind and name: soft tokens and its end, [n + 1, H]."""


def vectors(towers: Path, sight: Sight | None, hearing: Hearing | None, scratch: Path) -> Vectors:
    """By the sections in the folder `towers`; pictures and repacked weights lie in `scratch`, a folder of its own."""
    files = write(scratch) if sight else {}
    eyes = Eyes(towers, sight, scratch) if sight else None
    ears = Ears(towers, hearing, scratch) if hearing else None
    end = next(iter(runner(towers / "end_of_audio.tflite", None)().values())) if hearing else None

    def made(kind: Kind, name: str) -> Floats:
        if kind == "image":
            assert eyes
            return eyes.see(files[name])
        assert ears
        assert isinstance(end, np.ndarray)
        return np.concatenate([ears.hear(sounds()[name]), end[0]])

    return made


def judge_logits(
    tower: str, sections: Sections, made: Vectors, told: Reference, head: Head, longest: int, gate: Gate | None
) -> list[Check]:
    """Every position of some answers of a tower's prompts, in float32.

    Args:
        tower: what its sections are called in checks: `vision-fp32`.
        sections: the text model's.
        made: what stands for a picture or sound.
        told: what golden stored of the tower.
        head: what makes logits of the reference's states.
        longest: tokens of the longest prefill.
        gate: the tower's limits.
    """
    rows, scores = list(zip(told.answers, told.states, strict=True))[:PROMPTS], []
    with log.progress(f"logits, {tower}", sum(len(row.tokens) for row, _ in rows), "tokens") as bar:
        for row, states in rows:
            logits = []
            for each in _decoded(Conversation(sections), row, made, longest):
                logits.append(each)
                bar.advance()
            scores.append(head.score(np.stack(logits), states))
    whole = metrics.join(scores)
    detail = f"{len(whole.kld)} positions of {len(rows)} answers; against {REFERENCE} with its cache"
    worst = float(whole.nmse.max())  # NaN stays NaN
    figure = Measurement(
        metric="nmse", name="worst logits NMSE through the cache", value=worst, against=REFERENCE, detail=detail
    )
    other = int((whole.top1 != 1).sum())
    held = gates.must_hold(tower, "positions with another most likely token", other, len(whole.kld), detail)
    return [*gates.judge(tower, gate, [figure]), held]


def _decoded(conversation: Conversation, row: Answer, made: Vectors, longest: int) -> Iterator[Floats]:
    """The logits [V] behind the prompt, and behind each token of the answer but the last."""
    media = iter(np.concatenate([made(kind, name) for kind, name in row.media]))
    read = [next(media) if token < 0 else token for token in row.prompt]
    assert next(media, None) is None, "the prompt has places for all media"
    for start in range(0, len(read) - 1, longest):
        conversation.prefill(read[start : min(start + longest, len(read) - 1)])
    for token in [read[-1], *row.tokens[:-1]]:
        yield conversation.decode(token)
