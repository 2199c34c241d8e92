"""Where a checkpoint lies: a folder here, or a repository on the Hub at one commit; and that of an adapter's base."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from pipeline.checkpoint import adapters
from pipeline.checkpoint.adapters import Adapter
from pipeline.checkpoint.source import Source
from pipeline.core import log
from pipeline.core.errors import FetchError, UsageError
from pipeline.core.graph import folder_name
from pipeline.core.manifest import Known, describe, dump_json
from pipeline.core.recipe import PROJECT
from pipeline.release import download
from pipeline.release.hub import Hub, Repository
from pipeline.release.licence import claimed

DOWNLOADS = ".download"
_AT = re.compile(r"([\w.-]+/[\w.-]+)@([\w./-]+)", re.ASCII)


@dataclass(frozen=True, kw_only=True)
class Folder:
    """A checkpoint in a folder here."""

    folder: Path

    @property
    def model(self) -> str:
        """What it is called."""
        return folder_name(self.folder)

    @property
    def source(self) -> Source:
        """How it is read."""
        return Source.of_folder(self.folder)

    @property
    def where(self) -> str:
        """In words."""
        return "local folder"

    def obtain(self, names: Iterable[str], root: Path, extra: int = 0) -> Path:
        """The folder itself; nothing moves."""
        del names, root, extra
        return self.folder

    def put(self, file: Path, target: Path) -> None:
        """Put a file of it in place: a symbolic link, relative inside the project.

        Such links survive when the project is moved or mounted elsewhere as a whole.
        """
        inside = file.is_relative_to(PROJECT) and target.resolve().is_relative_to(PROJECT)
        target.symlink_to(os.path.relpath(file, target.parent.resolve()) if inside else file)

    def revision(self, names: Iterable[str], known: Known) -> str:
        """A hash over names, sizes and contents of files, of which those that are `known` are not read again."""
        records = [vars(record) for record in describe([self.folder / name for name in names], self.folder, known)]
        return hashlib.sha256(dump_json(records).encode()).hexdigest()

    def card(self, model: str) -> Mapping[str, object] | None:
        """The front matter of the card of `model`, which is this one, or unknown."""
        file = self.folder / "README.md"
        if model != self.model:
            return None
        said = claimed(file.read_text(encoding="utf-8", errors="replace") if file.is_file() else "")
        return {"license": said.licence, "base_model": list(said.base_models), "tags": list(said.tags)}


@dataclass(frozen=True, kw_only=True)
class OnHub:
    """A checkpoint on the Hub, at one commit."""

    hub: Hub
    repository: Repository

    @property
    def model(self) -> str:
        """Its id."""
        return self.repository.model_id

    @property
    def source(self) -> Source:
        """How it is read: by ranges, before anything is downloaded."""
        sizes = {name: file.size for name, file in self.repository.files.items() if "/" not in name}
        where = f"{self.hub.endpoint}/{self.model}"
        below = tuple(name for name in self.repository.files if "/" in name)
        return Source(
            where=where, sizes=sizes, read=partial(self.hub.read, self.repository), remote=True, below=lambda: below
        )

    @property
    def where(self) -> str:
        """In words."""
        return f"{self.hub.endpoint}/{self.model} at {self.repository.revision}, accessible"

    def obtain(self, names: Iterable[str], root: Path, extra: int = 0) -> Path:
        """Download files to where they wait below `root`; `extra` bytes must fit on its disk besides."""
        waiting, wanted = root / DOWNLOADS / self.repository.revision, tuple(names)
        download.check_disk(wanted, self.repository, waiting, root, extra)
        for name in wanted:
            self.hub.download(self.repository, name, waiting)
        return waiting

    def put(self, file: Path, target: Path) -> None:
        """Put a downloaded file in place: it stays where it waited until the stage is finished."""
        try:
            target.hardlink_to(file)
        except OSError:  # a file system without hard links: a kill from here on costs this file
            file.replace(target)

    def revision(self, names: Iterable[str], known: Known) -> str:
        """The commit."""
        del names, known
        return self.repository.revision

    def card(self, model: str) -> Mapping[str, object] | None:
        """The front matter of the card of `model`."""
        return self.hub.card(model)


Origin = Folder | OnHub


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What MODEL_ID names: where it lies, and of an adapter what it is and its `base`.

    `source` is all of it as one checkpoint; of an adapter the weights there are the base's.
    """

    origin: Origin
    source: Source
    adapter: Adapter | None = None
    base: Origin | None = None

    @property
    def origins(self) -> tuple[Origin, ...]:
        """All that is read."""
        return (self.origin, self.base) if self.base else (self.origin,)

    def card(self, model: str) -> Mapping[str, object] | None:
        """The front matter of the card of `model`: of a folder here, or on the Hub if that is asked at all."""
        said = (origin.card(model) for origin in sorted(self.origins, key=lambda origin: isinstance(origin, OnHub)))
        return next((table for table in said if table is not None), None)


def find(model_id: str, revision: str = "") -> Origin:
    """The checkpoint `model_id`, a folder or a Hub id at `revision`.

    Raises:
        UsageError: a revision of a folder.
        FetchError: as `Hub.resolve`.
    """
    if Path(model_id).is_dir():
        if revision:
            raise UsageError(f"{model_id} is a folder: it has no revisions", remedy="leave REVISION= out")
        return Folder(folder=Path(model_id).resolve())
    if (file := Path(model_id)).is_file():
        raise UsageError(
            f"{model_id} is a file", remedy=f"give the folder of the whole checkpoint: MODEL_ID={file.parent}"
        )
    hub = Hub()
    repository = hub.resolve(model_id, revision)
    log.step(f"{repository.model_id} at commit {repository.revision}")
    return OnHub(hub=hub, repository=repository)


def ask(model_id: str, revision: str, base: str) -> Asked:
    """The checkpoint `model_id`; if it is an adapter, with the base that it names or `base` (id, id@revision, folder).

    Raises:
        UsageError: a base for what is no adapter.
        FetchError: neither is there, or the adapter can't be merged.
    """
    origin = find(model_id, revision)
    source = origin.source
    if not adapters.is_adapter(source):
        if base:
            raise UsageError(f"{model_id} is no adapter, so that BASE={base} says nothing", remedy="leave BASE= out")
        return Asked(origin=origin, source=source)
    adapter = adapters.open_adapter(source)
    found = _base(adapter, base, here=isinstance(origin, Folder))
    return Asked(origin=origin, source=adapters.overlay(found.source, source), adapter=adapter, base=found)


def _base(adapter: Adapter, said: str, *, here: bool) -> Origin:
    """Where an adapter's base lies. A folder is looked for where somebody says one, or the adapter lies `here` too."""
    if named := _AT.fullmatch(said):
        return find(named[1], named[2])
    name, revision = (said, "") if said else (adapter.base, adapter.revision)
    if name and (said or here) and Path(name).is_dir():
        return find(name)
    original = adapters.sixteen_bit(name)
    if original != name:
        log.warn(f"the base {name} is rounded to 4 bits: its 16-bit original {original} takes its place")
        revision = ""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", original, re.ASCII):
        raise FetchError(
            f"{adapter.where} is an adapter for {name or 'a base that it does not name'}, which is not here",
            cause="it was trained on a folder of another machine" if name else "its configuration was edited",
            remedy="say which model that is: BASE=owner/name (of the Hub), BASE=owner/name@commit, or a folder",
        )
    return find(original, revision)


def drop_downloads(root: Path, kept: Iterable[Origin] = ()) -> None:
    """Remove what earlier runs downloaded below `root`, but that of the commits `kept`."""
    commits = {origin.repository.revision for origin in kept if isinstance(origin, OnHub)}
    if not commits:
        shutil.rmtree(root / DOWNLOADS, ignore_errors=True)
    for folder in (root / DOWNLOADS).glob("*"):
        if folder.name not in commits:
            shutil.rmtree(folder)
