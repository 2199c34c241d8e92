"""A published folder by its name: one that is here, or `owner/name@revision`, which is downloaded first."""

from __future__ import annotations

import re
from pathlib import Path

from pipeline.core import log
from pipeline.core.errors import UsageError
from pipeline.release.hub import Hub
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
