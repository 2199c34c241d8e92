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
from pipeline.judge.media import Given
from pipeline.judge.metrics import Scores
from pipeline.judge.reference import Head
from pipeline.judge.seeing import Eyes
from pipeline.judge.sensing import Answer, Floats, Kind, Reference, runner
from pipeline.runtime.sections import Conversation, Sections

PROMPTS = 4
"""Prompts whose answers are judged, the second of them with two pictures and a sound; all of them would take long."""
Vectors = Callable[[Kind, str], Floats]
"""What stands in a prompt for a picture or sound, by kind and name: soft tokens and its end, [n + 1, H]."""


def vectors(towers: Path, given: Given, scratch: Path) -> Vectors:
    """By the sections in the folder `towers`; repacked weights lie in `scratch`, a folder of its own."""
    eyes = Eyes(towers, given.sight, scratch) if given.sight else None
    ears = Ears(towers, given.hearing, scratch) if given.hearing else None
    ends = {kind: _end(towers / f"end_of_{name}.tflite") for kind, name in (("image", "vision"), ("audio", "audio"))}

    def made(kind: Kind, name: str) -> Floats:
        if kind == "image":
            assert eyes
            return np.concatenate([eyes.see(given.pictures[name]), *ends[kind]])
        assert ears
        return np.concatenate([ears.hear(given.sounds[name]), *ends[kind]])

    return made


def _end(file: Path) -> list[Floats]:
    """The vector [1, H] behind a medium, if it is a section of its own."""
    if not file.is_file():
        return []
    # A constant, of which XNNPACK has nothing to lay out.
    row = next(iter(runner(file, None)().values()))
    assert isinstance(row, np.ndarray)
    return [row[0]]


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
    scores = _scored(tower, sections, made, told, head, longest, PROMPTS)
    whole = metrics.join(scores)
    detail = f"{len(whole.kld)} positions of {len(scores)} answers; against {REFERENCE} with its cache"
    worst = float(whole.nmse.max())  # NaN stays NaN
    figure = Measurement(
        metric="nmse", name="worst logits NMSE through the cache", value=worst, against=REFERENCE, detail=detail
    )
    other = int((whole.top1 != 1).sum())
    held = gates.must_hold(tower, "positions with another most likely token", other, len(whole.kld), detail)
    return [*gates.judge(tower, gate, [figure]), held]


def divergence(tower: str, sections: Sections, made: Vectors, told: Reference, head: Head, longest: int) -> Measurement:
    """What a tower in fewer bits costs at the text's end: the mean KLD over every position of all answers.

    Arguments as of `judge_logits`; `sections` are float32's, so that all of it is the towers'.
    """
    scores = _scored(tower, sections, made, told, head, longest, len(told.answers))
    whole, worst = metrics.join(scores), max(float(each.kld.mean()) for each in scores)
    return Measurement(
        metric="kld",
        name="KLD behind pictures and sounds, text model in fp32",
        value=float(whole.kld.mean()),
        against=REFERENCE,
        detail=f"{len(whole.kld)} positions of {len(scores)} answers; of the worst answer {worst:.3g}; top-1 agreement "
        f"{whole.top1.mean():.2%}",
    )


def _scored(
    tower: str, sections: Sections, made: Vectors, told: Reference, head: Head, longest: int, prompts: int
) -> list[Scores]:
    """The scores of so many answers, one after the other."""
    rows, scores = list(zip(told.answers, told.states, strict=True))[:prompts], []
    with log.progress(f"logits, {tower}", sum(len(row.tokens) for row, _ in rows), "tokens") as bar:
        for row, states in rows:
            logits = []
            for each in _decoded(Conversation(sections), row, made, longest):
                logits.append(each)
                bar.advance()
            scores.append(head.score(np.stack(logits), states))
    return scores


def _decoded(conversation: Conversation, row: Answer, made: Vectors, longest: int) -> Iterator[Floats]:
    """The logits [V] behind the prompt, and behind each token of the answer but the last."""
    media = iter(np.concatenate([made(kind, name) for kind, name in row.media]))
    read = [next(media) if token < 0 else token for token in row.prompt]
    assert next(media, None) is None, "the prompt has places for all media"
    for start in range(0, len(read) - 1, longest):
        conversation.prefill(read[start : min(start + longest, len(read) - 1)])
    for token in [read[-1], *row.tokens[:-1]]:
        yield conversation.decode(token)
