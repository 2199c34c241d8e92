"""The shipped model's checkpoint, fetched once, and machines of its own for each test."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from line import Line, small_recipe
from machines import Machines
from works import copied

from pipeline import bundle, fetch, fp32, golden, graph, int8


@pytest.fixture
def machines(tmp_path: Path) -> Iterator[Machines]:
    """None yet."""
    folder = tmp_path / "machines"
    folder.mkdir()
    made = Machines(folder, {"COUNTED": str(folder / "counted")})
    try:
        yield made
    finally:
        made.stop()


@pytest.fixture(scope="session")
def fetched(tmp_path_factory: pytest.TempPathFactory) -> Line:
    """The shipped model, fetched, with the small recipe."""
    folder = tmp_path_factory.mktemp("fetched")
    line = Line(artifacts=folder / "artifacts", recipe=small_recipe(folder / "small.toml"))
    assert line.run(fetch.STAGE) == 0
    return line


@pytest.fixture(scope="session")
def bundled(fetched: Line, tmp_path_factory: pytest.TempPathFactory) -> Line:
    """The same with the reference and the bundles."""
    line = fetched.copy(tmp_path_factory.mktemp("bundled") / "artifacts", "fetch")
    for stage in (golden.STAGE, graph.STAGE, fp32.STAGE, int8.STAGE, bundle.STAGE):
        assert line.run(stage, "--graphs", "bundle") == 0
    return line


@pytest.fixture(scope="session")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prompts and references, more than one shard of them."""
    file = tmp_path_factory.mktemp("task") / "task.jsonl"
    words = ("The sea", "A cat", "ⴰⵣⵓⵍ", "One day", "The sun") * 4
    rows = [{"prompt": f"{word} {place}", "reference": "is blue"} for place, word in enumerate(words)]
    file.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return file


@pytest.fixture
def another(fetched: Line, tmp_path: Path) -> Callable[[], Line]:
    """Copies of it, each in a folder of its own."""
    return lambda: copied(fetched, tmp_path, "fetch")
