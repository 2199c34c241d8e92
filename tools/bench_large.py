"""Measure the pipeline on random checkpoints of true size, and hold what it took against its limits.

    python -m tools.bench_large e2b [e4b gemma4-e2b gemma4-e4b]        (nox -s large)

Writes tables and a picture into `bench/`, with what the plan says beside what stages took, and fails if a limit is
missed. The disk is checked first (E2B needs 35 GB at once, E4B 48). The runs, per size of Gemma 3n: bf16 to the int8
bundle, and on through every stage up to publish; the same under a memory cgroup of 4 GiB, where this process may make
one; bf16 to the fp32 sections. Of Gemma 4, and of all with `--int8-alone`, the first alone. A checkpoint of 0.3 billion
parameters goes first, so that growth shows.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipeline.core import log, parallel, versions
from pipeline.core.host import processor
from pipeline.core.recipe import of_type
from pipeline.planning import speed
from tools import bench_stages, figures, plan_fit, tables
from tools.bench_stages import GIB, together
from tools.make_random_checkpoint import GEOMETRIES, make

INT8 = ("fetch", "graph", "int8", "bundle")
JUDGED = ("golden --weights streamed", "verify", "publish")
FP32 = ("fetch", "graph", "fp32")
DISK = {"e2b": 35e9, "e4b": 48e9, "gemma4-e2b": 24e9, "gemma4-e4b": 36e9}
LIMITS = {
    # run: (peak anonymous GiB: must, aim), (minutes: must, aim)
    "e2b int8": ((3.0, 1.2), (12, 5)),
    "e2b fp32": ((1.5, 0.8), (12, 5)),
    "e2b golden": ((4.0, 2.0), (None, None)),
    "e2b int8, 4 GiB cgroup": ((4.0, 2.5), (None, None)),
    "e4b int8": ((3.0, 1.2), (20, 9)),
    "gemma4-e2b int8": ((1.2, 0.8), (None, None)),
    "gemma4-e4b int8": ((1.2, 0.8), (None, None)),
}
GROWTH = (3.0, 1.3)
"""Peak anonymous memory of the int8 run at E2B over that at 0.3 billion parameters: must, aim."""
AGAINST_GEMMA3N = (1.1, 0.7)
"""Processor time of Gemma 4's int8 run per byte made over that of Gemma 3n's: must, aim."""
CGROUPS = (
    (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes"),  # version 1
    (Path("/sys/fs/cgroup"), "memory.max"),
)
SHOWN = ("e2b int8", "e2b judged", "e2b fp32", "e4b int8")
"""The runs in the picture."""
CHANGES = bench_stages.INT8_ALONE | {
    "decode = 128": "decode = 64",
    "prompts = 16": "prompts = 4",
    "continuation = 128": "continuation = 16",
    "positions = 2032": "positions = 0",
    "positions = 2048": "positions = 256",
    # random weights amplify every rounding: what int8 does to them says nothing
    "kld = 0.01": "kld = 20.0",
    "top1 = 0.96": "top1 = 0.0",
    "perplexity_ratio_min = 0.993": "perplexity_ratio_min = 0.0",
    "perplexity_ratio_max = 1.007": "perplexity_ratio_max = 1e9",
}
"""The shipped recipe, cut to what a large model is judged on in minutes, and with the int8 bundle alone."""
CLIMBS = {"no ladder": {"ladder = true": "ladder = false"}, "all rungs": {"kld = 0.01": "kld = 1e-9"}}
"""What stage int8 is measured with besides, at E2B: nothing judged, and no rung good enough."""


@contextmanager
def cgroup(limit: int) -> Iterator[Sequence[str] | None]:
    """A command that runs another one in a new memory cgroup of `limit` bytes; None where no group can be made."""
    for mount, setting in CGROUPS:
        group = mount / f"hf-to-litert-{os.getpid()}"
        try:
            group.mkdir()
            (group / setting).write_text(str(limit), encoding="ascii")
        except OSError:
            with suppress(OSError):
                group.rmdir()
            continue
        try:
            yield ("sh", "-c", f'echo $$ >{group}/cgroup.procs && exec "$@"', "sh")
        finally:
            group.rmdir()
        return
    log.warn("this process may make no memory cgroup: the run in one is left out")
    yield None


def measure(size: str, folder: Path, *, int8_alone: bool) -> tuple[dict[str, dict[str, Any]], list[plan_fit.Run]]:
    """All runs of a size: name → what each stage took; and its stages for the plan. Files go once they are measured."""
    recipe = of_type(GEOMETRIES[size]["model_type"])[0].stem
    settings = bench_stages.changed_recipe(recipe, folder, CHANGES)
    checkpoint = make(GEOMETRIES[size], folder / size)
    results = folder / "artifacts"

    def run(stages: Sequence[str], within: Sequence[str] = ()) -> dict[str, Any]:
        return bench_stages.measure(stages, checkpoint, results, settings, "bundle", within)

    def planned() -> list[plan_fit.Run]:
        return list(plan_fit.runs(f"{size}, random", str(checkpoint), results, settings, "bundle"))

    runs = {f"{size} int8": run(INT8)}
    if int8_alone or size.startswith("gemma4"):
        taken = planned()
        runs |= besides(size, checkpoint, folder)
        shutil.rmtree(results)
        shutil.rmtree(checkpoint)
        return runs, taken
    judged = run(JUDGED)
    runs |= {f"{size} golden": {"golden": judged["golden"]}, f"{size} judged": judged}
    taken = planned()
    if size == "e2b":
        with cgroup(4 * GIB) as within:
            if within:
                runs[f"{size} int8, 4 GiB cgroup"] = run(INT8, within)
    runs |= besides(size, checkpoint, folder)
    shutil.rmtree(results)
    runs[f"{size} fp32"] = run(FP32)
    shutil.rmtree(results)
    shutil.rmtree(checkpoint)
    return runs, taken


def besides(size: str, checkpoint: Path, folder: Path) -> dict[str, dict[str, Any]]:
    """Stages int4, and int8 without its ladder and with all rungs, at E2B: no bundle of it is up to date then."""
    if size != "e2b":
        return {}
    runs = {}
    for name, changes in {"int4": {}, **CLIMBS}.items():
        own = folder / name
        own.mkdir()
        settings = bench_stages.changed_recipe("gemma3n", own, CHANGES | changes)
        stages = ("int8",) if changes else ("int4",)
        runs[f"{size} {name}"] = bench_stages.measure(stages, checkpoint, folder / "artifacts", settings, "bundle")
    return runs


def judge(runs: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Every limit that these runs are held against, with what was found."""
    rows = []
    for name, (memory, (must, aim)) in LIMITS.items():
        if name in runs:
            took = together(runs[name])
            rows.append(_row(f"{name}: peak anonymous, GiB", took["peak_anonymous"] / GIB, *memory))
            if must and aim:
                rows.append(_row(f"{name}: minutes", took["seconds"] / 60, must, aim))
    small, large = (runs.get(f"{size} int8") for size in ("0.3b", "e2b"))
    if small and large:
        growth = together(large)["peak_anonymous"] / together(small)["peak_anonymous"]
        rows.append(_row("growth of peak anonymous from 0.3 to 4.5 billion parameters", growth, *GROWTH))
    for size in ("e2b", "e4b"):
        known, new = (runs.get(f"{name} int8") for name in (size, f"gemma4-{size}"))
        if known and new:
            ratio = _per_byte(new) / _per_byte(known)
            rows.append(_row(f"gemma4-{size} over {size}, processor time per byte made", ratio, *AGAINST_GEMMA3N))
    return rows


def _per_byte(stages: Mapping[str, Mapping[str, Any]]) -> float:
    """Processor seconds of a run over the bytes of its bundle: the two families' sizes of one name differ."""
    seconds: float = together(stages)["processor_seconds"] / stages["bundle"]["size"]
    return seconds


def _row(what: str, value: float, must: float, aim: float) -> dict[str, Any]:
    return {"what": what, "value": value, "must": must, "aim": aim, "passed": value <= must}


def _earlier(file: Path, about: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """Runs of an earlier call on the same machine with the same versions, and their dates.

    A size takes long, and can be run alone.
    """
    found = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    if not found or any(found[key] != value for key, value in about.items()):
        return {}, {}
    return dict(found["runs"]), dict(found["dates"])


def _planned(stages: Sequence[plan_fit.Run], command: str) -> tables.Table:
    """What the plan says of finished stages, beside what they took."""
    made = plan_fit.table(stages, speed.of_this_machine(Path("artifacts")))
    return replace(made, measured=replace(made.measured, command=f"`{command}`"))


def main() -> int:
    """Run from the command line; 1 if a limit is missed, 10 if the disk is too small."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sizes", nargs="*", default=["e2b"], choices=[*DISK], help="default: e2b")
    parser.add_argument("--out", type=Path, default=tables.RAW, help="where all results go (default: %(default)s)")
    parser.add_argument("--int8-alone", action="store_true", help="the way to the int8 bundle alone")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    free, needed = shutil.disk_usage(arguments.out).free, max(DISK[size] for size in arguments.sizes)
    if free < needed:
        log.line(f"error: this needs {log.human_bytes(needed)} of disk at once, {log.human_bytes(free)} are free")
        return 10
    about = {"machine": {"cpu": processor(), "threads": parallel.threads()}, "versions": versions.installed()}
    runs, dates = _earlier(arguments.out / "large.json", about)
    stages: list[plan_fit.Run] = []
    today = time.strftime("%Y-%m-%d")
    with tempfile.TemporaryDirectory(dir=arguments.out) as scratch:
        for size in ("0.3b", *arguments.sizes):
            taken, planned = measure(size, Path(scratch), int8_alone=arguments.int8_alone)
            stages += planned
            runs, dates = runs | taken, dates | dict.fromkeys(taken, today)
    sizes = dict.fromkeys(name.split()[0] for name in runs if not name.startswith("0.3b"))
    found: dict[str, Any] = {
        "runs": runs,
        "dates": dates,
        "limits": judge(runs),
        **about,
        "date": today,
        "command": f"nox -s large -- {' '.join(sizes)}",
    }
    (arguments.out / "large.json").write_text(json.dumps(found), encoding="utf-8")  # stages in their order
    earlier = tables.read_all()
    made = dict(figures.large(found)) | {"planned": _planned(stages, found["command"])}
    tables.write_all({name: tables.joined(earlier[name], table) for name, table in made.items()})
    if shown := {name: runs[name] for name in SHOWN if name in runs}:
        bench_stages.draw(shown, tables.BENCH / "large.png")
    for name, took in runs.items():
        log.line(f"\n{name}")
        for line in bench_stages.table(took):
            log.line(line)
    log.line()
    for row in found["limits"]:
        word = "ok" if row["passed"] else "MISSED"
        log.line(f"{word}: {row['what']}: {row['value']:.2f} (must ≤ {row['must']}, aim ≤ {row['aim']})")
    return 0 if all(row["passed"] for row in found["limits"]) else 1


if __name__ == "__main__":
    sys.exit(main())
