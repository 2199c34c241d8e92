"""reproduce: rebuild a finished artefact folder from its own manifests, and compare every file.

    make reproduce MODEL_ID=…

Every finished stage is run again, in order, into a second folder, with the revision, graphs, device and scheme that its
manifest names, under the same recipe and the same versions. The first file that differs is said, with the stage that
made it and the tensor or byte where it does.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from pipeline.core import errors, facts, graph, log, manifest, process, versions
from pipeline.core.graph import model_name
from pipeline.core.manifest import Manifest
from pipeline.core.recipe import PROJECT, STEP
from pipeline.core.recipe import load as load_recipe
from pipeline.core.stage import common_parser, guard, parse
from pipeline.tflite.difference import compare

STAGES = tuple(name for name in graph.STAGES if name != "evaluate")


def work(arguments: argparse.Namespace) -> None:
    """Rebuild and compare.

    Raises:
        UsageError: nothing is finished, or it was made under another recipe or with other versions.
        IntegrityError: a file differs.
        PipelineError: a stage failed, of the class that its exit code has.
    """
    root = arguments.artifacts / model_name(arguments.model_id)
    finished = {name: manifest.read(root / name) for name in STAGES if (root / name / manifest.NAME).is_file()}
    versions.require_same(finished, load_recipe(arguments.recipe).sha256, root)
    again: Path = arguments.again
    shutil.rmtree(again, ignore_errors=True)
    where = ["--model-id", arguments.model_id, "--artifacts", str(again), "--recipe", str(arguments.recipe)]
    files = 0
    for name, made in finished.items():
        module = f"pipeline.{graph.STAGES[name].module}"
        options = [*_options(name, made, finished), *(_base(made, arguments) if name == "fetch" else [])]
        command = [sys.executable, "-m", module, *where, *options, *_texts(name, arguments)]
        if code := process.run(command, cwd=PROJECT):
            raise errors.of_code(code)(
                f"stage {name} failed with exit code {code}", remedy=f"what it needs is said above; {root} is unharmed"
            )
        files += compare(name, root, again / root.name)
    shutil.rmtree(again)
    log.line(f"reproduced: {files} files of {len(finished)} stages have the same bytes")


def _options(name: str, made: Manifest, finished: Mapping[str, Manifest]) -> list[str]:
    """The settings with which a stage was run, as its manifest tells."""
    options = ["--graphs", finished["graph"].told(facts.Files).graphs] if "graph" in finished else []
    if name == "fetch":
        return ["--revision", made.revision] if "/" in made.model else []
    if name == "golden":
        golden = made.told(facts.Golden)
        return [*options, "--device", golden.device, "--weights", golden.weights]
    if name.startswith("int8-"):
        return [*options, "--scheme", name.removeprefix("int8-")]
    if name == "verify":
        read = {record.path.split("/", 1)[0] for record in made.inputs if record.path.endswith(f"/{STEP}")}
        return [*options, "--variants", *(stage for stage in STAGES if stage in read)]
    if name == "publish" and (override := made.told(facts.Publish).licence_override):
        return [*options, "--licence-override", override]
    return options


def _base(made: Manifest, arguments: argparse.Namespace) -> list[str]:
    """The base of an adapter: that of the Hub at its commit; a folder, and a template, as they were said."""
    merged = made.told(facts.Fetch).adapter
    named = arguments.base if merged else ""
    if merged and "/" in merged.base:
        named = f"{merged.base}@{merged.base_revision}"
    options = {"--base": named, "--template": str(arguments.template or "")}
    return [word for option, value in options.items() if value for word in (option, value)]


def _texts(name: str, arguments: argparse.Namespace) -> list[str]:
    """The user's own texts, for the stages that read them; a manifest knows their contents, not where they are."""
    read = {
        "eval": tuple(stage for stage, node in graph.STAGES.items() if "eval" in node.settings),
        "calibration": tuple(stage for stage, node in graph.STAGES.items() if "calibration" in node.settings),
    }
    given = {option: getattr(arguments, option) for option, stages in read.items() if name in stages}
    return [word for option, file in given.items() if file for word in (f"--{option}", str(file))]


def main(argv: Sequence[str] | None = None) -> int:
    """Run from the command line and return the exit code."""
    parser = common_parser(
        "reproduce", "Rebuild a finished artefact folder from its own manifests and compare every file."
    )
    parser.add_argument(
        "--again", type=Path, help="the second folder, removed if all is the same (default: ARTIFACTS/reproduced)"
    )
    parser.add_argument("--base", default="", help="the folder of an adapter's base, if it was given")
    parser.add_argument("--template", type=Path, metavar="FILE", help="the chat template that fetch was given, if any")
    parser.add_argument("--eval", type=Path, metavar="FILE", help="the text that golden and verify were given, if any")
    parser.add_argument("--calibration", type=Path, metavar="FILE", help="the text that int8 was given, if any")
    arguments = parse(parser, argv)
    arguments.again = arguments.again or arguments.artifacts / "reproduced"
    return guard(lambda: work(arguments))


if __name__ == "__main__":
    sys.exit(main())
