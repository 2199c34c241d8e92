"""What each stage makes and needs, by a checkpoint's sizes.

Sizes follow from the configuration. Memory and time follow from constants, measured on two cores (AMD EPYC, 2026-11-29,
`python -m tools.planned`) with the shipped model, Gemma 3 270M and the random checkpoints of
`tools/make_random_checkpoint.py`. They are right to a factor of two, which is what a plan is for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from pipeline.core import memory
from pipeline.core.graph import Choice, makeable
from pipeline.core.recipe import DECODER, STEP
from pipeline.judge import corpus
from pipeline.models import sizes
from pipeline.planning.model import Model
from pipeline.quantize import hessians

_GIB = 1 << 30
_DOWNLOAD = 50e6
"""Bytes per second of a download: a guess, nothing is measured beforehand."""
_HASH = 0.8e9
"""Bytes per second of reading and hashing a stage's inputs."""
_WRITE = 0.35e9
"""Bytes per second of writing a file of weights and hashing it, conversion included."""
_FLOPS = 1.2e11
"""Multiply-adds per second of a float32 forward on two cores, counted twice as is usual."""
_INTEGER_FLOPS = 4e11
"""The same of an int8 file in LiteRT."""
_IMPORTS = 4.0
"""Seconds until torch and transformers are there."""
_READ = 1.5e9
"""Parameters per second that golden lays out in float32 when it streams, and that a decoder reads per token."""
_CALL = 5e-3
"""Seconds that PyTorch takes for a layer whatever its size: small models are bound by that, token by token."""
_STEP_READ = 1.5e10
"""Bytes of weights per second that a decoder reads, token by token."""
_ROUNDED, _ROUNDED_COLUMN = 1.6e-8, 2.5e-11
"""Seconds per weight that GPTQ rounds on two cores, and per column of its span that takes up the error."""
_FACTORED = 7e-8
"""Seconds per value of a Hessian that GPTQ factors."""
_HALVES = 5.5
"""Bytes of memory per fp16 weight of a file that is run: LiteRT widens them, and packs what it has widened."""
_TRACED = 8e-3
"""Seconds per layer and sample of running a file whose every tensor is kept, for the ranges of static files."""


@dataclass(frozen=True, kw_only=True)
class Need:
    """What a stage makes and takes: bytes of all its files, of scratch and of anonymous memory, and seconds."""

    what: str
    size: int
    memory: float
    seconds: float
    scratch: int = 0


def fetch(model: Model) -> Need:
    """The download, hashing it, and merging an adapter: what was downloaded for that is scratch."""
    seconds = 2 + model.download / _DOWNLOAD + model.stored / _HASH + model.merged / _WRITE
    size, scratch = (model.merged, model.download) if model.merged else (model.download, 0)
    used = (0.6 if model.merged else 0.2) * _GIB
    return Need(what="checkpoint", size=size, memory=used, seconds=seconds, scratch=scratch)


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
        tokens += 4 * model.conversation + bundle.positions
        steps = max(steps, bundle.continuation) + bundle.decode
    parameters = model.facts.parameters
    streamed = memory.must_stream(parameters)
    return Need(
        what="Hugging Face in fp32, " + ("streamed" if streamed else "loaded"),
        size=4 * kept * model.table[1],
        memory=_streamed(model) if streamed else 0.6 * _GIB + 4 * parameters,
        seconds=_IMPORTS
        + 2 * _read_by_tokens(model) * tokens / _FLOPS
        + steps * (model.multiplied / _READ + _CALL * sizes.layers(model.shapes)),
    )


def _read_by_tokens(model: Model) -> int:
    """Parameters that every token of the reference is multiplied with: hidden states are kept, so not the head's."""
    return model.multiplied - math.prod(model.table)


def _streamed(model: Model) -> float:
    """Memory of the reference that reads each matrix when it is needed."""
    return (0.7 + 0.018 * sizes.layers(model.shapes)) * _GIB


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
        seconds=_IMPORTS + work / _FLOPS + size / _WRITE,
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
        memory=0.4 * _GIB + sizes.EXPORT_BYTES * layers,
        seconds=3 + sizes.export_seconds(layers // sizes.layers(model.shapes), layers),
    )


def _filled(model: Model, precision: str, *, sections: bool = True) -> Need:
    size = model.size(precision) if sections else model.files[STEP].bytes(precision)
    seconds = 2 + (size + model.stored) / _WRITE
    taken = 0.2 * _GIB + 2 * model.cache  # each file is run once, with a cache in and a cache out
    # GPTQ is all that reads the Hessians of stage moments.
    if sections and "moments" in makeable(precision, Choice(recipe=model.recipe, graphs=model.graphs)):
        seconds += _gptq(model)
    if precision == "fp16":
        taken += _HALVES * model.multiplied
    return Need(what=" ".join(model.files if sections else [STEP]), size=size, memory=taken, seconds=seconds)


def _gptq(model: Model) -> float:
    """Seconds of rounding every graph's weights, and of the factors that they are rounded by."""
    rounded = sum(
        math.prod(shape) * (_ROUNDED + _ROUNDED_COLUMN * hessians.span(shape[1])) for shape in _linear(model).values()
    )
    factored = sum(width * hessians.span(width) * _FACTORED for width in _inputs(model))
    return (rounded + factored) * len([name for name, held in model.files.items() if held.graph_layers])


def _static(model: Model) -> Need:
    """As the other files, and a run of the fp32 file over the calibration text."""
    filled, recipe = _filled(model, "int8", sections=False), model.recipe
    samples = recipe.int8.calibration_samples
    run = 2 * model.multiplied * samples * recipe.corpus.window / _FLOPS + samples * _TRACED * sizes.layers(
        model.shapes
    )
    return replace(filled, seconds=filled.seconds + run)


def bundle(model: Model) -> Need:
    """The sections in one file each; the tokenizer is loaded, which takes many times its bytes."""
    size = sum(model.size(precision, sections=True) for precision in model.bundles)
    what = " ".join(f"{precision}.litertlm" for precision in model.bundles)
    return Need(what=what, size=size, memory=0.28 * _GIB + 20 * model.tokenizer, seconds=3 + size / _WRITE)


def verify(model: Model) -> Need:
    """Each bundle speaks every position of the conversations and texts, then every prompt's continuation."""
    settings = model.recipe.bundle
    judged = 3 * settings.decode + settings.positions
    decoders = [model.files[DECODER].bytes(precision) for precision in model.bundles]
    decoded = judged + settings.prompts * settings.continuation
    seconds = _IMPORTS + sum(decoders) * (decoded / _STEP_READ + 2 / _HASH)
    for precision in model.bundles:
        flops = _FLOPS if precision == "fp32" else _INTEGER_FLOPS
        seconds += 2.0 + 3 * 2 * model.multiplied * model.conversation / flops
    if model.graphs != "bundle":
        seconds += 25.0 + 2 * golden(model).seconds
    taken = 0.35 * _GIB + 6.5 * model.cache
    if model.graphs != "bundle":
        taken += 0.35 * _GIB + 4 * model.multiplied  # XNNPACK packs a step graph's weights into memory
    logits = 4 * judged * model.table[0] * len(decoders)
    return Need(
        what="report.html", size=1 << 20, memory=taken, seconds=seconds, scratch=max(decoders, default=0) + logits
    )


def publish(model: Model) -> Need:
    """Links to the files."""
    size = sum(model.size(precision, sections=True) for precision in model.bundles)
    return Need(
        what="the folder to upload, by hard links", size=1 << 20, memory=0.05 * _GIB, seconds=0.4 + size / _HASH
    )


def page(model: Model) -> Need:
    """Links to the int8 sections, the tokenizer, and the page with three builds of its runtime."""
    size = model.size("int8", sections=True)
    return Need(what="a page that runs int8", size=30 << 20, memory=0.6 * _GIB, seconds=4 + size / _HASH)


NEEDS: Mapping[str, Callable[[Model], Need]] = {
    "fetch": fetch,
    "golden": golden,
    "moments": moments,
    "graph": graph,
    "fp32": partial(_filled, precision="fp32"),
    "fp16": partial(_filled, precision="fp16"),
    "int8": partial(_filled, precision="int8"),
    "int4": partial(_filled, precision="int4"),
    "int8-static": _static,
    "int8-static16": _static,
    "int8-dynamic": partial(_filled, precision="int8", sections=False),
    "bundle": bundle,
    "verify": verify,
    "publish": publish,
    "page": page,
}
