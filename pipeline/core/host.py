"""What only Linux has, each with a plain way for elsewhere. No other file of the pipeline asks for any of it."""

from __future__ import annotations

import ctypes
import mmap
import os
import platform
import resource
import sys
from collections.abc import Iterator
from pathlib import Path

LINUX = sys.platform == "linux"
_NO_RESERVE = 0x4000
"""MAP_NORESERVE of Linux, which Python's mmap names from 3.13 on."""
_TRIM, _MAPPED, _ARENAS = -1, -3, -8
"""M_TRIM_THRESHOLD, M_MMAP_THRESHOLD and M_ARENA_MAX of glibc's malloc.h."""
_UNLIMITED = 1 << 60
_KINDS = (
    ("sys/fs/cgroup", "memory.max", "memory.current", ""),  # version 2
    ("sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),  # version 1
)
"""Per version of cgroups: where they are mounted, the files with limit and use, and how names in memory.stat begin."""
_MAXRSS = 1 if sys.platform == "darwin" else 1024
"""Bytes that `ru_maxrss` counts in."""


def cores() -> int:
    """Cores that this process may use: in a container or under taskset fewer than there are. Elsewhere all."""
    return len(os.sched_getaffinity(0)) if LINUX else os.cpu_count() or 1


def open_direct(file: Path, flags: int) -> int:
    """A descriptor of `file` past the page cache; where file system or host has no direct writing, an ordinary one.

    Raises:
        OSError: as `os.open`.
    """
    try:
        return os.open(file, flags | (os.O_DIRECT if LINUX else 0), 0o666)
    except OSError:
        return os.open(file, flags, 0o666)


def unreserved(size: int) -> mmap.mmap:
    """`size` bytes of address space that take no memory while nothing touches them.

    Linux refuses what is larger than its memory unless it is told to set none aside; macOS never sets any aside.
    """
    return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | (_NO_RESERVE if LINUX else 0))


def one_arena() -> None:
    """Let all threads of this process share the allocator's room, from its start.

    glibc gives threads arenas of their own, each of which keeps what its thread let go: with blocks of rows in threads
    of many pools that is half a gigabyte.
    """
    _set_allocator((_ARENAS, 1))


def keep_freed() -> None:
    """Let the allocator keep what is freed for what comes next, as far as glibc itself goes if nobody says otherwise.

    Dask starts workers with MALLOC_TRIM_THRESHOLD_=65536: then each tensor is mapped and filled with zeros anew, which
    was a quarter of golden's processor time (Gemma 3 270M).
    """
    _set_allocator((_TRIM, 64 << 20), (_MAPPED, 32 << 20))


def _set_allocator(*options: tuple[int, int]) -> None:
    set_option = getattr(ctypes.CDLL(None), "mallopt", None) if LINUX else None
    for option in options:
        if set_option:
            set_option(*option)


def trim() -> None:
    """Give back what the allocator keeps of freed memory. Others than glibc's keep less, or give it back themselves."""
    give_back = getattr(ctypes.CDLL(None), "malloc_trim", None) if LINUX else None
    if give_back:
        give_back(0)


def memory_held() -> tuple[int, int]:
    """Bytes of this process's memory now: resident (all mapped pages), and anonymous (what only swap could hold).

    Elsewhere twice the most that was ever resident: the anonymous part is no more than that.
    """
    if not LINUX:
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _MAXRSS
        return most, most
    status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    sizes = {row.split(":")[0]: int(row.split()[1]) * 1024 for row in status.splitlines() if row.endswith("kB")}
    return sizes.get("VmRSS", 0), sizes.get("RssAnon", 0)


def processor() -> str:
    """The processor's name, from the kernel; elsewhere its kind."""
    file = Path("/proc/cpuinfo")
    rows = file.read_text(encoding="utf-8", errors="replace").splitlines() if LINUX and file.is_file() else []
    names = [row.partition(":")[2].strip() for row in rows if row.startswith("model name")]
    return names[0] if names else platform.machine()


def memory_limits(root: Path = Path("/")) -> Iterator[int]:
    """Bytes that the machine has free, and what each memory cgroup leaves; elsewhere all that the machine has.

    Args:
        root: where `proc` and `sys` are mounted.
    """
    if not LINUX:
        yield os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return
    meminfo = root / "proc" / "meminfo"
    if meminfo.is_file():
        rows = dict(line.split(":", 1) for line in meminfo.read_text(encoding="ascii").splitlines() if ":" in line)
        # Not MemFree: what the page cache holds is given up when somebody needs it.
        if "MemAvailable" in rows:
            yield int(rows["MemAvailable"].split()[0]) * 1024
    for kind, group in _groups(root):
        mount, limit, used, prefix = kind
        folder = root / mount / group
        if (folder / limit).is_file() and (folder / used).is_file():
            most = (folder / limit).read_text(encoding="ascii").strip()
            # Version 2 says `max` for no limit, version 1 a number near 2⁶³.
            if most.isdigit() and int(most) < _UNLIMITED:
                held = int((folder / used).read_text(encoding="ascii")) - _reclaimable(folder, prefix)
                yield max(0, int(most) - max(0, held))


def _groups(root: Path) -> Iterator[tuple[tuple[str, str, str, str], str]]:
    """The memory cgroups that hold this process, from the root (all that a container sees) to the innermost."""
    file = root / "proc" / "self" / "cgroup"
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    rows = [line.split(":", 2) for line in lines if line.count(":") >= 2]
    for kind, names in zip(_KINDS, ("", "memory"), strict=True):
        inner = next((path for _, controllers, path in rows if names in controllers.split(",")), "/")
        parts = [part for part in inner.split("/") if part not in ("", "..")]
        # Every group on the way counts: the tightest limit is the one that kills.
        for depth in range(len(parts) + 1):
            yield kind, "/".join(parts[:depth])


def _reclaimable(folder: Path, prefix: str) -> int:
    """Bytes of files that the group holds in the page cache, which the kernel gives up when memory runs short."""
    file = folder / "memory.stat"
    rows = dict(line.split() for line in file.read_text(encoding="ascii").splitlines()) if file.is_file() else {}
    return sum(int(rows.get(f"{prefix}{kind}_file", 0)) for kind in ("active", "inactive"))
