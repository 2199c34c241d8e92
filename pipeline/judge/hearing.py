"""Ears held against Hugging Face: soft tokens of sounds, and greedy text after prompts with sounds in LiteRT-LM."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from pipeline.core import log, manifest, parallel
from pipeline.core.recipe import Gate
from pipeline.judge import gates
from pipeline.judge.gates import REFERENCE, Check, Measurement
from pipeline.judge.parity import TIE
from pipeline.judge.sounds import sounds
from pipeline.runtime import litert
from pipeline.runtime.interface import Runner
from pipeline.runtime.litert_lm import LmRuntime, spoken
from pipeline.runtime.sound import Hearing, Samples

Floats = NDArray[np.float32]
TOWER = "audio-fp32"
"""What the sections of the tower are called in checks, and their limits in the recipe."""
SOFT, ANSWERS = "sounds.safetensors", "sounds.json"
_BUILT_IN = ("silence", "the shortest", "speech, 1.88 s")
"""Sounds that run in the built-in kernels too, which take ten times as long."""
_SHOWN = 3
_PARTS = ("encoder", "adapter")


@dataclass(frozen=True, kw_only=True)
class Heard:
    """The reference's greedy text after a message of `sounds` (by name) and a `question`.

    `prompt_tokens` with the places of the sounds; per token of the answer the lead in logits.
    """

    sounds: tuple[str, ...]
    question: str
    prompt_tokens: int
    tokens: list[int]
    text: str
    margins: list[float]


@dataclass(frozen=True, kw_only=True)
class Reference:
    """What golden stored of sounds: soft tokens [n, H] by name, and the answers."""

    soft: Mapping[str, Floats]
    answers: Sequence[Heard]

    def store(self, folder: Path) -> None:
        """Write it into golden's `folder`."""
        save_file(dict(self.soft), folder / SOFT)
        rows = [asdict(row) for row in self.answers]
        text = json.dumps(rows, ensure_ascii=False, indent=1) + "\n"
        manifest.write_atomically(folder / ANSWERS, text)

    @classmethod
    def stored(cls, folder: Path) -> Reference:
        """What is in golden's `folder`."""
        rows = json.loads((folder / ANSWERS).read_text(encoding="utf-8"))
        answers = [Heard(**{**row, "sounds": tuple(row["sounds"])}) for row in rows]
        return cls(soft=load_file(folder / SOFT), answers=answers)


def judge_tower(
    sections: Path, hearing: Hearing, reference: Reference, gate: Gate | None, scratch: Path
) -> list[Check]:
    """The sections of the tower in the folder `sections` against Hugging Face: the worst sound's soft tokens.

    `scratch` is where repacked weights may lie.
    """
    worst = {True: (0.0, ""), False: (0.0, "")}
    counts = 0
    given = sounds()
    with log.progress("soft tokens of sounds", len(given) + len(_BUILT_IN), "sounds") as bar:
        for xnnpack, names in ((True, tuple(given)), (False, _BUILT_IN)):
            ears = _Ears(sections, hearing, scratch if xnnpack else None)
            for name in names:
                got, wanted = ears.hear(given[name]), reference.soft[name]
                counts += len(got) != len(wanted)
                error = _nmse(got, wanted) if len(got) == len(wanted) else np.inf
                worst[xnnpack] = max(worst[xnnpack], (error, name))
                bar.advance()
    figures = [
        Measurement(
            metric="nmse",
            name=f"worst NMSE of soft tokens, {'XNNPACK' if xnnpack else 'built-in kernels'}",
            value=float(error),
            against=REFERENCE,
            detail=f"{len(given) if xnnpack else len(_BUILT_IN)} sounds; worst: {name}",
        )
        for xnnpack, (error, name) in worst.items()
    ]
    held = gates.must_hold(TOWER, "sounds with another number of soft tokens", counts, len(given))
    return [*gates.judge(TOWER, gate, figures), held]


class _Ears:
    """The encoder and the adapter as the runtime runs them."""

    def __init__(self, sections: Path, hearing: Hearing, scratch: Path | None) -> None:
        """With XNNPACK, whose weights are repacked into `scratch`; without a folder in the built-in kernels."""
        self._hearing = hearing
        self._encoder, self._adapter = (self._open(sections / f"audio_{part}.tflite", scratch) for part in _PARTS)
        self._most = int(self._encoder.get_input_details()["src_inputs"]["shape"][1])

    @staticmethod
    def _open(file: Path, scratch: Path | None) -> Runner:
        threads = parallel.threads()
        if scratch is None:
            return litert.litert(file, xnnpack=False, threads=threads).get_signature_runner()
        return litert.MappedModel(file, scratch / f"{file.name}.packed", threads).get_signature_runner(file.stem)

    def hear(self, sound: Samples) -> Floats:
        """The soft tokens [n, H] that become positions of a prompt."""
        frames, mask = self._hearing.frames(sound, self._most)
        features = self._encoder(src_inputs=frames, mask=mask)
        made = next(iter(self._adapter(**features).values()))
        there = features["mask"]
        assert isinstance(made, np.ndarray)
        assert isinstance(there, np.ndarray)
        rows: Floats = made[0, : 1 + int(np.flatnonzero(there[0])[-1])]
        return rows


def _nmse(got: Floats, wanted: Floats) -> float:
    wide = wanted.astype(np.float64)
    return float(((got - wide) ** 2).sum() / (wide**2).sum())


def judge_words(bundle: Path, hearing: Hearing, answers: Sequence[Heard], scratch: Path) -> Check:
    """Greedy text after prompts with sounds, in LiteRT-LM."""
    given, different = sounds(), []
    ties = 0
    with tempfile.TemporaryDirectory(dir=scratch) as cache, LmRuntime(bundle, cache=Path(cache), hears=True) as runtime:
        for row in answers:
            played = [hearing.packed(hearing.fitted(given[name])) for name in row.sounds]
            message = {"role": "user", "content": spoken(row.question, played)}
            with runtime.hear([message], len(row.tokens), greedy=True) as session:
                text = "".join(session.decode())
            if text != row.text:
                tie = min(row.margins) < TIE
                ties += tie
                different += [] if tie else [f"{row.sounds[0]}: {text[:30]!r}, not {row.text[:30]!r}"]
    detail = f"{len(answers)} prompts, {sum(len(row.tokens) for row in answers)} tokens; {ties} part at a tie"
    detail += f"; e.g. {'; '.join(different[:_SHOWN])}" if different else ""
    name = "greedy texts about sounds in LiteRT-LM that differ"
    return gates.must_hold(f"bundle-{bundle.stem}", name, len(different), len(answers), detail)
