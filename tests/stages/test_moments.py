"""moments of the shipped model: what they are of, that they are what layers read, and int8 files rounded by them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from line import Line, small_recipe
from torch import nn

from pipeline import int4, int8, moments
from pipeline.checkpoint.names import EMBEDDING
from pipeline.core import manifest
from pipeline.core.errors import IntegrityError
from pipeline.core.graph import Choice, needs
from pipeline.core.recipe import DECODER, STEP, load
from pipeline.core.stage import Stage
from pipeline.quantize import gptq, hessian_sums, hessians
from pipeline.reference import linear
from pipeline.tflite.graph import Graph
from tools import bench_stages, bench_stock

GPTQ = {
    "keep_float = []": "keep_float = []\ngptq = true",
    "int8_tokens =": "gptq = true\nint8_tokens =",
    "[shapes]": "hessian_windows = 12\n[shapes]",
}


@pytest.fixture(scope="module")
def line(built: Line, tmp_path_factory: pytest.TempPathFactory) -> Line:
    """The built line's checkpoint and graphs, with moments, under a recipe that rounds by them."""
    folder = tmp_path_factory.mktemp("moments")
    copy = built.copy(folder / "artifacts", "fetch", "graph")
    made = Line(artifacts=copy.artifacts, recipe=small_recipe(folder / "r.toml", **GPTQ))
    assert made.run(moments.STAGE) == 0
    return made


def kept(line: Line) -> dict[str, np.ndarray[Any, np.dtype[np.float32]]]:
    """Moments by the name of the weight."""
    folder = line.root / "moments"
    index = json.loads((folder / hessians.INDEX).read_text(encoding="utf-8"))
    return {name: np.load(folder / file) for name, file in index.items()}


def test_every_layer_with_weights_has_them(line: Line, built: Line) -> None:
    graph = Graph.read(built.root / "int8" / STEP)
    read = {graph.name(int(o.inputs[1])) for o in graph.operators() if graph.code(o) == "FULLY_CONNECTED"}
    assert read == kept(line).keys()


def test_each_token_counts_once_each_time_a_layer_reads(line: Line) -> None:
    tokens = manifest.read(line.root / "moments").facts["tokens"]
    corpus = load(line.recipe).corpus
    assert tokens == corpus.hessian_windows * corpus.window == 12 * corpus.window
    for name, found in kept(line).items():
        times = 2 if "modality_router" in name else 1  # AltUp predicts and corrects
        assert np.trace(found, axis1=1, axis2=2).sum() == pytest.approx(times * tokens, rel=1e-3), name
        assert np.allclose(found, found.transpose(0, 2, 1), rtol=1e-3, atol=1e-3 * float(np.abs(found).max()))


def test_layers_that_read_the_same_share_a_file(line: Line) -> None:
    index = json.loads((line.root / "moments" / hessians.INDEX).read_text(encoding="utf-8"))
    layer = "layers.0.self_attn.{}_proj.weight"
    assert len({index[layer.format(kind)] for kind in "qkv"}) == 1
    assert index["layers.0.mlp.gate_proj.weight"] == index["layers.0.mlp.up_proj.weight"]
    assert index["layers.0.mlp.up_proj.weight"] != index["layers.0.mlp.down_proj.weight"]
    assert EMBEDDING in index, "which is the head as well"


def test_sums_are_of_what_is_read_each_row_over_its_norm(tmp_path: Path) -> None:
    """Independently, in float64; a wide layer has spans of its own."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(6, 2 * hessians.SPAN, bias=False), nn.Linear(2 * hessians.SPAN, 3))
    sums = hessian_sums.HessianSums(tmp_path)
    batches = [torch.randn(2, 5, 6), torch.zeros(1, 2, 6), torch.randn(1, 4, 6)]
    plain = [model(batch) for batch in batches]
    sums.observe(model)
    linear.multiply_by_onednn(model)
    for batch, expected in zip(batches, plain, strict=True):
        assert torch.allclose(model(batch), expected, atol=1e-5)
    sums.close()
    rows = torch.cat([batch.reshape(-1, 6) for batch in batches if batch.any()]).double()
    wide = rows @ model[0].weight.detach().double().T
    for name, x in (("0.weight", rows), ("1.weight", wide)):
        unit = (x / x.norm(dim=1, keepdim=True)).detach().numpy()
        found = np.load(tmp_path / f"{name}.npy")
        width = hessians.span(x.shape[1])
        for place in range(len(found)):
            part = unit[:, place * width : (place + 1) * width]
            assert np.allclose(found[place], part.T @ part, atol=1e-5)


def test_two_runs_give_the_same_bytes(line: Line, tmp_path: Path) -> None:
    other = line.copy(tmp_path, "fetch")
    assert other.run(moments.STAGE) == 0
    assert manifest.read(other.root / "moments").outputs == manifest.read(line.root / "moments").outputs


def test_int8_and_int4_are_rounded_by_them_and_come_out_again(
    line: Line, built: Line, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Alone and with the bundle's decoder, which has the step graph's matrices: each is rounded once."""
    rounded_lots: list[int] = []
    plainly = gptq.round_rows

    def counted(values: np.ndarray[Any, Any], *more: Any) -> np.ndarray[Any, Any]:
        rounded_lots.append(values.size)
        return plainly(values, *more)

    monkeypatch.setattr(gptq, "round_rows", counted)
    for stage in (int8.STAGE, int4.STAGE):
        found, folder = {}, line.root / stage.name
        for graphs in ("step", "bundle", "all"):
            rounded_lots.clear()
            assert line.run(stage, "--graphs", graphs) == 0
            assert any(record.path.startswith("moments/") for record in manifest.read(folder).inputs)
            found[graphs] = (
                sum(rounded_lots),
                [(folder / name).read_bytes() for name in (STEP, DECODER) if (folder / name).is_file()],
            )
        assert found["all"][0] == found["step"][0] == found["bundle"][0] > 0
        assert found["all"][1] == found["step"][1] + found["bundle"][1]
    assert line.run(int8.STAGE, "--graphs", "step") == 0
    plain, rounded = (Graph.read(root / "int8" / STEP) for root in (built.root, line.root))
    name = "layers.0.mlp.down_proj.weight"
    pair = [
        next(one.constant(t) for t in range(len(one.main.tensors)) if one.name(t) == name) for one in (plain, rounded)
    ]
    assert 0.01 < float((pair[0] != pair[1]).mean()) < 0.9
    assert np.abs(pair[0].astype(int) - pair[1]).max() < 20


@pytest.mark.parametrize("stage", [int8.STAGE, int4.STAGE], ids=lambda stage: stage.name)
def test_what_was_rounded_by_a_gpu_s_moments_says_so(line: Line, tmp_path: Path, stage: Stage) -> None:
    other = line.copy(tmp_path, "fetch", "graph", "moments")
    found = []
    for device in ("cpu", "cuda"):
        made = manifest.read(other.root / "moments")
        manifest.write(replace(made, facts={**made.facts, "device": device}), other.root / "moments")
        assert other.run(stage, "--graphs", "step") == 0
        found.append(manifest.read(other.root / stage.name).facts)
    assert "device" not in found[0] and found[1] == {**found[0], "device": "cuda"}


def test_a_changed_file_of_moments_is_refused(line: Line, tmp_path: Path) -> None:
    other = line.copy(tmp_path, "fetch", "graph", "moments")
    file = next((other.root / "moments").glob("*.npy"))
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert other.run(int8.STAGE, "--graphs", "step") == IntegrityError.exit_code


def test_the_benchmark_of_bundles_runs_every_stage_that_its_recipe_needs(tmp_path: Path) -> None:
    """It stopped at int8 once the recipe rounded by moments."""
    recipe = load(bench_stages.changed_recipe("gemma3", tmp_path, bench_stages.INT8_ALONE))
    choice = Choice(recipe=recipe, graphs="bundle")
    for place, name in enumerate(bench_stock.STAGES):
        assert {*needs(name, choice)} <= {*bench_stock.STAGES[:place]}
