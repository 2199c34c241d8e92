"""The shipped model's checkpoint, fetched once, and machines of its own for each test."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from line import Line, small_recipe
from machines import Machines

from pipeline import fetch


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


@pytest.fixture
def another(fetched: Line, tmp_path: Path) -> Callable[[], Line]:
    """Copies of it, each in a folder of its own."""

    def copy() -> Line:
        place = tmp_path / "artifacts"
        shutil.rmtree(place, ignore_errors=True)
        return fetched.copy(place, "fetch")

    return copy
