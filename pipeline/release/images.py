"""Published images of the project, by digest: `releases/images.txt` has a line for each, the newest last."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from pipeline.core import log, process
from pipeline.core.errors import UsageError
from pipeline.core.recipe import PROJECT

FILE = PROJECT / "releases" / "images.txt"
"""It is in no image, which can't know its own digest."""
HELD = PROJECT / "releases" / "held.txt"
"""All that decides what is in an image, a path a line; README.md is in it too, and names the last one."""
PUSHED = re.compile(r"[a-z0-9.-]+(?::\d+)?/[a-z0-9._/-]+@sha256:[0-9a-f]{64}")
"""A name by which anybody pulls exactly that image."""


def published(lock: str, file: Path = FILE) -> str:
    """The newest image with the packages of a lock, `cpu` or `cuda`; empty where none is published yet."""
    return next((image for _, image in _listed(lock, file)), "")


def _listed(lock: str, file: Path) -> Iterator[tuple[str, str]]:
    """The commit and the name of each published image of a lock, the newest first."""
    rows = [line.split() for line in file.read_text(encoding="utf-8").splitlines()] if file.is_file() else []
    return ((row[0], row[2]) for row in reversed(rows) if row[1:2] == [lock])


def _of_this_clone(lock: str) -> str:
    """The published image that holds the sources as they are here; else the newest, and it is said whose it holds."""
    held, listed = HELD.read_text(encoding="utf-8").split() if HELD.is_file() else [], [*_listed(lock, FILE)]
    for commit, image in listed:
        if _is_here(commit, held):
            return image
    for commit, image in listed[:1]:
        log.warn(f"no published image holds the sources as they are here: {image} has those of commit {commit[:12]}")
        return image
    return ""


def _is_here(commit: str, held: Sequence[str]) -> bool:
    """Whether the paths in `held` are as at `commit`, with nothing besides that git does not know."""
    same = process.output(["git", "diff", "--quiet", commit, "--", *held], cwd=PROJECT) is not None
    return same and not process.output(["git", "ls-files", "--others", "--exclude-standard", *held], cwd=PROJECT)


def pulled(given: str, lock: str) -> str:
    """The image `given`, else the published one of this clone's sources, for a machine elsewhere.

    Raises:
        UsageError: it is on this machine alone, or none is published.
    """
    image = given or _of_this_clone(lock)
    if not PUSHED.fullmatch(image):
        raise UsageError(
            f"IMAGE={image} is none that another machine can pull as exactly that image"
            if image
            else "no image of the project is published yet"
            if FILE.is_file()
            else "the list of the project's images is in a clone alone, and not here",
            remedy="name a pushed one by its digest: IMAGE=ghcr.io/owner/name@sha256:… (docs/files.md, the image)",
        )
    return image
