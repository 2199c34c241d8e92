"""What all towers are held against: soft tokens of pictures or sounds, and greedy text about them in LiteRT-LM."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from pipeline.core import log, manifest, parallel
from pipeline.core.recipe import Bundle, Gate
from pipeline.judge import gates
from pipeline.judge.gates import REFERENCE, Check, Measurement
from pipeline.judge.metrics import nmse
from pipeline.judge.parity import TIE
from pipeline.runtime import litert
from pipeline.runtime.interface import Runner
from pipeline.runtime.litert_lm import Kind as Kind
from pipeline.runtime.litert_lm import LmRuntime, Medium, content

Floats = NDArray[np.float32]
QUESTIONS = ("What is this?", "What do you hear?", "Tell me about it.", "Who are you?", "ⵎⴰ ⵢⴰⴷ?")
"""What is asked about them."""
_SHOWN = 3
_LARGE, _FEW = 10**9, (2, 64)
"""Parameters from which on a model is asked fewer prompts, for fewer tokens."""
_STATES = "before the tokens of answer "


@dataclass(frozen=True, kw_only=True)
class Answer:
    """The reference's greedy text after a message of `media`, kind and name, and a `question`.

    The ids of the `prompt`, −1 where a vector of a medium stands; per token of the answer the lead in logits.
    """

    media: tuple[tuple[Kind, str], ...]
    question: str
    prompt: list[int]
    tokens: list[int]
    text: str
    margins: list[float]


@dataclass(frozen=True, kw_only=True)
class Reference:
    """What golden stored of a tower: soft tokens [n, H] by the name of a picture or sound, and the answers.

    Of each of these the final hidden states [n, H] before its tokens, with the reference's own cache.
    """

    soft: Mapping[str, Floats]
    answers: Sequence[Answer]
    states: Sequence[Floats]

    def store(self, folder: Path, tower: str) -> None:
        """Write it into golden's `folder`."""
        states = {f"{_STATES}{index:03}": rows for index, rows in enumerate(self.states)}
        save_file({**self.soft, **states}, folder / f"{tower}.safetensors")
        rows = [asdict(row) for row in self.answers]
        text = json.dumps(rows, ensure_ascii=False, indent=1) + "\n"
        manifest.write_atomically(folder / f"{tower}.json", text)

    @classmethod
    def stored(cls, folder: Path, tower: str) -> Reference:
        """What is in golden's `folder`."""
        rows = json.loads((folder / f"{tower}.json").read_text(encoding="utf-8"))
        answers = [Answer(**{**row, "media": tuple(map(tuple, row["media"]))}) for row in rows]
        stored = load_file(folder / f"{tower}.safetensors")
        states = [stored.pop(name) for name in sorted(stored) if name.startswith(_STATES)]
        return cls(soft=stored, answers=answers, states=states)


@dataclass(frozen=True, kw_only=True)
class Soft:
    """What was found of a tower's sections: checks, and by picture or sound the NMSE of its soft tokens in XNNPACK."""

    checks: list[Check]
    errors: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class Said:
    """LiteRT-LM's text about media of a message, beside the reference's."""

    tower: str
    media: tuple[tuple[Kind, str], ...]
    question: str
    expected: str
    text: str
    same: bool
    tie: bool


@dataclass(frozen=True, kw_only=True)
class Sensed:
    """What was found of a bundle's towers: `soft` by tower and precision, `vision-int8`; what it `said`, if asked.

    `resized` is the NMSE of soft tokens of a picture that LiteRT-LM resizes itself, where that was read.
    """

    checks: list[Check]
    soft: Mapping[str, Soft]
    said: Sequence[Said] = ()
    resized: float | None = None

    def facts(self) -> dict[str, object]:
        """The entry in the report; empty of a bundle without towers."""
        if not self.soft:
            return {}
        errors = {name: dict(one.errors) for name, one in self.soft.items()}
        rows = [asdict(row) for row in self.said]
        return {"senses": {"errors": errors, "said": rows, "resized": self.resized}}


def asked(bundle: Bundle, parameters: int) -> tuple[int, int]:
    """How many prompts about a tower's media a model of so many parameters answers, and the most tokens of each."""
    most = bundle.prompts, bundle.continuation
    return (min(most[0], _FEW[0]), min(most[1], _FEW[1])) if is_large(parameters) else most


def is_large(parameters: int) -> bool:
    """Whether a model of so many parameters is asked little: each question may read all weights anew."""
    return parameters >= _LARGE


def runner(file: Path, scratch: Path | None) -> Runner:
    """A section with XNNPACK, whose weights are repacked into `scratch`; without a folder in the built-in kernels."""
    threads = parallel.threads()
    if scratch is None:
        return litert.litert(file, xnnpack=False, threads=threads).get_signature_runner()
    # By the folder too, which is the precision's: LiteRT takes repacked weights that lie there, whatever they are of.
    packed = scratch / f"{file.parent.name}-{file.name}.packed"
    return litert.MappedModel(file, packed, threads).get_signature_runner(file.stem)


def judge_soft(
    tower: str,
    reference: Mapping[str, Floats],
    built_in: Collection[str],
    opened: Callable[[bool], Callable[[str], Floats]],
    gate: Gate | None,
    figures: Sequence[Measurement] = (),
) -> Soft:
    """The sections of a tower against Hugging Face: the soft tokens of the worst picture or sound.

    Args:
        tower: what its sections are called in checks, and their limits in the recipe: `vision-int8`.
        reference: what Hugging Face makes of each, by name.
        built_in: those that run in the built-in kernels too, which take ten times as long.
        opened: with XNNPACK or without, what makes soft tokens [n, H] by name.
        gate: the limits.
        figures: what else is known of the sections.
    """
    errors: dict[bool, dict[str, float]] = {True: {}, False: {}}
    counts = 0
    with log.progress(f"soft tokens, {tower}", len(reference) + len(built_in), "inputs") as bar:
        for xnnpack, names in ((True, tuple(reference)), (False, built_in)):
            sense = opened(xnnpack)
            for name in names:
                got, wanted = sense(name), reference[name]
                counts += len(got) != len(wanted)
                errors[xnnpack][name] = nmse(got, wanted) if len(got) == len(wanted) else math.inf
                bar.advance()
    for xnnpack, found in errors.items():
        kernels = "XNNPACK" if xnnpack else "built-in kernels"
        name, error = max(found.items(), key=lambda each: (math.isnan(each[1]), each[1]))
        detail = f"{len(found)} inputs; worst: {name}"
        figures = [
            *figures,
            _soft("nmse", f"worst NMSE of soft tokens, {kernels}", error, detail),
            _soft("snr", f"least SNR of soft tokens, {kernels}, dB", decibels(error), detail),
        ]
    held = gates.must_hold(tower, "inputs with another number of soft tokens", counts, len(reference))
    return Soft(checks=[*gates.judge(tower, gate, figures), held], errors=errors[True])


def _soft(metric: str, name: str, value: float, detail: str) -> Measurement:
    return Measurement(metric=metric, name=name, value=value, against=REFERENCE, detail=detail)


def decibels(error: float) -> float:
    """The signal-to-noise ratio of a normalised mean square error."""
    return -10 * math.log10(error) if error else math.inf


def judge_words(
    bundle: Path, given: Callable[[Kind, str], Medium], answers: Sequence[Answer], scratch: Path, tower: str
) -> tuple[Check, list[Said]]:
    """Greedy text about pictures and sounds, in LiteRT-LM; `given` are they, by kind and name."""
    said: list[Said] = []
    kinds = {kind for row in answers for kind, _ in row.media}
    with (
        tempfile.TemporaryDirectory(dir=scratch) as cache,
        LmRuntime(bundle, cache=Path(cache), senses=kinds) as runtime,
        log.progress(f"greedy text, {tower}", len(answers), "prompts") as bar,
    ):
        for row in answers:
            media = [given(kind, name) for kind, name in row.media]
            message = {"role": "user", "content": content(row.question, media)}
            with runtime.sense([message], len(row.tokens), greedy=True) as session:
                text = "".join(session.decode())
            same = text == row.text
            tie = not same and min(row.margins) < TIE
            beside = Said(
                tower=tower,
                media=row.media,
                question=row.question,
                expected=row.text,
                text=text,
                same=same,
                tie=tie,
            )
            said.append(beside)
            bar.advance()
    different = [
        f"{row.media[0][1]}: {row.text[:30]!r}, not {row.expected[:30]!r}"
        for row in said
        if not row.same and not row.tie
    ]
    ties = sum(row.tie for row in said)
    detail = f"{len(answers)} prompts, {sum(len(row.tokens) for row in answers)} tokens; {ties} part at a tie"
    detail += f"; e.g. {'; '.join(different[:_SHOWN])}" if different else ""
    name = f"greedy texts in LiteRT-LM that differ, {tower}"
    return gates.must_hold(f"bundle-{bundle.stem}", name, len(different), len(answers), detail), said
