"""plan: what the stages will make and need, from the checkpoint's headers alone, before anything large moves.

    make plan MODEL_ID=…

Says per stage the files and their sizes, peak memory and rough time, and refuses (exit code 10) what the disk or the
memory, the machine's or the container's, can't hold. The figures are right to a factor of two, which is what a plan is
for (pipeline/planning/needs.py). How fast this machine is, is measured at the first plan, in about a second, and
kept in `.speed.json` in the folder of artefacts where there is one.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.core import log, manifest, memory, options
from pipeline.core.errors import ResourceError
from pipeline.core.graph import behind
from pipeline.core.recipe import load as load_recipe
from pipeline.core.stage import Common, guard
from pipeline.planning import speed
from pipeline.planning.model import look
from pipeline.planning.needs import NEEDS, Need


@dataclass(frozen=True, kw_only=True)
class Options(Common):
    """Which checkpoint, exactly, and which stages."""

    revision: str = field(default="", metadata={"help": "branch, tag or commit on the Hub (default: the main branch)"})
    base: str = field(default="", metadata={"help": "of an adapter: owner/name, owner/name@revision or a folder"})
    stages: tuple[str, ...] = field(
        default=(), metadata={"choices": tuple(NEEDS), "help": "those to plan (default: what publish needs)"}
    )


def work(given: Options) -> None:
    """Print the plan.

    Raises:
        ResourceError: the disk or the memory is too small for it.
    """
    root, recipe = given.root, load_recipe(given.recipe_file)
    model = look(given.model_id, given.revision, given.base, recipe, given.graphs or recipe.graphs, given.towers)
    stages = given.stages or behind(["publish"], model.choice)
    own = speed.of_this_machine(given.artifacts)
    needs = {name: NEEDS[name](model).on(own) for name in stages}
    done = {name: _took(root / name) for name in needs if (root / name / manifest.NAME).is_file()}
    facts = model.facts
    log.line(f"plan · {root.name} · {model.where}")
    log.line(
        f"  {facts.model_type}, {facts.parameters / 1e6:,.0f} M parameters in {facts.dtype}, "
        f"{facts.shards} weight files, {log.human_bytes(model.stored)}; licence: {model.licence}"
    )
    for row in (*_table(needs, done), *(model.remarks if "bundle" in needs else ())):
        log.line(f"  {row}")
    if done:
        expected, took = sum(needs[name].seconds for name in done), sum(done.values())
        log.line(f"  done: {log.human_seconds(took)}, by this plan {log.human_seconds(expected)}")
    _check([need for name, need in needs.items() if name not in done], root)


def _took(folder: Path) -> float:
    """Seconds that the finished stage in `folder` took; 0 where nothing says that."""
    run = folder / "run.json"
    return float(json.loads(run.read_text(encoding="utf-8"))["seconds"]) if run.is_file() else 0.0


def _check(needs: Sequence[Need], root: Path) -> None:
    """Hold what is still to be done against the machine.

    Raises:
        ResourceError: the disk or the memory is too small.
    """
    disk = sum(need.size for need in needs) + max((need.scratch for need in needs), default=0)
    most = int(max((need.memory for need in needs), default=0))
    free_disk, free_memory = shutil.disk_usage(_existing(root)).free, memory.available()
    left = log.human_bytes(free_memory) if free_memory is not None else "unknown"
    log.line(
        f"  in all: {log.human_bytes(disk)} of disk ({log.human_bytes(free_disk)} free), {log.human_bytes(most)} of "
        f"memory ({left} free), about {log.human_seconds(sum(need.seconds for need in needs))}"
    )
    if disk > free_disk:
        raise ResourceError(
            f"this needs {log.human_bytes(disk)} of disk, {log.human_bytes(free_disk)} are free",
            cause="every file that is made stays until `make clean`",
            remedy="free some, set ARTIFACTS= to a folder on another disk, or build less (GRAPHS=bundle, `make int8`)",
        )
    memory.require(most, "the largest stage", "use a larger machine")


def _existing(folder: Path) -> Path:
    """`folder`, or the innermost of those around it that exists."""
    return next(each for each in (folder.absolute(), *folder.absolute().parents) if each.is_dir())


def _table(needs: Mapping[str, Need], done: Mapping[str, float]) -> list[str]:
    rows = [f"{'stage':<13}{'disk':>9}{'scratch':>9}{'memory':>9}{'about':>18}  makes"]
    for name, need in needs.items():
        sizes_ = (log.human_bytes(size) if size else "–" for size in (need.size, need.scratch, need.memory))
        about = f"took {log.human_seconds(done[name])}" if name in done else log.human_seconds(need.seconds)
        rows.append(f"{name:<13}" + "".join(f"{size:>9}" for size in sizes_) + f"{about:>18}  {need.what}")
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Run from the command line and return the exit code."""
    summary = "Say what the stages will make and need, from the checkpoint's headers alone."
    given = options.read("plan", summary, Options, argv)
    return guard(lambda: work(given))


if __name__ == "__main__":
    sys.exit(main())
