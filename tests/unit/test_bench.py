"""What a candidate of a search is measured as."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.core.recipe import PROJECT
from pipeline.core.recipe import parse as parse_recipe
from pipeline.judge import metrics
from pipeline.search import bench, preparation, rewrite
from pipeline.search.bench import Bench, Clock
from pipeline.search.candidates import SPACES, Candidate, Value


def bench_of(folder: Path, section: str) -> Bench:
    nothing: Any = None
    return Bench(
        checkpoint=nothing,
        hessians=nothing,
        all_positions=folder,
        step=folder,
        text=(PROJECT / "pipeline" / "recipes" / "gemma3.toml").read_text(encoding="utf-8"),
        windows=np.zeros((4, 8), np.int32),
        folder=folder,
        clock=Clock(60),
        identity="",
        space=SPACES[section],
    )


@pytest.mark.parametrize("section", SPACES)
def test_a_candidates_section_is_that_of_its_recipe_and_no_recipe_is_read_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, section: str
) -> None:
    measured = bench_of(tmp_path, section)
    ways = [["."], [r"layers\.[0-3]\.mlp", "head"], []]
    values: list[dict[str, Value]] = [
        {knob.key: way} for knob in SPACES[section].knobs if not knob.values for way in ways
    ]
    values += [{knob.key: value} for knob in SPACES[section].knobs for value in knob.values]
    wanted = [
        getattr(parse_recipe(rewrite.with_values(measured.text, section, one).encode(), "x"), section) for one in values
    ]
    assert measured.given == getattr(parse_recipe(measured.text.encode(), "x"), section)
    monkeypatch.setattr(bench, "parse_recipe", lambda *_: pytest.fail("a recipe is read"))
    assert [measured.section(Candidate(name="x", values=one)) for one in values] == wanted


def test_the_figure_that_is_said_is_of_all_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured, file = bench_of(tmp_path, "int8"), tmp_path / "x.tflite"
    file.touch()
    values = iter([0.125, 0.125, 0.375, 0.375])

    def score(*_given: object) -> metrics.Scores:
        logits = np.zeros((3, 5), np.float32)
        made = metrics.compare(logits, logits, np.zeros(3, np.int64))
        return replace(made, kld=np.full(3, next(values)))

    monkeypatch.setattr(Bench, "write", lambda *_given: file)
    monkeypatch.setattr(Bench, "_score", score)
    monkeypatch.setattr(bench.litert, "StepModel", lambda *_given, **_options: None)
    assert measured.evaluate(Candidate(name="x", values={}), [0, 1]).startswith("x: KLD 2.50e-01, ")


def test_measurements_depend_on_all_rooms_that_make_a_file() -> None:
    """They are kept from one tune to the next: a room that is not there would leave its changes unseen."""
    seen = {file.parent.name for file in preparation.makers()}
    assert seen == {"checkpoint", "export", "models", "quantize", "tflite"}
