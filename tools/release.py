"""What a release description says, as settings of `make`, one `NAME=value` a line.

    python -m tools.release releases/NAME.toml
    python -m tools.release --model ORG/NAME --revision COMMIT --recipe gemma3n --target ORG/OTHER --tag v1

`--upload` demands a commit. Needs no environment: Python's own library is enough.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from pipeline.core.stage import guard
from pipeline.release import description

KEYS = ("model", "revision", "recipe", "graphs", "rung", "target", "tag")


def main(argv: Sequence[str] | None = None) -> int:
    """Print the settings; the exit code is 2 if the description is wrong."""
    parser = argparse.ArgumentParser(prog="python -m tools.release", description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("file", nargs="?", type=Path, help="a description in releases/")
    parser.add_argument("--upload", action="store_true", help="refuse a release that names no commit")
    for key in KEYS:
        parser.add_argument(f"--{key}", default="", help="instead of a description, or what it leaves open")
    arguments = parser.parse_args(argv)
    given = {key: value for key in KEYS if (value := getattr(arguments, key))}

    def work() -> None:
        release = description.describe(arguments.file, given)
        if arguments.upload:
            description.refuse_open(release)
        for name, value in release.settings().items():
            print(f"{name}={value}")

    return guard(work)


if __name__ == "__main__":
    sys.exit(main())
