"""Count what the house is held against: sizes of its rooms, imports, types, names, comments.

    python -m tools.house        (nox -s house)

All counts come from syntax trees and tokens, so a word in a text is not a use. The limits are the project's own: *must*
holds before a change is merged, *aim* is where it should go.
"""

from __future__ import annotations

import ast
import io
import re
import sys
import tokenize
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

from pipeline.core import log
from pipeline.core.recipe import PROJECT

LONGEST_STAGE = 120
_DIRECTIVES = ("# type:", "# noqa", "# fmt:", "# pragma", "# ruff:")


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A count with its limits, and what it is of: the room, the files."""

    name: str
    value: float
    must: str
    aim: str = ""
    of: str = ""
    digits: str = ".0f"
    unit: str = ""

    def cells(self) -> list[str]:
        """The figure as a row."""
        return [self.name, f"{self.value:{self.digits}}{self.unit}", self.must, self.aim, self.of]


def figures(project: Path = PROJECT) -> list[Figure]:
    """Every figure of the project in the folder `project`."""
    pipeline = project / "pipeline"
    sizes = room_sizes(pipeline)
    biggest = max(sizes, key=lambda room: sizes[room])
    long = {file.name: length for file in stages(pipeline) if (length := lines(file)) > LONGEST_STAGE}
    circles, upward = circle(pipeline), upward_imports(pipeline)
    named = files_by_key(project)
    key = max(named, key=lambda key: len(named[key]))
    return [
        Figure(name="Makefile, lines", value=lines(project / "Makefile"), must="≤ 220", aim="≤ 150"),
        Figure(
            name="biggest room, share of pipeline's lines",
            value=100 * sizes[biggest] / sum(map(lines, sources(pipeline))),
            must="≤ 18 %",
            aim="≤ 14 %",
            of=biggest,
            unit=" %",
        ),
        Figure(name=f"stages over {LONGEST_STAGE} lines", value=len(long), must="0", of=_listed(long)),
        Figure(name="rooms in a circle of imports", value=len(circles), must="0", of=" → ".join(circles)),
        Figure(name="imports upward", value=len(upward), must="0", of=", ".join(upward)),
        Figure(
            name="lines with `Any` in pipeline/",
            value=sum(map(uses_of_any, sources(pipeline))),
            must="≤ 120",
            aim="≤ 60",
        ),
        Figure(name="files that name one recipe key", value=len(named[key]), must="≤ 5", aim="≤ 3", of=f"`{key}`"),
        Figure(
            name="README, words",
            value=len((project / "README.md").read_text(encoding="utf-8").split()),
            must="≤ 1,300",
            aim="≤ 1,000",
        ),
        Figure(
            name="comments per 100 lines of code in pipeline/",
            value=100 * sum(map(comments, sources(pipeline))) / sum(map(code_lines, sources(pipeline))),
            must="≥ 3",
            digits=".1f",
        ),
    ]


def _listed(sizes: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {size}" for name, size in sorted(sizes.items(), key=lambda pair: -pair[1]))


def sources(folder: Path) -> list[Path]:
    """The Python files below `folder`."""
    return sorted(folder.rglob("*.py"))


def stages(pipeline: Path) -> list[Path]:
    """The stages and commands: files that stand in no room."""
    return sorted(file for file in pipeline.glob("*.py") if file.name != "__init__.py")


@cache
def text(file: Path) -> str:
    """What is in `file`."""
    return file.read_text(encoding="utf-8")


@cache
def nodes(file: Path) -> tuple[ast.AST, ...]:
    """Every node of its syntax tree."""
    return tuple(ast.walk(ast.parse(text(file))))


def lines(file: Path) -> int:
    """How many lines it has."""
    return len(text(file).splitlines())


def room_sizes(pipeline: Path) -> dict[str, int]:
    """Lines of each room."""
    rooms = sorted({file.parent for file in pipeline.glob("*/*.py")})
    return {room.name: sum(map(lines, sources(room))) for room in rooms}


def imports(file: Path) -> Iterator[str]:
    """Dotted names of what `file` imports, inside functions too; `from a import b` gives a.b."""
    for node in nodes(file):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def used(file: Path) -> set[str]:
    """Rooms and stages that `file` imports, by name."""
    return {name.split(".")[1] for name in imports(file) if name.startswith("pipeline.")}


def circle(pipeline: Path) -> list[str]:
    """Rooms that need each other in a circle, the first again at the end; empty if none do."""
    rooms = room_sizes(pipeline)
    needs = {room: set[str]().union(*map(used, sources(pipeline / room))) & {*rooms} - {room} for room in rooms}
    try:
        TopologicalSorter(needs).prepare()
    except CycleError as error:
        found: list[str] = error.args[1]
        return found
    return []


def upward_imports(pipeline: Path) -> list[str]:
    """Imports of a stage by a room or by another stage, and of any room by `core`."""
    above, rooms = {file.stem for file in stages(pipeline)}, {*room_sizes(pipeline)}
    found = []
    for file in sources(pipeline):
        room = file.relative_to(pipeline).parts[0]
        forbidden = rooms - {"core"} | above if room == "core" else above
        found += [f"{file.relative_to(pipeline)} imports {name}" for name in sorted(used(file) & forbidden)]
    return found


def uses_of_any(file: Path) -> int:
    """On how many lines a type is given up as `Any`; its import does not count."""
    return len({node.lineno for node in nodes(file) if isinstance(node, ast.Name) and node.id == "Any"})


def comments(file: Path) -> int:
    """Lines with a comment for people."""
    tokens = tokenize.generate_tokens(io.StringIO(text(file)).readline)
    found = [token.string for token in tokens if token.type == tokenize.COMMENT]
    return sum(not comment.startswith(_DIRECTIVES) for comment in found)


def code_lines(file: Path) -> int:
    """Lines that are neither empty nor a docstring's."""
    told = {
        line
        for node in nodes(file)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        for line in range(node.lineno, (node.end_lineno or node.lineno) + 1)
    }
    return sum(bool(line.strip()) and number not in told for number, line in enumerate(text(file).splitlines(), 1))


def recipe_keys(project: Path) -> list[str]:
    """The keys of a recipe's [int8] and [int4]."""
    declared = nodes(project / "pipeline" / "core" / "recipe.py")
    sections = [node for node in declared if isinstance(node, ast.ClassDef) and node.name in ("Int8", "Int4")]
    fields = [line.target for section in sections for line in section.body if isinstance(line, ast.AnnAssign)]
    return sorted({field.id for field in fields if isinstance(field, ast.Name)})


def names(file: Path) -> set[str]:
    """Attributes, arguments, fields and whole strings in a Python file: the ways in which code names a key."""
    found = set()
    for node in nodes(file):
        if isinstance(node, ast.Attribute):
            found.add(node.attr)
        elif isinstance(node, ast.keyword) and node.arg:
            found.add(node.arg)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.add(node.value)
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            found.add(node.target.id)
    return found


def functions(file: Path) -> set[str]:
    """The functions and methods that a file defines."""
    return {node.name for node in nodes(file) if isinstance(node, ast.FunctionDef)}


def files_by_key(project: Path) -> dict[str, list[Path]]:
    """Files of code, outside tests, that name each recipe key; in the Makefile any word counts.

    A key that is a function's name too is left out: which of the two a file means is not to be seen.
    """
    found = {file: names(file) for folder in ("pipeline", "tools") for file in sources(project / folder)}
    found[project / "Makefile"] = set(re.findall(r"\w+", text(project / "Makefile")))
    other = set[str]().union(*map(functions, sources(project / "pipeline")))
    return {
        key: [file for file, words in found.items() if key in words] for key in recipe_keys(project) if key not in other
    }


def main() -> int:
    """Print the table."""
    for line in log.align([["", "today", "must", "aim", "of"], *(figure.cells() for figure in figures())]):
        log.line(line.rstrip())
    return 0


if __name__ == "__main__":
    sys.exit(main())
