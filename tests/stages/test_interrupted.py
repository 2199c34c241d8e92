"""A stage that is killed, or stopped with Ctrl-C, in the middle: the same command goes on and gives the same bytes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import Line, lasting

from pipeline.core import manifest
from pipeline.core.recipe import PROJECT

READS = {
    "golden": ("fetch",),
    "graph": ("fetch",),
    "fp32": ("fetch", "graph"),
    "fp16": ("fetch", "graph"),
    "int8": ("fetch", "graph"),
    "bundle": ("fetch", "fp32", "int8"),
}
STARTED = 60.0
"""Seconds within which a stage must have begun to write."""


def begin(line: Line, stage: str) -> subprocess.Popen[bytes]:
    """The stage in a process of its own, which Ctrl-C reaches."""
    common = ["--model-id", str(line.model), "--artifacts", str(line.artifacts), "--recipe", str(line.recipe)]
    program = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler);"
        f"from pipeline.core.stage import main; from pipeline.{stage} import STAGE; sys.exit(main(STAGE))"
    )
    environment = os.environ | {"PYTHONHASHSEED": "1"}
    return subprocess.Popen([sys.executable, "-c", program, *common], cwd=PROJECT, env=environment)


def wait_until_it_writes(process: subprocess.Popen[bytes], folder: Path) -> None:
    """Until a file of the stage has bytes, or, where it writes none for long, its folder is there."""
    deadline = time.monotonic() + STARTED
    while time.monotonic() < deadline and process.poll() is None:
        if folder.is_dir() and any(file.stat().st_size for file in folder.rglob("*") if file.is_file()):
            return
        if folder.name == "graph" and folder.is_dir():
            time.sleep(3)  # torch.export is at work
            return
        time.sleep(0.002)
    assert process.poll() is None, "it ended before it could be stopped"


@pytest.mark.parametrize("stage", READS)
def test_after_a_kill_the_stage_gives_the_same_bytes(built: Line, tmp_path: Path, stage: str) -> None:
    line = built.copy(tmp_path / "artifacts", *READS[stage])
    folder = line.root / stage
    with begin(line, stage) as process:
        wait_until_it_writes(process, folder)
        process.kill()
    assert not (folder / manifest.NAME).exists()
    with begin(line, stage) as process:
        assert process.wait() == 0
    names = [Path(record.path).relative_to(stage).as_posix() for record in manifest.read(built.root / stage).outputs]
    assert lasting(folder, *names) == lasting(built.root / stage, *names)
    assert sorted(file.name for file in folder.iterdir()) == sorted({*names, manifest.NAME, "run.json"})


@pytest.mark.parametrize("stage", ["golden", "graph", "fp32", "bundle"])
def test_ctrl_c_leaves_nothing_half_written(built: Line, tmp_path: Path, stage: str) -> None:
    line = built.copy(tmp_path / "artifacts", *READS[stage])
    with begin(line, stage) as process:
        wait_until_it_writes(process, line.root / stage)
        process.send_signal(signal.SIGINT)
        assert process.wait() == 130
    assert not list((line.root / stage).iterdir())
