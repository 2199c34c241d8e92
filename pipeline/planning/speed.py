"""How fast this machine is, measured in about a second: what the seconds of a plan are scaled by."""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from pipeline.core import manifest, parallel
from pipeline.core.host import processor

FILE = ".speed.json"
"""Beside the models' artefact folders: of a machine it is measured once."""
_SECONDS, _TRIES, _MOST = 0.1, 5, 0.5
"""Each kind of work is tried for so long, and on a busy machine so often, up to half a second: what else the machine
does only ever adds to a time."""
_COUNT, _WIDTH = 32, 64
"""Matrices so small that one thread multiplies them: threads that wait for each other measure what else is going on."""
_BYTES, _WRITTEN = 1 << 25, 1 << 23
_LOOPS = 20_000


@dataclass(frozen=True, kw_only=True)
class Speed:
    """What a machine does per second.

    `products` are float32 operations of small matrix products on all its cores, `copies` bytes copied in memory by one
    thread, `writes` bytes written to the disk and kept there, `calls` steps of a loop in Python.
    """

    products: float
    copies: float
    writes: float
    calls: float


REFERENCE = Speed(products=2.2e11, copies=2.1e10, writes=5e8, calls=4.6e7)
"""The machine that the plan's constants are of: two cores, AMD EPYC, 2026-11-29, best of many tries."""


def of_this_machine(artifacts: Path) -> Speed:
    """As the file in `artifacts` says, else measured, and kept there if there is such a folder: a plan makes none."""
    file, whose = artifacts / FILE, {"processor": processor(), "cores": parallel.threads()}
    kept = _kept(file, whose)
    if kept is not None:
        return kept
    made = measure(artifacts)
    # A full disk, or one that only may be read, is for the plan itself to speak of.
    with suppress(OSError):
        if artifacts.is_dir():
            manifest.write_atomically(file, manifest.dump_json({**whose, **asdict(made)}))
    return made


def _kept(file: Path, whose: Mapping[str, object]) -> Speed | None:
    """What the file says; None where it is another machine's, or does not have all of it, as one that was cut."""
    try:
        said = json.loads(file.read_text(encoding="utf-8"))
        own = isinstance(said, dict) and said.items() >= whose.items()
        return Speed(**{name: float(said[name]) for name in asdict(REFERENCE)}) if own else None
    except (OSError, ValueError, LookupError, TypeError):
        return None


def measure(folder: Path) -> Speed:
    """Measure this machine; `folder` is on the disk that counts (where it does not exist, what is around it)."""
    # Written once before: memory that is new has to be cleared by the system first.
    left, right = (np.full((_COUNT, _WIDTH, _WIDTH), 0.5, np.float32) for _ in range(2))
    into = np.zeros_like(left)
    here, there = (np.full(_BYTES, 1, np.uint8) for _ in range(2))
    place = next(each for each in (folder.absolute(), *folder.absolute().parents) if each.is_dir())
    return Speed(
        products=parallel.threads() * 2 * _COUNT * _WIDTH**3 / _least(lambda: np.matmul(left, right, out=into)),
        copies=_BYTES / _least(lambda: np.copyto(there, here)),
        writes=_writes(place, here[:_WRITTEN].data),
        calls=_LOOPS / _least(lambda: sum(step & 1 for step in range(_LOOPS))),
    )


def _writes(folder: Path, data: memoryview) -> float:
    """Bytes per second that the disk of `folder` takes and keeps; the reference's where nothing can be written."""

    def write() -> None:
        # Without a name: nothing is left even if the process is killed.
        with tempfile.TemporaryFile(dir=folder) as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())

    try:
        return data.nbytes / _least(write)
    except OSError:
        return REFERENCE.writes


def _least(work: Callable[[], object]) -> float:
    """Seconds of the quickest try."""
    times: list[float] = []
    while sum(times) < _SECONDS or (len(times) < _TRIES and sum(times) < _MOST):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return min(times)
