"""Hold a published folder against one that was built again, file by file.

    python -m tools.rebuilt PUBLISHED artifacts/MODEL/publish

Every file that the second folder's manifest lists must be in the first with the same bytes, but for what names the
image and the source it was made with.
"""

from __future__ import annotations

import argparse
import filecmp
import sys
from collections.abc import Sequence
from pathlib import Path

from pipeline.core import log, manifest
from pipeline.core.errors import IntegrityError
from pipeline.core.stage import guard
from pipeline.release.preflight import MODELS
from pipeline.tflite.difference import where_different

PAPERS = ("manifests", "provenance.json")


def compare(published: Path, again: Path) -> list[str]:
    """The files that have the same bytes.

    Raises:
        IntegrityError: names the first that is missing or differs, and where; or there is no model file.
    """
    listed = [Path(record.path).relative_to(again.name) for record in manifest.read(again).outputs]
    held = [name for name in listed if name.parts[0] not in PAPERS]
    if not any(name.suffix in MODELS for name in held):
        raise IntegrityError(f"{again} holds no model file", remedy="build it with `make publish`")
    for name in held:
        first, second = published / name, again / name
        if not first.is_file():
            raise IntegrityError(f"{name} was built, but never published", remedy="look at what was released")
        if not filecmp.cmp(first, second, shallow=False):
            raise IntegrityError(
                f"{name} differs: {where_different(first, second)}",
                cause="the build depends on something besides its inputs, or other bytes were published",
                remedy="build it once more; if that is the same, do not trust what was published",
            )
    return [name.as_posix() for name in held]


def main(argv: Sequence[str] | None = None) -> int:
    """Compare; the exit code is 4 if they differ."""
    parser = argparse.ArgumentParser(prog="python -m tools.rebuilt", description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("published", type=Path, help="a download of the release")
    parser.add_argument("again", type=Path, help="the stage's folder publish/ of the second build")
    arguments = parser.parse_args(argv)

    def work() -> None:
        for name in compare(arguments.published, arguments.again):
            log.step(f"{name}: the same bytes")

    return guard(work)


if __name__ == "__main__":
    sys.exit(main())
