"""A model's stages in an artefact folder, the shipped model's as a rule, and what tests change of it."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from pipeline.core import manifest
from pipeline.core.recipe import PROJECT
from pipeline.core.stage import DEFAULT_MODEL, DEFAULT_RECIPE, Stage, main

CAP = 30.0
"""The shipped model's soft-cap."""
OPTIONAL = {'optional = ["int4"] # published where it keeps its limits, left out where not\n': ""}
"""The change of a shipped recipe that leaves the int4 bundle out."""
SMALL = {
    **OPTIONAL,
    "cache_length = 4096": "cache_length = 512",
    "prefill = [32, 128]": "prefill = [8, 32]",
    "decode = 128": "decode = 24",
    "positions = 2032": "positions = 930",
    "prompts = 16": "prompts = 4",
    "continuation = 128": "continuation = 12",
    "window = 128": "window = 32",
    "positions = 2048": "positions = 512",
    "prompts = 6": "prompts = 3",
    "continuation = 24": "continuation = 5",
    "batch = [1, 2, 3, 8]": "batch = [1, 3]",
    "sequence = [1, 16, 17, 128, 300, 1024, 2048]": "sequence = [1, 17, 40]",
}
"""Changes of the shipped recipe that make judging quick; files and limits stay the same."""


@dataclass(frozen=True)
class Line:
    """Stages of a model, the shipped one if no other is given, below `artifacts`, run with `recipe`."""

    artifacts: Path
    recipe: Path
    model: Path = PROJECT / DEFAULT_MODEL

    @property
    def root(self) -> Path:
        """The model's artefact folder."""
        return self.artifacts / self.model.name

    def run(self, stage: Stage, *options: str, recipe: Path | None = None) -> int:
        """Run one stage and return its exit code."""
        common = ["--model-id", str(self.model), "--artifacts", str(self.artifacts)]
        return main(stage, [*common, "--recipe", str(recipe or self.recipe), *options])

    def copy(self, artifacts: Path, *stages: str, model: Path | None = None) -> Line:
        """The same line elsewhere, with copies of the finished `stages`; `model` may be a changed one of that name."""
        other = dataclasses.replace(self, artifacts=artifacts, model=model or self.model)
        assert other.model.name == self.model.name
        for name in stages:
            shutil.copytree(self.root / name, other.root / name, symlinks=True)
        return other


def changed_model(folder: Path, **files: str) -> Path:
    """The shipped model in `folder`, with other contents of `files` (`config` is config.json)."""
    copy = folder / Path(DEFAULT_MODEL).name
    shutil.copytree(PROJECT / DEFAULT_MODEL, copy, ignore=shutil.ignore_patterns("corpus"))
    for name, text in files.items():
        (copy / (name if "." in name else f"{name}.json")).write_text(text, encoding="utf-8")
    return copy


def small_recipe(
    file: Path, *, source: Path = PROJECT / DEFAULT_RECIPE, small: Mapping[str, str] = SMALL, **more: str
) -> Path:
    """The recipe `source` with the changes in `small` and `more` (`old` → `new` lines), written to `file`."""
    text = source.read_text(encoding="utf-8")
    for old, new in {**small, **more}.items():
        assert text.count(old) == 1, f"the recipe has no single line {old!r}"
        text = text.replace(old, new)
    file.write_text(text, encoding="utf-8")
    return file


def written(folder: Path, ending: str = "") -> int:
    """Bytes by now in the files below `folder` with this ending; what is moved or deleted meanwhile counts nothing."""
    count = 0
    for below, _, names in os.walk(folder):  # rglob stumbles over a folder that goes while it looks
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                count += Path(below, name).stat().st_size if name.endswith(ending) else 0
    return count


def lasting(folder: Path, *names: str) -> dict[str, object]:
    """What must be the same after a second run: the bytes of `names`, and the manifest.

    The manifest without `source`, which says what state the repository is in: that may change while tests run.
    """
    made = dataclasses.replace(manifest.read(folder), source=manifest.Source(commit="", dirty=False))
    return {"manifest": made, **{name: (folder / name).read_bytes() for name in names}}


def shared(
    factory: pytest.TempPathFactory, name: str, make: Callable[[Line], None], *, model: str = "", **changes: Any
) -> Line:
    """A line of this process' own, a copy of what `make` made in the first process of this test run that asked.

    Of the shipped model, or of the one that `make` writes, called `model`; `changes` as `small_recipe` takes them.
    """
    own = factory.getbasetemp()
    common = own.parent if "PYTEST_XDIST_WORKER" in os.environ else own
    made = Line(
        artifacts=common / f"made-{name}",
        recipe=common / f"{name}.toml",
        model=common / model if model else PROJECT / DEFAULT_MODEL,
    )
    with (common / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not made.recipe.exists():
            shutil.rmtree(made.artifacts, ignore_errors=True)
            recipe = small_recipe(common / f"{name}.toml.new", **changes)
            make(dataclasses.replace(made, recipe=recipe))
            recipe.rename(made.recipe)
    copy = factory.mktemp(name)
    shutil.copytree(made.artifacts, copy / "artifacts", symlinks=True)
    return dataclasses.replace(made, artifacts=copy / "artifacts")
