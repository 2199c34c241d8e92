"""Downloads from the Hub: whether the disk has room for one, and a published folder by its name.

The folder is one that is here, or `owner/name@revision`, which is downloaded first.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable
from pathlib import Path

from pipeline.core import log
from pipeline.core.errors import ResourceError, UsageError
from pipeline.release.hub import Hub, Repository
from pipeline.release.upload import KEPT

_ON_HUB = re.compile(r"([\w.-]+/[\w.-]+)@([\w./-]+)", re.ASCII)


def obtain(files: str, downloads: Path) -> Path:
    """The folder that `files` names; from the Hub it comes by commit, to `downloads/<owner>--<name>/<commit>`.

    What an interrupted download left there is continued, and what is complete is not downloaded again.

    Raises:
        UsageError: it is neither a folder nor `owner/name@revision`.
        FetchError: no such repository or revision, no access, no network.
        IntegrityError: what came is not what the Hub lists.
    """
    if Path(files).is_dir():
        return Path(files)
    named = _ON_HUB.fullmatch(files)
    if not named:
        raise UsageError(f"{files} is not a folder", remedy="set FILES= to a published folder or owner/name@revision")
    hub = Hub()
    repository = hub.resolve(named[1], named[2])
    folder = downloads / named[1].replace("/", "--") / repository.revision
    log.step(f"{named[1]} at commit {repository.revision}, to {folder}")
    for name in sorted(repository.files.keys() - KEPT):
        hub.download(repository, name, folder)
    return folder


def check_disk(names: Iterable[str], repository: Repository, waiting: Path, root: Path, extra: int = 0) -> None:
    """Refuse files, by name, that do not fit on the disk of `root` beside what is in `waiting` already.

    `extra`: bytes that will be written besides.

    Raises:
        ResourceError: says how much is missing.
    """
    there = sum(file.stat().st_size for file in waiting.iterdir()) if waiting.is_dir() else 0
    needed = sum(repository.files[name].size for name in names) - there
    free = shutil.disk_usage(root).free
    log.step(f"to download: {log.human_bytes(needed)}; free on the disk: {log.human_bytes(free)}")
    if needed + extra > free:
        raise ResourceError(
            f"the checkpoint needs {log.human_bytes(needed + extra)}, the disk has {log.human_bytes(free)} left",
            remedy="free some space, or set ARTIFACTS= to a folder on another disk",
        )
