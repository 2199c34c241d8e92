"""What LiteRT-LM hands to the decoder where pictures and sounds stand, read back by a probe."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from line import Line
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load_file
from whole import END, HEARS, KINDS, PLACES, SEES, TAKE, bundle_of, changed, sections, told

from pipeline import bundle, verify
from pipeline.bundling import litertlm
from pipeline.bundling.metadata import of_checkpoint, tokenizer_json
from pipeline.bundling.replaced import with_decoder
from pipeline.checkpoint.chat import open_tokenizer
from pipeline.checkpoint.reader import open_checkpoint
from pipeline.core.recipe import load
from pipeline.core.stage import Context
from pipeline.judge import handed, media
from pipeline.judge.gates import Check
from pipeline.judge.pictures import pictures
from pipeline.judge.sensing import Reference
from pipeline.runtime.litert_lm import Kind, LmRuntime, Medium
from pipeline.tflite.graph import Graph
from tools.bench_senses import Towers, runtime_resized

Change = Callable[[Graph], None]


def handed_over(
    line: Line, scratch: Path, bundle_file: Path | None = None, **changes: Any
) -> tuple[dict[str, Check], list[str]]:
    """The checks of the probe on a line's fp32 bundle, or another one, by name, and the names of those that are red."""
    checkpoint = line.root / "fetch" / "checkpoint"
    with media.given(SEES, HEARS, scratch) as given:
        setting = handed.Setting(
            towers={tower: Reference.stored(line.root / "golden", tower) for tower in KINDS},
            medium=given,
            tokenizer=open_tokenizer(checkpoint),
            vocabulary=2048,
            per_layer=handed.per_layer_inputs(open_checkpoint(checkpoint)),
            large=False,
        )
        pack = partial(with_decoder, bundle_file or bundle_of(line))
        found = handed.judge_handed("bundle-fp32", replace(setting, **changes), pack, scratch)
    assert found.resized is None or found.resized > 1e-9, "the runtime resizes otherwise"
    return {check.name: check for check in found.checks}, [check.name for check in found.checks if not check.passed]


def soft(tower: str) -> str:
    return f"worst NMSE of what LiteRT-LM hands to the decoder, soft tokens, {tower}"


PER_LAYER = "worst NMSE of what LiteRT-LM hands to the decoder, per-layer inputs"


def test_the_runtime_hands_over_what_hugging_face_embeds(
    line: Line, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All pictures with their end, and sounds of all lengths; a resolution of 2e-11 is the probe's own."""
    monkeypatch.setattr(handed, "_PICTURES", tuple(told(line).soft))
    monkeypatch.setattr(handed, "_LENGTHS", 99)
    checks, red = handed_over(line, tmp_path)
    assert not red
    assert set(checks) == {soft("vision"), soft("audio"), PER_LAYER, PLACES}
    assert "26 inputs of 1 lengths" in checks[soft("vision")].detail
    assert "16 inputs of 16 lengths" in checks[soft("audio")].detail
    for name, most in ((soft("vision"), 1e-10), (soft("audio"), 2e-9), (PER_LAYER, 1e-10)):
        value = checks[name].value
        assert value is not None
        assert value < most


def test_what_is_read_back_leaves_repacked_towers_in_files(
    line: Line, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In memory the true audio tower's would be 2.7 GB, for which no plan has room."""
    packed = set[str]()

    def closed(self: LmRuntime) -> None:
        packed.update(file.name.split(".")[-2] for file in tmp_path.rglob("*.xnnpack_cache"))
        own(self)

    own = LmRuntime.close
    monkeypatch.setattr(LmRuntime, "close", closed)
    assert not handed_over(line, tmp_path, large=True)[1]
    assert {"vision_encoder", "static_audio_encoder"} <= packed
    assert not [*tmp_path.rglob("*.xnnpack_cache")]


def test_of_a_large_model_two_of_each_are_read(line: Line, tmp_path: Path) -> None:
    checks, red = handed_over(line, tmp_path, large=True)
    assert not red
    assert [checks[soft(tower)].detail[:8] for tower in KINDS] == ["2 inputs"] * 2


def one_row_on(adapter: Graph) -> None:
    """The adapter's rows moved by one, as its end stays last."""
    made = int(adapter.main.outputs[0])
    moved = adapter.add_tensor("moved", "FLOAT32", adapter.shape(made))
    rows = adapter.add_constant(np.array([*range(1, 256), 0, 256], np.int32), "rows")
    adapter.main.operators.append(adapter.operator("GATHER", [made, rows], [moved], axis=1))
    adapter.main.outputs = [moved]
    assert adapter.model.signatureDefs
    adapter.model.signatureDefs[0].outputs[0].tensorIndex = moved


def text_models_end(line: Line) -> Change:
    """The row of `<end_of_image>` from the text model's table, as litert-torch 0.10.0 has it."""
    text = load_file(line.model / "model.safetensors")["model.language_model.embed_tokens.weight"]
    row, right = text[END].float().numpy() * np.float32(128**0.5), told(line).soft["noise"][-1]

    def change(adapter: Graph) -> None:
        ends = [
            tensor
            for tensor in range(len(adapter.main.tensors))
            if adapter.is_constant(tensor)
            and adapter.constant(tensor).size == right.size
            and np.allclose(adapter.constant(tensor).ravel(), right, atol=1e-5)
        ]
        assert ends, "the end of a picture is a constant of the adapter"
        for tensor in ends:
            adapter.set_constant(tensor, row.reshape(adapter.shape(tensor)))

    return change


@pytest.mark.parametrize("defect", ["moved", "end"])
def test_the_probe_sees_a_defect_of_the_bundle(defect: str, line: Line, tmp_path: Path) -> None:
    models = sections(line)
    change = one_row_on if defect == "moved" else text_models_end(line)
    models["vision_adapter"] = changed(models["vision_adapter"], change, tmp_path / "vision_adapter.tflite")
    own = of_checkpoint(line.root / "fetch" / "checkpoint", load(line.recipe).bundle, "vision,audio")
    spoilt = tmp_path / "spoilt.litertlm"
    litertlm.write(own.metadata, tokenizer_json(own.tokenizer, own.vocabulary), models, spoilt)
    checks, red = handed_over(line, tmp_path, spoilt)
    assert red == [soft("vision")]
    assert (checks[red[0]].value or 0.0) > 1e-3


def test_verify_fails_where_the_bundle_hands_over_other_vectors(
    line: Line, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Though the towers' sections in their folder are right."""
    stages = ("fetch", "golden", "graph", "towers", "fp32", "int8")
    other, own = line.copy(tmp_path / "artifacts", *stages), bundle._sensed

    def sensed(context: Context, precision: str) -> dict[str, Path]:
        models = own(context, precision)
        if precision == "fp32":
            models["vision_adapter"] = changed(models["vision_adapter"], one_row_on, tmp_path / "vision_adapter.tflite")
        return models

    monkeypatch.setattr(bundle, "_sensed", sensed)
    assert other.run(bundle.STAGE, *TAKE) == 0
    assert other.run(verify.STAGE, *TAKE) == 8
    assert f"fail: bundle-fp32: {soft('vision')} is" in capsys.readouterr().err


def test_the_probe_sees_other_pictures_and_inputs(line: Line, tmp_path: Path) -> None:
    dark = replace(told(line), soft=told(line).soft | {"photograph": told(line).soft["face"]})
    heard = Reference.stored(line.root / "golden", "audio")
    assert handed_over(line, tmp_path, towers={"vision": dark, "audio": heard})[1] == [soft("vision")]
    stored = load_file(line.model / "model.safetensors")["model.language_model.embed_tokens_per_layer.weight"]
    one = stored[1].float().numpy().reshape(-1, 16) * np.float32(4)
    assert handed_over(line, tmp_path, per_layer=one)[1] == [PER_LAYER]


def test_the_runtime_resizes_otherwise(line: Line, tmp_path: Path) -> None:
    """Why `make run` does it: without, the runtime's own pixels are others, by another filter and in linear light."""

    def raw(kind: Kind, name: str) -> Medium:
        return Medium(kind=kind, data=pictures()[name])

    checks, red = handed_over(line, tmp_path, towers={"vision": told(line)}, medium=raw)
    assert red == [soft("vision")]
    assert (checks[red[0]].value or 0.0) > 1e-5
    towers = Towers.opened(line.root / "towers" / "fp32", tmp_path)
    theirs = {
        name: towers.see(runtime_resized(pixels_of(pictures()[name]), SEES.size), tmp_path) for name in handed._PICTURES
    }
    resized = replace(told(line), soft=told(line).soft | theirs)
    checks, _ = handed_over(line, tmp_path, towers={"vision": resized}, medium=raw)
    assert (checks[soft("vision")].value or 1.0) < 1e-6, "this is what docs/experiments.md measures"


def pixels_of(data: bytes) -> NDArray[np.uint8]:
    with Image.open(io.BytesIO(data)) as opened:
        return np.asarray(opened.convert("RGB"))
