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
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeAlias, cast

from pipeline.core import log, parallel
from pipeline.core.errors import IntegrityError

SCHEMA = 1
NAME = "manifest.json"
_BLOCK = 4 << 20
Fact: TypeAlias = "str | int | float | bool | None | list[Fact] | dict[str, Fact]"
Facts: TypeAlias = Mapping[str, Fact]


@dataclass(frozen=True, kw_only=True)
class FileRecord:
    """The identity of a file: its path relative to the model's artefact folder, size in bytes, and sha256."""

    path: str
    size: int
    sha256: str

    @classmethod
    def of(cls, file: Path, base: Path, bar: log.Progress | None = None) -> FileRecord:
        """Hash `file`; its path is recorded relative to `base`, and `bar` is advanced by the bytes read."""
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
    """One finished stage. `facts` are the stage's own findings; `tools` maps package names to versions."""

    stage: str
    model: str
    revision: str
    recipe_sha256: str
    inputs: tuple[FileRecord, ...]
    outputs: tuple[FileRecord, ...]
    facts: Facts
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
            if record.path == name or record.path.endswith("/" + name):
                return record
        raise self._wrong(f"lists no file {name}")

    def integer(self, fact: str) -> int:
        """A fact that is a whole number. Like the readers below it raises IntegrityError for what is anything else."""
        return cast(int, self._fact(fact, "a whole number", _integer))

    def integers(self, fact: str) -> list[int]:
        """A fact that is a list of whole numbers."""
        held = self._fact(fact, "a list of whole numbers", lambda value: _list_of(value, _integer))
        return cast(list[int], held)

    def number(self, fact: str) -> float | None:
        """A fact that is a number, or null where the model has none."""
        held = self._fact(
            fact, "a number or null", lambda value: value is None or isinstance(value, float) or _integer(value)
        )
        return None if held is None else float(cast(float, held))

    def text(self, fact: str) -> str:
        """A fact that is a text."""
        return cast(str, self._fact(fact, "a text", lambda value: isinstance(value, str)))

    def table(self, fact: str) -> Mapping[str, Any]:
        """A fact that holds facts by name."""
        return cast(Mapping[str, Any], self._fact(fact, "a table", lambda value: isinstance(value, dict)))

    def tables(self, fact: str) -> list[Mapping[str, Any]]:
        """A fact that is a list of such tables."""
        held = self._fact(fact, "a list of tables", lambda value: _list_of(value, lambda row: isinstance(row, dict)))
        return cast(list[Mapping[str, Any]], held)

    def _fact(self, name: str, kind: str, fits: Callable[[object], bool]) -> Fact:
        """A fact, if it is there and `fits`: a wrong one is never read as another value."""
        if name not in self.facts:
            raise self._wrong(f"has no fact {name}")
        if not fits(self.facts[name]):
            raise self._wrong(f"has {self.facts[name]!r} as its fact {name}, which is not {kind}")
        return self.facts[name]

    def _wrong(self, fault: str) -> IntegrityError:
        return IntegrityError(
            f"the manifest of stage {self.stage} {fault}",
            cause="the folder was made by another version of this project, or the manifest was edited",
            remedy=f"remove that stage's folder and run `make {self.stage}` again",
        )


def _list_of(value: object, fits: Callable[[object], bool]) -> bool:
    return isinstance(value, list) and all(map(fits, value))


def _integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def dump_json(value: object) -> str:
    """Deterministic JSON text: sorted keys, two spaces, no NaN, a newline at the end."""
    return json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"


def write_atomically(file: Path, text: str) -> None:
    """Write `text` to `file` so that the file is either whole or absent, also after a power cut or with two writers."""
    partial = file.with_name(f"{file.name}.{secrets.token_hex(4)}.partial")
    try:
        with partial.open("w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
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
        return _parse(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, KeyError, TypeError) as error:
        raise IntegrityError(
            f"{file} can't be read: {error}", cause="it was edited or made by another version", remedy=again
        ) from error


def _parse(raw: dict[str, Any]) -> Manifest:
    if raw["schema"] != SCHEMA:
        raise ValueError(f"schema {raw['schema']}, expected {SCHEMA}")
    files = {key: tuple(_record(**record) for record in raw[key]) for key in ("inputs", "outputs")}
    return Manifest(**{**raw, **files, "source": Source(**raw["source"])})


def _record(path: str, size: int, sha256: str) -> FileRecord:
    if not isinstance(path, str) or Path(path).is_absolute() or ".." in Path(path).parts:
        raise ValueError(f"{path!r} is not a path inside the model's folder")
    return FileRecord(path=path, size=size, sha256=sha256)


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
        row = self.sums.get(str(file.absolute()))
        return str(row[-1]) if row and row[:-1] == self._identity(file) else None

    def record(self, file: Path, base: Path, bar: log.Progress | None = None) -> FileRecord:
        """The record of `file`, read only if it is not known; as `FileRecord.of`."""
        before = self._identity(file)
        if known := self.sha256(file):
            if bar:
                bar.advance(int(before[0]))
            return FileRecord(path=file.relative_to(base).as_posix(), size=int(before[0]), sha256=known)
        made = FileRecord.of(file, base, bar)
        if before == self._identity(file) and time.time_ns() - int(before[3]) > self._TICK:
            self.sums[str(file.absolute())] = [*before, made.sha256]
        return made

    def keep(self) -> None:
        """Write the note for the next stage."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self.file, dump_json(self.sums))

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
