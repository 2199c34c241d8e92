"""A large file written past the kernel's page cache, which would copy all of it once more, and hashed on the way.

What is written through the cache took 1.2 s of processor time per GB (2 cores, ext4), more than all that went into it.
"""

from __future__ import annotations

import errno
import hashlib
import mmap
import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType

from pipeline.core import host

_BUFFER = 8 << 20
"""Bytes that are written at a time."""
_BUFFERS = 4
_ALIGNED = 4096
"""What the place, the size and the memory of a direct write must be multiples of, on any disk of today."""


class DirectFile:
    """A new file, of which bytes are given one after the other. Whole only if its context ends without an error.

    Where the file system has no direct writing, as of memory, the page cache takes part.
    """

    def __init__(self, file: Path) -> None:
        """Make `file`.

        Raises:
            OSError: as `open`.
        """
        self._descriptor = host.open_direct(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        self._digest = hashlib.sha256()
        self._hasher, self._writer = ThreadPoolExecutor(1), ThreadPoolExecutor(1)
        # Of pages: what Python's own memory begins at is no multiple of anything.
        self._free = deque(
            memoryview(mmap.mmap(-1, _BUFFER, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)) for _ in range(_BUFFERS)
        )
        self._under_way: deque[tuple[memoryview, tuple[Future[None], Future[None]]]] = deque()
        self._buffer, self._filled, self._size = self._free.popleft(), 0, 0

    def write(self, data: bytes | memoryview) -> None:
        """Add `data`.

        Raises:
            OSError: what was added earlier could not be written.
        """
        rest = memoryview(data)
        while rest:
            count = min(len(rest), _BUFFER - self._filled)
            self._buffer[self._filled : self._filled + count] = rest[:count]
            self._filled, rest = self._filled + count, rest[count:]
            if self._filled == _BUFFER:
                self._send()

    def copy(self, file: Path, start: int, stop: int) -> Iterator[int]:
        """Add bytes `start` to `stop` of `file`, read to where they are written from; how many, as they come.

        Raises:
            OSError: they can't be read, or what was added earlier not be written.
        """
        with file.open("rb", buffering=0) as source:
            source.seek(start)
            while start < stop:
                room = self._buffer[self._filled : self._filled + min(stop - start, _BUFFER - self._filled)]
                count = source.readinto(room)
                if not count:
                    raise OSError(errno.EIO, "the file became shorter while it was read", str(file))
                self._filled, start = self._filled + count, start + count
                if self._filled == _BUFFER:
                    self._send()
                yield count

    def sha256(self) -> str:
        """The hash of the whole file, once its context has ended."""
        return self._digest.hexdigest()

    def __enter__(self) -> DirectFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        try:
            if kind is None:
                whole = self._size + self._filled
                self._send()
                while self._under_way:
                    self._take_back()
                os.ftruncate(self._descriptor, whole)  # the last write was a multiple of what it must be
        finally:
            self._hasher.shutdown(cancel_futures=True)
            self._writer.shutdown(cancel_futures=True)
            os.close(self._descriptor)

    def _send(self) -> None:
        """Hash and write what the buffer holds, and go on with a free one."""
        part = self._buffer[: -(-self._filled // _ALIGNED) * _ALIGNED]
        hashed = self._hasher.submit(self._digest.update, self._buffer[: self._filled])
        self._under_way.append((self._buffer, (hashed, self._writer.submit(self._put, part, self._size))))
        self._size += self._filled
        self._filled = 0
        if not self._free:
            self._take_back()
        self._buffer = self._free.popleft()

    def _take_back(self) -> None:
        buffer, futures = self._under_way.popleft()
        for future in futures:
            future.result()
        self._free.append(buffer)

    def _put(self, part: memoryview, place: int) -> None:
        while part:
            count = os.pwrite(self._descriptor, part, place)
            part, place = part[count:], place + count
