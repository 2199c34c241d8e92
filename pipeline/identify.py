"""identify: of which type a checkpoint on the Hub is, which chooses its recipe; of an adapter its base.

Make runs it before all else where MODEL_ID is not here and nobody says RECIPE= (pipeline/core/rules.py). Little is
read: which commit there is, its config.json, and of a model that sees or hears the names of its tensors.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import get_args

from pipeline.checkpoint.reader import CONFIG, INDEX, SINGLE, read_tensors
from pipeline.checkpoint.source import Source
from pipeline.core import log, options, senses
from pipeline.core.manifest import dump_json, write_atomically
from pipeline.core.recipe import IDENTIFIED, Tower, named_in
from pipeline.core.stage import Common, guard
from pipeline.release import origin


@dataclass(frozen=True, kw_only=True)
class Options(Common):
    """Which state of a repository on the Hub, and of an adapter which base."""

    revision: str = field(default="", metadata={"help": "branch, tag or commit on the Hub (default: the main branch)"})
    base: str = field(default="", metadata={"help": "of an adapter: owner/name, owner/name@revision or a folder"})


def work(given: Options) -> None:
    """Write down the model type, and the towers that there are.

    Raises:
        FetchError, UsageError: as `origin.ask`.
        IntegrityError: its config.json is no JSON, or its weights are not what their headers say.
    """
    asked = origin.ask(given.model_id, given.revision, given.base)
    config, note = asked.source.json(CONFIG), given.root / IDENTIFIED
    towers = senses.among(_tensors(asked.source), get_args(Tower)) if senses.described(config) else ()
    found: dict[str, object] = {"model_type": config.get("model_type"), "towers": [*towers]}
    note.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(note, dump_json(found))
    if not given.recipe and (recipe := named_in(note)):  # without one, the plan says which types there are
        log.step(f"of type {found['model_type']}: recipe {recipe.stem}")


def _tensors(source: Source) -> Collection[str]:
    """The names of all tensors; none of what fetch will refuse for having no weights that are read here."""
    weights = {SINGLE, INDEX} & source.sizes.keys()
    return read_tensors(source.sizes.keys(), source.sizes, source.read, source.where) if weights else ()


def main(argv: Sequence[str] | None = None) -> int:
    """Run from the command line and return the exit code."""
    given = options.read("identify", "Find out of which type a checkpoint is that is not here yet.", Options, argv)
    return guard(lambda: work(given))


if __name__ == "__main__":
    sys.exit(main())
