"""reproduce: rebuild a finished artefact folder from its own manifests, and compare every file.

    make reproduce MODEL_ID=…

Every finished stage is run again, in order, into a second folder, with the revision, graphs, device and scheme that its
manifest names, under the same recipe and the same versions. The first file that differs is said, with the stage that
made it and the tensor or byte where it does.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.core import errors, facts, graph, log, manifest, options, process, rerun, versions
from pipeline.core.errors import UsageError
from pipeline.core.recipe import PROJECT
from pipeline.core.recipe import load as load_recipe
from pipeline.core.stage import guard
from pipeline.tflite.difference import compare

_MARK = ".reproduced"
"""Stands in a second build: what has none is never removed."""


@dataclass(frozen=True, kw_only=True)
class Options(rerun.Given):
    """As what the stages were given, and where the second build goes."""

    again: Path | None = field(
        default=None,
        metadata={"help": "where the second build goes, removed if all is the same (default: ARTIFACTS/reproduced)"},
    )


def work(given: Options) -> None:
    """Rebuild and compare.

    Raises:
        UsageError: nothing is finished, or it was made under another recipe or with other versions.
        IntegrityError: a file differs.
        PipelineError: a stage failed, of the class that its exit code has.
    """
    root, recipe = given.root, given.recipe_file
    again = graph.model_root(given.again or given.artifacts / "reproduced", given.model_id)
    finished = {name: manifest.read(root / name) for name in rerun.STAGES if (root / name / manifest.NAME).is_file()}
    if "fetch" in finished and not finished["fetch"].told(facts.Fetch).towers:
        finished.pop("towers", None)  # of an earlier build, with towers
    versions.require_same(finished, load_recipe(recipe).sha256, root)
    _clear(again)
    again.mkdir(parents=True)
    (again / _MARK).touch()
    where = ["--model-id", given.model_id, "--artifacts", str(again.parent), "--recipe", str(recipe)]
    files = 0
    for name in finished:
        module = f"pipeline.{graph.STAGES[name].module}"
        command = [sys.executable, "-m", module, *where, *rerun.words(name, finished, given)]
        if code := process.run(command, cwd=PROJECT):
            raise errors.of_code(code)(
                f"stage {name} failed with exit code {code}", remedy=f"what it needs is said above; {root} is unharmed"
            )
        files += compare(name, root, again)
    _clear(again)
    log.line(f"reproduced: {files} files of {len(finished)} stages have the same bytes")


def _clear(again: Path) -> None:
    """Remove an earlier second build in `again`, and the folder around it if nothing else is there.

    Raises:
        UsageError: something else is there, which is somebody's.
    """
    if not again.exists():
        return
    if not (again / _MARK).is_file():
        raise UsageError(f"{again} was not made by reproduce", remedy="name a folder of its own with --again")
    shutil.rmtree(again)
    if not any(again.parent.iterdir()):
        again.parent.rmdir()


def main(argv: Sequence[str] | None = None) -> int:
    """Run from the command line and return the exit code."""
    summary = "Rebuild a finished artefact folder from its own manifests and compare every file."
    given = options.read("reproduce", summary, Options, argv)
    return guard(lambda: work(given))


if __name__ == "__main__":
    sys.exit(main())
