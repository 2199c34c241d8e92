"""What a cluster costs on one machine: golden and verify in one process of two threads, and by two workers of one.

    python -m tools.bench_cluster ARTIFACTS MODEL_ID [--recipe FILE]

ARTIFACTS holds the model's fetch, fp32, int8 and bundle; golden and verify are made in it anew, twice. Beside seconds
it gives processor seconds, workers' too, which other work on the machine hardly lengthens. First it times the seam
itself: shards that do nothing, as large as those of the reference, here.
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
from dataclasses import dataclass
from pathlib import Path

from pipeline.cluster import pool
from pipeline.core import log
from pipeline.core.recipe import PROJECT

WAYS = {"one process of two threads": ("OMP_NUM_THREADS=2", ""), "two workers of one thread": ("", "local:2")}
_SHARDS, _TOKENS = 500, 1024


@dataclass(frozen=True)
class Nothing:
    """A shard that says as much as a batch of the reference, and does nothing."""

    number: int
    tokens: tuple[int, ...]

    @property
    def amount(self) -> int:
        """Its tokens."""
        return len(self.tokens)

    def run(self, bar: log.Progress) -> bytes:
        """As many bytes as a hidden state of 640 numbers a token has."""
        bar.advance(self.amount)
        return bytes(4 * 640 * self.amount)


def timed(command: Sequence[str], **settings: str) -> tuple[float, float]:
    """Seconds, and processor seconds with those of all processes that it waited for."""
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    # As Make has it: threads that wait for others would count as work, and keep those from theirs.
    subprocess.run(command, cwd=PROJECT, env={"OMP_WAIT_POLICY": "PASSIVE", **os.environ, **settings}, check=True)
    after, passed = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic() - started
    return passed, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def seam() -> float:
    """Seconds that a shard costs where it runs in this process."""
    with tempfile.TemporaryDirectory() as scratch:
        started = time.process_time()
        with pool.opened("", Path(scratch), "golden", (), "nothing") as shards:
            futures = [shards.submit(Nothing(number, tuple(range(_TOKENS)))) for number in range(_SHARDS)]
            for future in futures:
                shards.result(future)
        return (time.process_time() - started) / _SHARDS


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.bench_cluster", description=(__doc__ or "").split("\n", 1)[0]
    )
    parser.add_argument("artifacts", type=Path)
    parser.add_argument("model")
    parser.add_argument("--recipe", type=Path)
    given = parser.parse_args(argv)
    log.line(f"the seam: {1000 * seam():.2f} ms of processor time a shard of {_TOKENS} tokens")
    words = ["--model-id", given.model, "--artifacts", str(given.artifacts), "--graphs", "bundle"]
    words += ["--recipe", str(given.recipe)] if given.recipe else []
    for way, (threads, cluster) in WAYS.items():
        settings = dict([threads.split("=")]) if threads else {}
        own = ["--cluster", cluster] if cluster else []
        for stage in ("golden", "verify"):
            device = ["--device", "cpu"] if stage == "golden" else []
            seconds, processor = timed([sys.executable, "-m", f"pipeline.{stage}", *words, *device, *own], **settings)
            load = os.getloadavg()[0]
            log.line(f"{way}: {stage}: {seconds:.1f} s, {processor:.1f} s of processor time (load {load:.1f})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
