"""The ladder of int8: ways to make a model's files, from what its recipe says up, of which the first good one is taken.

A recipe is tuned on the models that there were. Another model may have channels far beyond the rest, and lose what
those did not lose (docs/experiments.md). So each rung is built as stage int8 builds it, run in LiteRT on calibration
text, and held against Hugging Face's model in fp32; a rung that does not keep the recipe's limits gives way to the
next, which costs more at run time. Text is read lot by lot until the interval is clear, a bounded number of lots, and
logits are there at judged positions alone. Nothing of the model's size is in memory: the reference streams, and LiteRT
maps what it packs.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Protocol

import numpy as np

from pipeline.checkpoint import chat
from pipeline.checkpoint.reader import Checkpoint
from pipeline.core import facts, log, memory, parallel
from pipeline.core.errors import UsageError
from pipeline.core.recipe import Gate, Graphs, Int8, Recipe, StepLimits
from pipeline.core.toml import Pattern
from pipeline.judge import corpus, metrics, screening
from pipeline.judge.corpus import Positions, Tokens
from pipeline.judge.metrics import Estimate
from pipeline.judge.reference import Floats, Head
from pipeline.models import build
from pipeline.quantize import gptq, hessians, int8
from pipeline.runtime.litert import OUTPUT, SIGNATURE, MappedModel, MappedRunner
from pipeline.tflite.graph import Graph

FIRST = "recipe"
"""The rung that is the recipe's section as it stands."""
_STRENGTH, _FEW, _ALL = 0.5, (Pattern("down_proj"), Pattern("head")), (Pattern("."),)
"""Of equalization; the layers whose activations cost most in Gemma 3; all layers."""
_STATES = 1024 * 640
"""Numbers of hidden states that the reference reads at once: a pass takes time of its own, and activations memory."""


class Reference(Protocol):
    """Hugging Face's model, streamed (reference/model.py)."""

    @property
    def tokenizer(self) -> chat.Tokenizer: ...
    @property
    def cap(self) -> float | None: ...

    def hidden(self, ids: Tokens, mask: Tokens) -> Floats:
        """Final hidden states [N, L, H] of windows and masks [N, L]."""


class Kept:
    """What the reference made of windows that stage moments let it read, in the stage's `folder`."""

    def __init__(self, folder: Path) -> None:
        self.windows: Tokens = np.load(folder / hessians.WINDOWS)
        self._states: Floats = np.load(folder / hessians.STATES, mmap_mode="r")
        self._places = {window.tobytes(): place for place, window in enumerate(self.windows)}

    def hidden(self, windows: Tokens) -> Floats:
        """Final hidden states [N, L, H] of some of them [N, L]."""
        return self._states[[self._places[window.tobytes()] for window in windows]]


@dataclass(frozen=True, kw_only=True)
class Rung:
    """A way to make int8 files, by its name."""

    name: str
    section: Int8


def rungs(given: Int8) -> list[Rung]:
    """What is tried for a recipe's section, in this order; a rung that changes nothing is left out."""
    even = replace(given, equalize=max(given.equalize, _STRENGTH))
    turned = replace(even, rotate=_ALL)
    named = given.int8x2 if _ALL[0] in given.int8x2 else tuple(dict.fromkeys((*given.int8x2, *_FEW)))
    few = replace(turned, int8x2=named)
    steps = {FIRST: given, "equalize": even, "rotate": turned, "int8x2": few, "int8x2-all": replace(few, int8x2=_ALL)}
    found: dict[Int8, str] = {}
    for name, section in steps.items():
        found.setdefault(section, name)
    return [Rung(name=name, section=section) for section, name in found.items()]


NAMES = (FIRST, "equalize", "rotate", "int8x2", "int8x2-all")
"""All rungs, of which `rungs` leaves out some."""


@dataclass(frozen=True, kw_only=True)
class Figures:
    """What a rung is judged by."""

    positions: int
    kld: Estimate
    top1: Estimate
    perplexity_ratio: Estimate

    @classmethod
    def of(cls, scores: screening.Sample, blocks: metrics.Indices) -> Figures:
        """Of positions in windows `blocks` [n]."""
        mean = partial(metrics.bootstrap, draws=metrics.Draws.of(blocks))
        return cls(
            positions=len(blocks),
            kld=mean(lambda means: means[..., 0], [scores.kld]),
            top1=mean(lambda means: means[..., 0], [scores.top1]),
            perplexity_ratio=mean(
                lambda means: np.exp(means[..., 0] - means[..., 1]), [scores.nll, scores.reference_nll]
            ),
        )


@dataclass(frozen=True, kw_only=True)
class Limit:
    """A gate that the files will have to pass, its limit of the KLD, and on how many positions it will be judged."""

    gate: Gate
    kld: float
    positions: int

    def kept(self, found: Figures) -> bool | None:
        """Whether a rung keeps the limits for sure; None where an interval does not tell."""
        told = [_within(each, limit, sign) for each, limit, sign in self._limited(found)]
        return False if False in told else None if None in told else True

    def likely(self, found: Figures) -> bool:
        """Whether the gate is likely to pass what `kept` could not tell of.

        It reads more text, so its intervals will be narrower by the root of that; around these values they must fit.
        """
        share = math.sqrt(min(1.0, found.positions / self.positions))
        return all(_within(_narrowed(each, share), limit, sign) for each, limit, sign in self._limited(found))

    def _limited(self, found: Figures) -> list[tuple[Estimate, float, int]]:
        """What is limited, its limit, and 1 where more of it is worse, −1 where less is."""
        gate, ratio = self.gate, found.perplexity_ratio
        limited = (
            (found.kld, self.kld, 1),
            (found.top1, gate.top1, -1),
            (ratio, gate.perplexity_ratio_max, 1),
            (ratio, gate.perplexity_ratio_min, -1),
        )
        return [(each, limit, sign) for each, limit, sign in limited if limit is not None]


def _narrowed(found: Estimate, share: float) -> Estimate:
    ends = (found.value + (end - found.value) * share for end in (found.low, found.high))
    return Estimate(found.value, *ends)


def _within(found: Estimate, limit: float, sign: int) -> bool | None:
    """Whether all of an interval is on the right side of a limit, False if none of it is; what is no number is not."""
    if not math.isfinite(found.value):
        return False
    best, worst = sorted(sign * end for end in (found.low, found.high))
    return True if worst <= sign * limit else None if best <= sign * limit else False


def limits(recipe: Recipe, graphs: Graphs) -> list[Limit]:
    """The limits of the step graph and of the bundle, as far as they are built and have one of the KLD."""
    bundle = recipe.bundle
    gates = {
        "int8-dynamic": recipe.corpus.positions if graphs != "bundle" else 0,
        "bundle-int8": 3 * bundle.decode + bundle.positions if graphs != "step" and "int8" in bundle.precisions else 0,
    }
    named = ((recipe.gates.get(name), positions) for name, positions in gates.items())
    return [
        Limit(gate=gate, kld=gate.kld, positions=positions)
        for gate, positions in named
        if positions and gate and gate.kld is not None
    ]


def named(given: Int8, name: str) -> Int8:
    """The section of the rung `name` of a recipe's section.

    Raises:
        UsageError: it has no such rung.
    """
    found = {rung.name: rung.section for rung in rungs(given)}
    if name not in found:
        raise UsageError(
            f"the recipe has no rung {name!r} on its ladder; there are {', '.join(found)}",
            cause="RUNG= or a manifest names one of another recipe",
            remedy="take the rung that stands in the int8 manifest of the build to be repeated, with its recipe",
        )
    return found[name]


def write(checkpoint: Checkpoint, source: Path, file: Path, section: Int8, hessians: gptq.Hessians | None) -> None:
    """Write `file`: the exported graph `source` with the checkpoint's weights, made as the section says."""
    log.step(f"{file.name}: int8 weights, dynamic")
    filled(checkpoint, source, section, hessians).write(file)


def filled(checkpoint: Checkpoint, source: Path, section: Int8, hessians: gptq.Hessians | None) -> Graph:
    """What `write` writes."""
    graph = build.with_weights(checkpoint, source)
    int8.make_int8(graph, section, hessians)
    graph.prune()
    return graph


@dataclass(frozen=True)
class Maker:
    """Makes rungs: of a checkpoint and its exported step graph, where one is wanted, the `step` file."""

    checkpoint: Checkpoint
    source: Path | None
    step: Path
    hessians: gptq.Hessians | None

    def make(self, section: Int8, scratch: Path, window: int, cap: float | None) -> Path:
        """The graph of chosen positions of a rung, in the folder `scratch`; it is of `step`, where one is wanted.

        Else it is of a graph that is exported for the ladder alone, once, to the folder that holds `scratch`.
        """
        if self.source:
            write(self.checkpoint, self.source, self.step, section, self.hessians)
            graph = Graph.read(self.step)
        else:
            log.step("int8 weights, dynamic, for the ladder")
            graph = filled(self.checkpoint, self._exported(scratch.parent, window), section, self.hessians)
        file, count = scratch / "at-positions.tflite", screening.judged_in(window)
        return at_positions(graph, file, window, count, 1 / cap if cap else 1.0)

    def _exported(self, folder: Path, window: int) -> Path:
        file = folder / "exported.tflite"
        if not file.is_file():
            build.export_step(self.checkpoint, StepLimits(max_batch=8, max_sequence=max(128, window)), file)
        return file


@dataclass(kw_only=True)
class Text:
    """Calibration text that rungs are judged on: windows [N, L], how many are in each lot, and what is expected.

    Windows are spread evenly over the text, and those of each lot over these. `hidden` gives the reference's final
    states [N, L, H] of some of them, until all lots are known; `head` makes logits of these. `begun` are those that
    `begin` has let it give.
    """

    windows: Tokens
    lots: Sequence[int]
    hidden: Callable[[Tokens], Floats] | None
    head: Head
    known: dict[int, tuple[Positions, Floats]] = field(default_factory=dict)
    begun: Floats | None = None

    @classmethod
    def of(cls, text: Path, window: int, reference: Reference, checkpoint: Checkpoint, parameters: int) -> Text:
        """As much of the file `text` as a model of so many parameters is judged on."""
        found = screening.lots(parameters, window)
        windows = corpus.calibration_windows(text, reference.tokenizer, window, sum(found))
        head = Head.of_checkpoint(checkpoint.folder, reference.cap)
        return cls(windows=windows, lots=found, hidden=lambda ids: reference.hidden(ids, np.ones_like(ids)), head=head)

    @classmethod
    def kept(cls, folder: Path, told: facts.Moments, checkpoint: Checkpoint, parameters: int) -> Text:
        """As `of`, as far as the reference has read it for stage moments, whose folder and facts these are."""
        kept, head = Kept(folder), Head.of_checkpoint(checkpoint.folder, told.final_logit_softcapping)
        available, window = kept.windows.shape
        found = screening.lots(parameters, window)
        count = min(available, sum(found))
        windows = kept.windows[np.arange(count) * available // count]
        return cls(windows=windows, lots=found, hidden=kept.hidden, head=head)

    def rows(self, lot: int) -> Tokens:
        """The windows of a lot; a text that is short has fewer."""
        return self.windows[lot :: len(self.lots)]

    def begin(self) -> None:
        """Let the reference read the first windows, which `expected` then has: somebody wants to watch."""
        assert self.hidden
        self.begun = self.hidden(self._parts(0)[0])

    def _parts(self, lot: int) -> list[Tokens]:
        """The windows of a lot that the reference reads together."""
        rows = self.rows(lot)
        few = max(1, _STATES // (self.head.weight.shape[1] * rows.shape[1]))
        return [rows[start : start + few] for start in range(0, len(rows), few)]

    def expected(self, lot: int) -> tuple[Positions, Floats]:
        """The judged positions of a lot, and the reference's hidden states [n, H] there."""
        rows = self.rows(lot)
        if lot not in self.known:
            count, window = rows.shape
            spread = corpus.spread_positions(count, window, count * screening.judged_in(window))
            begun = [] if lot or self.begun is None else [self.begun]
            assert self.hidden
            # Of the states only those of judged positions are kept.
            states = np.concatenate([*begun, *map(self.hidden, self._parts(lot)[len(begun) :])])
            self.known[lot] = spread, states[spread.window, spread.length - 1]
            if len(self.known) == len(self.lots):
                # The reference goes, before a file is run: of a large model, which has one lot, each takes a gigabyte.
                self.hidden = None
                memory.give_back()
        return self.known[lot]

    def score(self, file: Path, lot: int) -> screening.Sample:
        """The graph of chosen positions in `file` on one lot, against the reference."""
        return score(file, self.rows(lot), *self.expected(lot), self.head)

    def judge(self, file: Path, limits: Sequence[Limit]) -> tuple[Figures, bool]:
        """The figures of the graph of chosen positions in `file`, and whether it keeps the `limits`."""
        parts, blocks = list[screening.Sample](), list[metrics.Indices]()
        for lot in (lot for lot in range(len(self.lots)) if len(self.rows(lot))):
            parts.append(self.score(file, lot))
            blocks.append(self.known[lot][0].window * len(self.lots) + lot)
            found = Figures.of(screening.Sample.join(parts), np.concatenate(blocks))
            told = [limit.kept(found) for limit in limits]
            if all(told) or False in told:
                return found, all(told)
        return found, all(limit.kept(found) or limit.likely(found) for limit in limits)


def score(file: Path, rows: Tokens, positions: Positions, hidden: Floats, head: Head) -> screening.Sample:
    """The graph of chosen positions in `file` on windows `rows` [N, L], against the reference.

    Args:
        file: as `at_positions` writes it.
        rows: the windows.
        positions: what is judged of them, as many of each as the graph gives.
        hidden: the reference's hidden states there, [n, H].
        head: of the reference.
    """
    model = MappedModel(file, file.with_suffix(".packed"), parallel.threads())
    run, parts, each = model.get_signature_runner(SIGNATURE), list[screening.Sample](), len(positions) // len(rows)
    targets, step = rows[positions.window, positions.length], max(1, screening.LOGITS // (head.vocabulary * each))
    for start in range(0, len(rows), step):
        some = slice(start * each, (start + step) * each)
        places = (positions.length[some] - 1).astype(np.int32).reshape(-1, each)
        found = [_logits(run, ids, at) for ids, at in zip(rows[start : start + step], places, strict=True)]
        parts.append(screening.compare(screening.logits(head, hidden[some]), np.concatenate(found), targets[some]))
    return screening.Sample.join(parts)


def _logits(run: MappedRunner, ids: Tokens, positions: Tokens) -> Floats:
    """Logits [n, V] of a window [L] after its first `positions` + 1 tokens, [n] each."""
    logits = run(input_ids=ids[None], attention_mask=np.ones_like(ids)[None], positions=positions)[OUTPUT]
    assert isinstance(logits, np.ndarray)
    return logits


def at_positions(graph: Graph, out: Path, window: int, count: int, factor: float) -> Path:
    """Write a step `graph`, and leave it, as one that gives the logits of `count` positions of one row, [count, V].

    What stands behind the product that picks the last position takes rows, one for each text; here these are
    positions, which a third input `positions` [count] names, from 0. So the file that is judged is the file that was
    written, but for that product, and the head is applied where it is asked for alone.

    Args:
        graph: a step graph, in any precision.
        out: where the graph goes.
        window: tokens.
        count: positions.
        factor: what the product multiplies hidden states with: `Head.factor` in models/transformer.py.
    """
    picking = [operator for operator in graph.operators() if graph.code(operator) == "BATCH_MATMUL"][-1]
    hidden, picked = int(picking.inputs[1]), int(picking.outputs[0])

    shape = graph.shape(picked)
    rows, chosen = (graph.add_tensor(f"positions;{name}", "FLOAT32", shape) for name in ("rows", "chosen"))
    places = graph.add_tensor("positions", "INT32", (count,))
    flat = graph.add_constant(np.array(shape, np.int32), "positions;shape")
    scale = graph.add_constant(np.array(factor, np.float32), "positions;factor")
    few = [
        graph.operator("RESHAPE", [hidden, flat], [rows]),
        graph.operator("GATHER", [rows, places], [chosen], axis=0),
        graph.operator("MUL", [chosen, scale], [picked]),
    ]
    graph.rewrite(lambda operator: few if operator is picking else [operator])
    inputs, logits = {str(port.name): int(port.tensorIndex) for port in graph.ports()}, int(graph.main.outputs[0])
    # Fixed shapes: the runtime that maps its packed weights takes no others.
    sizes = {**dict.fromkeys(inputs.values(), [1, window]), logits: [count, graph.shape(logits)[-1]]}
    for tensor, size in sizes.items():
        graph.main.tensors[tensor].shape, graph.main.tensors[tensor].shapeSignature = size, None
    graph.main.inputs, graph.model.signatureDefs = [*inputs.values(), places], []
    graph.add_signature(SIGNATURE, {**inputs, "positions": places}, {OUTPUT: logits})
    graph.prune()
    graph.write(out)
    return out


def climb(tried: Sequence[Rung], limits: Sequence[Limit], maker: Maker, text: Text) -> tuple[Int8, facts.Ladder]:
    """Make and judge rungs until one keeps the `limits`; where none does, the closest one is taken.

    The step graph of the rung that is taken is left, where one is wanted.

    Args:
        tried: the rungs, in order.
        limits: what is to be kept.
        maker: makes them.
        text: what they are judged on.
    """
    judged, limit = list[facts.Rung](), min(each.kld for each in limits)
    with TemporaryDirectory(dir=maker.step.parent) as scratch:
        for rung in tried:
            own = Path(scratch) / rung.name
            own.mkdir()
            file = maker.make(rung.section, own, text.windows.shape[1], text.head.cap)
            found, kept = text.judge(file, limits)
            shutil.rmtree(own)  # one rung's files at a time: they are as large as the model
            judged.append(_facts(rung, found, kept=kept))
            log.step(f"rung {rung.name}: {judged[-1].figures}; {'taken' if kept else 'not close enough'}")
            if kept:
                return rung.section, facts.Ladder(rung=rung.name, limit=limit, judged=tuple(judged))
    best = min(range(len(tried)), key=lambda place: _distance(judged[place]))
    if best != len(tried) - 1:
        maker.step.unlink(missing_ok=True)
    told = facts.Ladder(rung=tried[best].name, limit=limit, judged=tuple(judged))
    log.warn(told.shortfall)
    return tried[best].section, told


def _facts(rung: Rung, found: Figures, *, kept: bool) -> facts.Rung:
    sound = math.isfinite(found.kld.value)
    return facts.Rung(
        rung=rung.name,
        kept=kept,
        positions=found.positions,
        kld=found.kld.value if sound else None,
        kld_low=found.kld.low if sound else None,
        kld_high=found.kld.high if sound else None,
        top1=found.top1.value if sound else None,
        perplexity_ratio=found.perplexity_ratio.value if sound else None,
    )


def _distance(rung: facts.Rung) -> float:
    return math.inf if rung.kld is None else rung.kld
