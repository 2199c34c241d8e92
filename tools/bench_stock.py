"""A real model as an int8 bundle, made by the stages and by the stock exporter: what making and running each takes.

    python -m tools.bench_stock smollm2 CHECKPOINT --work FOLDER        (nox -s stock)

Both have the same cache, prefill and decode signatures, are built in turns, and run in LiteRT-LM in turns. The stock
exporter comes from a lock of its own. The table goes to `bench/`, which `python -m tools.figures` writes into the
documents.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

from pipeline.core import log, manifest, parallel
from pipeline.core.host import processor
from pipeline.core.recipe import PROJECT, load
from tools import bench_bundle, bench_stages, figures, real_models, tables
from tools.real_models import REAL_MODELS

Taken = dict[str, dict[str, Any]]
"""What each stage of a build took."""
Found = TypeVar("Found")
STAGES = ("fetch", "graph", "moments", "int8", "bundle")
UNJUDGED = {"ladder = true": "ladder = false"}
"""The change to a recipe that leaves the ladder out, by which int8 judges what it made: the stock exporter does not."""
BUILDS = 2
TOKENS = 128
"""Tokens of the prompt, which a prefill takes whole, and of the answer."""


def measure(name: str, checkpoint: Path, folder: Path, rounds: int, builds: int = BUILDS) -> dict[str, Any]:
    """Make a real model's int8 bundle with the stages and with the stock exporter, and run both, all in turns.

    Only ours where the stock exporter can't be installed. Of several builds that with the middle processor time counts.

    Args:
        name: a key of `REAL_MODELS`.
        checkpoint: its checkpoint.
        folder: where all that is made goes.
        rounds: measurements of speed.
        builds: how often each is built.
    """
    same = {"prefill = [32, 128]": f"prefill = [{TOKENS}]"}  # the signatures that the stock exporter is asked for
    changes = {**REAL_MODELS[name].changes, **bench_stages.INT8_ALONE, **UNJUDGED, **same}
    recipe = bench_stages.changed_recipe(REAL_MODELS[name].recipe, folder, changes)
    cache = load(recipe).bundle.cache_length
    root, made = folder / checkpoint.name, folder / "by-stock"
    stock, taken, exported = environment("stock", folder), list[Taken](), list[dict[str, Any]]()
    for _ in range(builds):
        shutil.rmtree(root, ignore_errors=True)  # no build may know what an earlier one has hashed
        taken.append(bench_stages.measure(STAGES, checkpoint, folder, recipe, "bundle"))
        if stock:
            options = ["--precision=int8", f"--prefill={TOKENS}", f"--cache={cache}"]
            subprocess.run([stock, "-m", "tools.stock", checkpoint, made, *options], check=True)
            exported.append(json.loads((made / "int8.json").read_text(encoding="utf-8")))
    stages = _middle(taken, lambda each: bench_stages.together(each)["processor_seconds"])
    builds_of = {"ours": bench_stages.together(stages)}
    shown = {"this project": stages}
    files = {"ours": root / "bundle" / "int8.litertlm"}
    if exported:
        builds_of["stock"] = _middle(exported, lambda each: each["processor_seconds"])
        files["stock"] = made / "int8.litertlm"
        shown["the stock exporter"] = {"export_hf": builds_of["stock"]}
    bench_stages.draw(shown, folder.parent / f"{REAL_MODELS[name].tables}.png")
    work = bench_bundle.Work(prompt_tokens=TOKENS, decode_tokens=TOKENS, threads=parallel.threads())
    measured = bench_bundle.compare(files, work, rounds)
    for line in bench_bundle.table(measured):
        log.line(line)
    return {
        "model": name,
        "parameters": manifest.read(folder / checkpoint.name / "fetch").facts["parameters"],
        "cache": cache,
        **asdict(work),
        "rounds": rounds,
        "stages": stages,
        "builds": builds_of,
        "built": builds,
        "bundles": measured,
        "runtime": version("litert-lm-api"),
    }


def _middle(found: Sequence[Found], seconds: Callable[[Found], float]) -> Found:
    """The one in the middle by `seconds`; of two the faster, which less ran beside."""
    return sorted(found, key=seconds)[(len(found) - 1) // 2]


def environment(lock: str, folder: Path) -> Path | None:
    """The Python of a new environment with `locks/<lock>.txt`, or None, said, if that can't be installed."""
    log.step(f"installing locks/{lock}.txt")
    made = folder / f"env-{lock}"
    if subprocess.run(
        [PROJECT / "tools" / "setup.sh", made, lock], env=os.environ | {"PYTHON": sys.executable}
    ).returncode:
        log.warn(f"locks/{lock}.txt can't be installed, so what needs it is left out of this benchmark")
        return None
    return made / "bin" / "python"


def main() -> int:
    """Measure, write the table; the exit code."""
    parser = real_models.command_line(__doc__, rounds=5)
    parser.add_argument("--builds", type=int, default=BUILDS, help="builds of each (default: %(default)s)")
    arguments = parser.parse_args()
    checkpoint, rounds = arguments.checkpoint.resolve(), arguments.rounds
    found = real_models.measured(
        parser, arguments.work, lambda work: measure(arguments.model, checkpoint, work, rounds, arguments.builds)
    )
    measured = tables.Measured(
        date=time.strftime("%Y-%m-%d"),
        command=f"`nox -s stock -- {arguments.model}`",
        machine=f"{parallel.threads()} threads ({processor()})",
    )
    tables.write_all(figures.bundles({"bundle": found}, measured))
    return 0


if __name__ == "__main__":
    sys.exit(main())
