"""Checkpoints that are 4-bit integers already (compressed-tensors): taken as they are, or refused by name."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import packing
import pytest
import torch
from line import Line, small_recipe
from packing import Grid
from safetensors.torch import load_file, save_file

from pipeline import fetch, int4
from pipeline.checkpoint import adapters
from pipeline.checkpoint.headers import TensorInfo
from pipeline.checkpoint.reader import open_checkpoint
from pipeline.core import manifest
from pipeline.core.errors import FetchError, QuantiseError
from pipeline.core.recipe import DECODER, PROJECT, STEP
from pipeline.core.stage import DEFAULT_MODEL
from pipeline.quantize import given
from pipeline.reference.model import HuggingFace
from pipeline.runtime.litert import StepModel
from pipeline.tflite import weights
from pipeline.tflite.graph import Graph
from pipeline.tflite.lazy import FourBits

SHIPPED = PROJECT / DEFAULT_MODEL
GROUPS = (32, 128)
IDS = np.random.default_rng(3).integers(5, 2000, (2, 40), dtype=np.int32)


class Packed:
    """The shipped model packed by groups, the same in float32, and its int4 files."""

    def __init__(self, folder: Path, group: int, built: Line) -> None:
        self.model, self.floats = (folder / kind / SHIPPED.name for kind in ("packed", "floats"))
        self.grids: Mapping[str, Grid] = packing.pack(SHIPPED, self.model, group, self.floats)
        # As the recipe is, and with all that would leave the grid: the files must not differ in what is given.
        self.line = made_int4(folder, self.model, built, 'rotate = ["."]\nequalize = 0.5\n')


def made_int4(
    folder: Path, model: Path, built: Line, more: str, int8x2: str = "down_proj", *, floats: bool = False
) -> Line:
    """int4 of `model`, with `more` in the recipe's section; what is not packed has 8 bits, or stays in `floats`."""
    others = ("embed_tokens", "embed_tokens_per_layer", "altup", "per_layer_model_projection", "head")
    rest = 'keep_float = ["."]' if floats else f"keep_int8 = {json.dumps(others)}"
    changes = {
        f"keep_int8 = {json.dumps(others[2:4])}": f"{more}{rest}",
        "int8_tokens = [[0, 512], [1792, 2048]] # of the shipped model's 2,048\n": "",
        'int8x2 = ["down_proj"]': f'int8x2 = ["{int8x2}"]',
    }
    line = Line(artifacts=folder / "artifacts", recipe=small_recipe(folder / "recipe.toml", **changes), model=model)
    assert line.run(fetch.STAGE) == 0
    # A graph has no matrix, and this one the same vectors: there is no need to export it anew.
    shutil.copytree(built.root / "graph", line.root / "graph")
    assert line.run(int4.STAGE) == 0
    return line


@pytest.fixture(scope="module", params=GROUPS)
def packed(request: pytest.FixtureRequest, built: Line, tmp_path_factory: pytest.TempPathFactory) -> Packed:
    return Packed(tmp_path_factory.mktemp("packed"), request.param, built)


def logits(folder: Path, *, streamed: bool = False) -> np.ndarray:
    model = HuggingFace.load(folder, "cpu", streamed=streamed).model
    with torch.inference_mode():
        found: np.ndarray = model(input_ids=torch.from_numpy(IDS).long(), use_cache=False).logits.numpy()
    return found


def test_fetch_says_what_it_is(packed: Packed) -> None:
    facts = manifest.read(packed.line.root / "fetch").facts
    whole = sum(tensor.numel() for tensor in load_file(packed.floats / "model.safetensors").values())
    assert facts["dtype"] == "int4" and facts["parameters"] == whole


def test_the_reference_has_the_values_of_integers_and_scales(packed: Packed) -> None:
    expected = logits(packed.floats)
    for streamed in (False, True):
        assert np.array_equal(logits(packed.model, streamed=streamed), expected)


def test_int4_files_have_the_same_integers_and_scales(packed: Packed) -> None:
    facts = manifest.read(packed.line.root / "int4").facts
    for file, name in ((STEP, "step"), (DECODER, "decoder")):
        found = Graph.read(packed.line.root / "int4" / file)
        seen = 0
        for view in found.views():
            for tensor in range(len(view.main.tensors)):
                grid = packed.grids.get(f"model.{view.name(tensor)}")
                if grid is None or not view.is_constant(tensor):
                    continue
                scales = view.block_scales(tensor)
                assert scales is not None, view.name(tensor)
                assert np.array_equal(view.constant(tensor), grid.integers)
                times = scales.scale.shape[1] // grid.scale.shape[1]
                assert np.array_equal(scales.scale, np.repeat(grid.scale, times, axis=1))
                seen += view.place == next(iter(found.views())).place
        assert seen == len(packed.grids) and facts[name]["weights_as_stored"] == seen


@pytest.mark.parametrize("xnnpack", [True, False])
def test_the_file_computes_what_transformers_does(packed: Packed, xnnpack: bool) -> None:
    """What is left is the rounding of activations and of what has 8 bits."""
    found = StepModel(packed.line.root / "int4" / STEP, xnnpack=xnnpack).logits(IDS, np.ones_like(IDS))
    assert nmse(found, logits(packed.floats)[:, -1]) < 2e-3


@pytest.mark.parametrize("packed", GROUPS[:1], indirect=True)
def test_with_activations_in_two_terms_nothing_else_is_left(packed: Packed, built: Line, tmp_path: Path) -> None:
    """Against transformers' model with what the file has in 8 bits rounded to 8 bits, and all else as it is."""
    line = made_int4(tmp_path, packed.model, built, "", ".")
    found = StepModel(line.root / "int4" / STEP).logits(IDS, np.ones_like(IDS))
    tensors = load_file(packed.floats / "model.safetensors")
    for name, value in tensors.items():
        if value.ndim == 2 and name not in packed.grids:
            exact = value.float()
            step = (exact.abs().amax(-1, keepdim=True) / 127).clamp_min(1e-30)
            tensors[name] = (exact / step).round() * step
    rounded = tmp_path / "rounded" / SHIPPED.name
    shutil.copytree(packed.floats, rounded)
    save_file(tensors, rounded / "model.safetensors", metadata={"format": "pt"})
    assert nmse(found, logits(rounded)[:, -1]) < 1e-6
    assert nmse(found, logits(packed.floats)[:, -1]) > 1e-4


@pytest.mark.parametrize("packed", GROUPS[:1], indirect=True)
def test_with_the_rest_in_float_the_file_is_transformers_model(packed: Packed, built: Line, tmp_path: Path) -> None:
    line = made_int4(tmp_path, packed.model, built, "", ".", floats=True)
    found = StepModel(line.root / "int4" / STEP).logits(IDS, np.ones_like(IDS))
    error = nmse(found, logits(packed.floats)[:, -1])
    print(f"NMSE {error:.1e}")
    assert error < 1e-6
    tables = [Graph.read(line.root / "int4" / f"{name}.tflite") for name in ("embedder", "per_layer_embedder")]
    assert all("FLOAT32" in {t.type_of(i) for i in range(len(t.main.tensors)) if t.name(i) == "table"} for t in tables)


def nmse(found: np.ndarray, expected: np.ndarray) -> float:
    """The worse row's, against the spread of what is expected."""
    error = np.square(found - expected).sum(-1) / np.square(expected - expected.mean(-1, keepdims=True)).sum(-1)
    return float(error.max())


def test_another_integer_is_seen(packed: Packed, tmp_path: Path) -> None:
    other = tmp_path / SHIPPED.name
    shutil.copytree(packed.model, other)
    tensors = load_file(other / "model.safetensors")
    name = next(name for name in tensors if name.endswith("mlp.up_proj.weight_packed"))
    tensors[name][3, 1] ^= 1
    save_file(tensors, other / "model.safetensors")
    checkpoint = open_checkpoint(other)
    names = {stored.removeprefix("model."): stored for stored in checkpoint.tensors}
    with pytest.raises(QuantiseError, match=r"up_proj\.weight has not the checkpoint's 4-bit integers"):
        given.check(checkpoint, names, packed.line.root / "int4" / STEP)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "zero points": ({"symmetric": False}, "zero points"),
    "eight bits": ({"num_bits": 8}, r"type of weights \(8-bit int\)"),
    "floats": ({"type": "float"}, r"type of weights \(4-bit float\)"),
    "groups of 16": ({"group_size": 16}, "groups of 16"),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made") / SHIPPED.name
    packing.pack(SHIPPED, folder, 32)
    return folder


def changed(made: Path, folder: Path, **settings: Any) -> Path:
    copy = folder / SHIPPED.name
    shutil.copytree(made, copy)
    config = json.loads((copy / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] |= settings
    (copy / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return copy


def refused(model: Path, capsys: pytest.CaptureFixture[str]) -> str:
    line = Line(artifacts=model.parent / "artifacts", recipe=small_recipe(model.parent / "r.toml"), model=model)
    assert line.run(fetch.STAGE) == FetchError.exit_code
    assert not (line.root / "fetch" / "manifest.json").exists()
    return capsys.readouterr().err


@pytest.mark.parametrize("name", REFUSED)
def test_what_an_int4_file_can_not_hold_is_refused_by_name(
    made: Path, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings, said = REFUSED[name]
    error = refused(changed(made, tmp_path, **packing.config(32, **settings)), capsys)
    assert "quantised already (compressed-tensors)" in error and "no like in an int4 file" in error
    assert re.search(said, error), error


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme"),
        ({"transform_config": {"config_groups": {"R1": {}}}}, "transform_config"),
        ({"format": "marlin-24"}, "format 'marlin-24'"),
        ({"quant_method": "gptq"}, "quantization_config"),
    ],
)
def test_so_is_what_surrounds_the_weights(
    made: Path, settings: dict[str, Any], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert said in refused(changed(made, tmp_path, **settings), capsys)


@pytest.mark.parametrize("part", ["weight_zero_point", "weight_g_idx"])
def test_a_stored_zero_point_or_order_is_refused_whatever_config_says(
    made: Path, part: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = changed(made, tmp_path)
    tensors = load_file(model / "model.safetensors")
    stem = next(name for name in tensors if name.endswith("weight_packed")).removesuffix("weight_packed")
    save_file({**tensors, f"{stem}{part}": torch.zeros(4, 4, dtype=torch.int32)}, model / "model.safetensors")
    assert f"{stem}{part} has no like in an int4 file" in refused(model, capsys)


def test_a_negative_scale_is_refused_before_a_file_is_written(made: Path, tmp_path: Path) -> None:
    model = changed(made, tmp_path)
    tensors = load_file(model / "model.safetensors")
    name = next(name for name in tensors if name.endswith("weight_scale"))
    tensors[name][0, 0] *= -1
    save_file(tensors, model / "model.safetensors")
    values = weights.rows(open_checkpoint(model), name.removesuffix("_scale"))
    assert isinstance(values, FourBits)
    with pytest.raises(QuantiseError, match="negative"):
        given.four_bits(values)


def test_an_adapter_is_not_merged_into_integers(made: Path) -> None:
    tensors: Mapping[str, TensorInfo] = open_checkpoint(made).tensors
    adapter: Any = SimpleNamespace(where="adapter")  # nothing else of it is looked at
    with pytest.raises(FetchError, match="stored as 4-bit integers"):
        adapters.changes(adapter, tensors, str, "base")


def test_weights_trained_for_q4_0_are_taken_with_a_word_on_their_twin(
    built: Line, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "tiny-it-qat-q4_0-unquantized"
    shutil.copytree(SHIPPED, model, ignore=shutil.ignore_patterns("corpus"))
    line = Line(artifacts=tmp_path / "artifacts", recipe=built.recipe, model=model)
    assert line.run(fetch.STAGE) == 0
    assert "-w4a16-ct goes into an int4 file without loss" in capsys.readouterr().err
