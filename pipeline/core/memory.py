"""How much memory this process may still take, and refusing work that needs more before it begins."""

from __future__ import annotations

import gc
from pathlib import Path

from pipeline.core import host, log
from pipeline.core.errors import ResourceError

_WORKING = 3 << 29
"""Bytes that the reference takes besides its weights: 1.3 GB were the peak with the shipped model."""


def available(root: Path = Path("/")) -> int | None:
    """Bytes that are free for this process: the machine's, or what its container leaves; None where unknown.

    Args:
        root: where `proc` and `sys` are mounted.
    """
    return min(host.memory_limits(root), default=None)


def of_reference(parameters: int) -> int:
    """Bytes that Hugging Face's model of so many parameters takes in float32, and working with it."""
    return 4 * parameters + _WORKING


def give_back() -> None:
    """Return to the system what is no longer used: objects in circles, and what the allocator keeps of them."""
    gc.collect()
    host.trim()


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
