"""The factors that bring the plan closest to what finished models took.

    python -m tools.plan_fit NAME=MODEL,ARTIFACTS,RECIPE,GRAPHS … [--keep | --add] [--out bench/planned.json]

Writes the factor of each stage, the middle of its models' ratios of measured (`run.json`) to planned, to
pipeline/planning/fitted.toml, and prints planned over measured with it; `--keep` leaves the file as it is, `--add`
the factors and the rows that are there, beside which it puts those of stages that have none. A plan is of a quiet
machine: what a stage took is the lesser of its seconds and its processor's, which other work on the machine hardly
changes. Must: 0.5 to 2 of the time, 0.7 to 1.5 of the memory.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pipeline.core import log, manifest, parallel
from pipeline.core.facts import Golden
from pipeline.core.graph import model_name
from pipeline.core.host import processor
from pipeline.core.recipe import load
from pipeline.planning import speed
from pipeline.planning.model import Model, look
from pipeline.planning.needs import FITTED, MODELLED, NEEDS, factors
from tools import tables
from tools.tables import Column, Measured, Row, Table, Value

_SHORTEST = 0.1
"""Seconds: what is shorter counts as so long."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """A finished stage of a model: what `run.json` says, and what is known of the model."""

    name: str
    stage: str
    model: Model
    took: Mapping[str, float]

    @property
    def seconds(self) -> float:
        """What it would take on a quiet machine, about."""
        return max(_SHORTEST, min(self.took["seconds"], self.took["processor_seconds"]))

    @property
    def memory(self) -> float:
        """Bytes of anonymous memory at its peak."""
        return self.took["peak_anonymous"]


def runs(name: str, model_id: str, artifacts: Path, recipe: Path, graphs: str) -> Iterator[Run]:
    """The finished stages of a model, in their order."""
    read = load(recipe)
    model = look(model_id, "", "", read, graphs or read.graphs)  # type: ignore[arg-type]  # as the command line has it
    root = artifacts / model_name(model_id)
    if (root / "golden").is_dir():  # it can be asked for one or the other
        told = manifest.read(root / "golden").told(Golden)
        model = replace(model, streamed=told.weights == "streamed")
    for stage in MODELLED:
        file = root / stage / "run.json"
        if file.is_file():
            yield Run(name=name, stage=stage, model=model, took=json.loads(file.read_text(encoding="utf-8")))


def fit(found: Iterable[Run], own: speed.Speed) -> dict[str, dict[str, float]]:
    """By stage the factors of seconds and memory: the middle of what its runs ask for, so that the worst is best."""
    asked: dict[str, dict[str, list[float]]] = {}
    for run in found:
        need, of = MODELLED[run.stage](run.model).on(own), asked.setdefault(run.stage, {"seconds": [], "memory": []})
        of["seconds"].append(run.seconds / need.seconds)
        of["memory"].append(run.memory / need.memory)
    return {
        stage: {name: round(math.sqrt(min(each) * max(each)), 3) for name, each in of.items()}
        for stage, of in asked.items()
    }


def dump(factors: Mapping[str, Mapping[str, float]]) -> str:
    """The factors as fitted.toml has them."""
    told = [f"\n[{stage}]\nseconds = {of['seconds']}\nmemory = {of['memory']}\n" for stage, of in factors.items()]
    return "# Factors of each stage's seconds and memory, written by `python -m tools.plan_fit`.\n" + "".join(told)


def table(found: Sequence[Run], own: speed.Speed) -> Table:
    """All of it as a table of the page."""
    made = []
    for run in found:
        need = NEEDS[run.stage](run.model).on(own)
        values = {
            "planned": need.seconds,
            "took": run.seconds,
            "time": need.seconds / run.seconds,
            "planned memory": need.memory / 2**30,
            "took memory": run.memory / 2**30,
            "memory": need.memory / run.memory,
        }
        made.append(
            Row(name=f"{run.name}, {run.stage}", values={key: Value(value=value) for key, value in values.items()})
        )
    return Table(
        title="The plan beside what stages took",
        about="Planned over taken; of the time the lesser of wall and processor time, since other work ran beside.",
        place=11,
        columns={
            "planned": Column(unit="s", digits=".1f"),
            "took": Column(unit="s", digits=".1f"),
            "time": Column(digits=".2f"),
            "planned memory": Column(unit="GiB", digits=".2f"),
            "took memory": Column(unit="GiB", digits=".2f"),
            "memory": Column(digits=".2f"),
        },
        measured=Measured(
            date=time.strftime("%Y-%m-%d"),
            command="`python -m tools.plan_fit`",
            machine=f"{parallel.threads()} threads ({processor()})",
        ),
        rows=tuple(made),
    )


def joined(before: Table, new: Table) -> Table:
    """`before` with the rows of `new` that it lacks, behind the others of the same model."""
    rows, names = list(before.rows), {row.name for row in before.rows}
    for row in (row for row in new.rows if row.name not in names):
        model = row.name.rpartition(",")[0]
        places = [place for place, each in enumerate(rows) if each.name.rpartition(",")[0] == model]
        rows.insert(max(places, default=len(rows) - 1) + 1, replace(row, measured=new.measured))
    return replace(before, rows=tuple(rows))


def main(argv: Sequence[str] | None = None) -> int:
    """Fit, print the table, and write it if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", help="finished models: NAME=MODEL,ARTIFACTS,RECIPE,GRAPHS")
    kept = parser.add_mutually_exclusive_group()
    kept.add_argument("--keep", action="store_true", help="leave the factors as they are")
    kept.add_argument("--add", action="store_true", help="leave what is there, and add what is not, to --out as well")
    parser.add_argument("--out", type=Path, help="where the table goes (bench/planned.json)")
    parser.add_argument("--artifacts", type=Path, default=Path("artifacts"), help="where this machine's speed is kept")
    arguments = parser.parse_args(argv)
    own = speed.of_this_machine(arguments.artifacts)
    found = [run for said in arguments.models for run in _said(said)]
    if not arguments.keep:
        fitted = fit(found, own) | (dict(factors()) if arguments.add else {})
        manifest.write_atomically(FITTED, dump({stage: fitted[stage] for stage in MODELLED if stage in fitted}))
        factors.cache_clear()
    made = table(found, own)
    if arguments.add and arguments.out:
        made = joined(tables.read(arguments.out), made)
    lines = [[row.name, *(made.columns[key].text(each.value) for key, each in row.values.items())] for row in made.rows]
    for line in log.align([["", *made.columns], *lines]):
        log.line(line)
    if arguments.out:
        manifest.write_atomically(arguments.out, tables.dump(made))
    return 0


def _said(text: str) -> Iterator[Run]:
    name, _, rest = text.partition("=")
    model_id, artifacts, recipe, graphs = rest.split(",")
    yield from runs(name, model_id, Path(artifacts), Path(recipe), graphs)


if __name__ == "__main__":
    sys.exit(main())
