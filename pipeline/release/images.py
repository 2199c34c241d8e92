"""Published images of the project, by digest: `releases/images.txt` has a line for each, the newest last."""

from __future__ import annotations

import re
from pathlib import Path

from pipeline.core.errors import UsageError
from pipeline.core.recipe import PROJECT

FILE = PROJECT / "releases" / "images.txt"
"""It is in no image, which can't know its own digest."""
PUSHED = re.compile(r"[a-z0-9.-]+(?::\d+)?/[a-z0-9._/-]+@sha256:[0-9a-f]{64}")
"""A name by which anybody pulls exactly that image."""


def published(lock: str, file: Path = FILE) -> str:
    """The newest image with the packages of a lock, `cpu` or `cuda`; empty where none is published yet."""
    rows = [line.split() for line in file.read_text(encoding="utf-8").splitlines()] if file.is_file() else []
    return next((row[2] for row in reversed(rows) if row[1:2] == [lock]), "")


def pulled(given: str, lock: str) -> str:
    """The image `given`, else the published one, for a machine elsewhere.

    Raises:
        UsageError: it is on this machine alone, or none is published.
    """
    image = given or published(lock)
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
