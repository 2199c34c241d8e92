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
from typing import Any

import numpy as np

from pipeline.checkpoint.headers import LENGTH_BYTES, header_length, parse_header
from pipeline.core import graph, log, manifest, process, versions
from pipeline.core.errors import IntegrityError, PipelineError, UsageError
from pipeline.core.graph import model_name
from pipeline.core.manifest import Manifest
from pipeline.core.recipe import PROJECT
from pipeline.core.recipe import load as load_recipe
from pipeline.core.stage import common_parser, guard
from pipeline.tflite.graph import Graph

STAGES = tuple(name for name in graph.STAGES if name != "evaluate")
_BLOCK = 1 << 22


def work(arguments: argparse.Namespace) -> None:
    """Rebuild and compare.

    Raises:
        UsageError: nothing is finished, or it was made under another recipe or with other versions.
        IntegrityError: a file differs.
        PipelineError: a stage failed.
    """
    root = arguments.artifacts / model_name(arguments.model_id)
    finished = {name: manifest.read(root / name) for name in STAGES if (root / name / manifest.NAME).is_file()}
    _require_same(finished, load_recipe(arguments.recipe).sha256, root)
    again: Path = arguments.again
    shutil.rmtree(again, ignore_errors=True)
    where = ["--model-id", arguments.model_id, "--artifacts", str(again), "--recipe", str(arguments.recipe)]
    files = 0
    for name, made in finished.items():
        module = f"pipeline.{graph.STAGES[name].module}"
        command = [sys.executable, "-m", module, *where, *_options(name, made, finished), *_texts(name, arguments)]
        if code := process.run(command, cwd=PROJECT):
            raise PipelineError(
                f"stage {name} failed with exit code {code}", remedy=f"what it needs is said above; {root} is unharmed"
            )
        files += compare(name, root, again / root.name)
    shutil.rmtree(again)
    log.line(f"reproduced: {files} files of {len(finished)} stages have the same bytes")


def _require_same(finished: Mapping[str, Manifest], recipe_sha256: str, root: Path) -> None:
    if "fetch" not in finished:
        raise UsageError(f"{root} holds no finished stage", remedy="run `make` first, with the same MODEL_ID")
    present = versions.installed()
    for name, made in finished.items():
        if made.recipe_sha256 != recipe_sha256:
            raise UsageError(f"stage {name} was made under another recipe", remedy="set RECIPE= to that one")
        changed = [f"{tool} {version}" for tool, version in made.tools.items() if present.get(tool) != version]
        if changed:
            raise UsageError(
                f"stage {name} was made with other versions: {', '.join(changed)}",
                remedy="check out the commit in its manifest, and run `make setup`",
            )


def _options(name: str, made: Manifest, finished: Mapping[str, Manifest]) -> list[str]:
    """The settings with which a stage was run, as its manifest tells."""
    graphs = finished["graph"].facts["graphs"] if "graph" in finished else None
    options = ["--graphs", str(graphs)] if graphs else []
    if name == "fetch":
        return ["--revision", made.revision] if "/" in made.model else []
    if name == "golden":
        return [*options, "--device", str(made.facts["device"]), "--weights", str(made.facts["weights"])]
    if name.startswith("int8-"):
        return [*options, "--scheme", name.removeprefix("int8-")]
    if name == "verify":
        read = {record.path.split("/", 1)[0] for record in made.inputs if record.path.endswith("/step.tflite")}
        return [*options, "--variants", *(stage for stage in STAGES if stage in read)]
    if name == "publish" and made.facts.get("licence_override"):
        return [*options, "--licence-override", str(made.facts["licence_override"])]
    return options


def _texts(name: str, arguments: argparse.Namespace) -> list[str]:
    """The user's own texts, for the stages that read them; a manifest knows their contents, not where they are."""
    read = {
        "eval": tuple(stage for stage, node in graph.STAGES.items() if "eval" in node.settings),
        "calibration": tuple(stage for stage, node in graph.STAGES.items() if "calibration" in node.settings),
    }
    given = {option: getattr(arguments, option) for option, stages in read.items() if name in stages}
    return [word for option, file in given.items() if file for word in (f"--{option}", str(file))]


def compare(stage: str, root: Path, again: Path) -> int:
    """Hold a stage's files against those of the second run; their number.

    Raises:
        IntegrityError: names the first that differs, and where.
    """
    first, second = (
        {record.path: record.sha256 for record in manifest.read(folder / stage).outputs} for folder in (root, again)
    )
    for path in sorted(first.keys() | second.keys()):
        if path not in first or path not in second:
            _refuse(f"{path} is made in one of the two runs only")
        if first[path] != second[path]:
            _refuse(f"{path} differs: {where_different(root / path, again / path)}")
    return len(first)


def _refuse(fault: str) -> None:
    raise IntegrityError(
        fault,
        cause="a stage depends on something besides its inputs, or a file was changed after it was made",
        remedy="run it again; if the second folder is the same twice, the first was changed",
    )


def where_different(left: Path, right: Path) -> str:
    """The first tensor that differs, if the files have tensors, and the first byte."""
    place = _first_byte(left, right)
    tensors: Sequence[str] = []
    if left.suffix == ".tflite":
        tensors = _graph_tensors(left, right)
    elif left.suffix == ".safetensors":
        tensors = [name for name, (start, stop) in _places(left).items() if start <= place < stop]
    named = f"tensor {tensors[0]}, " if tensors else ""
    return f"{named}first at byte {place} of {left.stat().st_size} and {right.stat().st_size}"


def _first_byte(left: Path, right: Path) -> int:
    start = 0
    with left.open("rb") as one, right.open("rb") as other:
        while True:
            a, b = one.read(_BLOCK), other.read(_BLOCK)
            if a != b or not a:
                short = min(len(a), len(b))
                differs = np.flatnonzero(np.frombuffer(a[:short], np.uint8) != np.frombuffer(b[:short], np.uint8))
                return start + (int(differs[0]) if len(differs) else short)
            start += len(a)


def _graph_tensors(left: Path, right: Path) -> list[str]:
    """Names of constants that differ, in the order of the file."""
    try:
        one, other = (_constants(file) for file in (left, right))
    except (IntegrityError, ValueError, IndexError):
        return []
    return [name for name in one if name in other and not np.array_equal(one[name], other[name])]


def _constants(file: Path) -> dict[str, Any]:
    graph = Graph.read(file)
    return {
        view.name(tensor): view.constant(tensor)
        for view in graph.each()
        for tensor in range(len(view.main.tensors))
        if view.is_constant(tensor)
    }


def _places(file: Path) -> dict[str, tuple[int, int]]:
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = header_length(stream.read(LENGTH_BYTES), size, file.name)
        tensors = parse_header(stream.read(length), size, file.name)
    return {name: (tensor.offset, tensor.offset + tensor.size) for name, tensor in tensors.items()}


def main(argv: Sequence[str] | None = None) -> int:
    """Run from the command line and return the exit code."""
    parser = common_parser(
        "reproduce", "Rebuild a finished artefact folder from its own manifests and compare every file."
    )
    parser.add_argument(
        "--again", type=Path, help="the second folder, removed if all is the same (default: ARTIFACTS/reproduced)"
    )
    parser.add_argument("--eval", type=Path, metavar="FILE", help="the text that golden and verify were given, if any")
    parser.add_argument("--calibration", type=Path, metavar="FILE", help="the text that int8 was given, if any")
    arguments = parser.parse_args(argv)
    arguments.again = arguments.again or arguments.artifacts / "reproduced"
    return guard(lambda: work(arguments))


if __name__ == "__main__":
    sys.exit(main())
