"""A file written past the page cache has the bytes that were given, whatever their number, or an error is told."""

from __future__ import annotations

import errno
import hashlib
import os
from pathlib import Path
from typing import Any

import pytest

from pipeline.core import direct
from pipeline.core.direct import DirectFile

SIZES = (0, 1, direct._ALIGNED, direct._BUFFER - 1, direct._BUFFER, direct._BUFFERS * direct._BUFFER + 4097)


def written(file: Path, data: bytes, step: int) -> str:
    with DirectFile(file) as stream:
        for start in range(0, len(data), step):
            stream.write(data[start : start + step])
    return stream.sha256()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("step", [99_991, 3 * direct._BUFFER])
@pytest.mark.parametrize("without", [False, True], ids=["direct", "not direct"])
def test_what_is_given_is_what_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int, step: int, without: bool
) -> None:
    plainly = os.open

    def refusing(file: Any, flags: int, mode: int = 0o777) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "no direct writing")
        return plainly(file, flags, mode)

    if without:
        monkeypatch.setattr(os, "open", refusing)
    data = (os.urandom(1 << 16) * (size // (1 << 16) + 1))[:size]
    assert written(tmp_path / "file", data, step) == hashlib.sha256(data).hexdigest()
    assert (tmp_path / "file").read_bytes() == data


@pytest.mark.parametrize("size", SIZES)
def test_a_part_of_another_file_is_copied(tmp_path: Path, size: int) -> None:
    data = (os.urandom(1 << 16) * (size // (1 << 16) + 1))[:size]
    (tmp_path / "source").write_bytes(b"before" + data + b"after")
    with DirectFile(tmp_path / "file") as stream:
        stream.write(b"head")
        counts = sum(stream.copy(tmp_path / "source", 6, 6 + size))
        stream.write(b"tail")
    assert counts == size and (tmp_path / "file").read_bytes() == b"head" + data + b"tail"
    assert stream.sha256() == hashlib.sha256(b"head" + data + b"tail").hexdigest()


def test_a_source_that_becomes_shorter_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes(b"short")
    with pytest.raises(OSError, match="shorter"), DirectFile(tmp_path / "file") as stream:
        list(stream.copy(tmp_path / "source", 0, 6))


def test_a_shorter_file_takes_the_place_of_a_longer_one(tmp_path: Path) -> None:
    written(tmp_path / "file", b"x" * 10_000, 10_000)
    written(tmp_path / "file", b"y" * 5, 5)
    assert (tmp_path / "file").read_bytes() == b"y" * 5


@pytest.mark.parametrize("size", [5, 6 * direct._BUFFER])
def test_a_disk_that_is_full_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OSError, match="No space left"):
        written(tmp_path / "file", bytes(size), size)


def test_an_error_amid_is_the_one_that_is_told(tmp_path: Path) -> None:
    with pytest.raises(KeyError, match="mine"), DirectFile(tmp_path / "file") as stream:
        stream.write(b"begun")
        raise KeyError("mine")
