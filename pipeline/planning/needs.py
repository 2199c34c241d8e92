"""What each stage makes and needs, by a checkpoint's sizes.

Sizes follow from the configuration. Memory and time follow from constants, measured on two cores (AMD EPYC,
2026-11-29), and from a factor per stage that `python -m tools.plan_fit` finds in what real runs took
(fitted.toml). Seconds are told by what they are spent on, so that they can be scaled to another machine (speed.py).
They are right to a factor of two, which is what a plan is for.
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path

from pipeline.core.graph import makeable, needs
from pipeline.core.recipe import BASELINE, DECODER, SECTION_LIMIT, STEP
from pipeline.judge import corpus, mixed, screening, sensing
from pipeline.models import sizes
from pipeline.planning.model import Model
from pipeline.planning.speed import REFERENCE, Speed
from pipeline.quantize import hessians

_GIB = 1 << 30
_DOWNLOAD = 50e6
"""Bytes per second of a download: a guess, nothing is measured beforehand."""
_HASH = 1.2e9
"""Bytes per second of reading and hashing a stage's inputs."""
_CONVERT, _WRITE = 0.47e9, 1.4e9
"""Bytes per second of converting a file of weights and hashing it, and of handing it to the disk."""
_FLOPS = 1.2e11
"""Multiply-adds per second of a float32 forward on two cores, counted twice as is usual."""
_INTEGER_FLOPS = 4e11
"""The same of an int8 file in LiteRT."""
_BESIDE = 2.1
"""What the ladder of int8 takes over the time of its products: weights laid out and packed, probabilities over the
vocabulary."""
_IMPORTS = 4.0
"""Seconds until torch and transformers are there."""
_READ = 1.5e9
"""Parameters per second that golden lays out in float32 when it streams, and that a decoder reads per token."""
_PASS = 1024
"""Tokens of a pass of the reference over text."""
_CALL = 5e-3
"""Seconds that PyTorch takes for a layer whatever its size: small models are bound by that, token by token."""
_STEP_READ = 1.5e10
"""Bytes of weights per second that a decoder reads, token by token."""
_ROUNDED, _ROUNDED_COLUMN = 1.1e-8, 2.4e-11
"""Seconds per weight that GPTQ rounds on two cores, and per column of its span that takes up the error."""
_FACTORED = 4e-8
"""Seconds per value of a Hessian that GPTQ factors."""
_HALVES = 5.5
"""Bytes of memory per fp16 weight of a file that is run: LiteRT widens them, and packs what it has widened."""
_TOKENIZER_READ = 6e6
"""Bytes of tokenizer.json per second that bundling reads, proves and packs."""
_TOKENIZER, _TOKENIZERS = 20, 35
"""Bytes of memory per byte of tokenizer.json: loaded once, and with LiteRT-LM's own beside it."""
_ACTIVATIONS = 4096
"""Bytes of the reference's activations per column: of so many tokens at once, in float32."""
_TOWER = 30.0
"""Seconds of exporting an audio tower of twelve blocks, or a vision tower."""
_RUNS = 28
"""Sounds or pictures that a tower is judged on."""
_LENGTHS = {"audio": 4, "vision": 26}
"""Inputs of full length that all those come to: the reference's work goes by the lengths of sounds."""
_TRACED = 8e-3
"""Seconds per layer and sample of running a file whose every tensor is kept, for the ranges of static files."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """Seconds by what they are spent on: the four of `Speed`, and waiting for what no machine makes quicker."""

    products: float = 0.0
    copies: float = 0.0
    writes: float = 0.0
    calls: float = 0.0
    waits: float = 0.0

    def __add__(self, other: Work) -> Work:
        """Both, one after the other."""
        return Work(**{name: value + getattr(other, name) for name, value in vars(self).items()})

    def __mul__(self, factor: float) -> Work:
        """So many times as much."""
        return Work(**{name: value * factor for name, value in vars(self).items()})

    @property
    def seconds(self) -> float:
        """All of them."""
        total: float = sum(vars(self).values())
        return total

    def on(self, speed: Speed) -> Work:
        """The same work on a machine of that speed; this is what it takes on the constants' own."""
        faster = {name: value / getattr(speed, name) for name, value in vars(REFERENCE).items()}
        return Work(**{name: value * faster.get(name, 1.0) for name, value in vars(self).items()})


@dataclass(frozen=True, kw_only=True)
class Need:
    """What a stage makes and takes: bytes of all its files, of scratch and of anonymous memory, and work."""

    what: str
    size: int
    memory: float
    work: Work
    scratch: int = 0

    @property
    def seconds(self) -> float:
        """How long it takes."""
        return self.work.seconds

    def on(self, speed: Speed) -> Need:
        """The same on a machine of that speed."""
        return replace(self, work=self.work.on(speed))

    def times(self, seconds: float, memory: float) -> Need:
        """The same with so many times the seconds and the memory."""
        return replace(self, work=self.work * seconds, memory=self.memory * memory)


def fetch(model: Model) -> Need:
    """The download, hashing it, and merging an adapter: what was downloaded for that is scratch."""
    work = Work(calls=2 + model.stored / _HASH, waits=model.download / _DOWNLOAD) + _written(model.merged)
    size, scratch = (model.merged, model.download) if model.merged else (model.download, 0)
    used = (0.6 if model.merged else 0.2) * _GIB
    return Need(what="checkpoint", size=size, memory=used, work=work, scratch=scratch)


def _written(size: float) -> Work:
    """Converting so many bytes of weights, and writing them."""
    return Work(calls=size / _CONVERT, writes=size / _WRITE)


def golden(model: Model) -> Need:
    """Forward passes in float32, in memory if that fits; greedy text and the cache read all weights per token."""
    recipe, bundle = model.recipe, model.recipe.bundle
    windows = max(1, recipe.corpus.positions // corpus.POSITIONS_PER_WINDOW)
    kept = windows * corpus.POSITIONS_PER_WINDOW
    tokens = 2 * windows * recipe.corpus.window  # some again, in another number of threads
    steps = recipe.corpus.continuation
    if model.graphs != "bundle":
        shapes = recipe.shapes
        rows = corpus.family_rows(corpus.shape_cases(shapes.batch, shapes.sequence, shapes.padding))
        tokens += sum(count * sequence for (sequence, _), count in rows.items())
    if model.graphs != "step":
        kept += 2 * (model.conversation + bundle.decode) + bundle.positions
        tokens += 2 * model.conversation + bundle.positions
        steps = max(steps, bundle.continuation)
        if BASELINE in bundle.precisions:  # the reference's own cache is that bundle's measure
            steps += bundle.decode
            tokens += 2 * model.conversation
        steps += len(model.facts.towers) * math.prod(sensing.asked(bundle, model.facts.parameters))
    parameters = model.facts.parameters
    # Streamed, weights are laid out for every pass over the text; read they are at each step in either way.
    passes = steps + model.streamed * tokens / _PASS
    return Need(
        what="Hugging Face in fp32, " + ("streamed" if model.streamed else "loaded"),
        size=4 * kept * model.table[1],
        memory=_streamed(model) if model.streamed else 0.6 * _GIB + 4 * parameters,
        work=Work(
            calls=_IMPORTS + steps * _CALL * sizes.layers(model.shapes),
            products=2 * (_read_by_tokens(model) * tokens + _in_towers(model, _LENGTHS)) / _FLOPS,
            copies=passes * model.multiplied / _READ,
        ),
    )


def _read_by_tokens(model: Model) -> int:
    """Parameters that every token of the reference is multiplied with: hidden states are kept, so not the head's."""
    return model.multiplied - math.prod(model.table)


def _streamed(model: Model) -> float:
    """Memory of the reference that reads each matrix when it is needed: a place per shape, and activations."""
    shapes = {shape for name, shape in _linear(model).items() if name.startswith("layers.")}
    hidden, widest = model.table[1], max(shape[0] for shape in shapes)
    columns = 70 * hidden + 6 * widest
    return 0.25 * _GIB + _TOKENIZER * model.tokenizer + 4 * sum(map(math.prod, shapes)) + _ACTIVATIONS * columns


def moments(model: Model) -> Need:
    """A forward pass over the calibration text; a square of each input's width, span by span."""
    recipe = model.recipe
    tokens = recipe.corpus.hessian_windows * recipe.corpus.window
    size = sum(4 * width * hessians.span(width) for width in _inputs(model))
    work = 2 * tokens * (_read_by_tokens(model) + size / 8)  # of each square one half
    return Need(
        what="second moments of what layers read",
        size=size,
        memory=_streamed(model),
        work=Work(calls=_IMPORTS, products=work / _FLOPS) + _written(size),
    )


def _inputs(model: Model) -> Sequence[int]:
    """The widths of all that linear layers read; those that read the same count once."""
    linear = {(name.rsplit(".", 2)[0], shape[1]) for name, shape in _linear(model).items()}
    return [width for _, width in sorted(linear)]


def _linear(model: Model) -> Mapping[str, tuple[int, ...]]:
    """Shapes of the matrices of the layers and of the head."""
    return {
        name: shape
        for name, shape in model.shapes.items()
        if len(shape) == 2 and (name.startswith("layers.") or sizes.is_head(name, model.shapes))
    }


def graph(model: Model) -> Need:
    """Export: a matter of layers and signatures, not of parameters."""
    layers = sum(held.graph_layers for held in model.files.values())
    size = sum(held.bytes("fp32") - 4 * held.elements for name, held in model.files.items() if held.graph_layers)
    return Need(
        what="graphs without matrices",
        size=size,
        memory=0.36 * _GIB + sizes.EXPORT_BYTES * layers,
        work=Work(calls=3 + sizes.export_seconds(layers // sizes.layers(model.shapes), model.shapes)),
    )


def towers(model: Model) -> Need:
    """Export of the towers, then as the other files; each encoder is run once, as XNNPACK lays it out."""
    precisions = model.choice.tower_precisions
    size, runs = sum(map(model.towers, precisions)), len(precisions)
    work = Work(calls=3 + _TOWER * len(model.facts.towers), products=2 * runs * _in_towers(model) / _FLOPS)
    return Need(
        what=" ".join(f"{one.tower}_encoder {one.tower}_adapter" for one in model.facts.towers),
        size=size,
        scratch=max((model.towers(precision) for precision in precisions), default=0),  # as XNNPACK lays it out
        memory=0.75 * _GIB,
        work=work + _written(size + runs * model.towers(BASELINE) / 2),  # each is read in the checkpoint's 16 bits
    )


def _in_towers(model: Model, times: Mapping[str, int] | None = None) -> float:
    """Products of parameters at one run of each tower, or at so many."""
    taken = () if model.graphs == "step" else model.facts.towers
    return sum(float(one.parameters) * model.rows[one.tower] * (times[one.tower] if times else 1) for one in taken)


def _filled(model: Model, precision: str, *, sections: bool = True) -> Need:
    size = model.size(precision) if sections else model.files[STEP].bytes(precision)
    work = Work(calls=2.0) + _written(size + model.stored)
    taken = 0.2 * _GIB + 2 * model.cache  # each file is run once, with a cache in and a cache out
    scratch = 0
    # GPTQ is all that reads the Hessians of stage moments.
    if sections and "moments" in makeable(precision, model.choice):
        work += Work(products=_gptq(model))
        # What is rounded for the step graph is kept for the decoder, a byte per weight.
        scratch = sum(map(math.prod, _linear(model).values())) if model.graphs == "all" else 0
    if precision == "fp16":
        taken += _HALVES * model.multiplied
    what = " ".join(model.files if sections else [STEP])
    return Need(what=what, size=size, memory=taken, work=work, scratch=scratch)


def _int8(model: Model) -> Need:
    """As the other files; with a ladder, its first rung is run on some text, all lots of it, as where a limit is near.

    So is the reference, streamed, unless stage moments has done it.
    """
    filled, recipe = _filled(model, "int8"), model.recipe
    if not recipe.int8.climbs:
        return filled
    window, asked = recipe.corpus.window, "moments" not in needs("int8", model.choice)
    windows = sum(screening.lots(model.facts.parameters, window))
    run = 2 * windows * window * _read_by_tokens(model) * (asked / _FLOPS + 1 / _INTEGER_FLOPS)
    judged = windows * screening.judged_in(window)
    table = 2 * judged * math.prod(model.table) * (1 / _FLOPS + 1 / _INTEGER_FLOPS)
    logits = min(judged * model.table[0], screening.LOGITS)
    # The graph of chosen positions, and its weights as XNNPACK packs them.
    written, layers = 2 * model.multiplied, sizes.layers(model.shapes)
    return replace(
        filled,
        memory=max(filled.memory, asked * _streamed(model), 0.25 * _GIB + 0.018 * _GIB * layers + 24 * logits),
        work=filled.work + Work(calls=_IMPORTS, products=_BESIDE * (run + table)) + _written(written),
        scratch=filled.scratch + written,
    )


def _gptq(model: Model) -> float:
    """Seconds of rounding every matrix once, and of the factors that they are rounded by."""
    rounded = sum(
        math.prod(shape) * (_ROUNDED + _ROUNDED_COLUMN * hessians.span(shape[1])) for shape in _linear(model).values()
    )
    factored = sum(width * hessians.span(width) * _FACTORED for width in _inputs(model))
    return rounded + factored


def _static(model: Model) -> Need:
    """As the other files, and a run of the fp32 file over the calibration text."""
    filled, recipe = _filled(model, "int8", sections=False), model.recipe
    samples = recipe.int8.calibration_samples
    run = Work(
        products=2 * model.multiplied * samples * recipe.corpus.window / _FLOPS,
        calls=samples * _TRACED * sizes.layers(model.shapes),
    )
    return replace(filled, work=filled.work + run)


def bundle(model: Model) -> Need:
    """The sections in one file each, large ones divided; the tokenizer is loaded, which takes many times its bytes."""
    size = sum(model.size(precision, sections=True) + model.towers(precision) for precision in model.bundles)
    what = " ".join(f"{precision}.litertlm" for precision in model.bundles)
    divided = [_divided(model, precision) for precision in model.bundles]
    return Need(
        what=what,
        size=size,
        memory=0.19 * _GIB + _TOKENIZERS * model.tokenizer,
        work=Work(calls=3.0 + model.tokenizer / _TOKENIZER_READ) + _written(size + sum(divided)),
        scratch=max(divided, default=0),
    )


def _divided(model: Model, precision: str) -> int:
    """Bytes of the models that a bundle holds in two sections each."""
    limit = model.recipe.bundle.section_limit or SECTION_LIMIT
    sizes = (held.bytes(precision) for name, held in model.files.items() if name != STEP)
    return sum(size for size in sizes if limit < size <= 2 * limit)


def verify(model: Model) -> Need:
    """Each bundle speaks every position of the conversations and texts, then every prompt's continuation."""
    settings = model.recipe.bundle
    judged = 3 * settings.decode + settings.positions
    decoders = [model.files[DECODER].bytes(precision) for precision in model.bundles]
    decoded = judged + settings.prompts * settings.continuation
    work = Work(calls=_IMPORTS + 2 * sum(decoders) / _HASH, copies=sum(decoders) * decoded / _STEP_READ)
    if BASELINE in model.bundles:  # logits and words about pictures and sounds
        prompts, tokens = sensing.asked(settings, model.facts.parameters)
        narrowed = len(model.choice.tower_precisions) - 1  # whose KLD at the text's end is judged on all prompts
        heard = len(model.facts.towers) * (prompts * (1 + narrowed) + min(prompts, mixed.PROMPTS)) * tokens
        work += Work(copies=heard * model.files[DECODER].bytes(BASELINE) / _STEP_READ)
    for precision in model.bundles:
        flops = _FLOPS if precision == "fp32" else _INTEGER_FLOPS
        work += Work(calls=2.0, products=3 * 2 * model.multiplied * model.conversation / flops)
    if model.graphs != "bundle":
        work += Work(calls=15.0) + golden(model).work * 2
    # XNNPACK has room for the largest matrix while it lays weights out.
    taken = 0.35 * _GIB + 6.5 * model.cache + max(map(math.prod, _linear(model).values()))
    if model.graphs != "bundle":
        taken += 0.35 * _GIB + 4 * model.multiplied  # XNNPACK packs a step graph's weights into memory
    logits = 4 * judged * model.table[0] * len(decoders)
    runs = _RUNS * len(model.choice.tower_precisions) + settings.prompts
    work += Work(products=2 * _in_towers(model) * runs / _FLOPS)
    # Towers with weights as XNNPACK has them, and twice more where they are read back (bundling/replaced.py).
    scratch = max(decoders, default=0) + logits + 3 * model.towers(BASELINE)
    return Need(what="report.html", size=1 << 20, memory=taken, work=work, scratch=scratch)


def publish(model: Model) -> Need:
    """Links to the files."""
    size = sum(model.size(precision, sections=True) for precision in model.bundles)
    work = Work(calls=0.4 + size / _HASH)
    return Need(what="the folder to upload, by hard links", size=1 << 20, memory=0.05 * _GIB, work=work)


def page(model: Model) -> Need:
    """Links to the int8 sections, what they say at a few places, the tokenizer, the page with its runtime's builds."""
    size = model.size("int8", sections=True)
    work = Work(calls=2 + 2 * size / _HASH)
    taken = 0.19 * _GIB + _TOKENIZERS * model.tokenizer + 3 * model.cache
    scratch = model.files[DECODER].bytes("int8")  # weights as XNNPACK lays them out
    return Need(what="a page that runs int8", size=40 << 20, memory=taken, work=work, scratch=scratch)


def space(model: Model) -> Need:
    """Links to the page and copies of the papers."""
    work = Work(calls=0.4 + model.size("int8", sections=True) / _HASH)
    return Need(what="a Space, by hard links", size=1 << 20, memory=0.05 * _GIB, work=work)


MODELLED: Mapping[str, Callable[[Model], Need]] = {
    "fetch": fetch,
    "golden": golden,
    "moments": moments,
    "graph": graph,
    "towers": towers,
    "fp32": partial(_filled, precision="fp32"),
    "fp16": partial(_filled, precision="fp16"),
    "int8": _int8,
    "int4": partial(_filled, precision="int4"),
    "int8-static": _static,
    "int8-static16": _static,
    "int8-dynamic": partial(_filled, precision="int8", sections=False),
    "bundle": bundle,
    "verify": verify,
    "publish": publish,
    "page": page,
    "space": space,
}
"""By stage, before what real runs say of it."""
FITTED = Path(__file__).with_name("fitted.toml")


def _fitted(name: str, model: Model) -> Need:
    """What the stage needs, with the factors of its seconds and its memory."""
    own = factors().get(name, {})
    return MODELLED[name](model).times(own.get("seconds", 1.0), own.get("memory", 1.0))


@cache
def factors() -> dict[str, dict[str, float]]:
    """By stage the factors of its `seconds` and its `memory`."""
    return tomllib.loads(FITTED.read_text(encoding="utf-8"))


NEEDS: Mapping[str, Callable[[Model], Need]] = {name: partial(_fitted, name) for name in MODELLED}
