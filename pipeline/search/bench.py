"""Measuring candidates: each is built as its stage would build it, and runs in LiteRT on windows of text.

Every measurement is kept in a file of its own, named by all that it depends on, so none is made twice.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from itertools import takewhile
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from pipeline.checkpoint.reader import Checkpoint
from pipeline.core import log, manifest, parallel
from pipeline.core.recipe import Int4, Int8
from pipeline.core.recipe import parse as parse_recipe
from pipeline.judge import metrics
from pipeline.judge.corpus import POSITIONS_PER_WINDOW, Tokens
from pipeline.models import build
from pipeline.quantize import gptq, int4, int8
from pipeline.runtime import litert
from pipeline.search.candidates import Candidate, Space
from pipeline.tflite.graph import Graph
from pipeline.tflite.lazy import Blocks
from pipeline.tflite.writer import write_all

WINDOWS = 2
"""In each shard, a piece of the text that a measurement is of."""
SEQUENCES = (1, 128)
"""Tokens of the steps that are timed."""
_ROUNDS = 7
_JUDGED = slice(1, -1)
"""Positions of a window: the first says the same in every window, the last predicts what is not there."""
_Logits = NDArray[np.float32]
Task: TypeAlias = "tuple[Candidate, Sequence[int]]"
"""A candidate, and the shards that it is measured on."""


@dataclass
class Clock:
    """The time that there is, in seconds; `longest` evaluation so far."""

    seconds: float
    started: float = field(default_factory=time.monotonic)
    longest: float = 0.0

    def left(self, share: float = 1.0) -> float:
        """Seconds until `share` of the time is over."""
        return self.started + share * self.seconds - time.monotonic()

    def open(self, share: float) -> bool:
        """Whether another evaluation fits in."""
        return self.left(share) > self.longest


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One candidate on some shards: figures per position, the block each is in, and the bytes of its file."""

    kld: metrics.Doubles
    top1: metrics.Doubles
    log_ratio: metrics.Doubles
    blocks: metrics.Indices
    size: int

    def facts(self) -> dict[str, object]:
        """The figures with 95 % intervals; none where the file gives no numbers."""
        if not np.isfinite(self.kld).all():
            return {}
        draws = metrics.Draws.of(self.blocks)
        mean = partial(metrics.bootstrap, draws=draws)
        return {
            "positions": len(self.kld),
            "kld": asdict(mean(lambda means: means[..., 0], [self.kld])),
            "top1": asdict(mean(lambda means: means[..., 0], [self.top1])),
            "perplexity_ratio": asdict(mean(lambda means: np.exp(means[..., 0]), [self.log_ratio])),
        }


@dataclass(frozen=True, kw_only=True)
class Bench:
    """Where candidates are built and measured. `identity` of all that a measurement depends on but the candidate."""

    checkpoint: Checkpoint
    hessians: gptq.Hessians
    all_positions: Path
    step: Path
    text: str
    windows: Tokens
    folder: Path
    clock: Clock
    identity: str
    space: Space
    building: threading.Lock = field(default_factory=threading.Lock)
    elsewhere: Callable[[Bench, Iterable[Task]], Iterator[str]] | None = None
    """What evaluates tasks, in order, other than this process."""
    said: Callable[[Tokens], Iterator[_Logits]] | None = None
    """What says of windows [N, L] what the fp32 file would, one after another, in its place: the reference on a GPU."""

    @property
    def shards(self) -> int:
        """How many there are; a text that is short has fewer."""
        return max(1, len(self.windows) // WINDOWS)

    @property
    def scratch(self) -> Path:
        """Files that are gone when tune ends."""
        return self.folder / "scratch"

    def rows(self, shard: int) -> range:
        """The windows of a shard, spread over the text as a whole."""
        return range(shard, len(self.windows), self.shards)

    @cached_property
    def references(self) -> list[Path]:
        """The fp32 file's logits [positions, V] of each window, which stay until tune ends."""
        files = [self.scratch / f"{place}.npy" for place in range(len(self.windows))]
        if all(file.is_file() for file in files):  # of the process that asks this one
            return files
        with log.progress("fp32", len(self.windows), "windows") as bar:
            for file, logits in zip(files, (self.said or self._fp32)(self.windows), strict=True):
                np.save(file, logits[_JUDGED])
                bar.advance()
        return files

    def _fp32(self, windows: Tokens) -> Iterator[_Logits]:
        """What the fp32 file says of each window [L]: [L, V]."""
        file = self.write(None, self.all_positions, "fp32")
        model = litert.StepModel(file, threads=parallel.threads())
        yield from (_logits(model, row) for row in windows)
        file.unlink()

    @cached_property
    def given(self) -> Int8 | Int4:
        """The section of the given recipe that is searched."""
        found: Int8 | Int4 = getattr(parse_recipe(self.text.encode(), "the given recipe"), self.space.section)
        return found

    def section(self, candidate: Candidate) -> Int8 | Int4:
        """That of the candidate's recipe; asked for thousands of times, so that no recipe is written and read."""
        values: dict[str, Any] = {  # of fields of whichever class the section has
            key: tuple(value) if isinstance(value, list) else value for key, value in candidate.values.items()
        }
        return replace(self.given, **values)

    def write(self, candidate: Candidate | None, source: Path, name: str) -> Path:
        """The graph `source` as the candidate, or in fp32, in the scratch folder; as stage int8 or int4 makes it."""
        with self.building:  # it uses all cores by itself
            graph = build.with_weights(self.checkpoint, source)
            section = self.section(candidate) if candidate else None
            if isinstance(section, Int8):
                int8.make_int8(graph, section, self.hessians)
            elif section:
                int4.make_int4(graph, section, self.hessians)
            if section and section.gptq:
                self._round_once(graph, section.equalize)
            graph.prune()
            graph.write(self.scratch / f"{name}.tflite")
        return self.scratch / f"{name}.tflite"

    def _round_once(self, graph: Graph, strength: float) -> None:
        """Let weights that an earlier candidate has as well be those of its file: GPTQ takes most of the time.

        A matrix is known by its name, its scales and the `strength` of equalization: nothing else changes its values
        before they are rounded without changing the largest of its rows.
        """
        rounded: dict[Path, tuple[int, Blocks]] = {}
        for view in graph.views():
            for weight in _rounded(view):
                buffer = view.buffer(weight)
                rounded[self._home(view, weight, strength)] = buffer, view.blocks(weight)
        missing = {file: values for file, (_, values) in rounded.items() if not file.is_file()}
        with log.progress("rounding weights", sum(map(len, missing.values()))) as bar:
            for file, write in zip(missing, write_all([*missing.values()], bar), strict=True):
                partial = file.with_name(f"{file.stem}.{secrets.token_hex(4)}.partial")  # others may write the same
                with partial.open("wb") as stream:
                    write(stream)
                partial.replace(file)
        for file, (buffer, values) in rounded.items():
            graph.model.buffers[buffer].data = Blocks.of(np.memmap(file, values.dtype, "r", shape=values.shape))

    def _home(self, view: Graph, weight: int, strength: float) -> Path:
        """Where the rounded values of a weight are kept until tune ends."""
        scales = view.scales(weight) or view.block_scales(weight)
        values = scales.scale if scales else np.empty(0)
        key = f"{view.name(weight)} {view.shape(weight)} {strength} {values.dtype}".encode() + values.tobytes()
        return self.scratch / f"{hashlib.sha256(key).hexdigest()[:32]}.rounded"

    def record(self, candidate: Candidate, what: int | str) -> Path:
        """Where the measurement of a candidate on a shard is kept, or that of its "speed"."""
        rows = what if isinstance(what, str) else list(self.rows(what))
        key = json.dumps([self.identity, self.space.section, asdict(self.section(candidate)), rows], sort_keys=True)
        return self.folder / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"

    def measure(self, wanted: Iterable[Task], share: float) -> None:
        """Measure candidates × shards, as far as they are not yet known and there is time.

        This map is the one seam between searching and measuring: the calls are independent of each other.
        """
        tasks = [(each, [s for s in shards if not self.record(each, s).is_file()]) for each, shards in wanted]
        tasks = [(each, missing) for each, missing in tasks if missing]
        if not tasks or not self.clock.open(share):
            return
        _ = self.references
        due = takewhile(lambda _: self.clock.open(share), tasks)
        here = lambda bench, tasks: parallel.ordered(lambda task: bench.evaluate(*task), tasks)  # noqa: E731
        for place, said in enumerate((self.elsewhere or here)(self, due), start=1):
            log.step(f"{place} of {len(tasks)}: {said}; {log.human_seconds(self.clock.left())} left")

    def evaluate(self, candidate: Candidate, shards: Sequence[int]) -> str:
        """Build the candidate, run the shards, keep what was found; the figures in words."""
        started = time.monotonic()
        # A name of its own: a worker that was given up may be at the same candidate.
        name = f"{self.record(candidate, shards[0]).stem}-{secrets.token_hex(4)}"
        file = self.write(candidate, self.all_positions, name)
        # One thread: candidates run side by side, and a graph this small gains little from more.
        model = litert.StepModel(file, threads=1)
        per_shard = []
        for shard in shards:
            scores = metrics.join([self._score(model, place) for place in self.rows(shard)])
            per_shard.append(scores)
            ratio = scores.nll - scores.reference_nll
            kept = {"kld": list(scores.kld), "top1": list(scores.top1), "log_ratio": list(ratio)}
            kept["size"] = [file.stat().st_size]
            manifest.write_atomically(self.record(candidate, shard), json.dumps(kept))
        file.unlink()
        self.clock.longest = max(self.clock.longest, time.monotonic() - started)
        scores = metrics.join(per_shard)
        return f"{candidate.name}: KLD {scores.kld.mean():.2e}, top-1 {scores.top1.mean():.1%}"

    def speed(self, candidate: Candidate, plain: Candidate) -> dict[str, list[float]]:
        """Seconds of one step of the plain candidate and of this one, by sequence length."""
        first = self.scratch / "plain.tflite"
        if not first.is_file():
            self.write(plain, self.step, first.stem)
        # On the step graph, as applications run it; the graph of every position pays for logits that they do not ask
        # for.
        files, bos = [first, self.write(candidate, self.step, "other")], int(self.windows[0, 0])
        return {str(length): litert.measure_in_turns(files, length, bos=bos, rounds=_ROUNDS) for length in SEQUENCES}

    def _score(self, model: litert.StepModel, place: int) -> metrics.Scores:
        targets = self.windows[place, 1:][_JUDGED.start :]
        return metrics.compare(
            np.load(self.references[place], mmap_mode="r"), _logits(model, self.windows[place])[_JUDGED], targets
        )

    def found(self, candidate: Candidate, shards: Iterable[int]) -> Measured | None:
        """What is known of the candidate on all of `shards`; None if it is not all known."""
        records = [(self.record(candidate, shard), self.rows(shard)) for shard in shards]
        if not records or not all(file.is_file() for file, _ in records):
            return None
        kept = [json.loads(file.read_text(encoding="utf-8")) for file, _ in records]
        joined = {key: np.concatenate([np.asarray(one[key]) for one in kept]) for key in kept[0]}
        return Measured(
            kld=joined["kld"],
            top1=joined["top1"],
            log_ratio=joined["log_ratio"],
            blocks=np.concatenate([_blocks(place, self.windows.shape[1]) for _, rows in records for place in rows]),
            size=int(joined["size"][0]),
        )


def _logits(model: litert.StepModel, row: Tokens) -> _Logits:
    """[L, V] of one window."""
    logits: _Logits = model.logits(row[None], np.ones_like(row)[None])[0]
    return logits


def _blocks(place: int, window: int) -> metrics.Indices:
    """The stretch of 16 tokens that each judged position of window `place` is in: what resampling draws."""
    positions: metrics.Indices = np.arange(window)[_JUDGED]
    return place * window + positions // POSITIONS_PER_WINDOW


def _rounded(view: Graph) -> Iterator[int]:
    """The constants of `view` whose values are integers that are made when the file is written."""
    for tensor, entry in enumerate(view.main.tensors):
        values = view.model.buffers[entry.buffer].data
        if isinstance(values, Blocks) and values.dtype.itemsize == 1:
            yield tensor
