"""int4 of the shipped model: made, looked into, judged by its own limits, published only where the recipe names it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from line import OPTIONAL, Line, small_recipe
from small_graph import bytes_by_type
from threadpoolctl import threadpool_info, threadpool_limits

from pipeline import bundle, int4, int8, publish, verify
from pipeline.bundling import contents
from pipeline.core import manifest
from pipeline.core.errors import QuantiseError, UsageError
from pipeline.core.recipe import STEP
from pipeline.models import build
from pipeline.tflite.graph import Graph

SHORT = {"max_sequence = 2048": "max_sequence = 16"}
"""What verify times goes no further than this; test_verify looks at its times."""
NAMED = SHORT | {'precisions = ["fp32", "int8"]': 'precisions = ["fp32", "int8", "int4"]'}
SHIPPED = dict.fromkeys(OPTIONAL, next(iter(OPTIONAL)))
"""What the tests' recipe leaves out of the shipped one."""


@pytest.fixture(scope="module")
def line(built: Line, tmp_path_factory: pytest.TempPathFactory) -> Line:
    """The built line with int4 and a bundle of it."""
    folder = tmp_path_factory.mktemp("four")
    stages = ("fetch", "golden", "graph", "fp32", "fp16", "int8")
    copy = replace(built.copy(folder / "artifacts", *stages), recipe=small_recipe(folder / "r.toml", **NAMED))
    assert copy.run(int4.STAGE) == 0
    assert copy.run(bundle.STAGE) == 0
    return copy


def judgement(line: Line) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((line.root / "verify" / "judgement.json").read_text(encoding="utf-8"))
    return found


def test_the_manifest_says_how_many_bits_there_are(line: Line) -> None:
    made = manifest.read(line.root / "int4").facts
    for name in ("step", "decoder"):
        facts = made[name]
        assert isinstance(facts, dict)
        four, eight = facts["weights_int4_share"], facts["weights_int8_share"]
        assert isinstance(four, float) and isinstance(eight, float)
        assert 0.5 < four < 1 and 0.99 < four + eight <= 1
        told = contents.read(line.root / "int4" / f"{name}.tflite").models[0]
        assert facts["bits_per_weight"] == pytest.approx(told.bits_per_weight(), rel=0.01)


def test_rows_are_made_while_blas_has_one_thread(line: Line, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own threads beside those of this project took ten times the time for rows that are rotated."""
    right, seen = build.with_weights, []

    def with_weights(checkpoint: Any, file: Path) -> Graph:
        seen.append({pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"})
        return right(checkpoint, file)

    monkeypatch.setattr(build, "with_weights", with_weights)
    copy = replace(line.copy(tmp_path / "artifacts", "fetch", "graph"), recipe=line.recipe)
    with threadpool_limits(2, "blas"):
        for stage in (int8.STAGE, int4.STAGE):
            seen.clear()
            assert copy.run(stage) == 0
            assert seen and seen == [{1}] * len(seen), stage.name


def test_what_the_recipe_keeps_has_eight_bits(line: Line) -> None:
    graph = Graph.read(line.root / "int4" / STEP)
    kinds = {graph.name(t): graph.type_of(t) for t in range(len(graph.main.tensors)) if graph.is_constant(t)}
    tables = {name.removeprefix("embed_tokens.weight;"): kind for name, kind in kinds.items() if "tokens.w" in name}
    assert {name: kind for name, kind in tables.items() if "scales" not in name} == {
        "fine_0": "INT8",
        "coarse_1": "INT4",
        "fine_1": "INT8",
    }
    assert kinds["per_layer_model_projection.weight"] == "INT8" and kinds["embed_tokens_per_layer.weight"] == "INT4"
    assert kinds["layers.0.mlp.down_proj.weight"] == "INT4"
    embedders = [Graph.read(line.root / "int4" / f"{name}.tflite") for name in ("embedder", "per_layer_embedder")]
    assert ["INT4" in bytes_by_type(each) for each in embedders] == [True, True]


def test_two_runs_give_the_same_bytes(line: Line, tmp_path: Path) -> None:
    other = line.copy(tmp_path, "fetch", "graph")
    assert other.run(int4.STAGE) == 0
    assert manifest.read(other.root / "int4").outputs == manifest.read(line.root / "int4").outputs


def test_it_is_judged_and_published_where_the_recipe_names_it(line: Line) -> None:
    assert line.run(verify.STAGE, "--variants", "fp32", "fp16", "int8", "int4") == 0
    found = judgement(line)
    checked = {(check["variant"], check["name"]) for check in found["checks"]}
    assert {("int4", "perplexity ratio on text, XNNPACK"), ("int4", "KLD on text, built-in kernels")} <= checked
    assert found["bundles"]["bundle-int4"]["fit"] and found["variants"]["int4"]["fit"]
    sizes = [found["bundles"][f"bundle-{name}"]["size"] for name in ("int4", "int8")]
    assert sizes[0] < 0.9 * sizes[1]
    assert line.run(publish.STAGE) == 0
    assert "The int4 files are for phones" in (line.root / "publish" / "README.md").read_text(encoding="utf-8")
    published = {file.name for file in (line.root / "publish").iterdir()}
    assert {f"{line.root.name}_int4.tflite", f"{line.root.name}_int4.litertlm"} <= published


def test_an_optional_bundle_that_misses_its_limits_is_left_out(
    line: Line, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = line.copy(tmp_path / "artifacts", "fetch", "golden", "fp32", "int8", "int4", "bundle")
    strict = small_recipe(tmp_path / "r.toml", **SHORT, **SHIPPED, **{"kld = 0.06": "kld = 1e-05"})
    assert copy.run(verify.STAGE, "--graphs", "bundle", recipe=strict) == 0
    found = judgement(copy)
    assert found["passed"] and {check["variant"] for check in found["checks"]} == {"bundle-fp32", "bundle-int8"}
    assert "bundle-int4" in {check["variant"] for check in found["alternative_checks"] if not check["passed"]}
    assert manifest.read(copy.root / "verify").facts["not_fit"] == ["bundle-int4"]
    assert "not fit to publish: bundle-int4: KLD" in capsys.readouterr().err
    assert copy.run(publish.STAGE, "--graphs", "bundle", recipe=strict) == 0
    published = copy.root / "publish"
    assert {file.name for file in published.glob("*.litertlm")} == {
        f"{copy.root.name}_{name}.litertlm" for name in ("fp32", "int8")
    }
    assert "int4" not in (published / "README.md").read_text(encoding="utf-8")


def test_a_model_of_which_too_little_can_have_four_bits_goes_without(
    built: Line, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It stopped the build, for a product that the recipe calls optional."""
    keep = {'keep_int8 = ["altup", "per_layer_model_projection"]': 'keep_int8 = ["."]'}
    line = built.copy(tmp_path / "artifacts", "fetch", "golden", "graph", "fp32", "int8")
    asked = replace(line, recipe=small_recipe(tmp_path / "asked.toml", **NAMED, **keep))
    assert asked.run(int4.STAGE, "--graphs", "bundle") == QuantiseError.exit_code
    assert "of its weights have 4 bits" in capsys.readouterr().err
    line = replace(line, recipe=small_recipe(tmp_path / "r.toml", **SHORT, **keep, **SHIPPED))
    assert line.run(int4.STAGE, "--graphs", "bundle") == 0
    made, said = manifest.read(line.root / "int4"), capsys.readouterr().err
    reason = made.facts["left_out"]
    assert isinstance(reason, str) and reason.startswith("decoder.tflite is not a int4 file: only ")
    assert f"int4 is left out: {reason}" in said
    assert not made.outputs and {file.name for file in (line.root / "int4").iterdir()} == {"manifest.json", "run.json"}
    for stage in (bundle.STAGE, verify.STAGE, publish.STAGE):
        assert line.run(stage, "--graphs", "bundle") == 0
    assert judgement(line)["bundles"].keys() == {"bundle-fp32", "bundle-int8"}
    assert len([*(line.root / "publish").glob("*.litertlm")]) == 2


def test_a_recipe_without_the_section_makes_none(
    built: Line, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bare = small_recipe(tmp_path / "r.toml")
    before, _, after = bare.read_text(encoding="utf-8").partition("[int4]")
    bare.write_text(before + "# Limits" + after.partition("# Limits")[2], encoding="utf-8")
    assert built.run(int4.STAGE, recipe=bare) == UsageError.exit_code
    assert "has no [int4] section" in capsys.readouterr().err
    assert not (built.root / "int4").exists()
