"""A stage that is killed, or stopped with Ctrl-C, in the middle: the same command goes on and gives the same bytes."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from line import Line, changed_model, lasting, small_recipe, written
from safetensors.torch import load_file, save_file

from pipeline import fetch, graph
from pipeline.core import manifest
from pipeline.core.recipe import PROJECT
from pipeline.core.stage import DEFAULT_MODEL

READS = {"golden": ("fetch",), "int8": ("fetch", "graph"), "graph": ("fetch",)}
"""What each needs. The runner, which every stage has, is tried in unit/test_stage; here are one stage that torch works
in, one that fills files in several threads, and torch.export, which must let an interrupt through."""
OPTIONS = {"graph": ("--graphs", "bundle")}
STARTED = 600.0
"""Seconds within which a stage must have begun to write, however busy the machine is."""


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Line:
    """fetch and graph of the shipped model's first three layers, one of each kind: an export takes long for each.

    Of its graphs the decoder with one prefill, which is made of several signatures that share their weights.
    """
    folder = tmp_path_factory.mktemp("short")
    config = json.loads((PROJECT / DEFAULT_MODEL / "config.json").read_text(encoding="utf-8"))
    kinds = ["sliding_attention", "full_attention", "full_attention"]  # the last shares the second's keys and values
    cut = {name: config[name][:3] for name in ("intermediate_size", "activation_sparsity_pattern")}
    fewer = {"num_hidden_layers": 3, "num_kv_shared_layers": 1, "layer_types": kinds, **cut}
    model = changed_model(folder, config=json.dumps(config | fewer))
    tensors = load_file(model / "model.safetensors")
    tensors = {name: value for name, value in tensors.items() if not re.search(r"\.layers\.[3-7]\.", name)}
    rows = 3 * config["hidden_size_per_layer_input"]
    table, projection = (f"model.{name}.weight" for name in ("embed_tokens_per_layer", "per_layer_model_projection"))
    tensors[table], tensors[projection] = tensors[table][:, :rows].contiguous(), tensors[projection][:rows].contiguous()
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    recipe = small_recipe(folder / "recipe.toml", **{"prefill = [32, 128]": "prefill = [8]"})
    line = Line(artifacts=folder / "artifacts", recipe=recipe, model=model)
    assert line.run(fetch.STAGE) == 0 and line.run(graph.STAGE, *OPTIONS["graph"]) == 0
    return line


@pytest.fixture
def made(request: pytest.FixtureRequest, stage: str) -> Line:
    """A line with the stages that `stage` reads, and `stage` as it is made by a run that nothing stops."""
    found: Line = request.getfixturevalue("short" if stage == "graph" else "built")
    return found


def begin(line: Line, stage: str) -> subprocess.Popen[bytes]:
    """The stage in a process of its own, which Ctrl-C reaches."""
    common = ["--model-id", str(line.model), "--artifacts", str(line.artifacts), "--recipe", str(line.recipe)]
    environment = os.environ | {"PYTHONHASHSEED": "1"}
    command = [sys.executable, "-m", f"pipeline.{stage}", *common, *OPTIONS.get(stage, ())]
    return subprocess.Popen(command, cwd=PROJECT, env=environment)


def wait_until_it_writes(process: subprocess.Popen[bytes], folder: Path) -> None:
    """Until a file of the stage has bytes, or, where it writes none for long, its folder is there."""
    deadline = time.monotonic() + STARTED
    while time.monotonic() < deadline and process.poll() is None:
        if written(folder):
            return
        if folder.name == "graph" and folder.is_dir():
            time.sleep(3)  # torch.export is at work
            return
        time.sleep(0.002)
    assert process.poll() is None, "it ended before it could be stopped"


@pytest.mark.parametrize("stage", READS)
def test_after_a_kill_the_stage_gives_the_same_bytes(made: Line, tmp_path: Path, stage: str) -> None:
    line = made.copy(tmp_path / "artifacts", *READS[stage])
    folder = line.root / stage
    with begin(line, stage) as process:
        wait_until_it_writes(process, folder)
        process.kill()
    assert not (folder / manifest.NAME).exists()
    with begin(line, stage) as process:
        assert process.wait() == 0
    names = [Path(record.path).relative_to(stage).as_posix() for record in manifest.read(made.root / stage).outputs]
    assert lasting(folder, *names) == lasting(made.root / stage, *names)
    assert sorted(file.name for file in folder.iterdir()) == sorted({*names, manifest.NAME, "run.json"})


def test_ctrl_c_leaves_nothing_half_written(built: Line, tmp_path: Path) -> None:
    line = built.copy(tmp_path / "artifacts", *READS["graph"])
    with begin(line, "graph") as process:
        wait_until_it_writes(process, line.root / "graph")
        process.send_signal(signal.SIGINT)
        assert process.wait() == 130
    assert not list((line.root / "graph").iterdir())
