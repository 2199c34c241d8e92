"""How much memory this process may still take, and refusing work that needs more before it begins."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Iterator
from pathlib import Path

from pipeline.core import log
from pipeline.core.errors import ResourceError

_UNLIMITED = 1 << 60
_WORKING = 3 << 29
"""Bytes that the reference takes besides its weights: 1.3 GB were the peak with the shipped model."""
_KINDS = (
    ("sys/fs/cgroup", "memory.max", "memory.current", ""),  # version 2
    ("sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),  # version 1
)
"""Per version of cgroups: where they are mounted, the files with limit and use, and how names in memory.stat begin."""


def available(root: Path = Path("/")) -> int | None:
    """Bytes that are free for this process: the machine's, or what its memory cgroup leaves; None where unknown.

    Args:
        root: where `proc` and `sys` are mounted.
    """
    return min(_limits(root), default=None)


def _limits(root: Path) -> Iterator[int]:
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


def of_reference(parameters: int) -> int:
    """Bytes that Hugging Face's model of so many parameters takes in float32, and working with it."""
    return 4 * parameters + _WORKING


def give_back() -> None:
    """Return to the system what is no longer used: objects in circles, and what the allocator keeps of them."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's; others keep less, or give it back by themselves
    if trim:
        trim(0)


def must_stream(parameters: int) -> bool:
    """Whether that is more than there is: the model must be read from its file a matrix at a time."""
    free = available()
    return free is not None and of_reference(parameters) > free


def require(needed: int, what: str, remedy: str, root: Path = Path("/")) -> None:
    """Refuse `what` if it needs more than there is.

    Raises:
        ResourceError: with both numbers.
    """
    free = available(root)
    if free is not None and needed > free:
        raise ResourceError(
            f"{what} needs about {log.human_bytes(needed)} of memory, {log.human_bytes(free)} are free",
            cause="the machine or its container is too small for this model",
            remedy=remedy,
        )
