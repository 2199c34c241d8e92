"""Who may import whom, read from the sources: a layer never reaches upward, a stage never imports a stage."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.core.recipe import PROJECT

PIPELINE = PROJECT / "pipeline"
ALLOWED = {
    "core": set(),
    "checkpoint": {"core"},
    "runtime": {"core"},
    "release": {"core"},
    "tflite": {"core", "checkpoint"},
    "export": {"core", "tflite"},
    "quantize": {"core", "tflite", "runtime"},
    "models": {"core", "checkpoint", "tflite", "export"},
    "judge": {"core", "checkpoint", "tflite", "runtime"},
    "reference": {"core", "checkpoint", "judge"},
    "report": {"core", "runtime", "judge"},
    "bundling": {"core", "checkpoint", "tflite", "quantize", "models"},
    "planning": {"core", "checkpoint", "quantize", "models", "judge", "release"},
    "search": {"core", "checkpoint", "tflite", "runtime", "quantize", "models", "judge"},
}
"""The rooms that a room's files may import, beside their own; a stage may import all."""
ROOMS = tuple(ALLOWED)
FILES = sorted(PIPELINE.rglob("*.py"))
STAGES = sorted(file for file in PIPELINE.glob("*.py") if file.name != "__init__.py")
MAKEFILE = (PROJECT / "Makefile").read_text(encoding="utf-8")


def imports(file: Path) -> Iterator[str]:
    """Dotted names of all modules that `file` imports, inside functions as well; `from a import b` gives a and a.b."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{file}: relative import"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_no_room_is_its_own_cellar() -> None:
    """Each room needs others that are listed before it, so that there are no circles."""
    for place, room in enumerate(ROOMS):
        assert ALLOWED[room] <= set(ROOMS[:place])


def own(file: Path) -> set[str]:
    """First names below `pipeline` that `file` imports: rooms, or stages."""
    return {name.split(".")[1] for name in imports(file) if name.startswith("pipeline.")}


def layer(file: Path) -> str:
    first = file.relative_to(PIPELINE).parts[0]
    return first if first in ROOMS else "stage"


def label(file: Path) -> str:
    return file.relative_to(PIPELINE).as_posix()


@pytest.mark.parametrize("file", FILES, ids=label)
def test_no_layer_imports_upward_or_sideways(file: Path) -> None:
    assert layer(file) == "stage" or own(file) <= {layer(file), *ALLOWED[layer(file)]}


@pytest.mark.parametrize("file", [file for file in FILES if layer(file) == "core"], ids=label)
def test_core_needs_the_standard_library_only(file: Path) -> None:
    outside = {name.split(".")[0] for name in imports(file)} - {"pipeline"}
    assert outside <= sys.stdlib_module_names


@pytest.mark.parametrize("file", [file for file in FILES if layer(file) == "judge"], ids=label)
def test_the_judge_knows_nothing_of_what_made_the_files(file: Path) -> None:
    makers = {"torch", "transformers", "litert_torch", "ai_edge_quantizer", "litert_converter", "jax"}
    assert not {name.split(".")[0] for name in imports(file)} & makers


@pytest.mark.parametrize("file", FILES, ids=label)
def test_one_place_prints_and_one_starts_programs(file: Path) -> None:
    if label(file) != "core/log.py":
        calls = [node.func for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Call)]
        assert not [call for call in calls if isinstance(call, ast.Name) and call.id == "print"]
    if label(file) != "core/process.py":
        assert "subprocess" not in set(imports(file))


def rooms_behind(file: Path) -> set[str]:
    """The rooms whose code runs when `file` does, through what it imports."""
    found, queue = set[str](), own(file)
    while queue:
        room = queue.pop()
        found.add(room)
        queue |= set().union(*(own(other) for other in (PIPELINE / room).rglob("*.py"))) - found
    return found


@pytest.mark.parametrize("stage", STAGES, ids=label)
def test_make_rebuilds_a_stage_when_code_that_it_imports_changes(stage: Path) -> None:
    listed = re.search(rf"^ROOMS_{stage.stem} := (.*)", MAKEFILE, flags=re.MULTILINE)
    assert listed, f"the Makefile has no ROOMS_{stage.stem}"
    assert rooms_behind(stage) == set(listed[1].split())


@pytest.mark.parametrize("stage", STAGES, ids=label)
def test_make_runs_a_stage_after_those_it_needs(stage: Path) -> None:
    needs = re.search(r"^    needs=(\(.*?\)),$", stage.read_text(encoding="utf-8"), flags=re.MULTILINE)
    if needs:
        listed = re.search(rf"^NEEDS_{stage.stem} := (.*)", MAKEFILE, flags=re.MULTILINE)
        assert listed and set(ast.literal_eval(needs[1])) <= set(listed[1].split())
