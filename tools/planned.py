"""What `make plan` says of a finished folder beside what its stages took: `python -m tools.planned`.

Prints seconds and peak anonymous memory of every stage, planned over measured (`run.json`). Where a ratio leaves 0.5 to
2 (time, on a quiet machine of two cores) or 0.7 to 1.5 (memory), the constants in pipeline/planning/needs.py want
mending.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence

from pipeline.core import log, options
from pipeline.core.recipe import load
from pipeline.core.stage import Common
from pipeline.planning.model import look
from pipeline.planning.needs import NEEDS


def rows(given: Common) -> Iterator[list[str]]:
    """A row per finished stage: its name, and of seconds and GiB what was planned, what was measured, and the ratio."""
    recipe = load(given.recipe_file)
    model = look(given.model_id, "", "", recipe, given.graphs or recipe.graphs)
    for name, need in NEEDS.items():
        file = given.root / name / "run.json"
        if file.is_file():
            run = json.loads(file.read_text(encoding="utf-8"))
            seconds, memory = (need(model).seconds, run["seconds"]), (need(model).memory, run["peak_anonymous"])
            told = [f"{value:.1f}" for value in (*seconds, run["processor_seconds"])]
            told += [f"{seconds[0] / max(seconds[1], 0.1):.2f}"]
            told += [f"{value / 2**30:.2f}" for value in memory] + [f"{memory[0] / max(memory[1], 1):.2f}"]
            yield [name, *told]


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table."""
    given = options.read("planned", (__doc__ or "").split("\n", 1)[0], Common, argv)
    head = ["stage", "planned s", "took s", "of processor", "ratio", "planned GiB", "took GiB", "ratio"]
    for line in log.align([head, *rows(given)]):
        log.line(line)
    return 0


if __name__ == "__main__":
    sys.exit(main())
