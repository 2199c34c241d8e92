"""Running another program and watching what it takes: the time, and the memory as the kernel counts it."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

INTERVAL = 0.05
"""Seconds between looks. Resident memory has a peak in the kernel; of anonymous memory a shorter one can be missed."""


@dataclass(frozen=True)
class Watched:
    """What a program took: seconds on the wall, bytes of resident and of anonymous memory at most."""

    seconds: float
    peak_resident: int
    peak_anonymous: int


def run(command: Sequence[str], log: Path | None = None) -> Watched:
    """Run `command` and watch that process, not its children, until it ends.

    Args:
        command: the program and its arguments.
        log: the file its output goes to; without one it is shown.

    Raises:
        subprocess.CalledProcessError: it failed.
    """
    resident = anonymous = 0
    started = time.perf_counter()
    with (log or Path("/dev/stderr")).open("wb" if log else "ab") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        while process.poll() is None:
            sizes = memory(process.pid)
            resident = max(resident, sizes.get("VmHWM", 0))
            anonymous = max(anonymous, sizes.get("RssAnon", 0))
            time.sleep(INTERVAL)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return Watched(time.perf_counter() - started, resident, anonymous)


def memory(process: int) -> dict[str, int]:
    """The sizes in `/proc/<process>/status` in bytes by the kernel's names; none when it has ended."""
    try:
        status = Path(f"/proc/{process}/status").read_text(encoding="ascii", errors="replace")
    except OSError:
        return {}
    return {row.split(":")[0]: int(row.split()[1]) * 1024 for row in status.splitlines() if row.endswith("kB")}
