"""Measure the stages: seconds, memory over time, bytes to and from the disk.

    python -m tools.bench_stages CHECKPOINT --stages fetch graph int8 bundle --graphs bundle --out bench/raw/e2b.json

Each stage is a process of its own, watched from outside. The picture beside the JSON has a panel per run: anonymous and
resident memory over time, stage after stage.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pipeline.core import log, manifest
from pipeline.core.recipe import PROJECT
from tools import watched

GIB = 1 << 30
RECIPES = PROJECT / "pipeline" / "recipes"
INT8_ALONE = {'precisions = ["fp32", "int8"]': 'precisions = ["int8"]', 'optional = ["int4"]': "optional = []"}
"""The change to a recipe that leaves the fp32 and the int4 bundle out."""


def measure(
    stages: Sequence[str], checkpoint: Path, artifacts: Path, recipe: Path, graphs: str, within: Sequence[str] = ()
) -> dict[str, Any]:
    """Run stages one after the other; by name what each took, and the size of what it made.

    Args:
        stages: names, with options behind them (`golden --weights streamed`).
        checkpoint: a folder.
        artifacts: where results go.
        recipe: the recipe file.
        graphs: step, bundle or all.
        within: a command that the stages run under, which must replace itself by them.

    Raises:
        subprocess.CalledProcessError: a stage failed; it has said why.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the Makefile has it
    where = ["--model-id", str(checkpoint), "--artifacts", str(artifacts), "--recipe", str(recipe), "--graphs", graphs]
    results = {}
    for name, *options in map(shlex.split, stages):
        took = watched.run([*within, sys.executable, "-m", f"pipeline.{name}", *where, *options])
        made = manifest.read(artifacts / checkpoint.name / name)
        results[name] = asdict(took) | {"size": sum(record.size for record in made.outputs)}
    return results


def changed_recipe(name: str, folder: Path, changes: Mapping[str, str]) -> Path:
    """A copy of a shipped recipe in `folder` with other lines (`old` → `new`, each of which it must have)."""
    text = (RECIPES / f"{name}.toml").read_text(encoding="utf-8")
    for old, new in changes.items():
        if old not in text:
            raise ValueError(f"recipe {name} has no line {old!r}")
        text = text.replace(old, new)
    file = folder / f"{name}.toml"
    file.write_text(text, encoding="utf-8")
    return file


def together(stages: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """Sums of seconds and of bytes moved, and the peaks of the largest process."""
    added = ("seconds", "processor_seconds", "read", "written")
    sums = {key: sum(taken[key] for taken in stages.values()) for key in added}
    return sums | {key: max(taken[key] for taken in stages.values()) for key in ("peak_anonymous", "peak_resident")}


def table(stages: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A Markdown table of what each stage took, and of all together."""
    rows = [
        "| stage | seconds | processor | peak anonymous | peak resident | read from disk | written | result |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, taken in {**stages, "together": together(stages) | {"size": 0}}.items():
        cells = (
            *(f"{taken[key]:.0f}" for key in ("seconds", "processor_seconds")),
            *(f"{taken[key] / GIB:.2f} GiB" for key in ("peak_anonymous", "peak_resident")),
            *(log.human_bytes(taken[key]) if taken[key] else "–" for key in ("read", "written", "size")),
        )
        rows.append(f"| {name} | {' | '.join(cells)} |")
    return rows


def draw(runs: Mapping[str, Mapping[str, Mapping[str, Any]]], file: Path) -> None:
    """A panel per run (title → stages by name → what they took): memory over time, to the PNG `file`."""
    import matplotlib
    from matplotlib import pyplot

    matplotlib.use("agg")
    figure, panels = pyplot.subplots(len(runs), squeeze=False, figsize=(10, 2.9 * len(runs)), layout="constrained")
    for axes, (title, stages) in zip(panels[:, 0], runs.items(), strict=True):
        start = 0.0
        for name, taken in stages.items():
            seconds = [start + look[0] for look in taken["memory"]]
            for column, colour, label in ((2, "#c8d3e0", "resident: files mapped"), (1, "#1f4e9c", "anonymous")):
                heights = [look[column] / GIB for look in taken["memory"]]
                axes.fill_between(seconds, heights, color=colour, linewidth=0, label=label if not start else None)
            axes.axvline(start, color="#888", linewidth=0.6)
            axes.annotate(
                name, (start, 1), (3, -3), xycoords=("data", "axes fraction"), textcoords="offset points",
                va="top", fontsize=8, rotation=90,
            )  # fmt: skip
            start += taken["seconds"]
        axes.set(xlim=(0, start), ylim=(0, 1.15 * axes.get_ylim()[1]), xlabel="seconds", ylabel="GiB")
        axes.set_title(title, loc="left")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, fontsize=8, frameon=False)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=100)
    pyplot.close(figure)


def main() -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--stages", nargs="+", default=["fetch", "graph", "int8"], help="default: %(default)s")
    parser.add_argument("--graphs", choices=("step", "bundle", "all"), default="bundle", help="default: %(default)s")
    parser.add_argument("--recipe", type=Path, default=RECIPES / "gemma3n.toml")
    parser.add_argument("--out", type=Path, default=Path("bench/raw/stages.json"), help="default: %(default)s")
    arguments = parser.parse_args()
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=arguments.out.parent) as scratch:
        stages = measure(
            arguments.stages, arguments.checkpoint.resolve(), Path(scratch), arguments.recipe, arguments.graphs
        )
    arguments.out.write_text(json.dumps(stages), encoding="utf-8")
    draw({arguments.checkpoint.name: stages}, arguments.out.with_suffix(".png"))
    for row in table(stages):
        log.line(row)
    return 0


if __name__ == "__main__":
    sys.exit(main())
