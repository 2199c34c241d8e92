"""Running another program and watching what it takes: time, memory as the kernel counts it, bytes to and from disk."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

INTERVAL = 0.05
"""Seconds between looks. Resident memory has a peak in the kernel; of anonymous memory a shorter one can be missed."""
_KEPT = 400
"""Looks that are kept of a whole run: enough for a picture."""


@dataclass(frozen=True, kw_only=True)
class Watched:
    """What a program took.

    Seconds on the wall, and of the processor, children included; bytes of resident and of anonymous memory at most;
    bytes it had the disk read and write (what the page cache served is not among them); and `memory` over time:
    seconds, anonymous and resident bytes.
    """

    seconds: float
    processor_seconds: float
    peak_resident: int
    peak_anonymous: int
    read: int
    written: int
    memory: list[tuple[float, int, int]]


def run(command: Sequence[str], log: Path | None = None) -> Watched:
    """Run `command` and watch that process, not its children, until it ends.

    Args:
        command: the program and its arguments.
        log: the file its output goes to; without one it is shown.

    Raises:
        subprocess.CalledProcessError: it failed.
    """
    looks: list[tuple[float, int, int]] = []
    resident, moved = 0, (0, 0)
    started, before = time.perf_counter(), os.times()
    with (log or Path("/dev/stderr")).open("wb" if log else "ab") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        while process.poll() is None:
            sizes, disk = _sizes(process.pid, "status"), _sizes(process.pid, "io")
            if "RssAnon" in sizes:
                looks.append((time.perf_counter() - started, sizes["RssAnon"], sizes["VmRSS"]))
                resident = max(resident, sizes["VmHWM"])
            moved = max(moved[0], disk.get("read_bytes", 0)), max(moved[1], disk.get("write_bytes", 0))
            time.sleep(INTERVAL)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return Watched(
        seconds=time.perf_counter() - started,
        processor_seconds=sum(os.times()[2:4]) - sum(before[2:4]),
        peak_resident=resident,
        peak_anonymous=max((anonymous for _, anonymous, _ in looks), default=0),
        read=moved[0],
        written=moved[1],
        memory=_thinned(looks),
    )


def _thinned(looks: Sequence[tuple[float, int, int]]) -> list[tuple[float, int, int]]:
    """At most about `_KEPT` of them, the highest of each group."""
    step = -(-len(looks) // _KEPT) or 1
    groups = (looks[start : start + step] for start in range(0, len(looks), step))
    kept = [max(group, key=lambda look: look[1]) for group in groups]
    return [(round(seconds, 2), anonymous, resident) for seconds, anonymous, resident in kept]


def _sizes(process: int, file: str) -> dict[str, int]:
    """What stands in `/proc/<process>/<file>`, in bytes by the kernel's names; nothing when it has ended."""
    try:
        text = Path(f"/proc/{process}/{file}").read_text(encoding="ascii", errors="replace")
    except OSError:
        return {}
    rows = [line.split() for line in text.splitlines()]
    plain = {row[0].rstrip(":"): int(row[1]) for row in rows if len(row) == 2 and row[1].isdecimal()}
    return plain | {row[0].rstrip(":"): int(row[1]) * 1024 for row in rows if row[-1] == "kB"}
