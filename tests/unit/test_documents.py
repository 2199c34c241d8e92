"""README and docs/: figures are those of bench/, links and trees lead to files, every key and code is told."""

from __future__ import annotations

import dataclasses
import hashlib
import re
import subprocess
from pathlib import Path

import pytest

from pipeline.core import errors, recipe
from pipeline.core.recipe import PROJECT, load
from pipeline.models import MODELS
from tools import figures, house, tables
from tools.tables import Column, Measured, Row, Table, Value

README = (PROJECT / "README.md").read_text(encoding="utf-8")
DOCUMENTS = sorted([*PROJECT.glob("*.md"), *(PROJECT / "docs").glob("*.md")])
SECTIONS = {
    "The top": recipe.Recipe,
    "`[step]`": recipe.StepLimits,
    "`[bundle]`": recipe.Bundle,
    "`[corpus]`": recipe.Corpus,
    "`[shapes]`": recipe.Shapes,
    "`[int8]`": recipe.Int8,
    "`[int4]`": recipe.Int4,
    "`[gates.": recipe.Gate,
}
"""The dataclass that each section of docs/recipe.md is about, by how its heading begins."""


def tracked() -> list[str]:
    done = subprocess.run(["git", "ls-files"], cwd=PROJECT, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def test_the_documents_have_the_figures_of_bench_and_no_others() -> None:
    for file, text in figures.documents(tables.read_all(), README).items():
        assert file.read_bytes() == text.encode("utf-8"), f"{file.name}: run `python -m tools.figures`"


def test_another_figure_in_bench_is_another_document(tmp_path: Path) -> None:
    found = tables.read_all()
    tables.write_all(found, tmp_path)
    file = tmp_path / f"{figures.HEADLINE}.json"
    file.write_text(file.read_text(encoding="utf-8").replace("278.5", "278.4"), encoding="utf-8")
    changed = figures.documents(tables.read_all(tmp_path), README)
    assert "| 278.4 MB | 0.0024 nats (0.0020 to 0.0028) |" in changed[figures.README]
    same = {file.stem for file, text in changed.items() if text == file.read_text(encoding="utf-8")}
    assert not same & {"README", "measured", figures.HEADLINE}, "pictures of other tables stay"


def test_a_table_comes_back_from_its_file_as_it_was(tmp_path: Path) -> None:
    found = tables.read_all()
    assert len(found) > 5
    tables.write_all(found, tmp_path)
    assert tables.read_all(tmp_path) == found
    for name in found:
        assert (tmp_path / f"{name}.json").read_bytes() == (tables.BENCH / f"{name}.json").read_bytes()


def by_hand(**changes: object) -> Table:
    way = Measured(date="2026-11-28", command="`make bench`", machine="2 cores")
    rows = (
        Row(name="ours", values={"size": Value(value=2.004), "KLD": Value(value=0.5, low=0.4, high=0.6)}),
        Row(name="theirs", values={"size": Value(value=4.0)}, measured=dataclasses.replace(way, date="2026-11-29")),
    )
    columns = {"size": Column(unit="MB", digits=".2f"), "KLD": Column(digits=".1f")}
    plain = Table(title="T", about="A.", place=1, columns=columns, measured=way, rows=rows)
    return dataclasses.replace(plain, ratios=(("ours", "theirs"),), **changes)


def test_a_table_is_markdown_with_ratios_of_what_has_no_interval() -> None:
    assert tables.markdown(by_hand()) == [
        "| | size | KLD |",
        "|---|---|---|",
        "| ours | 2.00 MB | 0.5 (0.4 to 0.6) |",
        "| theirs | 4.00 MB | – |",
        "| ours / theirs | 0.50 |  |",
    ]


def test_a_row_of_another_day_says_so() -> None:
    assert tables.origins(by_hand()) == [
        "- ours: measured by `make bench` on 2026-11-28, 2 cores.",
        "- theirs: measured by `make bench` on 2026-11-29, 2 cores.",
    ]
    same = tuple(dataclasses.replace(row, measured=None) for row in by_hand().rows)
    assert tables.origins(by_hand(rows=same)) == ["Measured by `make bench` on 2026-11-28, 2 cores."]


def test_only_the_digits_that_are_shown_are_kept() -> None:
    assert '"value": 2.0\n' in tables.dump(by_hand()) and "2.004" not in tables.dump(by_hand())


@pytest.mark.parametrize(
    "changes",
    [
        {"ratios": (("ours", "nobody"),)},
        {"columns": {"size": Column()}},
        {"rows": by_hand().rows * 2},
    ],
)
def test_a_table_with_a_name_that_leads_nowhere_is_refused(changes: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="table 'T'"):
        dataclasses.replace(by_hand(), **changes)


def test_a_readme_without_a_place_for_a_figure_is_refused() -> None:
    for name in ("headline", "times"):
        with pytest.raises(ValueError, match=f"one place for {name}"):
            figures.documents(tables.read_all(), README.replace(f"<!-- end of {name} -->", ""))


def tree() -> set[str]:
    """The paths in README's tree: names stand before what is said of them; those that are set in are in pipeline/."""
    block = next(block for block in README.split("```") if "\npipeline/ " in block)
    rows = [(line.startswith(" "), line.strip().split("  ")[0].split()) for line in block.strip("\n").splitlines()]
    return {("pipeline/" if below else "") + name.rstrip("/") for below, names in rows for name in names}


def test_the_tree_is_that_of_git() -> None:
    """Every path is there, and every file and folder at the top and of pipeline/ is named."""
    files = tracked()
    tops = {path.partition("/")[0] for path in files} - {".dockerignore", ".gitignore"}
    below = {"/".join(path.split("/")[:2]) for path in files if path.startswith("pipeline/")} - {"pipeline/__init__.py"}
    assert tree() == tops | below


@pytest.mark.parametrize("file", DOCUMENTS, ids=lambda file: file.name)
def test_links_between_the_documents_lead_somewhere(file: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", file.read_text(encoding="utf-8")):
        assert (file.parent / target).exists(), target


@pytest.mark.parametrize(
    "file", [PROJECT / "README.md", *PROJECT.glob("examples/*/README.md")], ids=lambda file: file.parent.name
)
def test_what_a_command_is_given_lies_there(file: Path) -> None:
    for given in re.findall(r"(?:MODEL_ID|IMAGE|AUDIO)=(examples/[\w./-]+)", file.read_text(encoding="utf-8")):
        assert (PROJECT / given).exists(), given


def test_every_document_is_reached_from_the_readme() -> None:
    linked = set(re.findall(r"\]\(([^)#:]+\.md)\)", README))
    assert {str(file.relative_to(PROJECT)) for file in DOCUMENTS} - {"README.md"} <= linked


def test_the_readme_is_short() -> None:
    assert len(README.split()) <= 1300


@pytest.mark.parametrize("heading", SECTIONS)
def test_every_key_of_a_recipe_is_told_in_its_section(heading: str) -> None:
    parts = (PROJECT / "docs" / "recipe.md").read_text(encoding="utf-8").split("\n## ")
    part = next(part for part in parts if part.startswith(heading))
    keys = {field.name for field in dataclasses.fields(SECTIONS[heading])} - {"sha256"}
    assert {key for key in keys if f"`{key}`" not in part} == set()


def test_every_exit_code_is_told() -> None:
    text = (PROJECT / "docs" / "files.md").read_text(encoding="utf-8").split("\n## Exit codes")[1].split("\n## ")[0]
    told = {int(code) for code in re.findall(r"^\| (\d+) \|", text, flags=re.MULTILINE)}
    kinds = {errors.PipelineError, *errors.PipelineError.__subclasses__()}
    assert told == {kind.exit_code for kind in kinds} | {0, 130}


def test_the_licence_is_apaches_own_text() -> None:
    text = (PROJECT / "LICENSE").read_bytes()
    assert hashlib.sha256(text).hexdigest() == "cfc7749b96f63bd31c3c42b5c471bf756814053e847c10f3eb003417bc523d30"


def test_the_house_counts_what_a_small_one_has(tmp_path: Path) -> None:
    sources = {
        "Makefile": "all:\n\techo gptq\n",
        "README.md": "two words",
        "pipeline/core/recipe.py": "class Int8:\n    gptq: bool = False\n    blocks: int = 0\n",
        "pipeline/models/a.py": "from pipeline.judge import b\nfrom pipeline import fetch\n",
        "pipeline/judge/b.py": "import pipeline.models.a\n\n\ndef blocks() -> Any:  # why\n    return x.gptq\n",
        "pipeline/fetch.py": '"""Docstring.\n\n# no comment\n"""\n' + "x = 1\n" * 120,
        "tools/c.py": "from typing import Any\n",
    }
    for name, text in sources.items():
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    found = {figure.name: figure for figure in house.figures(tmp_path)}
    values = {name: figure.value for name, figure in found.items()}
    assert values == {
        "Makefile, lines": 2,
        "biggest room, share of pipeline's lines": pytest.approx(100 * 5 / 134),
        "stages over 120 lines": 1,
        "rooms in a circle of imports": 3,
        "imports upward": 1,
        "lines with `Any` in pipeline/": 1,
        "files that name one recipe key": 3,
        "README, words": 2,
        "comments per 100 lines of code in pipeline/": pytest.approx(100 / 128),
    }
    assert found["imports upward"].of == "models/a.py imports fetch"
    assert found["biggest room, share of pipeline's lines"].of == "judge"


def test_the_limits_of_the_house_are_told_to_those_who_change_it() -> None:
    text = (PROJECT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    table = text.split("| figure | must | aim |\n|---|---|---|\n")[1].split("\n\n")[0]
    assert table.splitlines() == [f"| {figure.name} | {figure.must} | {figure.aim} |" for figure in house.figures()]


def test_the_house_of_the_project_has_no_circles_and_nothing_upward() -> None:
    found = {figure.name: figure.value for figure in house.figures()}
    assert found["rooms in a circle of imports"] == found["imports upward"] == 0
    assert 0 < found["biggest room, share of pipeline's lines"] < 100 and found["lines with `Any` in pipeline/"] > 0


def test_every_family_and_its_recipe_stand_in_the_table() -> None:
    page = (PROJECT / "docs" / "families.md").read_text(encoding="utf-8")
    rows = [line for line in page.splitlines() if line.startswith("| ")]
    for file in sorted((PROJECT / "pipeline" / "recipes").glob("*.toml")):
        for kind in load(file).model_types:
            assert [row for row in rows if f"`{kind}`" in row and f"`pipeline/recipes/{file.name}`" in row], kind
    assert {kind for kind in MODELS if f"`{kind}`" in page} == set(MODELS)
