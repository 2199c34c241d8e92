"""Signatures of fixed shape: the step graph's own logits, its own weights, and a judgement of each."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from line import Line, small_recipe

from pipeline import fp32, int8, verify
from pipeline.core import manifest
from pipeline.core.errors import IntegrityError
from pipeline.core.stage import Context, Outcome, Stage
from pipeline.runtime.litert import FixedStep, StepModel, litert
from pipeline.tflite.graph import Graph

SHAPES = {"serving_1x32": (1, 32), "serving_3x32": (3, 32)}
ROOM = {
    "size_per_parameter = 4.08": "size_per_parameter = 4.3",
    "perplexity_ratio_max = 1.007\nsize_ratio = 0.28\n\n[gates.int8-static]": "perplexity_ratio_max = 1.007\n"
    "size_ratio = 0.32\n\n[gates.int8-static]",
}
"""Limits of size: the operators of a signature weigh something beside a model of two million weights."""


@pytest.fixture(scope="module")
def line(built: Line, tmp_path_factory: pytest.TempPathFactory) -> Line:
    """fp32 and int8 step graphs with two fixed shapes."""
    folder = tmp_path_factory.mktemp("fixed")
    shapes = {"max_sequence = 2048": 'max_sequence = 128\nfixed = ["1x32", "3x32"]'}
    recipe = small_recipe(folder / "recipe.toml", **shapes, **ROOM)
    made = Line(artifacts=folder, recipe=recipe)
    for name in ("fetch", "golden", "graph"):
        shutil.copytree(built.root / name, made.root / name, symlinks=True)
    for stage in (fp32.STAGE, int8.STAGE):
        assert made.run(stage, "--graphs", "step") == 0
    return made


def step(line: Line, precision: str) -> Path:
    return line.root / precision / "step.tflite"


@pytest.mark.parametrize("precision", ["fp32", "int8"])
@pytest.mark.parametrize("xnnpack", [True, False], ids=["xnnpack", "builtin"])
def test_logits_are_the_step_graphs_own(line: Line, built: Line, precision: str, xnnpack: bool) -> None:
    opened = litert(step(line, precision), xnnpack=xnnpack, threads=1)
    plain = StepModel(step(built, precision), xnnpack=xnnpack, threads=1)
    for name, shape in SHAPES.items():
        ids = np.random.default_rng(5).integers(3, 2000, shape).astype(np.int32)
        for padded in (slice(0, 0), slice(0, 5), slice(shape[1] - 5, None)):  # none, left, right
            mask = np.ones_like(ids)
            mask[:, padded] = 0
            logits = opened.get_signature_runner(name)(input_ids=ids, attention_mask=mask)["logits"]
            assert np.array_equal(logits, plain.logits(ids, mask))


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_every_shape_is_settled_and_each_weight_is_stored_once(line: Line, built: Line, precision: str) -> None:
    graph = Graph.read(step(line, precision))
    first, *others = graph.views()
    assert [view.signature() for view in others] == list(SHAPES)
    weights = {first.buffer(tensor) for tensor in range(len(first.main.tensors)) if first.is_constant(tensor)}
    for view in others:
        tensors = range(len(view.main.tensors))
        assert all(-1 not in view.shape(tensor) for tensor in tensors)
        assert not [o for o in view.operators() if view.code(o) == "SHAPE"]
        own = [t for t in tensors if view.is_constant(t) and view.buffer(t) not in weights]
        assert all(len(view.shape(t)) <= 1 for t in own), "what follows of the shape, and nothing else"
    added = step(line, precision).stat().st_size - step(built, precision).stat().st_size
    assert 0 < added < 300_000


def test_the_step_graph_itself_is_what_it_was(line: Line, built: Line) -> None:
    with_shapes, plain = Graph.read(step(line, "int8")), Graph.read(step(built, "int8"))
    codes = [[graph.code(operator) for operator in graph.operators()] for graph in (with_shapes, plain)]
    assert codes[0] == codes[1]


def test_smaller_batches_are_padded(line: Line) -> None:
    model, plain = FixedStep(step(line, "fp32"), "serving_3x32", 1), StepModel(step(line, "fp32"), threads=1)
    ids = np.random.default_rng(6).integers(3, 2000, (4, 9)).astype(np.int32)
    mask = np.ones_like(ids)
    mask[1, :3] = 0
    found = model.logits(ids, mask)
    assert found.shape == (4, 2048)
    np.testing.assert_allclose(found, plain.logits(ids, mask), atol=2e-4)


def test_a_file_without_the_signature_is_refused(built: Line) -> None:
    with pytest.raises(IntegrityError, match="serving_1x32"):
        FixedStep(step(built, "fp32"), "serving_1x32", 1)


def judge(line: Line, *variants: str) -> tuple[int, dict[str, Any]]:
    code = line.run(verify.STAGE, "--graphs", "step", "--variants", *variants)
    judgement: dict[str, Any] = json.loads((line.root / "verify" / "judgement.json").read_text(encoding="utf-8"))
    return code, judgement


def test_each_is_judged_like_the_rest(line: Line) -> None:
    code, judgement = judge(line, "fp32", "int8")
    assert code == 0, [check for check in judgement["checks"] if not check["passed"]]
    for name in SHAPES:
        found = {(c["variant"], c["name"]): c for c in judgement["checks"] if c["name"].endswith(f"by {name}")}
        assert {key[1].split(" on text")[0] for key in found if key[0] == "fp32"} == {
            "worst logits NMSE", "KLD", "top-1 agreement",
        }  # fmt: skip
        assert ("int8", f"perplexity ratio on text, by {name}") in found
        assert found["fp32", f"KLD on text, by {name}"]["value"] < 1e-9
    assert judgement["fixed"] == ["1x32", "3x32"]
    page = (line.root / "verify" / "report.html").read_text(encoding="utf-8")
    assert "<code>serving_3x32</code>" in page and "LiteRT.js" in page


def test_one_that_computes_something_else_fails(line: Line, tmp_path: Path) -> None:
    """A norm's constant of the signature alone is another one: the file is fine by its first signature."""
    graph = Graph.read(step(line, "fp32"))
    view = graph.views()[1]
    scaled = next(o for o in view.operators() if view.code(o) == "MUL" and view.is_constant(int(o.inputs[1])))
    scaled.inputs = [int(scaled.inputs[0]), view.add_constant(1.3 * view.constant(int(scaled.inputs[1])), "spoilt")]
    graph.write(tmp_path / "step.tflite")
    other = line.copy(tmp_path / "artifacts", "fetch", "golden")

    def work(context: Context) -> Outcome:
        shutil.copyfile(tmp_path / "step.tflite", context.folder / "step.tflite")
        return Outcome(facts={"graphs": "step"})

    assert other.run(Stage(name="fp32", summary="", work=work, needs_of=lambda *_: ("fetch",))) == 0
    code, judgement = judge(other, "fp32")
    failed = {check["name"] for check in judgement["checks"] if not check["passed"]}
    assert code == 8 and "KLD on text, by serving_1x32" in failed
    assert not [name for name in failed if "serving_1x32" not in name]
    assert not (other.root / "verify" / manifest.NAME).exists()
