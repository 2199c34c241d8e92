"""Rows that were rounded once, kept for the second graph that has them: the bundle's decoder after the step graph."""

from __future__ import annotations

import hashlib
import os
import tempfile
import threading
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline.tflite.lazy import Array, flat_bytes


class Kept:
    """Rounded rows by all that they were made of, in a file without a name: whatever ends this process, none stays.

    A graph that differs in a weight, a scale or a Hessian has rows of its own.
    """

    def __init__(self, folder: Path) -> None:
        """`folder` is where the file takes its room, a byte per weight."""
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - open as long as this is
        self._places, self._end, self._lock = dict[bytes, int](), 0, threading.Lock()

    def close(self) -> None:
        """Give the room back."""
        self._file.close()

    def once(self, made_of: Iterable[bytes | Array], shape: tuple[int, ...], make: Callable[[], Array]) -> Array:
        """What `make` gives, int8 of `shape`; what it gave before where that was made of the same."""
        digest = hashlib.sha256()
        for part in made_of:
            digest.update(part if isinstance(part, bytes) else flat_bytes(part).data)
        place = self._places.get(digest.digest())
        if place is not None:
            found: NDArray[np.int8] = np.empty(shape, np.int8)
            os.preadv(self._file.fileno(), [found.reshape(-1).data], place)
            return found
        made = make()
        rest = memoryview(flat_bytes(made).data)
        with self._lock:
            place, self._end = self._end, self._end + len(rest)
        at = place
        while rest:  # a disk that is nearly full takes a part, and says so the next time
            count = os.pwrite(self._file.fileno(), rest, at)
            rest, at = rest[count:], at + count
        self._places[digest.digest()] = place
        return made
