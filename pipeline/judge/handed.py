"""What LiteRT-LM hands to the decoder where a picture or a sound stands, in numbers, against Hugging Face (`probe.py`).

Equal words are a weak sign: a soft token that is a hundredth off seldom changes one. Here it shows, and so does a
vector at another position, one that sees too much or too little, and per-layer inputs of another token than 0.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.checkpoint.chat import Tokenizer
from pipeline.checkpoint.names import PER_LAYER, inner, text_name
from pipeline.checkpoint.reader import Checkpoint
from pipeline.core import log
from pipeline.core.recipe import Gate
from pipeline.judge import gates, probe
from pipeline.judge.gates import REFERENCE, Check, Measurement
from pipeline.judge.metrics import nmse
from pipeline.judge.pictures import pictures
from pipeline.judge.probe import Doubles, Given, Probe
from pipeline.judge.sensing import Answer, Floats, Kind, Reference
from pipeline.runtime.litert_lm import LmRuntime, Medium, content

LIMIT = Gate(nmse=1e-8)
"""Of what is handed over: the probe's own resolution is 2e-11."""
KINDS: Mapping[str, Kind] = {"vision": "image", "audio": "audio"}
_PICTURES = ("photograph", "noise, wide", "face, dark")
_RESIZED = _PICTURES[0]
"""The one that LiteRT-LM is given as it is, too, which is then called `_RAW`."""
_RAW = ""
_LENGTHS, _FEW = 12, 2
"""Sounds of so many lengths are asked about; of a large model so many of each kind."""
_ROUND = 128
_WIDTH = 256
"""Of a layer's input, where config.json does not say it: transformers' own."""
Pack = Callable[[Path, int, Path], None]
"""Writes to a file, its last argument, the judged bundle with another decoder and room for so many tokens."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What the runtime is held against.

    What golden stored of each tower, as a message's media by kind and name, the tokenizer, and how many tokens the
    model has; `per_layer` [layers, D] are token 0's. Of a `large` model little is read. Where soft tokens see the
    `whole` picture these are the lengths of the bundle's prefills, by which it is read.
    """

    towers: Mapping[str, Reference]
    medium: Callable[[Kind, str], Medium]
    tokenizer: Tokenizer
    vocabulary: int
    per_layer: Floats
    large: bool
    whole: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Handed:
    """The checks, and the NMSE of soft tokens of a picture that LiteRT-LM resizes itself; None without eyes."""

    checks: list[Check]
    resized: float | None = None


@dataclass(frozen=True)
class _Prompt:
    """How golden laid out a message with one medium: tokens before its vectors, tokens behind them, and what is asked.

    A sound's end is no part of what golden stored of it, and counts among those behind.
    """

    before: int
    behind: int
    question: str

    @classmethod
    def of(cls, reference: Reference) -> _Prompt:
        row: Answer = next(row for row in reference.answers if len(row.media) == 1)
        ((_, name),) = row.media
        before = row.prompt.index(-1)
        return cls(before, len(row.prompt) - before - len(reference.soft[name]), row.question)


@dataclass(frozen=True)
class _Read:
    """What was read of a medium beside what is right: of soft tokens, of per-layer inputs, of positions seen."""

    soft: tuple[Doubles, Doubles]
    per_layer: tuple[Doubles, Doubles]
    misplaced: int


def per_layer_inputs(checkpoint: Checkpoint) -> Floats:
    """Those [layers, D] of token 0, which stand where no token does; [0, 0] of a model that has none."""
    stored = next((name for name in checkpoint.tensors if text_name(inner(name)) == PER_LAYER), None)
    if stored is None:
        return np.zeros((0, 0), np.float32)
    nested = checkpoint.config.get("text_config")
    told = nested if isinstance(nested, dict) else checkpoint.config
    size = int(str(told.get("hidden_size_per_layer_input", _WIDTH)))
    row: Floats = checkpoint.rows(stored, 0, 1).reshape(-1, size) * np.float32(size**0.5)
    return row


def judge_handed(bundle: str, setting: Setting, pack: Pack, scratch: Path) -> Handed:
    """What the runtime hands to the decoder of a `bundle`, which is what it is called in checks."""
    checks, read, resized = list[Check](), list[_Read](), None
    for tower, reference in setting.towers.items():
        found = _of_tower(tower, reference, setting, pack, scratch)
        if own := found.pop(_RAW, None):
            resized = _error(own.soft)
        errors = {name: _error(one.soft) for name, one in found.items()}
        worst = max(errors, key=lambda name: errors[name])
        detail = f"{len(found)} inputs of {len({len(reference.soft[name]) for name in found})} lengths; worst: {worst}"
        checks += _check(bundle, f"soft tokens, {tower}", errors[worst], detail)
        read += found.values()
    if setting.per_layer.size:
        detail = f"{sum(len(one.per_layer[0]) for one in read)} sums"
        checks += _check(bundle, "per-layer inputs", max(_error(one.per_layer) for one in read), detail)
    rest = " or of their picture" if setting.whole else ""
    name = f"inputs with positions that see others than those before them{rest}, in LiteRT-LM"
    checks.append(gates.must_hold(bundle, name, sum(one.misplaced > 0 for one in read), len(read)))
    return Handed(checks=checks, resized=resized)


def _check(bundle: str, what: str, value: float, detail: str) -> list[Check]:
    name = f"worst NMSE of what LiteRT-LM hands to the decoder, {what}"
    figure = Measurement(metric="nmse", name=name, value=value, against=REFERENCE, detail=detail)
    return gates.judge(bundle, LIMIT, [figure])


def _error(pair: tuple[Doubles, Doubles]) -> float:
    """Infinite where nothing could be read, or something else than the zeros that were given."""
    found, wanted = pair
    if not wanted.any():  # as the per-layer inputs of a padding token that was never trained
        return 0.0 if len(found) and not found.any() else float("inf")
    return nmse(found, wanted)


def _names(tower: str, reference: Reference, *, large: bool) -> list[str]:
    """The pictures or sounds that are read: of sounds one of each length, from the shortest on."""
    names = [*_PICTURES]
    if tower == "audio":
        names = [*{len(rows): name for name, rows in sorted(reference.soft.items())}.values()]
        names = sorted(names, key=lambda name: len(reference.soft[name]))[:_LENGTHS]
    return names[:: -(-len(names) // _FEW)] if large else names


def _of_tower(tower: str, reference: Reference, setting: Setting, pack: Pack, scratch: Path) -> dict[str, _Read]:
    """What is read of a tower's pictures or sounds, by name."""
    prompt, names = _Prompt.of(reference), _names(tower, reference, large=setting.large)
    alphabet = _letters(setting)
    vectors = {name: reference.soft[name] for name in names}
    longest = prompt.before + max(map(len, vectors.values())) + prompt.behind + probe.DIGITS * (probe.VALUES + 1)
    prefills = setting.whole or (probe.PREFILL,)
    decoder = Probe(
        Given(start=prompt.before, vectors=vectors, per_layer=setting.per_layer, whole=bool(setting.whole)),
        -(-longest // _ROUND) * _ROUND + max(prefills),
        [*alphabet.values()],
        setting.vocabulary,
        prefills,
    )
    file, made = scratch / "probe.tflite", scratch / "probe.litertlm"
    decoder.graph().write(file)
    pack(file, decoder.length, made)
    found = {}
    with (
        tempfile.TemporaryDirectory(dir=scratch) as cache,  # repacked in memory a large tower would be gigabytes
        LmRuntime(made, cache=Path(cache), senses=[KINDS[tower]]) as runtime,
        log.progress(f"what LiteRT-LM hands to the decoder, {tower}", len(names), "inputs") as bar,
    ):
        given = {name: setting.medium(KINDS[tower], name) for name in names}
        if tower == "vision":
            given[_RAW] = Medium(kind="image", data=pictures()[_RESIZED])
        for name, medium in given.items():
            message = {"role": "user", "content": content(prompt.question, [medium])}
            with runtime.sense([message], probe.DIGITS * (probe.VALUES + 1) - 1, greedy=True) as session:
                text = "".join(session.decode())
            found[name] = _read(decoder, prompt, _RESIZED if name == _RAW else name, text, "".join(alphabet))
            bar.advance()
    made.unlink()  # as large as the towers, and the next one is too
    return found


def _letters(setting: Setting) -> dict[str, int]:
    """Letters that are tokens of their own."""
    known = setting.tokenizer.backend_tokenizer.get_vocab()
    single = sorted(
        (text, token)
        for text, token in known.items()
        if len(text) == 1 and text.isascii() and text.isalnum() and token < setting.vocabulary
    )
    return dict(single[: probe.BASE])


def _read(decoder: Probe, prompt: _Prompt, name: str, text: str, alphabet: str) -> _Read:
    """What an answer says of a picture or sound; where it is no answer of a probe, nothing."""
    nothing = np.zeros(0), np.zeros(0)
    if not set(text) <= set(alphabet) or len(text) < probe.DIGITS * probe.VALUES:
        return _Read(nothing, nothing, 1)
    expected = decoder.expected(name)
    places, found = decoder.read(text, alphabet, prompt.before + len(expected) + prompt.behind - 1)
    # Of a short sound some places are beyond its end.
    there = places[:, 0] < len(expected)
    places, found = places[there], found[there]
    wanted, column = expected[places[:, 0], places[:, 1]], places[:, 1]
    soft, seen = column < len(decoder.soft), column == decoder.seen
    step = decoder.step
    misplaced = int((np.abs(found - wanted)[seen] > step / 2).sum())
    inputs = ~soft & ~seen
    return _Read((found[soft], wanted[soft]), (found[inputs], wanted[inputs]), misplaced)
