"""Who may import whom, read from the sources: a layer never reaches upward, a stage never imports a stage."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.core import graph, rules
from pipeline.core.recipe import PROJECT, load

PIPELINE = PROJECT / "pipeline"
ALLOWED = {
    "core": set(),
    "cluster": {"core"},
    "checkpoint": {"core"},
    "runtime": {"core"},
    "release": {"core", "checkpoint"},
    "tflite": {"core", "checkpoint"},
    "export": {"core", "tflite"},
    "quantize": {"core", "checkpoint", "tflite", "runtime"},
    "models": {"core", "checkpoint", "tflite", "export"},
    "judge": {"core", "cluster", "checkpoint", "tflite", "runtime"},
    "reference": {"core", "cluster", "checkpoint", "judge"},
    "report": {"core", "runtime", "judge"},
    "bundling": {"core", "checkpoint", "tflite", "runtime", "quantize", "models"},
    "planning": {"core", "checkpoint", "runtime", "quantize", "models", "judge", "release"},
    "search": {"core", "cluster", "checkpoint", "tflite", "runtime", "quantize", "models", "judge"},
}
"""The rooms that a room's files may import, beside their own; a stage may import all."""
ROOMS = tuple(ALLOWED)
FILES = sorted(PIPELINE.rglob("*.py"))
STAGES = sorted(file for file in PIPELINE.glob("*.py") if file.name != "__init__.py")


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


def test_a_stage_is_made_again_for_the_code_that_it_imports_and_for_no_other() -> None:
    made_again = {stage for stage in graph.STAGES if PIPELINE / "quantize" / "gptq.py" in rules.modules(stage)}
    assert made_again == {"int8", "int8-static", "int8-dynamic", "int8-static16", "int4"}
    assert PIPELINE / "report" / "page.html.jinja" in rules.modules("verify")
    assert PIPELINE / "models" / "gemma3.py" in rules.modules("graph"), "a family is chosen while the stage runs"
    assert not [file for file in rules.modules("fetch") if file.parent.name in ("quantize", "judge", "report")]


@pytest.mark.parametrize("stage", graph.STAGES)
def test_what_a_stage_imports_is_found(stage: str) -> None:
    """Against the interpreter's own list: every module of the project that importing the stage loads."""
    code = f"import sys, pipeline.{graph.STAGES[stage].module}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True, check=True)
    loaded = [name for name in done.stdout.split() if name.split(".")[0] == "pipeline"]
    files = {PIPELINE.parent.joinpath(*name.split(".")) for name in loaded}
    found = {file if file.name != "__init__.py" else file.parent for file in rules.modules(stage)}
    assert {file if file.is_dir() else file.with_suffix(".py") for file in files} <= found


@pytest.mark.parametrize("name", graph.STAGES)
def test_a_stage_stands_after_what_it_needs(name: str) -> None:
    order = list(graph.STAGES)
    for recipe in sorted((PIPELINE / "recipes").glob("*.toml")):
        for graphs in ("step", "bundle", "all"):
            choice = graph.Choice(recipe=load(recipe), graphs=graphs)
            assert all(order.index(need) < order.index(name) for need in graph.makeable(name, choice))


@pytest.mark.parametrize("constant", ["step.tflite", "decoder.tflite"])
def test_the_name_of_a_graphs_file_stands_in_one_place(constant: str) -> None:
    held = {
        file.relative_to(PIPELINE).as_posix()
        for file in FILES
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and node.value == constant
    }
    assert held == {"core/recipe.py"}


def test_the_tokenizer_is_opened_in_one_place() -> None:
    held = {
        file.relative_to(PIPELINE).as_posix() for file in FILES if "AutoTokenizer.from_pretrained(" in file.read_text()
    }
    assert held - {"checkpoint/preflight.py"} == {"checkpoint/chat.py"}  # preflight tells people to


def test_nothing_in_the_pipeline_serves_tests_alone() -> None:
    """A public function that is named nowhere but where it is defined; what others call back is named here."""
    # By torch.nn.Module, logging.Handler, the Hub's CommitOperationAdd, and LiteRT-LM, which asks its tools.
    called_back = {"forward", "emit", "as_file", "get_tool_description", "execute"}
    sources = [*FILES, *PIPELINE.rglob("*.jinja"), *(PROJECT / "tools").glob("*.py"), PROJECT / "noxfile.py"]
    words = Counter(word for file in sources for word in re.findall(r"\w+", file.read_text(encoding="utf-8")))
    kinds = (ast.FunctionDef, ast.ClassDef)
    defined = Counter(
        node.name
        for file in FILES
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, kinds) and not node.name.startswith("_")
    )
    assert {name for name, count in defined.items() if words[name] <= count} <= called_back
