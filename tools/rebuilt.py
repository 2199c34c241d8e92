"""Hold a published folder against one that was built again, file by file.

    python -m tools.rebuilt PUBLISHED artifacts/MODEL/publish

Every file that the second folder's manifest lists must be in the first with the same bytes, but for what names the
image and the source it was made with. The card says what was measured, and float32's last digits depend on the kind of
processor: its measured figures must be within 5 % of each other, or both be noise, and the rest the same text.
"""

from __future__ import annotations

import argparse
import filecmp
import math
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from pipeline.core import log, manifest
from pipeline.core.errors import IntegrityError
from pipeline.core.stage import guard
from pipeline.release.preflight import MODELS
from pipeline.tflite.difference import where_different

PAPERS = ("manifests", "provenance.json")
CARD = "README.md"
RELATIVE = 0.05
NOISE = 1e-9
"""A thousandth of the strictest limit that a recipe has: figures this small are rounding, other on each machine."""
_CELLS = 7
"""Of a line about one check, cut at `|`: check, against, value, limit and detail, and nothing at each end."""
_VALUE, _DETAIL = 3, 5
_ANY = re.compile(r"(?<![\w.])\d+(?:\.\d+)?(?:e[+-]?\d+)?(?![\w.])")
_REAL = re.compile(r"(?<![\w.])\d+(?:\.\d+(?:e[+-]?\d+)?|e[+-]?\d+)(?![\w.])")
_WORST = re.compile(r"worst in \w+, row \d+|largest error \S+ nats")
"""Where rounding is largest, and how large, is noise as well."""


def compare(published: Path, again: Path) -> list[str]:
    """The files that are the same.

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
        if where := _difference(first, second):
            raise IntegrityError(
                f"{name} differs: {where}",
                cause="the build depends on something besides its inputs, or other bytes were published",
                remedy="build it once more; if that is the same, do not trust what was published",
            )
    return [name.as_posix() for name in held]


def _difference(first: Path, second: Path) -> str:
    """Where two files differ, or nothing."""
    if filecmp.cmp(first, second, shallow=False):
        return ""
    if first.name != CARD:
        return where_different(first, second)
    left, right = (file.read_text(encoding="utf-8", errors="replace").splitlines() for file in (first, second))
    for row, (one, other) in enumerate(zip(left, right, strict=False), start=1):
        if not _alike(one, other):
            return f"line {row} is {one!r} and {other!r}"
    return "" if len(left) == len(right) else f"it has {len(left)} lines and {len(right)}"


def _alike(one: str, other: str) -> bool:
    """Whether two lines of a card say the same but for what another processor rounds differently."""
    (text, figures), (other_text, other_figures) = _measured(one), _measured(other)
    return text == other_text and all(
        math.isclose(a, b, rel_tol=RELATIVE, abs_tol=NOISE) for a, b in zip(figures, other_figures, strict=True)
    )


def _measured(line: str) -> tuple[str, list[float]]:
    """A line without its measured figures, and these: the value of a check, and what is no integer in its detail."""
    cells, found = line.split("|"), list[float]()
    if len(cells) != _CELLS:
        return line, []
    cells[_DETAIL] = _WORST.sub("", cells[_DETAIL])
    for place, number in ((_VALUE, _ANY), (_DETAIL, _REAL)):
        found += map(float, number.findall(cells[place]))
        cells[place] = number.sub("#", cells[place])
    return "|".join(cells), found


def main(argv: Sequence[str] | None = None) -> int:
    """Compare; the exit code is 4 if they differ."""
    parser = argparse.ArgumentParser(prog="python -m tools.rebuilt", description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("published", type=Path, help="a download of the release")
    parser.add_argument("again", type=Path, help="the stage's folder publish/ of the second build")
    arguments = parser.parse_args(argv)

    def work() -> None:
        for name in compare(arguments.published, arguments.again):
            log.step(f"{name}: the same")

    return guard(work)


if __name__ == "__main__":
    sys.exit(main())
