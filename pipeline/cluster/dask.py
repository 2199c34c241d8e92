"""Workers by Dask's `distributed`: those of a scheduler somewhere, or processes on this machine.

Dask moves shards and results, gives a dead worker's shard to another one, and gives up a shard that kills several. It
is imported only where a cluster is asked for; its usual settings (TLS, timeouts) are its own.
"""

from __future__ import annotations

import logging
import tempfile
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sized
from concurrent.futures import CancelledError, Executor, Future, InvalidStateError
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import ParamSpec, Protocol, TypeVar, cast

from pipeline.core import log, parallel
from pipeline.core.errors import ResourceError, UsageError

P = ParamSpec("P")
T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)
_PATIENCE = "10s"
"""How long a scheduler may take to answer."""
_UNREAD, _SILENT = "distributed.comm.timeouts.tcp", "300s"
"""How long a process may read nothing of what is sent to it: as long as a scheduler lets a worker be silent. Dask's 30
s pass on a busy machine, and then the scheduler is lost."""
_WORKERS = 120.0
"""Seconds that may pass without any worker."""
_REMEDY = "run the same command again: finished shards are kept"


@contextmanager
def connect(cluster: str) -> Iterator[Workers]:
    """The executor of a cluster; what becomes of it is told in a sentence.

    Args:
        cluster: a scheduler's address (`tcp://host:8786`, `tls://…`), or `local:<n>` for n workers on this machine.

    Raises:
        UsageError: there is no such scheduler, or it has another version; Dask is not installed.
        ResourceError: no worker came, all that tried a shard died, or the scheduler was lost.
    """
    count = parallel.local_workers(cluster)
    try:
        import distributed
        from dask import config
    except ImportError:
        raise UsageError(
            "CLUSTER= needs Dask, which is not installed here",
            remedy="`make … CLUSTER=…` installs it; by hand: pip install --require-hashes -r locks/cluster.txt",
        ) from None
    for name in ("distributed", "distributed.client"):  # what is told here in sentences it would tell in tracebacks
        logging.getLogger(name).setLevel(logging.CRITICAL)
    with ExitStack() as stack:
        if config.get(_UNREAD) == "30s":  # nobody said otherwise
            stack.enter_context(config.set({_UNREAD: _SILENT}))
        if count:
            scratch = stack.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True))
            address = stack.enter_context(
                distributed.LocalCluster(
                    n_workers=count,
                    threads_per_worker=1,
                    memory_limit=0,  # the stage has planned for what a model takes
                    dashboard_address=None,
                    local_directory=scratch,
                    silence_logs="CRITICAL",
                )
            ).scheduler_address
        else:
            address = cluster
        try:
            client = stack.enter_context(distributed.Client(address, timeout=_PATIENCE, set_as_default=False))
        except (OSError, ValueError, RuntimeError) as error:
            raise UsageError(
                f"no Dask scheduler answers at {cluster}: {str(error).splitlines()[0]}",
                cause="none runs there, a firewall is between, or it asks for TLS",
                remedy="start one (`dask scheduler`) and its workers as docs/cluster.md says, or use CLUSTER=local:2",
            ) from None
        _check_version(client.get_versions()["scheduler"]["packages"].get("distributed"), distributed.__version__)
        try:
            client.wait_for_workers(1, timeout=_WORKERS)
        except TimeoutError:
            raise _no_worker(cluster) from None
        workers = Workers(client)
        log.step(f"shards run on {workers.count()} workers of {cluster}")
        try:
            stack.enter_context(_watched(workers, client.scheduler_info, cluster))
            yield workers
        except distributed.scheduler.KilledWorker as error:
            raise ResourceError(
                f"{error.allowed_failures + 1} workers died over one shard, the last at {error.last_worker.address}",
                cause="a worker has too little memory for the model, or is stopped from outside",
                remedy=f"give workers more memory; then {_REMEDY}",
            ) from None
        except ModuleNotFoundError as error:
            raise UsageError(
                f"a worker of {cluster} does not have this project's code: {error}",
                cause="it was started in another folder or environment",
                remedy="start workers as docs/cluster.md says, in a checkout of the same commit or in the image",
            ) from None
        except (CancelledError, distributed.comm.CommClosedError):
            raise ResourceError(
                f"the scheduler at {cluster} is lost",
                cause="it ended, or the network is cut",
                remedy=_REMEDY,
            ) from None


class _There(Protocol[T_co]):
    """A future as Dask has them: of a result that lies on a worker."""

    def release(self) -> None:
        """Let go of the result there."""
        ...


class _Loop(Protocol):
    """The loop of Dask's client, in a thread of its own."""

    def add_callback(self, callback: Callable[P, Awaitable[None]], *args: P.args, **kwargs: P.kwargs) -> None:
        """Run the coroutine `callback` in the loop."""
        ...


class _Client(Protocol):
    """What of Dask's client is used here."""

    loop: _Loop

    def submit(self, fn: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> _There[T]:
        """Hand a call to a worker."""
        ...

    def scheduler_info(self, *, n_workers: int) -> Mapping[str, Sized]:
        """What the scheduler says of itself; of all workers with -1."""
        ...

    def gather(self, there: _There[T], *, asynchronous: bool) -> Awaitable[T]:
        """Bring a result here."""
        ...


class Workers(Executor):
    """Dask's workers as an executor.

    Unlike Dask's own, it lets go of a result there once it is here: Dask makes those anew that a dead worker held.
    """

    def __init__(self, client: _Client) -> None:
        self._client = client
        self._give_ups = dict[int, Callable[[BaseException], None]]()

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """The future of what `fn` gives on a worker."""
        here = Future[T]()
        self._give_ups[id(here)] = partial(_settle, here, None)
        here.add_done_callback(lambda done: self._give_ups.pop(id(done), None))
        # Not `pure`: a call that was made before would be answered with what came of it then.
        there = partial(self._client.submit, pure=False)(fn, *args, **kwargs)
        # In the client's loop, which ends with it. A thread that waits for a result would keep an interrupted process.
        self._client.loop.add_callback(self._bring, here, there)
        return here

    async def _bring(self, here: Future[T], there: _There[T]) -> None:
        try:
            result = await self._client.gather(there, asynchronous=True)
        except BaseException as error:
            _settle(here, None, error)
        else:
            _settle(here, result, None)
        finally:
            there.release()

    def count(self) -> int:
        """How many workers there are now."""
        return len(self._client.scheduler_info(n_workers=-1)["workers"])

    def give_up(self, error: BaseException) -> None:
        """Answer everything that is waited for with `error`."""
        for give_up in tuple(self._give_ups.values()):
            give_up(error)


def _settle(here: Future[T], result: T | None, error: BaseException | None) -> None:
    with suppress(InvalidStateError):  # it was given up
        if error:
            here.set_exception(error)
        else:
            here.set_result(cast(T, result))


@contextmanager
def _watched(workers: Workers, scheduler: Callable[[], Mapping[str, object]], cluster: str) -> Iterator[None]:
    """Give up what is waited for once there has been no worker for too long: Dask would wait for ever."""
    over = threading.Event()

    def watch() -> None:
        seen = time.monotonic()
        while not over.wait(min(5.0, _WORKERS / 20)):
            # Without a scheduler Dask itself gives up.
            with suppress(Exception):
                if scheduler()["workers"]:
                    seen = time.monotonic()
            if time.monotonic() - seen > _WORKERS:
                workers.give_up(_no_worker(cluster))

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        over.set()


def _no_worker(cluster: str) -> ResourceError:
    return ResourceError(
        f"the scheduler at {cluster} has no worker",
        cause="none was started, all of them ended, or they wait in a queue",
        remedy=f"start workers as docs/cluster.md says; then {_REMEDY}",
    )


def _check_version(theirs: str | None, ours: str) -> None:
    if theirs != ours:
        raise UsageError(
            f"the scheduler runs distributed {theirs}, here is {ours}",
            cause="it was started from another environment",
            remedy="start it from locks/cluster.txt, or from the same image",
        )
