"""What bundles see and hear, for people: small pictures and waves, how close soft tokens are, and what was answered.

The pictures and sounds are those that every model is judged on, so a report needs their names alone.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from markupsafe import Markup, escape
from PIL import Image, ImageOps

from pipeline.core.judgement import Report, Said
from pipeline.judge.pictures import pictures
from pipeline.judge.sensing import decibels
from pipeline.judge.sounds import RATE, Samples, sounds

_SIDE, _QUALITY = 64, 60
"""Pixels of a small picture's longer side, and how it is packed: 2 kB at most."""
_POINTS, _HEIGHT = 48, 24
"""Of a wave."""
_MOST = 32
"""Inputs of a tower, and answers about each tower's, that are on the page."""


@dataclass(frozen=True)
class Input:
    """A picture or sound: what it looks like, its name, and by precision NMSE and SNR of its soft tokens."""

    look: Markup
    name: str
    figures: Mapping[str, tuple[float | None, float | None]]


@dataclass(frozen=True)
class Tower:
    """The inputs of a tower, so many more `left` out, and the precisions that were judged."""

    name: str
    precisions: Sequence[str]
    inputs: Sequence[Input]
    left: int


@dataclass(frozen=True)
class Talk:
    """What a bundle said about some media, beside what it was to say."""

    looks: Sequence[tuple[Markup, str]]
    said: Said


def towers(report: Report) -> list[Tower]:
    """The towers of all bundles; none where no bundle sees or hears."""
    errors: dict[str, dict[str, Mapping[str, float | None]]] = {}
    for bundle in report["bundles"].values():
        for name, found in (bundle["senses"]["errors"] if "senses" in bundle else {}).items():
            tower, _, precision = name.partition("-")
            errors.setdefault(tower, {})[precision] = found
    return [_tower(name, errors[name]) for name in sorted(errors, reverse=True)]


def _tower(name: str, errors: Mapping[str, Mapping[str, float | None]]) -> Tower:
    names = [*dict.fromkeys(each for found in errors.values() for each in found)]
    precisions = sorted(errors, key=("fp32", "fp16", "int8").index)
    kind = "image" if name == "vision" else "audio"
    inputs = [
        Input(_look(kind, each), each, {one: _figures(errors[one].get(each)) for one in precisions})
        for each in names[:_MOST]
    ]
    return Tower(name, precisions, inputs, max(0, len(names) - _MOST))


def _figures(error: float | None) -> tuple[float | None, float | None]:
    signal = None if error is None else decibels(error)
    return error, signal if signal is not None and math.isfinite(signal) else None


def resized(report: Report) -> tuple[float | None, float | None]:
    """NMSE and SNR of soft tokens of a picture that LiteRT-LM resizes itself; nothing where it was not read."""
    read = [bundle["senses"]["resized"] for bundle in report["bundles"].values() if "senses" in bundle]
    return _figures(next((error for error in read if error is not None), None))


def talks(report: Report) -> dict[str, list[Talk]]:
    """By bundle what it said about pictures and sounds."""
    return {name: rows for name in sorted(report["bundles"]) if (rows := [*_talks(report, name)])}


def _talks(report: Report, name: str) -> Iterator[Talk]:
    bundle, counts = report["bundles"][name], dict[str, int]()
    for row in bundle["senses"]["said"] if "senses" in bundle else ():
        counts[row["tower"]] = counts.get(row["tower"], 0) + 1
        if counts[row["tower"]] <= _MOST:
            yield Talk([(_look(kind, each), each) for kind, each in row["media"]], row)


@cache
def _look(kind: str, name: str) -> Markup:
    """A small picture of a picture or a sound; nothing of one that is not judged any more."""
    shown, played = _judged()
    if kind == "image":
        return _small(shown[name], name) if name in shown else Markup()
    return _wave(played[name], name) if name in played else Markup()


@cache
def _judged() -> tuple[Mapping[str, bytes], Mapping[str, Samples]]:
    """The pictures and the sounds that are judged; to draw them takes a second."""
    return pictures(), sounds()


def _small(data: bytes, name: str) -> Markup:
    with Image.open(io.BytesIO(data)) as opened:
        picture = ImageOps.exif_transpose(opened).convert("RGB")
    scale = _SIDE / max(picture.size)
    width, height = (max(1, round(side * scale)) for side in picture.size)
    # What is smaller is shown by its pixels.
    way = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.BOX
    packed = io.BytesIO()
    picture.resize((width, height), way).save(packed, "JPEG", quality=_QUALITY)
    source = f"data:image/jpeg;base64,{base64.b64encode(packed.getvalue()).decode()}"
    return Markup(  # noqa: S704 - the name is escaped, the rest is made here
        f'<img class="look" src="{source}" width="{width}" height="{height}" alt="{escape(name)}">'
    )


def _wave(played: Samples, name: str) -> Markup:
    """How loud a sound is over its time, and how long that is."""
    ends = np.linspace(0, len(played), _POINTS + 1).astype(int)
    loud = [float(np.abs(played[a:b]).max(initial=0.0)) for a, b in zip(ends[:-1], ends[1:], strict=True)]
    half = _HEIGHT / 2
    lines = "".join(f"M{2 * x + 1} {half - half * y:.1f}V{half + half * y + 0.5:.1f}" for x, y in enumerate(loud))
    seconds = f"{len(played) / RATE:.2f} s"
    return Markup(  # noqa: S704 - as above
        f'<svg class="look" viewBox="0 0 {2 * _POINTS} {_HEIGHT}" role="img" aria-label="{escape(name)}, {seconds}">'
        f'<path class="wave" d="{lines}"/></svg><small>{seconds}</small>'
    )
