"""tune: what int8 costs where, and a recipe with better values in its [int8] section; the same for [int4].

    make tune MODEL_ID=… RECIPE=… [MINUTES=30] [SECTION=int4]

Two things are measured, all in LiteRT on the recipe's calibration text, as KL(fp32 file || candidate) at every
position of whole windows; on a GPU (`--device`) Hugging Face's model in fp32 speaks for the fp32 file:

1. what costs nothing at run time, and with the best of it what each group of layers contributes, its weights and its
   activations: int8 in that group alone, or 4 bits in it and 8 elsewhere;
2. candidates on a greedy path from plain int8, or 4 bits everywhere, by gain for cost; half of them go on to twice as
   much text, until few are left, which see all of it; of these size and speed too, in turns with the plain file.

The most faithful one within `--size` and `--speed` becomes `tune/recipe.toml`, which `make int8 RECIPE=` takes as it
is, or `tune-int4/recipe.toml` for `make int4`; `report.json` and `report.html` beside it hold all figures. Every
measurement is kept in `.tune/`, so that the same command goes on after Ctrl-C, a kill or the end of MINUTES.
"""

from __future__ import annotations

import shutil
import sys
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Literal, cast

from pipeline.core import facts, log, manifest, options
from pipeline.core import recipe as recipes
from pipeline.core.stage import Common, guard, locked, made_again
from pipeline.reference import devices
from pipeline.report import tuning
from pipeline.search import candidates, groups, rewrite
from pipeline.search.bench import Clock
from pipeline.search.candidates import SPACES
from pipeline.search.facts import report
from pipeline.search.preparation import NEEDS, open_bench
from pipeline.search.shards import measured_on
from pipeline.search.study import Study
from pipeline.tflite.graph import Graph


def _by_section(key: str) -> str:
    return ", ".join(f"{space.section} {getattr(space, key)}" for space in SPACES.values())


@dataclass(frozen=True, kw_only=True)
class Options(Common):
    """What is searched, for how long, on which text, and what a candidate may cost."""

    section: Literal["int8", "int4"] = field(default="int8", metadata={"help": "what is searched (default: int8)"})
    minutes: float = field(default=30.0, metadata={"help": "the time to search in (default: %(default)s)"})
    calibration: Path | None = field(
        default=None, metadata={"metavar": "FILE", "help": "your own text to tune on: .txt or .jsonl"}
    )
    size: float | None = field(
        default=None, metadata={"help": f"largest file, of plain int8 (default: {_by_section('most')})"}
    )
    device: devices.Device = field(default="auto", metadata={"help": "where fp32 runs: auto and cuda take a GPU"})
    cluster: str = field(default="", metadata={"help": "whose workers measure: a scheduler's address, or local:<n>"})
    speed: float = field(default=0.5, metadata={"help": "least tokens/s, of the plain file (default: %(default)s)"})
    parts: int | None = field(default=None, metadata={"help": f"stretches of a kind (default: {_by_section('parts')})"})


def work(given: Options) -> None:
    """Search, and write what was found, also when time ends or someone stops it.

    Raises:
        UsageError: the recipe has no such section, its scheme is not dynamic, a text can't be read, or there is no GPU.
        IntegrityError: stages fetch, graph or moments are not finished, or were changed.
    """
    file, root, clock, space = given.recipe_file, given.root, Clock(60 * given.minutes), SPACES[given.section]
    values = candidates.values_of(recipe := recipes.load(file), space)
    with locked(root, "tune"), made_again(root, NEEDS):
        device = devices.choose(given.device, manifest.read(root / "fetch").told(facts.Fetch).parameters)
        bench = open_bench(file, recipe, given.calibration, root, clock, space)
        said = partial(devices.logits, bench.checkpoint.folder, device)
        bench = bench if device == "cpu" else replace(bench, said=said, identity=f"{bench.identity} {device}")
        try:
            layers = groups.layers_of(Graph.read(bench.all_positions))
            with measured_on(given.cluster, bench) as bench, bench.hessians:
                study = Study(
                    bench=bench,
                    layer_groups=groups.group(layers, given.parts or space.parts),
                    layers=layers,
                    given=candidates.priced("the given recipe", values, layers, space),
                    limits=(given.size or space.most, given.speed),
                )
                try:
                    study.run()
                finally:  # also when it is interrupted
                    write(study, recipe, given, root / ("tune" if space.section == "int8" else f"tune-{space.section}"))
        finally:
            shutil.rmtree(bench.scratch)


def write(study: Study, recipe: recipes.Recipe, given: Options, folder: Path) -> None:
    """Write the recipe of the best candidate so far, and the report."""
    if not any(study.bench.found(each, [0]) for each in study.tried):
        log.warn("nothing is measured yet, so there is no recipe: give it more MINUTES=")
        return
    folder.mkdir(parents=True, exist_ok=True)
    told = cast("tuning.Report", report(study, recipe, given.root.name, given.minutes))
    made = rewrite.with_values(study.bench.text, study.space.section, study.chosen().values, tuning.comment(told))
    recipes.parse(made.encode(), "the tuned recipe")
    manifest.write_atomically(folder / "recipe.toml", made)
    manifest.write_atomically(folder / "report.json", manifest.dump_json(told))
    manifest.write_atomically(folder / "report.html", tuning.render(told))
    for row in tuning.table(told):
        log.line(f"  {row}")
    log.line(f"recipe: {folder / 'recipe.toml'}")


def main() -> int:
    """Run from the command line and return the exit code."""
    given = options.read("tune", "Measure what fewer bits cost where, and write a better recipe.", Options)
    return guard(lambda: work(given))


if __name__ == "__main__":
    sys.exit(main())
