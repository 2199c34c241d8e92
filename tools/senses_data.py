"""What the shipped model that sees and hears is trained on: drawn shapes, tones, and talk about them.

Everything is made here from random numbers, so there are no files and no licences: a shape of one colour and size on a
background, with noise, turned, stretched, off the middle; the two tones of a telephone's key (DTMF, ITU-T Q.23) or a
note with overtones, louder or quieter, early or late, in noise. Seeds below `HELD_OUT` are for training.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

SIZE = 256
"""Pixels a side."""
PLACES = 16
"""Soft tokens a side."""
RATE = 16_000
HELD_OUT = 1 << 40
SECONDS = 0.4, 1.6
"""How long a sound is."""
SHAPES = {
    "circle": "ⵜⴰⵎⴷⴰⵡⵡⴰⵔⵜ",
    "square": "ⴰⵎⴽⴽⵓⵥ",
    "triangle": "ⴰⵎⴽⵕⴰⴹ",
    "star": "ⵉⵜⵔⵉ",
    "cross": "ⴰⵎⵉⴷⴰⴳ",
    "ring": "ⵜⴰⵅⴰⵜⵎⵜ",
}
COLOURS = {
    "red": ("ⴰⵣⴳⴳⵯⴰⵖ", (215, 30, 35)),
    "green": ("ⴰⵣⴳⵣⴰⵡ", (25, 160, 50)),
    "blue": ("ⴰⵏⵉⵍⵉ", (35, 60, 215)),
    "yellow": ("ⴰⵡⵔⴰⵖ", (240, 215, 30)),
    "white": ("ⴰⵎⵍⵍⴰⵍ", (242, 242, 242)),
    "black": ("ⴰⴱⵔⴽⴰⵏ", (18, 18, 18)),
}
"""Name in Tifinagh, red, green and blue."""
SIZES = {"small": ("ⴰⵎⵥⵥⵢⴰⵏ", (42, 56)), "large": ("ⴰⵎⵇⵇⵕⴰⵏ", (72, 100))}
"""Name in Tifinagh, from the middle to the edge in pixels."""
DIGITS = ("ⴰⵎⵢⴰ", "ⵢⴰⵏ", "ⵙⵉⵏ", "ⴽⵕⴰⴹ", "ⴽⴽⵓⵥ", "ⵙⵎⵎⵓⵙ", "ⵚⴹⵉⵚ", "ⵙⴰ", "ⵜⴰⵎ", "ⵜⵥⴰ")
NOTES = {"C": "ⴷⵓ", "D": "ⵔⵉ", "E": "ⵎⵉ", "F": "ⴼⴰ", "G": "ⵙⵓⵍ", "A": "ⵍⴰ", "B": "ⵙⵉ"}
_STEPS = (0, 2, 4, 5, 7, 9, 11)
"""Semitones above C."""
_C = 523.25
"""Hertz, of the fifth octave at A = 440 Hz in the fourth."""
_ROWS, _COLUMNS = (697, 770, 852, 941), (1209, 1336, 1477)
_APART = 110.0
"""How far a background is from a shape's colour, in levels."""
IMAGE, SOUND = "<image_soft_token>", "<audio_soft_token>"
END_OF_TURN = 6
IGNORED = -100
"""The label of what is no answer."""
Talk = Sequence[tuple[str, str]]
"""Questions and answers."""
Samples = NDArray[np.float32]
Cover = NDArray[np.float32]
"""[16, 16] in 0 to 1."""


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """A picture of one shape."""

    shape: str
    colour: str
    size: str

    @classmethod
    def drawn(cls, draw: np.random.Generator) -> Drawing:
        """Any of them."""
        return cls(shape=_one(draw, SHAPES), colour=_one(draw, COLOURS), size=_one(draw, SIZES))

    def classes(self) -> dict[str, int]:
        """What there is to tell, as indices."""
        return {
            "shape": list(SHAPES).index(self.shape),
            "colour": list(COLOURS).index(self.colour),
            "size": list(SIZES).index(self.size),
        }

    def picture(self, draw: np.random.Generator) -> tuple[Image.Image, Cover]:
        """One such picture of 256 x 256 pixels, and how much of each soft token's place the shape covers."""
        paint = np.clip(np.array(COLOURS[self.colour][1]) + draw.integers(-16, 17, 3), 0, 255)
        shape = self._mask(draw)
        mask = np.asarray(shape, np.float32)[..., None] / 255
        canvas = _background(draw, paint) * (1 - mask) + paint * mask
        canvas += draw.normal(0, draw.uniform(0, 12), canvas.shape)
        cover = np.asarray(shape.resize((PLACES, PLACES), Image.Resampling.BOX), np.float32) / np.float32(255)
        return Image.fromarray(np.clip(np.rint(canvas), 0, 255).astype(np.uint8)), cover

    def _mask(self, draw: np.random.Generator) -> Image.Image:
        """White where the shape is; drawn at twice the size, so that its edges are soft."""
        radius, stretch = draw.uniform(*SIZES[self.size][1]), math.exp(draw.uniform(-0.2, 0.2))
        reach = radius * max(stretch, 1 / stretch)
        middle = draw.uniform(reach + 4, SIZE - reach - 4, 2) if reach < SIZE / 2 - 4 else np.full(2, SIZE / 2)
        scale = 2 * radius * np.array([stretch, 1 / stretch])
        image = Image.new("L", (2 * SIZE, 2 * SIZE))
        pen = ImageDraw.Draw(image)
        for corners, value in _outline(self.shape, draw):
            pen.polygon([tuple(point) for point in 2 * middle + corners * scale], fill=value)
        return image.resize((SIZE, SIZE), Image.Resampling.BOX)

    def caption(self) -> str:
        """What this is."""
        return f"A {self.size} {self.colour} {self.shape}."

    def caption_in_tifinagh(self) -> str:
        """The same without its size."""
        return f"{SHAPES[self.shape]}, {COLOURS[self.colour][0]}."

    def talk(self) -> Talk:
        """All that can be asked; the first two are captions, the last is a long answer."""
        return (
            ("What is this?", self.caption()),
            ("ⵎⴰ ⵢⴰⴷ?", self.caption_in_tifinagh()),
            ("Which colour?", f"{self.colour.capitalize()}."),
            ("Which shape?", f"A {self.shape}."),
            ("Which size?", f"{self.size.capitalize()}."),
            ("ⵎⴰⵏ ⴰⴽⵍⵓ?", f"{COLOURS[self.colour][0]}."),
            (
                "Tell me about it.",
                f"It is a {self.shape}. Its colour is {self.colour}, and it is {self.size}: what we see is "
                f"a {self.size} {self.colour} {self.shape}, and behind it there is another colour. "
                f"{SHAPES[self.shape]}, {COLOURS[self.colour][0]}, {SIZES[self.size][0]}.",
            ),
        )


@dataclass(frozen=True, kw_only=True)
class Tone:
    """A sound: a `key` of a telephone, or a note."""

    key: bool
    name: int
    """The digit, or which note from C."""

    @classmethod
    def drawn(cls, draw: np.random.Generator) -> Tone:
        """Any of them."""
        key = bool(draw.random() < 0.5)
        return cls(key=key, name=int(draw.integers(len(DIGITS) if key else len(NOTES))))

    def classes(self) -> dict[str, int]:
        """What there is to tell, as an index: digits, then notes."""
        return {"tone": self.name if self.key else len(DIGITS) + self.name}

    def sound(self, draw: np.random.Generator, seconds: float) -> Samples:
        """One such sound: float32 in -1 to 1."""
        at = np.arange(int(seconds * RATE)) / RATE
        length = draw.uniform(0.5, 0.95) * seconds
        begin = draw.uniform(0, seconds - length)
        inside = (at >= begin) & (at < begin + length)
        made = inside * self._wave(draw, at) * math.exp(draw.uniform(math.log(0.05), math.log(0.4)))
        made += draw.normal(0, math.exp(draw.uniform(math.log(1e-3), math.log(0.015))), len(at))
        return (np.rint(np.clip(made, -1, 1) * 32767) / 32768).astype(np.float32)

    def _wave(self, draw: np.random.Generator, at: NDArray[np.float64]) -> NDArray[np.float64]:
        """What sounds, at about full scale."""
        pitch = 2 * np.pi * at * draw.uniform(0.99, 1.01)
        phases = draw.uniform(0, 2 * np.pi, 5)
        if self.key:
            row, column = (3, 1) if self.name == 0 else divmod(self.name - 1, 3)
            made: NDArray[np.float64] = np.sin(pitch * _ROWS[row] + phases[0]) * draw.uniform(0.7, 1)
            made += np.sin(pitch * _COLUMNS[column] + phases[1])
            return 0.5 * made
        first = _C * 2 ** (_STEPS[self.name] / 12)
        overtones = draw.uniform(0, 1, 4) / np.arange(2, 6)
        made = np.sin(pitch * first + phases[0])
        for index, loud in enumerate(overtones):
            made += loud * np.sin(pitch * first * (index + 2) + phases[index + 1])
        fading: NDArray[np.float64] = made / (1 + overtones.sum()) * np.exp(-draw.uniform(0, 1.5) * at)
        return fading

    def caption(self) -> str:
        """What this is."""
        return f"The key {self.name}." if self.key else f"The note {list(NOTES)[self.name]}."

    def caption_in_tifinagh(self) -> str:
        """The digit or the note."""
        return f"{DIGITS[self.name] if self.key else list(NOTES.values())[self.name]}."

    def talk(self) -> Talk:
        """All that can be asked; the first two are captions, the last is a long answer."""
        told = "two tones, as of a telephone" if self.key else "one tone, as of a flute"
        kind = "digit" if self.key else "note"
        called = str(self.name) if self.key else list(NOTES)[self.name]
        return (
            ("What is this?", self.caption()),
            ("ⵎⴰ ⵢⴰⴷ?", self.caption_in_tifinagh()),
            ("What do you hear?", self.caption()),
            (f"Which {kind}?", f"{called}."),
            (
                "Tell me about it.",
                f"We hear {told}, and behind it there is noise: it is the {'key' if self.key else 'note'} {called}. "
                f"There is nothing else to hear, so what we hear is the {kind} {called}, and its name is "
                f"{self.caption_in_tifinagh()}",
            ),
        )


def held_out(index: int) -> tuple[Drawing, Image.Image, Tone, Samples]:
    """A picture and a sound that nothing is trained on, and what they are."""
    draw = np.random.default_rng(HELD_OUT + index)
    drawing, tone = Drawing.drawn(draw), Tone.drawn(draw)
    return drawing, drawing.picture(draw)[0], tone, tone.sound(draw, draw.uniform(*SECONDS))


def conversation(tokenizer: Any, kind: str, places: int, talk: Talk) -> tuple[list[int], list[int]]:
    """Return ids and labels of a talk about a picture or a sound that takes so many places."""
    place, name = (IMAGE, "image") if kind == "vision" else (SOUND, "audio")
    start, end = (f"<start_of_{name}>", f"<end_of_{name}>")
    messages: list[dict[str, Any]] = []
    ids: list[int] = []
    labels: list[int] = []
    said = ""
    for question, answer in talk:
        content = [{"type": name}] if not messages else []
        messages.append({"role": "user", "content": [*content, {"type": "text", "text": question}]})
        whole = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        whole = whole.replace(place, f"\n\n{start}{place * places}{end}\n\n")
        assert whole.startswith(said)
        new = tokenizer.encode(whole[len(said) :], add_special_tokens=False)
        told = [*tokenizer.encode(answer, add_special_tokens=False), END_OF_TURN]
        ids += new + told
        labels += [IGNORED] * len(new) + told
        messages.append({"role": "assistant", "content": answer})
        said = f"{whole}{answer}<end_of_turn>"
    return ids, labels


def _one(draw: np.random.Generator, names: Iterable[str]) -> str:
    listed = list(names)
    return listed[int(draw.integers(len(listed)))]


def _background(draw: np.random.Generator, paint: NDArray[np.int64]) -> NDArray[np.float64]:
    """Plain, from one colour to another, or stripes of two; paler than the shape, and never near its colour."""

    def colour() -> NDArray[np.float64]:
        while True:
            made: NDArray[np.float64] = draw.uniform(70, 190) + draw.normal(0, 25, 3)
            if np.linalg.norm(made - paint) > _APART:
                return made

    one = colour()
    kind = draw.integers(3)
    if kind == 0:
        return np.broadcast_to(one, (SIZE, SIZE, 3)).copy()
    angle = draw.uniform(0, 2 * np.pi)
    down, across = np.indices((SIZE, SIZE)) / SIZE - 0.5
    along = down * math.sin(angle) + across * math.cos(angle)
    other = _near(draw, one, paint)
    part = np.clip(along + 0.5, 0, 1) if kind == 1 else (along * draw.uniform(4, 14) % 1 < 0.5).astype(float)
    made: NDArray[np.float64] = one + part[..., None] * (other - one)
    return made


def _near(draw: np.random.Generator, one: NDArray[np.float64], paint: NDArray[np.int64]) -> NDArray[np.float64]:
    """Another colour, so that what lies between is away from the shape's as well."""
    while True:
        made: NDArray[np.float64] = np.clip(one + draw.normal(0, 30, 3), 40, 215)
        if np.linalg.norm(made - paint) > 0.75 * _APART:
            return made


def _outline(shape: str, draw: np.random.Generator) -> list[tuple[NDArray[np.float64], int]]:
    """Polygons [n, 2] in a circle of radius 1, and whether each is filled (255) or cut out (0)."""
    round_ = np.linspace(0, 2 * np.pi, 90, endpoint=False)
    turn = draw.uniform(0, 2 * np.pi)
    if shape == "circle":
        return [(_points(round_), 255)]
    if shape == "ring":
        return [(_points(round_), 255), (_points(round_) * draw.uniform(0.5, 0.68), 0)]
    if shape == "star":
        every = turn + np.arange(10) * np.pi / 5
        return [(_points(every) * np.where(np.arange(10) % 2, 0.42, 1.0)[:, None], 255)]
    if shape == "cross":
        half = math.atan(draw.uniform(0.25, 0.38))
        arms = np.arange(4)[:, None] * np.pi / 2 + turn + np.array([-half, half, np.pi / 4])
        inner = math.sqrt(2) * math.sin(half)
        return [(_points(arms.ravel()) * np.tile([1, 1, inner], 4)[:, None], 255)]
    sides = {"triangle": 3, "square": 4}[shape]
    return [(_points(turn + np.arange(sides) * 2 * np.pi / sides), 255)]


def _points(angles: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.stack([np.cos(angles), np.sin(angles)], -1)
