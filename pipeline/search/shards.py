"""Candidates that are measured on the workers of a cluster, a candidate a shard.

A worker builds and runs it as this process would, beside the same files in the shared folder, and keeps what it found
there: so what is known does not depend on who measured it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from math import inf
from pathlib import Path
from typing import Literal

import numpy as np

from pipeline.checkpoint.reader import open_checkpoint
from pipeline.cluster import pool
from pipeline.cluster.worker import let_go
from pipeline.core import log, manifest, parallel
from pipeline.quantize import gptq
from pipeline.search.bench import Bench, Clock, Task
from pipeline.search.candidates import SPACES, Candidate
from pipeline.search.preparation import NEEDS

_AHEAD = 1
"""Candidates that wait for a worker: one that is done has the next at once, and no more are begun when time ends."""


@dataclass(frozen=True)
class Told:
    """All that makes a bench, in plain values; `threads` build a candidate."""

    root: str
    text: str
    windows: tuple[tuple[int, ...], ...]
    all_positions: str
    step: str
    identity: str
    section: Literal["int8", "int4"]
    threads: int

    @classmethod
    def of(cls, bench: Bench, threads: int) -> Told:
        """What `bench` is told anew on a worker; its folder lies in that of the model."""
        return cls(
            root=str(bench.folder.parent.absolute()),
            text=bench.text,
            windows=tuple(map(tuple, bench.windows.tolist())),
            all_positions=str(bench.all_positions.absolute()),
            step=str(bench.step.absolute()),
            identity=bench.identity,
            section=bench.space.section,
            threads=threads,
        )


_open_now: dict[Told, tuple[Bench, ExitStack]] = {}
"""The bench of this process."""


def _bench(told: Told) -> Bench:
    if told not in _open_now:
        unload()
        root, stack = Path(told.root), ExitStack()
        hessians = stack.enter_context(gptq.Hessians(root / "moments"))
        bench = Bench(
            checkpoint=open_checkpoint(root / "fetch" / "checkpoint"),
            hessians=hessians,
            all_positions=Path(told.all_positions),
            step=Path(told.step),
            text=told.text,
            windows=np.array(told.windows, np.int32),
            folder=root / ".tune",
            clock=Clock(inf),
            identity=told.identity,
            space=SPACES[told.section],
        )
        _open_now[told] = bench, stack
    return _open_now[told][0]


def unload() -> None:
    """Let the bench go."""
    while _open_now:
        _open_now.popitem()[1][1].close()


let_go.append(unload)


@dataclass(frozen=True)
class Measuring:
    """A candidate on `pieces` of the text."""

    told: Told
    candidate: Candidate
    pieces: tuple[int, ...]

    @property
    def amount(self) -> int:
        """One candidate."""
        return 1

    def run(self, bar: log.Progress) -> bytes:
        """The figures in words; in numbers they are kept where the bench looks for them."""
        with parallel.limited(self.told.threads):
            said = _bench(self.told).evaluate(self.candidate, self.pieces)
        bar.advance()
        return said.encode()


@contextmanager
def measured_on(cluster: str, bench: Bench) -> Iterator[Bench]:
    """`bench`, whose candidates the workers of `cluster` measure; as it is where there is none.

    A shard is kept no longer than the call: what was found has a place of its own.
    """
    if not cluster:
        yield bench
        return
    root = bench.folder.parent
    read = [record for name in NEEDS for record in manifest.read(root / name).outputs]
    inputs = (*read, manifest.FileRecord.of(bench.all_positions, root))
    pool.forget(root, "tune")
    try:
        with pool.opened(cluster, root, "tune", inputs, "candidates", "candidates") as shards:
            yield replace(bench, elsewhere=partial(_measure, shards))
    finally:
        pool.forget(root, "tune")


def _measure(shards: pool.Shards, bench: Bench, tasks: Iterable[Task]) -> Iterator[str]:
    """The figures of each task in words, in order; `tasks` are asked for one by one, as workers get free."""
    told, waiting = Told.of(bench, parallel.threads(1)), deque[Future[bytes]]()
    for candidate, pieces in tasks:
        waiting.append(shards.submit(Measuring(told, candidate, tuple(pieces))))
        if len(waiting) >= shards.workers() + _AHEAD:
            yield shards.result(waiting.popleft()).decode()
    while waiting:
        yield shards.result(waiting.popleft()).decode()
