"""tune: what int8 costs where, and a recipe with better values in its [int8] section; the same for [int4].

    make tune MODEL_ID=… RECIPE=… [MINUTES=30] [SECTION=int4]

Three things are measured, all in LiteRT on the recipe's calibration text, as KL(fp32 file || candidate) at every
position of whole windows:

1. what costs nothing at run time, and with the best of it what each group of layers contributes, its weights and its
   activations: int8 in that group alone, or 4 bits in it and 8 elsewhere;
2. candidates on a greedy path from plain int8, or 4 bits everywhere, by gain for cost; half of them go on to twice as
   much text, until few are left, which see all of it;
3. size and speed of these, against the plain file, in turns.

The most faithful one within `--size` and `--speed` becomes `tune/recipe.toml`, which `make int8 RECIPE=` takes as it
is, or `tune-int4/recipe.toml` for `make int4`; `report.json` and `report.html` beside it hold all figures. Every
measurement is kept in `.tune/`, so that the same command goes on after Ctrl-C, a kill or the end of MINUTES.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path
from typing import cast

from pipeline.core import log, manifest
from pipeline.core.errors import UsageError
from pipeline.core.graph import model_name
from pipeline.core.recipe import Recipe
from pipeline.core.recipe import load as load_recipe
from pipeline.core.recipe import parse as parse_recipe
from pipeline.core.stage import common_parser, guard, locked, made_again, parse
from pipeline.report import tuning
from pipeline.search import candidates, groups, rewrite
from pipeline.search.bench import Clock
from pipeline.search.candidates import SPACES, Value
from pipeline.search.facts import report
from pipeline.search.preparation import NEEDS, open_bench
from pipeline.search.study import Study
from pipeline.tflite.graph import Graph


def work(arguments: argparse.Namespace) -> None:
    """Search, and write what was found, also when time ends or someone stops it.

    Raises:
        UsageError: the recipe has no such section, its scheme is not dynamic, or a text can't be read.
        IntegrityError: stages fetch, graph or moments are not finished, or were changed.
    """
    recipe, clock, space = load_recipe(arguments.recipe), Clock(60 * arguments.minutes), SPACES[arguments.section]
    section = getattr(recipe, space.section)
    if section is None:
        raise UsageError(
            f"recipe {recipe.name} has no [int4] section", remedy="add one, as in pipeline/recipes/gemma3.toml"
        )
    if space.section == "int8" and not recipe.int8.is_dynamic:
        raise UsageError("tune searches dynamic int8, the recipe's scheme is static", remedy='say scheme = "dynamic"')
    root = arguments.artifacts / model_name(arguments.model_id)
    with locked(root, "tune"), made_again(root, NEEDS):
        bench = open_bench(arguments.recipe, recipe, arguments.calibration, root, clock, space)
        try:
            layers = groups.layers_of(Graph.read(bench.all_positions))
            values = {knob.key: _plain(getattr(section, knob.key)) for knob in space.knobs}
            study = Study(
                bench=bench,
                layer_groups=groups.group(layers, arguments.parts or space.parts),
                layers=layers,
                given=candidates.priced("the given recipe", values, layers, space),
                limits=(arguments.size or space.most, arguments.speed),
            )
            try:
                with bench.hessians:
                    study.run()
            finally:  # also when it is interrupted
                write(study, recipe, arguments, root / ("tune" if space.section == "int8" else f"tune-{space.section}"))
        finally:
            shutil.rmtree(bench.scratch)


def write(study: Study, recipe: Recipe, arguments: argparse.Namespace, folder: Path) -> None:
    """Write the recipe of the best candidate so far, and the report."""
    if not any(study.bench.found(each, [0]) for each in study.tried):
        log.warn("nothing is measured yet, so there is no recipe: give it more MINUTES=")
        return
    folder.mkdir(parents=True, exist_ok=True)
    told = cast("tuning.Report", report(study, recipe, model_name(arguments.model_id), arguments.minutes))
    made = rewrite.with_values(study.bench.text, study.space.section, study.chosen().values, tuning.comment(told))
    parse_recipe(made.encode(), "the tuned recipe")
    manifest.write_atomically(folder / "recipe.toml", made)
    manifest.write_atomically(folder / "report.json", manifest.dump_json(told))
    manifest.write_atomically(folder / "report.html", tuning.render(told))
    for row in tuning.table(told):
        log.line(f"  {row}")
    log.line(f"recipe: {folder / 'recipe.toml'}")


def _plain(value: Value | tuple[str, ...]) -> Value:
    return list(value) if isinstance(value, tuple) else value


def _arguments() -> argparse.ArgumentParser:
    parser = common_parser("tune", "Measure what fewer bits cost where, and write a recipe with a better section.")
    parser.add_argument("--section", choices=SPACES, default="int8", help="what is searched (default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=30.0, help="the time to search in (default: %(default)s)")
    parser.add_argument("--calibration", type=Path, metavar="FILE", help="your own text to tune on: .txt or .jsonl")
    sizes, parts = (
        ", ".join(f"{space.section} {getattr(space, key)}" for space in SPACES.values()) for key in ("most", "parts")
    )
    parser.add_argument("--size", type=float, help=f"largest file, of plain int8 (default: {sizes})")
    parser.add_argument(
        "--speed", type=float, default=0.5, help="least tokens/s, of the plain file (default: %(default)s)"
    )
    parser.add_argument("--parts", type=int, help=f"stretches that a kind is cut into (default: {parts})")
    return parser


if __name__ == "__main__":
    sys.exit(guard(lambda: work(parse(_arguments(), None))))
