"""How often a bundle names pictures and sounds that nobody trained on, and what fewer bits and another resizing cost.

    make bundle GRAPHS=bundle MODEL_ID=examples/tiny-gemma3n-senses
    python -m tools.bench_senses               # 120 of each; --count for others

In LiteRT-LM: "What is this?" and "ⵎⴰ ⵢⴰⴷ?" about pictures and sounds drawn by `senses_data`, by bundle; an answer is
right if it is the caption word for word. Pictures of another size are resized by us, as `make run` does it, or left to
the runtime. Then, through the float32 text model's sections, the mean KL divergence over every token of the captions:
towers in int8 against those in float32, and pixels as the runtime's own resizing makes them (`runtime_resized`, held
against the runtime in tests/eyes) against ours.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from transformers import AutoTokenizer

from pipeline.core import log
from pipeline.core.recipe import PROJECT
from pipeline.judge.hearing import Ears
from pipeline.judge.seeing import Eyes
from pipeline.judge.sensing import Floats, runner
from pipeline.runtime.litert_lm import Kind, LmRuntime, Medium, content
from pipeline.runtime.picture import Pixels, Sight
from pipeline.runtime.sections import Conversation, Sections
from pipeline.runtime.sound import Hearing, Samples
from tools.senses_data import Drawing, Talk, conversation, held_out

MODEL = "tiny-gemma3n-senses"
SEES, HEARS = Sight(size=256), Hearing(rate=16_000, frame=512, hop=160)
OTHER = (448, 336)
"""Width and height of pictures that have to be resized."""
CAPTIONS = 2
"""So many of what can be asked ask for a caption."""
Doubles = NDArray[np.float64]


@dataclass(frozen=True)
class Shown:
    """A picture or sound as it is given to the runtime, and what is said of it."""

    kind: Kind
    name: str
    data: bytes
    talk: Talk


def shown(count: int) -> Iterator[Shown]:
    """Held-out pictures and sounds: as they are; and pictures of another size, resized by us and not."""
    for index in range(count):
        drawing, picture, tone, sound = held_out(index)
        large = np.asarray(larger(picture))
        yield Shown("image", "pictures", SEES.packed(np.asarray(picture)), drawing.talk())
        yield Shown("image", "pictures of another size", SEES.packed(SEES.fitted(large)), drawing.talk())
        yield Shown("image", "the same, resized by LiteRT-LM", SEES.packed(large), drawing.talk())
        name = "keys" if tone.key else "notes"
        yield Shown("audio", name, HEARS.packed(HEARS.fitted(sound)), tone.talk())


def larger(picture: Image.Image) -> Image.Image:
    """A picture in another size."""
    return picture.resize(OTHER, Image.Resampling.BICUBIC)


def named(bundle: Path, count: int) -> dict[str, list[bool]]:
    """Which captions a bundle gives word for word, by what was shown and the question."""
    right: dict[str, list[bool]] = {}
    with (
        tempfile.TemporaryDirectory() as cache,
        LmRuntime(bundle, cache=Path(cache), senses={"image", "audio"}) as runtime,
        log.progress(f"captions, {bundle.stem}", 4 * CAPTIONS * count, "answers") as bar,
    ):
        for each in shown(count):
            for question, answer in each.talk[:CAPTIONS]:
                message = {"role": "user", "content": content(question, [Medium(kind=each.kind, data=each.data)])}
                with runtime.sense([message], 48, greedy=True) as session:
                    said = "".join(session.decode())
                right.setdefault(f"{each.name}: {question}", []).append(said == answer)
                if each.kind == "image" and question == each.talk[0][0]:  # but for the size
                    right.setdefault(f"{each.name}: colour and shape", []).append(
                        said.split()[-2:] == answer.split()[-2:]
                    )
                bar.advance()
    return right


def runtime_resized(pixels: Pixels, size: int) -> Pixels:
    """`pixels` as LiteRT-LM 0.18.1 resizes them: by Catmull and Rom's cubic in linear light."""
    light = _linear(pixels.astype(np.float64) / 255)
    down = _weights(pixels.shape[0], size) @ light.reshape(pixels.shape[0], -1)
    across = down.reshape(size, pixels.shape[1], 3).swapaxes(0, 1).reshape(pixels.shape[1], -1)
    made = (_weights(pixels.shape[1], size) @ across).reshape(size, size, 3).swapaxes(0, 1)
    return np.rint(_encoded(np.clip(made, 0, 1)) * 255).astype(np.uint8)


def _linear(value: Doubles) -> Doubles:
    """Of sRGB (IEC 61966-2-1)."""
    return np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)


def _encoded(light: Doubles) -> Doubles:
    """As sRGB."""
    return np.where(light <= 0.0031308, light * 12.92, 1.055 * light ** (1 / 2.4) - 0.055)


def _weights(before: int, after: int) -> Doubles:
    """Which of `before` pixels each of `after` is made of [after, before]: Catmull and Rom's cubic, wider if fewer."""
    scale = max(1.0, before / after)
    centres = (np.arange(after) + 0.5) * before / after - 0.5
    reach = int(np.ceil(2 * scale)) + 1
    made = np.zeros((after, before))
    for shift in range(-reach, reach + 1):
        places = np.rint(centres).astype(int) + shift
        far = np.abs(places - centres) / scale
        near, tail = (1.5 * far - 2.5) * far**2 + 1, ((-0.5 * far + 2.5) * far - 4) * far + 2
        weight = np.where(far < 1, near, np.where(far < 2, tail, 0.0))
        np.add.at(made, (np.arange(after), np.clip(places, 0, before - 1)), weight)
    made /= made.sum(axis=1, keepdims=True)
    return made


@dataclass(frozen=True)
class Towers:
    """The sections of a precision."""

    eyes: Eyes
    ears: Ears
    end: Floats

    @classmethod
    def opened(cls, folder: Path, scratch: Path) -> Towers:
        """Those in a folder."""
        end = next(iter(runner(folder / "end_of_audio.tflite", None)().values()))
        assert isinstance(end, np.ndarray)
        return cls(Eyes(folder, SEES, scratch), Ears(folder, HEARS, scratch), end[0])

    def see(self, pixels: Pixels, scratch: Path) -> Floats:
        """[257, H] of pixels of the encoder's size."""
        file = scratch / "seen.png"
        file.write_bytes(SEES.packed(pixels))
        return self.eyes.see(file)

    def hear(self, sound: Samples) -> Floats:
        """[n + 1, H] of a sound."""
        rows: Floats = np.concatenate([self.ears.hear(sound), self.end])
        return rows


def log_probabilities(sections: Sections, ids: Sequence[int], first: int, vectors: Floats, answer: int) -> Doubles:
    """[answer, V], of so many last tokens of ids: what stands from place `first` on is `vectors`."""
    read: list[int | NDArray[np.float32]] = [*ids[:first], *vectors, *ids[first + len(vectors) :]]
    told, conversation_ = len(read) - answer, Conversation(sections)
    for start in range(0, told - 1, 32):
        conversation_.prefill(read[start : min(start + 32, told - 1)])
    logits = np.stack([conversation_.decode(token) for token in read[told - 1 : -1]]).astype(np.float64)
    logits -= logits.max(axis=-1, keepdims=True)
    made: Doubles = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    return made


def divergence(right: Doubles, other: Doubles) -> list[float]:
    """KL(right || other) at each position."""
    return [float(value) for value in (np.exp(right) * (right - other)).sum(axis=-1)]


def costs(root: Path, count: int) -> dict[str, list[float]]:
    """The KL divergence at each token of captions, by what is changed."""
    tokenizer = AutoTokenizer.from_pretrained(root / "fetch" / "checkpoint")
    sections, found = Sections(root / "fp32"), dict[str, list[float]]()
    with tempfile.TemporaryDirectory() as folder, log.progress("captions' logits", count, "pairs") as bar:
        scratch = Path(folder)
        exact, few = (Towers.opened(root / "towers" / precision, scratch) for precision in ("fp32", "int8"))
        for index in range(count):
            drawing, picture, tone, sound = held_out(index)
            large = np.asarray(larger(picture))
            ours, theirs = SEES.fitted(large), runtime_resized(large, SEES.size)
            for name, right, other, thing in (
                ("int8, pictures", exact.see(ours, scratch), few.see(ours, scratch), drawing),
                ("int8, sounds", exact.hear(sound), few.hear(sound), tone),
                ("LiteRT-LM's resizing", exact.see(ours, scratch), exact.see(theirs, scratch), drawing),
            ):
                for each in thing.talk()[:CAPTIONS]:
                    kind = "vision" if isinstance(thing, Drawing) else "audio"
                    ids, labels = conversation(tokenizer, kind, len(right) - 1, [each])
                    first = ids.index(2014 if kind == "vision" else 2015) + 1
                    said = partial(log_probabilities, sections, ids, first, answer=sum(label >= 0 for label in labels))
                    found.setdefault(name, []).extend(divergence(said(vectors=right), said(vectors=other)))
            bar.advance()
    return found


def main() -> int:
    """Measure and print JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--artifacts", type=Path, default=PROJECT / "artifacts", help="where the model's stages are")
    parser.add_argument("--count", type=int, default=120, help="pictures and sounds (default 120)")
    arguments = parser.parse_args()
    root = arguments.artifacts / MODEL
    bundles = sorted((root / "bundle").glob("*.litertlm"))
    right = {bundle.stem: named(bundle, arguments.count) for bundle in bundles}
    told = {name: {each: [sum(row), len(row)] for each, row in sorted(rows.items())} for name, rows in right.items()}
    cost = {
        name: {"mean": float(np.mean(values)), "worst": float(np.max(values)), "tokens": len(values)}
        for name, values in costs(root, arguments.count).items()
    }
    log.answer(json.dumps({"right": told, "KL divergence": cost}, indent=2, ensure_ascii=False))
    return 0


if __name__ == "__main__":
    sys.exit(main())
