"""SHA256SUMS: what lets anybody check a download with `sha256sum -c SHA256SUMS`."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from pipeline.core import manifest
from pipeline.core.errors import IntegrityError, PublishError
from pipeline.core.manifest import FileRecord

NAME = "SHA256SUMS"


def write_sums(folder: Path, files: Iterable[Path]) -> Path:
    """Write the sums of `files`, all in `folder` or below it, and return the path of the new file.

    Raises:
        PublishError: a name holds a line break or a backslash, for which coreutils has a syntax of its own.
    """
    records = sorted((FileRecord.of(file, folder) for file in files), key=lambda record: record.path)
    for record in records:
        if set(record.path) & set("\n\r\\"):
            raise PublishError(f"{record.path!r} can't stand in {NAME}", remedy="rename the checkpoint's folder")
    target = folder / NAME
    manifest.write_atomically(target, "".join(f"{record.sha256}  {record.path}\n" for record in records))
    return target


def read_sums(folder: Path) -> dict[str, str]:
    """The sums in `folder`, sha256 by path.

    Raises:
        IntegrityError: the file is missing, or a line is not a sum, two spaces and a path.
    """
    file = folder / NAME
    if not file.is_file():
        raise IntegrityError(f"{file} does not exist", remedy="run `make publish` again")
    sums: dict[str, str] = {}
    for row in file.read_text(encoding="utf-8").splitlines():
        digest, _, path = row.partition("  ")
        if len(digest) != 64 or not path or path in sums:
            raise IntegrityError(f"{file} has a line that is no checksum: {row!r}", remedy="run `make publish` again")
        sums[path] = digest
    return sums


def check_sums(folder: Path) -> int:
    """Hold every file that SHA256SUMS lists against its sum and return how many there are.

    Raises:
        IntegrityError: names the first file that is missing or differs.
    """
    sums = read_sums(folder)
    for path, digest in sums.items():
        file = folder / path
        if not file.is_file():
            raise IntegrityError(
                f"{file} is missing", cause=f"it is listed in {NAME}", remedy="run `make publish` again"
            )
        if FileRecord.of(file, folder).sha256 != digest:
            raise IntegrityError(
                f"{file} does not have the sha256 in {NAME}",
                cause="it was changed after it was made",
                remedy="run `make publish` again",
            )
    return len(sums)
