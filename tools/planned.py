"""What `make plan` says of a finished folder beside what its stages took: `python -m tools.planned`.

Prints seconds and peak anonymous memory of every stage, planned over measured (`run.json`), and ends with 8 where a
plan is out by more than a factor of two: `python -m tools.plan_fit` mends it. Planned seconds are of a quiet machine of
this one's speed; one that is busy is asked for memory alone (`--judge memory`). Other work on the machine
lengthens the seconds, but hardly those of the processor, of which two cores give two a second: a plan is too long
beside twice the seconds, too short beside half of what both cores would have taken.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from pipeline.core import log, options
from pipeline.core.errors import VerificationError
from pipeline.core.recipe import load
from pipeline.core.stage import Common, guard
from pipeline.planning import speed
from pipeline.planning.model import look
from pipeline.planning.needs import NEEDS

FACTOR = 2
_CORES = 2
_SHORT = 1.0
"""Seconds below which a stage is all start and end."""


@dataclass(frozen=True, kw_only=True)
class Options(Common):
    """What may be out by no more than a factor of two."""

    judge: Literal["all", "memory"] = "all"


@dataclass(frozen=True, kw_only=True)
class Row:
    """A finished stage: planned and measured seconds, those of its processors, planned and measured bytes."""

    stage: str
    planned: float
    took: float
    processor: float
    planned_memory: float
    memory: float

    def cells(self) -> list[str]:
        """For people; memory in GiB."""
        seconds = [f"{value:.1f}" for value in (self.planned, self.took, self.processor)]
        memory = [f"{value / 2**30:.2f}" for value in (self.planned_memory, self.memory)]
        times, sizes = self.planned / max(self.took, 0.1), self.planned_memory / max(self.memory, 1)
        return [self.stage, *seconds, f"{times:.2f}", *memory, f"{sizes:.2f}"]

    def out(self) -> str:
        """What the plan is out in, if anything."""
        if not self.memory / FACTOR <= self.planned_memory <= self.memory * FACTOR:
            return "memory"
        longest, shortest = max(self.took, _SHORT) * FACTOR, self.processor / _CORES / FACTOR
        return "" if shortest <= max(self.planned, _SHORT) <= longest or self.took < _SHORT else "seconds"


def rows(given: Common) -> Iterator[Row]:
    """A row per finished stage."""
    recipe = load(given.recipe_file)
    model = look(given.model_id, "", "", recipe, given.graphs or recipe.graphs)
    own = speed.of_this_machine(given.artifacts)
    for name, need in NEEDS.items():
        file = given.root / name / "run.json"
        if file.is_file():
            run, planned = json.loads(file.read_text(encoding="utf-8")), need(model).on(own)
            yield Row(
                stage=name,
                planned=planned.seconds,
                took=run["seconds"],
                processor=run["processor_seconds"],
                planned_memory=planned.memory,
                memory=run["peak_anonymous"],
            )


def work(given: Options) -> None:
    """Print the table.

    Raises:
        VerificationError: names the stages of which the plan is out by more than a factor of two.
    """
    found = list(rows(given))
    head = ["stage", "planned s", "took s", "of processor", "ratio", "planned GiB", "took GiB", "ratio"]
    for line in log.align([head, *(row.cells() for row in found)]):
        log.line(line)
    judged = ("memory",) if given.judge == "memory" else ("memory", "seconds")
    if out := [f"{row.stage} ({row.out()})" for row in found if row.out() in judged]:
        raise VerificationError(
            f"the plan is out by more than a factor of {FACTOR}: {', '.join(out)}",
            cause="the stage takes more or less than it did when its constants were measured",
            remedy="run it on a quiet machine of two cores, then `python -m tools.plan_fit`",
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Run from the command line and return the exit code."""
    given = options.read("planned", (__doc__ or "").split("\n", 1)[0], Options, argv)
    return guard(lambda: work(given))


if __name__ == "__main__":
    sys.exit(main())
