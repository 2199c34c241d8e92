"""int8 chooses itself: a stressed model climbs, its rung is recorded and repeated, and a shortfall is said."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from line import Line, small_recipe

from pipeline import fetch, int8
from pipeline.bundling import litertlm
from pipeline.core import facts, manifest
from pipeline.core.recipe import PROJECT, load
from pipeline.core.stage import DEFAULT_MODEL
from pipeline.reference import activations
from pipeline.reference.model import HuggingFace
from pipeline.runtime.litert import SIGNATURE, MappedModel, StepModel
from pipeline.search import ladder
from pipeline.tflite.graph import Graph
from tools import stress


def told(line: Line) -> facts.Ladder:
    found = manifest.read(line.root / "int8").told(facts.Precision).climbed
    assert found
    return found


def hashes(line: Line) -> dict[str, str]:
    return {record.path: record.sha256 for record in manifest.read(line.root / "int8").outputs}


@pytest.fixture(scope="module")
def stressed(built: Line, tmp_path_factory: pytest.TempPathFactory) -> Line:
    """The shipped model with rows of its matrices scaled, up to its int8 files; its graph is the shipped model's."""
    folder = tmp_path_factory.mktemp("stressed")
    strong = stress.Variant(up=(256.0,) * 8)
    model = stress.write(PROJECT / DEFAULT_MODEL, folder / "tiny-gemma3n", strong)
    line = built.copy(folder / "artifacts", "graph", model=model)
    assert line.run(fetch.STAGE) == 0
    assert line.run(int8.STAGE) == 0
    return line


def test_a_stressed_model_climbs_until_it_keeps_the_limits(stressed: Line, built: Line) -> None:
    found, limit = told(stressed), load(stressed.recipe).gates["bundle-int8"].kld
    assert limit is not None and found.limit == limit and found.rung == found.judged[-1].rung != "recipe"
    first, last = found.judged[0], found.judged[-1]
    assert first.rung == "recipe" and not first.kept and first.kld is not None
    assert last.kept and last.kld_high is not None and last.kld_high < limit and last.kld_high < first.kld / 5
    # The shipped model stays where it was: what its recipe says is good enough.
    assert [rung.rung for rung in told(built).judged] == ["recipe"]


def test_the_recorded_rung_is_built_again_without_judging(stressed: Line, tmp_path: Path) -> None:
    line = stressed.copy(tmp_path, "fetch", "graph")
    assert line.run(int8.STAGE, "--rung", told(stressed).rung) == 0
    assert hashes(line) == hashes(stressed)
    assert told(line) == facts.Ladder(rung=told(stressed).rung)
    assert line.run(int8.STAGE, "--rung", "unknown") == 2
    assert line.run(int8.STAGE, "--rung", "recipe", "--graphs", "step") == 0
    assert hashes(line)["int8/step.tflite"] != hashes(stressed)["int8/step.tflite"]


def test_where_no_rung_is_good_enough_the_closest_is_built_and_said(
    stressed: Line, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    # One rung: all that the ladder could add is there.
    most = 'ladder = true\nequalize = 0.7\nrotate = ["."]\nint8x2 = ["."]'
    recipe = small_recipe(tmp_path / "r.toml", **{"ladder = true": most})
    recipe.write_text(recipe.read_text(encoding="utf-8").replace("kld = 0.01", "kld = 1e-7"), encoding="utf-8")
    line = dataclasses.replace(stressed.copy(tmp_path, "fetch", "graph"), recipe=recipe)
    assert line.run(int8.STAGE, "--graphs", "step") == 0
    found, said = told(line), capfd.readouterr().err
    assert [(rung.rung, rung.kept) for rung in found.judged] == [("recipe", False)]
    assert found.rung == "recipe" and found.shortfall in said and "times the limit of 1e-07" in found.shortfall


def test_the_largest_activation_is_told_and_is_what_modules_read_and_give(stressed: Line, built: Line) -> None:
    def said(line: Line) -> float:
        found = manifest.read(line.root / "int8").told(facts.Precision).largest_activation
        assert found
        return found

    # Rows of up_proj are 256 times as large, and so is what down_proj reads, which no module gives: a product is.
    assert said(stressed) > 20 * said(built)
    reference = HuggingFace.load(PROJECT / DEFAULT_MODEL, "cpu")
    windows = np.random.default_rng(0).integers(5, 2000, (2, 32), dtype=np.int32)
    with torch.inference_mode():
        streams = reference.model.model(torch.from_numpy(windows).long(), output_hidden_states=True).hidden_states
    inner = max(float(stream.abs().max()) for stream in streams[1:-1])
    largest = activations.largest(reference, lambda: reference.hidden(windows, np.ones_like(windows)))
    assert inner <= largest < 100 * inner
    sections = litertlm.read_sections(built.root / "bundle" / "int8.litertlm")
    assert not any(section.activation_type for section in sections)


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_the_graph_of_chosen_positions_is_the_file_itself(built: Line, tmp_path: Path, precision: str) -> None:
    file = built.root / precision / "step.tflite"
    few = ladder.at_positions(Graph.read(file), tmp_path / "few.tflite", 32, 4, 1 / 30)
    ids = np.random.default_rng(0).integers(5, 2000, (1, 32), dtype=np.int32)
    run, model = MappedModel(few, tmp_path / "packed", 1).get_signature_runner(SIGNATURE), StepModel(file, threads=1)
    for positions in ([0, 6, 30, 31], [31, 6, 6, 2]):
        places = np.array(positions, np.int32)
        found = run(input_ids=ids, attention_mask=np.ones_like(ids), positions=places)["logits"]
        assert isinstance(found, np.ndarray) and found.shape == (4, 2048)
        for row, place in zip(found, positions, strict=True):
            alone = model.logits(ids[:, : place + 1], np.ones((1, place + 1), np.int32))[0]
            np.testing.assert_allclose(row, alone, atol=1e-4)
