"""What a stage made and from what: the deterministic description beside every artefact.

A stage's `manifest.json` is written last and by rename, so that its existence means the stage is done. It holds no
time, host or path of a machine: two builds can be compared with `diff -r`. Those go to `run.json`.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeAlias, TypeVar

from pipeline.core import log, parallel, records
from pipeline.core.errors import IntegrityError

SCHEMA = 1
NAME = "manifest.json"
# Large enough that calls do not count, small enough to stay in the cache between read and hash.
_BLOCK = 4 << 20
Fact: TypeAlias = "str | int | float | bool | None | list[Fact] | dict[str, Fact]"
Facts: TypeAlias = Mapping[str, Fact]
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class FileRecord:
    """The identity of a file: its path relative to the model's artefact folder, size in bytes, and sha256."""

    path: str
    size: int
    sha256: str

    @classmethod
    def of(cls, file: Path, base: Path, bar: log.Progress | None = None) -> FileRecord:
        """Hash `file`; its path is recorded relative to `base`, and `bar` is advanced by the bytes read."""
        # Unbuffered, into one block: nothing is copied on the way from the page cache to the hash.
        digest, size, block = hashlib.sha256(), 0, memoryview(bytearray(_BLOCK))
        with file.open("rb", buffering=0) as stream:
            while count := stream.readinto(block):
                digest.update(block[:count])
                size += count
                if bar:
                    bar.advance(count)
        return cls(path=file.relative_to(base).as_posix(), size=size, sha256=digest.hexdigest())


def sha256_of_part(file: Path, start: int, size: int) -> str:
    """The sha256 of `size` bytes of `file` from byte `start`, or of as many as there are, read in blocks."""
    digest, block = hashlib.sha256(), memoryview(bytearray(min(size, _BLOCK)))
    with file.open("rb", buffering=0) as stream:
        stream.seek(start)
        while size and (count := stream.readinto(block[: min(size, _BLOCK)])):
            digest.update(block[:count])
            size -= count
    return digest.hexdigest()


@dataclass(frozen=True, kw_only=True)
class Source:
    """The state of this project's own code: commit (empty outside git) and whether files differ from it."""

    commit: str
    dirty: bool


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """One finished stage. `facts` are the stage's own findings, `told` reads them; `tools` are packages' versions."""

    stage: str
    model: str
    revision: str
    recipe_sha256: str
    inputs: tuple[FileRecord, ...]
    outputs: tuple[FileRecord, ...]
    facts: Mapping[str, object]
    tools: Mapping[str, str]
    image_digest: str
    source: Source
    schema: int = SCHEMA

    def output(self, name: str) -> FileRecord:
        """The record of the output whose path ends in `name`.

        Raises:
            IntegrityError: the manifest has no such output.
        """
        for record in self.outputs:
            # With the slash, or `step.tflite` would find `my-step.tflite`.
            if record.path == name or record.path.endswith("/" + name):
                return record
        raise self._wrong(f"the manifest of stage {self.stage} lists no file {name}")

    def told(self, kind: type[T]) -> T:
        """The stage's facts, which are a `kind` of core/facts.py.

        Raises:
            IntegrityError: a fact is missing, unknown or of another type; a wrong one is never read as another value.
        """
        return self._read(kind, self.facts, "")

    def part(self, name: str, kind: type[T]) -> T:
        """As `told`, of the fact `name` alone, for a stage whose facts stand by names of its own choice."""
        if name not in self.facts:
            raise self.lacks(name)
        return self._read(kind, self.facts[name], name)

    def _read(self, kind: type[T], value: object, where: str) -> T:
        try:
            return records.build(kind, value, where)
        except ValueError as error:
            raise self._wrong_fact(str(error)) from error

    def lacks(self, fact: str) -> IntegrityError:
        """What to say of a fact that not every such stage has, where it is needed."""
        return self._wrong_fact(f"`{fact}` is missing")

    def _wrong_fact(self, fault: str) -> IntegrityError:
        return self._wrong(f"the facts in the manifest of stage {self.stage} are wrong: {fault}")

    def _wrong(self, fault: str) -> IntegrityError:
        return IntegrityError(
            fault,
            cause="the folder was made by another version of this project, or the manifest was edited",
            remedy=f"remove that stage's folder and run `make {self.stage}` again",
        )


def dump_json(value: object) -> str:
    """Deterministic JSON text: sorted keys, two spaces, no NaN, a newline at the end."""
    # Two builds are compared byte for byte, so nothing may depend on the order in which facts were found.
    return json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"


def write_atomically(file: Path, text: str) -> None:
    """Write `text` to `file` so that the file is either whole or absent, also after a power cut or with two writers."""
    # Another name for each writer: two that shared one would mix their lines.
    partial = file.with_name(f"{file.name}.{secrets.token_hex(4)}.partial")
    try:
        with partial.open("w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            # Before the rename: after a power cut a file system may know the new name and not yet the bytes.
            os.fsync(stream.fileno())
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)


def write(manifest: Manifest, folder: Path) -> Path:
    """Write `manifest` into `folder` and return the path of the file."""
    file = folder / NAME
    write_atomically(file, dump_json(asdict(manifest)))
    return file


def read(folder: Path) -> Manifest:
    """The manifest in `folder`.

    Raises:
        IntegrityError: it is missing, is not JSON, or has another schema.
    """
    file = folder / NAME
    again = f"run `make {folder.name}` (with the same MODEL_ID)"
    if not file.is_file():
        raise IntegrityError(f"{file} does not exist", cause=f"stage {folder.name} is not finished", remedy=again)
    try:
        return parse(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise IntegrityError(
            f"{file} can't be read: {error}", cause="it was edited or made by another version", remedy=again
        ) from error


def parse(text: str) -> Manifest:
    """The manifest that `text` is.

    Raises:
        ValueError: it is none.
    """
    raw = json.loads(text)
    schema = raw.get("schema") if isinstance(raw, dict) else None
    if schema != SCHEMA:
        raise ValueError(f"schema {schema}, expected {SCHEMA}")
    made = records.build(Manifest, raw)
    for record in (*made.inputs, *made.outputs):
        # A manifest can come from elsewhere, and its paths are joined to the folder and read.
        if Path(record.path).is_absolute() or ".." in Path(record.path).parts:
            raise ValueError(f"{record.path!r} is not a path inside the model's folder")
    return made


class Known:
    """Hashes of files that were read before, in `.inputs/hashed.json` below `root`, so that no stage reads them again.

    As in git's index, a file is the one that was hashed if its size, inode and times are what they were: whoever writes
    to a file changes its ctime, which nobody can set. A file that was changed within the clock's last tick before it
    was hashed is not remembered, since another change in that tick would not show.
    """

    _TICK = 100_000_000  # nanoseconds; Linux keeps file times to 10 ms or better

    def __init__(self, root: Path) -> None:
        self.file = root / ".inputs" / "hashed.json"
        self.sums: dict[str, list[int | str]] = {}
        with suppress(OSError, ValueError, RecursionError):  # a note that was lost or damaged costs time alone
            said = json.loads(self.file.read_text(encoding="utf-8"))
            rows = said.items() if isinstance(said, dict) else ()
            self.sums = {name: row for name, row in rows if isinstance(row, list)}

    def sha256(self, file: Path) -> str | None:
        """The hash of `file` if it is known and the file is what it was."""
        row = self.sums.get(self._place(file))
        return str(row[-1]) if row and row[:-1] == self._identity(file) else None

    def record(self, file: Path, base: Path, bar: log.Progress | None = None) -> FileRecord:
        """The record of `file`, read only if it is not known; as `FileRecord.of`."""
        before = self._identity(file)
        if known := self.sha256(file):
            if bar:
                bar.advance(int(before[0]))
            return FileRecord(path=file.relative_to(base).as_posix(), size=int(before[0]), sha256=known)
        made = FileRecord.of(file, base, bar)
        if before == self._identity(file):
            self.learn({file: made.sha256})
        return made

    def settle(self) -> None:
        """Wait until what was written just now is old enough to be remembered."""
        time.sleep(1.1 * self._TICK / 1e9)

    def learn(self, sums: Mapping[Path, str]) -> None:
        """Remember the sha256 of files as they are now."""
        for file, sha256 in sums.items():
            now = self._identity(file)
            if time.time_ns() - int(now[3]) > self._TICK:
                self.sums[self._place(file)] = [*now, sha256]

    def keep(self) -> None:
        """Write the note for the next stage."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        # Names may hold bytes that are no text, which UTF-8 can't say; JSON's escapes can.
        write_atomically(self.file, json.dumps(self.sums, indent=2, sort_keys=True) + "\n")

    @staticmethod
    def _place(file: Path) -> str:
        # Where a link leads, so that a local checkpoint is one file by its own name and by fetch's.
        return os.path.realpath(file)

    @staticmethod
    def _identity(file: Path) -> list[int | str]:
        stat = file.stat()
        return [stat.st_size, stat.st_ino, stat.st_mtime_ns, stat.st_ctime_ns]


def check(records: Iterable[FileRecord], base: Path, known: Known | None = None) -> None:
    """Make sure that every file is there with its recorded size and sha256, by reading it unless it is `known`.

    Raises:
        IntegrityError: names the first file that differs, and how.
    """
    wanted = tuple(records)
    with log.progress("checking inputs", sum(record.size for record in wanted)) as bar:
        for _ in parallel.ordered(lambda record: _check(record, base, bar, known), wanted):
            pass


def describe(files: Iterable[Path], base: Path, known: Known | None = None) -> tuple[FileRecord, ...]:
    """The records of `files`, in order."""
    record = known.record if known else FileRecord.of
    wanted = tuple(files)
    with log.progress("hashing results", sum(file.stat().st_size for file in wanted)) as bar:
        return tuple(parallel.ordered(lambda file: record(file, base, bar), wanted))


def _check(record: FileRecord, base: Path, bar: log.Progress, known: Known | None) -> None:
    file = base / record.path
    stage = record.path.split("/", 1)[0]
    remedy = f"remove {base / stage} and run make again"
    if not file.is_file():
        raise IntegrityError(f"{file} is missing", cause="it was removed after it was made", remedy=remedy)
    if file.stat().st_size != record.size:
        raise IntegrityError(
            f"{file} has {file.stat().st_size} bytes, its manifest says {record.size}",
            cause="it was truncated or replaced after it was made",
            remedy=remedy,
        )
    if (known.record if known else FileRecord.of)(file, base, bar).sha256 != record.sha256:
        raise IntegrityError(
            f"{file} does not have the sha256 in its manifest",
            cause="it was changed after it was made",
            remedy=remedy,
        )
