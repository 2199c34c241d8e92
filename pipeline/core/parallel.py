"""Work on many parts in a thread per core, with results in order: they do not depend on the threads."""

from __future__ import annotations

import os
import re
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import Context, ContextVar, copy_context
from typing import TypeVar

from pipeline.core import host
from pipeline.core.errors import UsageError

Part = TypeVar("Part")
Result = TypeVar("Result")

_given_up: ContextVar[tuple[threading.Event, ...]] = ContextVar("given_up", default=())
"""Of the parts that this thread works within: set once nobody waits for their results any more."""


_limit: ContextVar[int | None] = ContextVar("limit", default=None)
"""The threads that what runs here may have, where somebody else counts them."""
_LOCAL = "local:"


@contextmanager
def limited(count: int) -> Iterator[None]:
    """Let `threads` say `count` in the block: of a shard, whose worker may be one of many on a machine."""
    before = _limit.set(count)
    try:
        yield
    finally:
        _limit.reset(before)


def threads(default: int | None = None) -> int:
    """What `THREADS=` says (handed on as OMP_NUM_THREADS), else `default`, else one per core this process may use."""
    if (limit := _limit.get()) is not None:
        return limit
    wanted = os.environ.get("OMP_NUM_THREADS", "")
    return int(wanted) if wanted.isdecimal() and int(wanted) else default or host.cores()


def local_workers(cluster: str) -> int | None:
    """How many workers on this machine `CLUSTER=local:<n>` asks for; None where it is a scheduler's address.

    Raises:
        UsageError: it is neither.
    """
    count = cluster.removeprefix(_LOCAL)
    if cluster.startswith(_LOCAL) and count.isdecimal() and int(count):
        return int(count)
    if not re.fullmatch(r"[a-z]+://\S+", cluster):
        raise UsageError(
            f"CLUSTER={cluster} is neither a scheduler's address nor local workers",
            remedy="say CLUSTER=tcp://host:8786 or CLUSTER=local:4",
        )
    return None


def ordered(work: Callable[[Part], Result], parts: Iterable[Part]) -> Iterator[Result]:
    """`work` of each part in order; at most one part per thread, and one more, is under way or waiting to be taken.

    After an error, an interrupt or a `break` no further part begins, nor one of those that are being cut up in turn:
    Ctrl-C is heard after the smallest parts under way.
    """
    count, over = threads(), threading.Event()
    with ThreadPoolExecutor(count) as pool:
        waiting: deque[Future[Result]] = deque()
        try:
            for part in parts:
                check()
                # In the caller's context, which a thread of a pool would not have: part of part knows what it is part
                # of.
                waiting.append(pool.submit(_context(over).run, work, part))
                # One more than threads, so that none waits while the caller looks at a result.
                if len(waiting) > count:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            over.set()
            for future in waiting:
                future.cancel()


def check() -> None:
    """Stop here if what this thread works on is given up: for long parts that are not cut up by `ordered` in turn.

    Raises:
        CancelledError: it is.
    """
    if any(event.is_set() for event in _given_up.get()):
        raise CancelledError


def _context(over: threading.Event) -> Context:
    """This thread's context for a worker, to which `over` is told as well."""
    context = copy_context()
    context.run(_given_up.set, (*_given_up.get(), over))
    return context
