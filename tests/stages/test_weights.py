"""The files that a checkpoint's weights go into: the same whatever the blocks and the stored type; damage is named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from line import Line, changed_model
from safetensors.torch import load_file, save_file

from pipeline import fetch, fp16, fp32, graph, int8
from pipeline.core import manifest
from pipeline.core.stage import Stage
from pipeline.tflite import lazy, writer

PRECISIONS = {"fp32": fp32.STAGE, "fp16": fp16.STAGE, "int8": int8.STAGE}
FILES = ("decoder.tflite", "embedder.tflite", "per_layer_embedder.tflite", "step.tflite")
Tensors = dict[str, torch.Tensor]


def sums(line: Line, precision: str) -> dict[str, str]:
    """File → sha256 of what a stage made."""
    return {Path(record.path).name: record.sha256 for record in manifest.read(line.root / precision).outputs}


@pytest.fixture(params=PRECISIONS)
def precision(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_every_precision_makes_every_file(built: Line, precision: str) -> None:
    assert tuple(sorted(sums(built, precision))) == FILES


def test_small_blocks_of_rows_give_the_same_bytes(
    built: Line, precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """3,000 bytes: 5 rows of a layer's matrix, 1 of the per-layer table; the last block is shorter."""
    monkeypatch.setattr(lazy, "_BLOCK_BYTES", 3000)
    line = built.copy(tmp_path, "fetch", "graph")
    assert line.run(PRECISIONS[precision]) == 0
    assert sums(line, precision) == sums(built, precision)


def test_files_with_weights_behind_the_flatbuffer_say_the_same(
    built: Line, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As those above 1 GiB are written. fp32's own run of each file would fail if they could not be read."""
    monkeypatch.setattr(writer, "_INLINE_LIMIT", 1 << 20)
    line = built.copy(tmp_path, "fetch", "graph")
    assert line.run(fp32.STAGE) == 0
    assert sums(line, "fp32")["step.tflite"] != sums(built, "fp32")["step.tflite"]
    from pipeline.runtime.litert import StepModel
    from pipeline.runtime.sections import Conversation, Sections

    ids = np.array([[2, 40, 41, 42]], dtype=np.int32)
    steps = [StepModel(each.root / "fp32" / "step.tflite").logits(ids, np.ones_like(ids)) for each in (line, built)]
    assert np.array_equal(*steps)
    spoken = []
    for each in (line, built):
        conversation = Conversation(Sections(each.root / "fp32"))
        conversation.prefill([2, 40, 41])
        spoken.append(conversation.decode(42))
    assert np.array_equal(*spoken)


# --- other checkpoints of the same model


def with_tensors(folder: Path, change: Callable[[Tensors], Tensors]) -> Path:
    """The shipped model with `change` made to its tensors."""
    folder.mkdir(exist_ok=True)
    model = changed_model(folder)
    file = model / "model.safetensors"
    save_file(change(load_file(file)), file, {"format": "pt"})
    return model


def matrices(tensors: Tensors, change: Callable[[torch.Tensor], torch.Tensor]) -> Tensors:
    """`change` made to all but vectors: those stand in the graph already."""
    return {name: change(value) if value.dim() > 1 else value for name, value in tensors.items()}


def made_from(built: Line, folder: Path, model: Path, stage: Stage) -> Line:
    line = built.copy(folder, "graph", model=model)
    assert line.run(fetch.STAGE) == 0
    assert line.run(stage) == 0
    return line


def test_a_checkpoint_in_float32_gives_the_same_files(built: Line, precision: str, tmp_path: Path) -> None:
    model = with_tensors(tmp_path / "model", lambda tensors: {name: value.float() for name, value in tensors.items()})
    line = made_from(built, tmp_path / "artifacts", model, PRECISIONS[precision])
    assert sums(line, precision) == sums(built, precision)


def test_a_checkpoint_in_float16_gives_the_files_of_its_values(built: Line, precision: str, tmp_path: Path) -> None:
    """Also with vectors in another type than matrices."""
    made = []
    for name, change in (
        ("half", lambda value: (value * 1.01).half()),
        ("widened", lambda value: (value * 1.01).half().float()),
    ):
        model = with_tensors(tmp_path / name, lambda tensors, change=change: matrices(tensors, change))
        made.append(sums(made_from(built, tmp_path / f"{name}-artifacts", model, PRECISIONS[precision]), precision))
    assert made[0] == made[1]
    assert made[0]["step.tflite"] != sums(built, precision)["step.tflite"]


def spoilt(name: str, value: float) -> Callable[[Tensors], Tensors]:
    def change(tensors: Tensors) -> Tensors:
        tensors[name].view(-1)[-1] = value
        return tensors

    return change


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
@pytest.mark.parametrize("name", ["model.layers.7.mlp.down_proj.weight", "model.embed_tokens_per_layer.weight"])
def test_a_matrix_that_is_not_finite_is_named_and_no_file_is_left(
    built: Line, precision: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, value: float
) -> None:
    line = built.copy(tmp_path / "artifacts", "graph", model=with_tensors(tmp_path, spoilt(name, value)))
    assert line.run(fetch.STAGE) == 0
    assert line.run(PRECISIONS[precision]) == 4
    assert f"error: tensor {name} holds values that are not finite" in capsys.readouterr().err
    assert not list((line.root / precision).iterdir())


def test_a_table_that_is_not_finite_leaves_no_half_a_file(built: Line, tmp_path: Path) -> None:
    """The decoder does not hold that table, so it is written before the damage is found; it is whole."""
    name = "model.embed_tokens_per_layer.weight"
    line = built.copy(tmp_path / "artifacts", "graph", model=with_tensors(tmp_path, spoilt(name, float("nan"))))
    assert line.run(fetch.STAGE) == 0
    assert line.run(fp32.STAGE, "--graphs", "bundle") == 4
    left = sorted(file.name for file in (line.root / "fp32").iterdir())
    assert left == ["decoder.tflite", "embedder.tflite"]
    for file in left:
        assert manifest.FileRecord.of(line.root / "fp32" / file, line.root).sha256 == sums(built, "fp32")[file]


def test_a_vector_that_is_not_finite_is_named_before_anything_is_exported(
    built: Line, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "model.layers.0.input_layernorm.weight"
    line = built.copy(tmp_path / "artifacts", model=with_tensors(tmp_path, spoilt(name, float("nan"))))
    assert line.run(fetch.STAGE) == 0
    assert line.run(graph.STAGE) == 4
    assert f"error: tensor {name} holds values that are not finite" in capsys.readouterr().err
    assert not list((line.root / "graph").iterdir())


def test_graphs_of_the_step_alone_hold_no_sections(built: Line, precision: str, tmp_path: Path) -> None:
    line = built.copy(tmp_path, "fetch", "graph")
    assert line.run(PRECISIONS[precision], "--graphs", "step") == 0
    assert sums(line, precision) == {"step.tflite": sums(built, precision)["step.tflite"]}


def test_graphs_of_the_bundle_alone_hold_no_step(built: Line, precision: str, tmp_path: Path) -> None:
    line = built.copy(tmp_path, "fetch", "graph")
    assert line.run(PRECISIONS[precision], "--graphs", "bundle") == 0
    assert sums(line, precision) == {name: sums(built, precision)[name] for name in FILES[:3]}


def test_graphs_that_were_not_exported_are_asked_for(
    built: Line, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = built.copy(tmp_path, "fetch", "graph")
    (line.root / "graph" / "decoder.tflite").unlink()
    assert line.run(fp32.STAGE) == 4
    assert "decoder.tflite" in capsys.readouterr().err
