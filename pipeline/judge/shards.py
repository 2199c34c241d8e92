"""What a bundle is asked, as shards: conversations and texts through its sections, and all that LiteRT-LM is asked.

A shard says where the model's artefacts are and all that its result depends on beside them; sections, bundle and what
the golden stage stored it reads there. Texts go through the cache a few at a time: what one is answered does not depend
on those before it, which the conversations tell.
"""

from __future__ import annotations

import io
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass, fields
from pathlib import Path

import numpy as np
from threadpoolctl import threadpool_limits

from pipeline.checkpoint import chat
from pipeline.cluster.pool import Shards
from pipeline.cluster.worker import KEPT, let_go
from pipeline.core import log, memory, parallel, records
from pipeline.judge import kv_cache, metrics, parity
from pipeline.judge.kv_cache import Logits, Schedule, Trace
from pipeline.judge.metrics import Scores
from pipeline.judge.parity import Parity
from pipeline.judge.reference import Floats, Head, Reference
from pipeline.runtime.litert_lm import Message
from pipeline.runtime.sections import Sections

_TEXTS = 2
"""Texts of a shard: with 127 tokens each, some seconds."""


@dataclass(frozen=True)
class Replayed:
    """What sections said: `scores` of every judged position against Hugging Face without a cache, in order.

    `cached` are those of the conversations against Hugging Face with its cache, None where they are not asked for;
    `unsound` counts positions with a logit that is not finite.
    """

    scores: Scores
    cached: Scores | None
    unsound: int


@dataclass(frozen=True)
class Place:
    """A model's artefact folder `root`, the soft-cap of its head, and the threads that a shard computes in."""

    root: str
    cap: float | None
    threads: int

    @property
    def reference(self) -> Reference:
        """What golden stored, with the head."""
        root = Path(self.root)
        return Reference(root / "golden", Head.of_checkpoint(root / "fetch" / "checkpoint", self.cap))

    @property
    def scratch(self) -> Path:
        """A folder for what would take gigabytes of memory."""
        return Path(self.root) / KEPT / "verify"

    @contextmanager
    def computing(self) -> Iterator[None]:
        """In so many threads and no more."""
        with parallel.limited(self.threads), threadpool_limits(self.threads, "blas"):
            yield


@dataclass(frozen=True)
class Replay:
    """The texts `first` to `last` through the sections of a precision, or the conversations where they are None.

    `exact`: the conversations are held against Hugging Face with its cache as well.
    """

    place: Place
    precision: str
    schedules: tuple[Schedule, Schedule]
    texts: tuple[int, int] | None
    exact: bool
    amount: int

    def run(self, bar: log.Progress) -> bytes:
        """The `Replayed`, packed."""
        reference = self.place.reference
        trace = Trace(schedules=self.schedules, **reference.cache())
        trace = trace.lot(*self.texts) if self.texts else trace.conversations()
        with self.place.computing():
            sections = _open(self.place, self.precision)
            with tempfile.NamedTemporaryFile(dir=self.place.scratch) as file:
                logits = kv_cache.replay(sections, trace, bar, Path(file.name))
                without, cached = trace.expected()
                scores = reference.head.score(logits, without, trace.targets)
                exact = _scored(reference.head, logits, cached, trace) if self.exact else None
                return _packed(scores, exact, sum(not np.isfinite(row).all() for row in logits))


def _scored(head: Head, logits: Logits, cached: Floats, trace: Trace) -> Scores:
    part = slice(len(cached))
    return head.score(logits[part], cached, trace.targets[part])


def _packed(scores: Scores, cached: Scores | None, unsound: int) -> bytes:
    stream, none = io.BytesIO(), np.empty((len(fields(Scores)), 0))
    np.savez(stream, np.stack(astuple(scores)), np.stack(astuple(cached)) if cached else none, np.array(unsound))
    return stream.getvalue()


def _unpacked(parts: Sequence[bytes]) -> Replayed:
    """What shards of one bundle said, one after another; the first is that of the conversations."""
    told = [list(np.load(io.BytesIO(part), allow_pickle=False).values()) for part in parts]
    scores, cached, unsound = zip(*told, strict=True)
    return Replayed(
        scores=metrics.join([Scores(*part) for part in scores]),
        cached=Scores(*cached[0]) if cached[0].size else None,
        unsound=sum(map(int, unsound)),
    )


_open_now: dict[tuple[Place, str], tuple[Sections, tempfile.TemporaryDirectory[str]]] = {}
"""The sections of this process, with the folder of their repacked weights: others would need as much memory again."""


def _open(place: Place, precision: str) -> Sections:
    if (place, precision) not in _open_now:
        unload()
        scratch = tempfile.TemporaryDirectory(dir=place.scratch, ignore_cleanup_errors=True)
        weights = Path(scratch.name) / "weights"
        sections = Sections(Path(place.root) / precision, weights=weights, threads=place.threads)
        _open_now[place, precision] = sections, scratch
    return _open_now[place, precision][0]


def unload() -> None:
    """Close the sections, and give back what they took: LiteRT-LM, which comes next, takes as much."""
    while _open_now:
        _open_now.popitem()[1][1].cleanup()  # and no name that holds the sections
        memory.give_back()


let_go.append(unload)


@dataclass(frozen=True)
class Spoken:
    """A bundle in LiteRT-LM: one shard, since opening it takes as long as much of what it is asked.

    `conversations` are JSON; of what golden stored, the first `prompts` are continued.
    """

    place: Place
    precision: str
    conversations: str
    prompts: int
    stop: tuple[int, ...]
    amount: int

    def run(self, bar: log.Progress) -> bytes:
        """The `Parity` as JSON."""
        unload()
        root = Path(self.place.root)
        tokenizer = chat.open_tokenizer(root / "fetch" / "checkpoint")
        with self.place.computing():
            found = parity.compare(
                root / "bundle" / f"{self.precision}.litertlm",
                tokenizer,
                json.loads(self.conversations),
                self.place.reference.greedy()[: self.prompts],
                set(self.stop),
                self.place.scratch,
            )
        bar.advance(self.amount)
        return json.dumps(records.table(found)).encode()


@dataclass(frozen=True)
class Asked:
    """Bundles of one model, asked in shards."""

    shards: Shards
    place: Place

    def replay(self, precision: str, trace: Trace, *, exact: bool) -> Callable[[], Replayed]:
        """What the sections say of `trace`: its conversations, and its texts a few at a time."""
        lots = [(first, min(first + _TEXTS, len(trace.texts))) for first in range(0, len(trace.texts), _TEXTS)]
        parts = [(None, trace.conversations().amount), *((lot, trace.lot(*lot).amount) for lot in lots)]
        futures = [
            self.shards.submit(Replay(self.place, precision, trace.schedules, lot, exact, amount))
            for lot, amount in parts
        ]
        return lambda: _unpacked([self.shards.result(future) for future in futures])

    def speak(
        self, precision: str, conversations: Sequence[Sequence[Message]], prompts: int, tokens: int, stop: set[int]
    ) -> Callable[[], Parity]:
        """How the bundle does in LiteRT-LM; `tokens` is how many it continues the prompts by."""
        told = json.dumps(conversations)
        future = self.shards.submit(Spoken(self.place, precision, told, prompts, tuple(sorted(stop)), tokens))
        return lambda: records.build(Parity, json.loads(self.shards.result(future)))
