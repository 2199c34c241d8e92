"""identify: of which type a checkpoint on the Hub is, which chooses its recipe; of an adapter its base.

Make runs it before all else where MODEL_ID is not here and nobody says RECIPE= (pipeline/core/rules.py). A few
kilobytes are read: which commit there is, and its config.json.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

from pipeline.checkpoint.reader import CONFIG
from pipeline.core import log, options
from pipeline.core.manifest import dump_json, write_atomically
from pipeline.core.recipe import IDENTIFIED, named_in
from pipeline.core.stage import Common, guard
from pipeline.release import origin


@dataclass(frozen=True, kw_only=True)
class Options(Common):
    """Which state of a repository on the Hub, and of an adapter which base."""

    revision: str = field(default="", metadata={"help": "branch, tag or commit on the Hub (default: the main branch)"})
    base: str = field(default="", metadata={"help": "of an adapter: owner/name, owner/name@revision or a folder"})


def work(given: Options) -> None:
    """Write down the model type.

    Raises:
        FetchError, UsageError: as `origin.ask`.
        IntegrityError: its config.json is no JSON.
    """
    asked = origin.ask(given.model_id, given.revision, given.base)
    model_type, note = asked.source.json(CONFIG).get("model_type"), given.root / IDENTIFIED
    note.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(note, dump_json({"model_type": model_type}))
    if recipe := named_in(note):  # without one, the plan that comes next says which types there are
        log.step(f"of type {model_type}: recipe {recipe.stem}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run from the command line and return the exit code."""
    given = options.read("identify", "Find out of which type a checkpoint is that is not here yet.", Options, argv)
    return guard(lambda: work(given))


if __name__ == "__main__":
    sys.exit(main())
