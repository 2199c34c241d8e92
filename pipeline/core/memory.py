"""How much memory this process may still take, and refusing work that needs more before it begins."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from pipeline.core import log
from pipeline.core.errors import ResourceError

_UNLIMITED = 1 << 60
_GROUPS = (
    ("sys/fs/cgroup/memory.max", "sys/fs/cgroup/memory.current"),  # version 2, as containers see their own
    ("sys/fs/cgroup/memory/memory.limit_in_bytes", "sys/fs/cgroup/memory/memory.usage_in_bytes"),  # version 1
)


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
        if "MemAvailable" in rows:
            yield int(rows["MemAvailable"].split()[0]) * 1024
    for limit, used in _GROUPS:
        if (root / limit).is_file() and (root / used).is_file():
            most = (root / limit).read_text(encoding="ascii").strip()
            if most.isdigit() and int(most) < _UNLIMITED:
                yield max(0, int(most) - int((root / used).read_text(encoding="ascii")))


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
