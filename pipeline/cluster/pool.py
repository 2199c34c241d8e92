"""Shards of a stage's work: handed to any executor, their results in order, finished ones kept for the next call.

What runs them has the interface of `concurrent.futures.Executor`. `InProcess` is one: it runs a shard when its result
is asked for. `dask.connect` gives one whose shards run on workers. A result depends on the shard alone, so it is the
same wherever it was computed, and whatever uses the results takes them in an order of its own.
"""

from __future__ import annotations

import hashlib
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import ParamSpec, TypeVar

from pipeline.cluster import dask
from pipeline.cluster.worker import KEPT, Shard, Terms, read, work, write
from pipeline.core import log, manifest, parallel

P = ParamSpec("P")
T = TypeVar("T")


class InProcess(Executor):
    """Runs a call in this process, and not before its result is asked for: so all that is to come is known before."""

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """A future that runs `fn` when it is asked for its result."""
        return _Asked(partial(fn, *args, **kwargs))


class _Asked(Future[T]):
    """A call that is made by whoever asks for its result; an interrupt leaves it to be made."""

    def __init__(self, call: Callable[[], T]) -> None:
        super().__init__()
        self._call = call

    def result(self, timeout: float | None = None) -> T:
        if not self.done():
            try:
                made = self._call()
            except Exception as error:
                self.set_exception(error)
            else:
                self.set_result(made)
        return super().result(timeout)


class Shards:
    """The shards of one stage.

    Args:
        executor: what runs them.
        terms: what a worker must be and see; its hash stands in the names of kept shards.
        folder: where finished ones are kept.
        bar: the progress of them all.
        remote: whether the executor has workers, which hold themselves against the terms.
    """

    def __init__(
        self, executor: Executor, terms: Terms, folder: Path, bar: log.Progress, *, remote: bool = False
    ) -> None:
        self.executor, self.terms, self.folder, self.bar, self.remote = executor, terms, folder, bar, remote
        self.found = 0
        self._unkept: OSError | None = None

    def workers(self) -> int:
        """How many run shards now; 1 where that is this process."""
        return self.executor.count() if isinstance(self.executor, dask.Workers) else 1

    def submit(self, shard: Shard) -> Future[bytes]:
        """The future of the shard's result, which may be kept from an earlier call."""
        if not self.bar.total:  # what came before, such as loading a model, is no part of the rate
            self.bar.started = time.monotonic()
        self.bar.total += shard.amount
        file = self.folder / hashlib.sha256(f"{self.terms!r}{shard!r}".encode()).hexdigest()
        if (kept := read(file)) is not None:
            self.found += 1
            self.bar.advance(shard.amount)
            done = Future[bytes]()
            done.set_result(kept)
            return done
        if not self.remote:
            future = self.executor.submit(shard.run, self.bar)
        else:
            future = self.executor.submit(work, self.terms, shard, file)
        future.add_done_callback(partial(self._done, shard, file))
        return future

    def _done(self, shard: Shard, file: Path, future: Future[bytes]) -> None:
        """Keep a result; an executor's thread may call this, so what fails is told by `result`."""
        if future.cancelled() or future.exception():
            return
        if self.remote:
            self.bar.advance(shard.amount)
        try:
            if not file.exists():  # a worker keeps its own
                write(file, future.result())
        except OSError as error:
            self._unkept = error

    def result(self, future: Future[bytes]) -> bytes:
        """The result of a shard, waited for.

        Raises:
            OSError: one so far could not be kept, since the disk is full for instance.
        """
        made = future.result()
        if self._unkept:
            raise self._unkept
        return made


@contextmanager
def opened(
    cluster: str, root: Path, stage: str, inputs: tuple[manifest.FileRecord, ...], label: str, unit: str = "tokens"
) -> Iterator[Shards]:
    """The shards of `stage`, with one bar for all; kept ones of an earlier call are found.

    Args:
        cluster: a scheduler's address or `local:<workers>`; empty: this process.
        root: the model's artefact folder.
        stage: the stage.
        inputs: the files that shards read, relative to `root`.
        label: what the bar calls them.
        unit: what their amounts are in.
    """
    folder = root / KEPT / stage
    folder.mkdir(parents=True, exist_ok=True)
    terms = Terms.of(root.absolute(), inputs)
    with dask.connect(cluster) if cluster else nullcontext(InProcess()) as workers, log.progress(label, 0, unit) as bar:
        shards = Shards(workers, terms, folder, bar, remote=bool(cluster))
        yield shards


def copies(cluster: str) -> int:
    """How many workers of `cluster` share this machine's memory; 1 where the work is done in this process."""
    return (parallel.local_workers(cluster) if cluster else None) or 1


def forget(root: Path, stage: str) -> None:
    """Remove the kept shards of `stage`, which is finished."""
    folder = root / KEPT / stage
    shutil.rmtree(folder, ignore_errors=True)
    if folder.parent.is_dir() and not any(folder.parent.iterdir()):
        folder.parent.rmdir()
