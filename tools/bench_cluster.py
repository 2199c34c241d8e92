"""What a cluster costs on one machine: golden and verify in one process of two threads, and by two workers of one.

    python -m tools.bench_cluster ARTIFACTS MODEL_ID [--recipe FILE] [--seam]

ARTIFACTS holds what `make bundle GRAPHS=bundle` made of the model; golden and verify are made in it anew. Workers need
Dask (`make .venv/.cluster`). Beside seconds it gives processor seconds, workers' too, which other work on the machine
hardly lengthens. With `--seam` instead what the seam between stage and workers costs where there are none: both stages
run once in this process, their shards are noted, and then handed through it again and again, doing nothing but what
results take.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline import golden, verify
from pipeline.cluster import pool
from pipeline.cluster.worker import Shard
from pipeline.core import log
from pipeline.core.recipe import PROJECT
from pipeline.core.stage import Stage
from pipeline.core.stage import main as run_stage
from pipeline.reference.shards import packed, unpacked

WAYS = {"one process of two threads": ("OMP_NUM_THREADS=2", ""), "two workers of one thread": ("", "local:2")}
_PASSES = 1000
"""Shards that are handed through, at least: processor time is told to some ms."""


@dataclass(frozen=True)
class Noted:
    """A shard that says what `shard` says of itself, and gives as much as it gave, float32, without computing it."""

    place: int
    shard: Shard
    size: int

    @property
    def amount(self) -> int:
        """The shard's."""
        return self.shard.amount

    def run(self, bar: log.Progress) -> bytes:
        """So many bytes."""
        bar.advance(self.amount)
        return packed(np.zeros(self.size // 4, np.float32))


class Noting(pool.Shards):
    """Shards, and what each gave."""

    noted: list[tuple[Shard, int]]

    def submit(self, shard: Shard) -> Future[bytes]:
        """As there."""
        future = super().submit(shard)
        future.add_done_callback(lambda done: self.noted.append((shard, len(done.result()))))
        return future


def noted(stage: Stage, words: Sequence[str]) -> tuple[list[tuple[Shard, int]], float]:
    """The shards of a stage that runs here, each with the bytes that it gave, and the stage's processor seconds."""
    plain, Noting.noted, started = pool.Shards, [], time.process_time()
    pool.Shards = Noting  # type: ignore[misc]  # what `opened` makes
    try:
        code = run_stage(stage, words)
    finally:
        pool.Shards = plain  # type: ignore[misc]
    if code:
        sys.exit(f"error: {stage.name} ended with exit code {code}")
    return Noting.noted, time.process_time() - started


def seam(shards: Sequence[tuple[Shard, int]]) -> float:
    """Processor seconds that the seam takes for all of `shards`, from many passes of them."""
    passes = -(-_PASSES // len(shards))
    started = time.process_time()
    for _ in range(passes):
        with tempfile.TemporaryDirectory() as scratch, pool.opened("", Path(scratch), "seam", (), "nothing") as handed:
            futures = [handed.submit(Noted(place, *each)) for place, each in enumerate(shards)]
            for future in futures:
                unpacked(handed.result(future))
    return (time.process_time() - started) / passes


def timed(command: Sequence[str], **settings: str) -> tuple[float, float]:
    """Seconds, and processor seconds with those of all processes that it waited for."""
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    # As Make has it: threads that wait for others would count as work, and keep those from theirs.
    subprocess.run(command, cwd=PROJECT, env={"OMP_WAIT_POLICY": "PASSIVE", **os.environ, **settings}, check=True)
    after, passed = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic() - started
    return passed, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def _device(stage: str) -> list[str]:
    return ["--device", "cpu"] if stage == "golden" else []


def tell_seam(words: Sequence[str]) -> None:
    """Run both stages here and print what the seam costs them."""
    for stage in (golden.STAGE, verify.STAGE):
        shards, took = noted(stage, [*words, *_device(stage.name)])
        cost = seam(shards)
        each = f"{len(shards)} shards, {1000 * cost / len(shards):.2f} ms each"
        log.line(f"the seam: {stage.name}: {each}: {cost:.3f} of {took:.1f} processor seconds, {cost / took:.2%}")


def compare_ways(words: Sequence[str]) -> None:
    """Run both stages both ways and print what they took, and the second way's over the first's."""
    taken = dict[str, NDArray[np.float64]]()
    for way, (threads, cluster) in WAYS.items():
        settings = dict([threads.split("=")]) if threads else {}
        own = ["--cluster", cluster] if cluster else []
        for stage in ("golden", "verify"):
            command = [sys.executable, "-m", f"pipeline.{stage}", *words, *_device(stage), *own]
            seconds, processor = timed(command, **settings)
            taken[way] = taken.get(way, np.zeros(2)) + (seconds, processor)
            load = os.getloadavg()[0]
            log.line(f"{way}: {stage}: {seconds:.1f} s, {processor:.1f} s of processor time (load {load:.1f})")
    one, two = taken.values()
    log.line("together: {:.2f} times the time, {:.2f} times the processor time".format(*(two / one)))


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.bench_cluster", description=(__doc__ or "").split("\n", 1)[0]
    )
    parser.add_argument("artifacts", type=Path)
    parser.add_argument("model")
    parser.add_argument("--recipe", type=Path)
    parser.add_argument("--seam", action="store_true", help="what it costs without a cluster")
    given = parser.parse_args(argv)
    words = ["--model-id", given.model, "--artifacts", str(given.artifacts), "--graphs", "bundle"]
    words += ["--recipe", str(given.recipe)] if given.recipe else []
    (tell_seam if given.seam else compare_ways)(words)
    return 0


if __name__ == "__main__":
    sys.exit(main())
