"""What a worker does: it makes sure that it is what it must be and sees what it must see, and then runs the shard.

Once per process and file. A worker that joins later, or is started anew, does the same.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Protocol

from pipeline.core import host, log, versions
from pipeline.core.errors import IntegrityError, UsageError
from pipeline.core.manifest import FileRecord
from pipeline.core.recipe import PROJECT


class Shard(Protocol):
    """A piece of work: a frozen dataclass of plain values, so that it can be sent and `repr` tells all of it."""

    @property
    def amount(self) -> int:
        """How much it is, in the unit of the progress bar."""
        ...

    def run(self, bar: log.Progress) -> bytes:
        """The result; `bar` is advanced by the amount while it runs."""
        ...


def _code() -> str:
    """The sha256 of the project's code and recipes."""
    digest = hashlib.sha256()
    for file in sorted((PROJECT / "pipeline").rglob("*")):
        if file.is_file() and file.suffix != ".pyc":
            digest.update(f"{file.relative_to(PROJECT)}\0{file.stat().st_size}\0".encode())
            digest.update(file.read_bytes())
    return digest.hexdigest()


_CODE = _code()
"""As it was when this process read it: a worker that is older than a change of the code says so."""
_DIGEST = hashlib.sha256().digest_size
_turn = threading.Lock()
KEPT = ".shards"
"""The folder, beside those of the stages, of finished shards of stages that are not, and of what workers put aside."""
let_go: list[Callable[[], None]] = []
"""What frees what shards leave open for those after them, such as a model: under other terms it may be another one."""


@dataclass(frozen=True)
class Terms:
    """What a worker must be and see: code and versions, and the `inputs` below `root` with the recorded contents."""

    code: str
    tools: tuple[tuple[str, str], ...]
    root: str
    inputs: tuple[FileRecord, ...]

    @classmethod
    def of(cls, root: Path, inputs: tuple[FileRecord, ...]) -> Terms:
        """Those of this process."""
        return cls(_CODE, tuple(sorted(versions.installed().items())), str(root), inputs)


def read(file: Path) -> bytes | None:
    """The result that is kept in `file`; None where there is none, or not all of it."""
    held = file.read_bytes() if file.is_file() else b""
    digest, result = held[:_DIGEST], held[_DIGEST:]
    return result if hashlib.sha256(result).digest() == digest else None


def write(file: Path, result: bytes) -> None:
    """Keep a result in `file`, after its sha256, whole or not at all."""
    partial = file.with_name(f"{file.name}.{secrets.token_hex(4)}.partial")
    try:
        with partial.open("wb") as stream:
            stream.write(hashlib.sha256(result).digest())
            stream.write(result)
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)


def work(terms: Terms, shard: Shard, file: Path) -> bytes:
    """The result of `shard`, on a worker, which keeps it in `file`: so it outlives whoever waits for it.

    Raises:
        UsageError: the worker has other code or versions, or does not see a file.
        IntegrityError: a file has other contents here.
    """
    # One at a time: shards share a model in this process, and its threads are counted for one.
    with _turn:
        _renew(terms)
        _accept(terms)
        if (kept := read(file)) is not None:  # of a worker that died, or was silent, before it could tell
            return kept
        result = shard.run(log.unshown())
        with suppress(OSError):  # who asked will keep it, or say why it can't be kept
            write(file, result)
        return result


_served: list[Terms] = []
"""The terms of this process, the last of which hold."""


def _renew(terms: Terms) -> None:
    if _served != [terms]:
        host.keep_freed()
        for free in let_go:
            free()
        _served[:] = [terms]


@cache
def _accept(terms: Terms) -> None:
    own = dict(Terms.of(Path(terms.root), ()).tools)
    wanted = dict(terms.tools)
    here = f"worker {socket.gethostname()} (process {os.getpid()})"
    other = [
        f"{name} {own.get(name, 'missing')} instead of {wanted.get(name, 'none')}"
        for name in sorted(own.keys() | wanted.keys())
        if own.get(name) != wanted.get(name)
    ]
    if other or terms.code != _CODE:
        raise UsageError(
            f"{here} has other {'versions: ' + ', '.join(other) if other else 'code of this project'}",
            cause="it was started from another commit, environment or image, or before this one was changed",
            remedy="start the workers anew from the same commit and lock, or from the same image",
        )
    for record in terms.inputs:
        file = Path(terms.root) / record.path
        if not file.is_file():
            raise UsageError(
                f"{here} does not see {os.path.realpath(file)}",
                cause="the folder is not shared with it, or is at another path there",
                remedy="set ARTIFACTS=, and MODEL_ID= if it is a folder, to folders that all machines have at one path",
            )
        if (found := FileRecord.of(file, Path(terms.root))) != record:
            raise IntegrityError(
                f"{here} sees other contents of {os.path.realpath(file)}: sha256 {found.sha256[:12]}…, "
                f"the manifest says {record.sha256[:12]}…",
                cause="the folder there is another one of that name, or the file was changed",
                remedy="share the folder, or fetch again",
            )
