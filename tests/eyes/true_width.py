"""Gemma 3n's vision tower in its true size, 294 million random weights, against Hugging Face's (`nox -s large_eyes`).

What it takes to build, and how close it is; `PICTURES` says how many of those that are judged (default: all).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import whole
from line import Line, small_recipe

from pipeline.core.recipe import PROJECT
from pipeline.judge.pictures import write
from pipeline.judge.seeing import Eyes
from pipeline.judge.sensing import nmse
from pipeline.reference import seeing
from pipeline.runtime.picture import Sight

TAKE = ("--towers", "vision", "--graphs", "bundle")
ANONYMOUS, SECONDS = 1.5 * 2**30, 240.0


def test_the_true_tower_is_hugging_faces(tmp_path: Path) -> None:
    model = whole.write_model(tmp_path / "eyes", settings=None, size=768)
    line = Line(artifacts=tmp_path / "artifacts", recipe=small_recipe(tmp_path / "small.toml"), model=model)
    common = ["--model-id", str(model), "--artifacts", str(line.artifacts), "--recipe", str(line.recipe), *TAKE]
    for stage in ("fetch", "towers"):  # in processes of their own, without the weights that were drawn here
        subprocess.run([sys.executable, "-m", f"pipeline.{stage}", *common], cwd=PROJECT, check=True)
    took = json.loads((line.root / "towers" / "run.json").read_text())
    sizes = {file.name: file.stat().st_size for file in (line.root / "towers" / "fp32").glob("*.tflite")}
    print({name: took[name] for name in ("seconds", "processor_seconds", "peak_anonymous", "peak_resident")}, sizes)
    files = write(tmp_path)
    chosen = {name: files[name] for name in [*files][: int(os.environ.get("PICTURES", len(files)))]}
    wanted = seeing.look(line.root / "fetch" / "checkpoint", chosen, tmp_path)
    for scratch in (tmp_path, None):  # with XNNPACK, and one in the built-in kernels
        eyes = Eyes(line.root / "towers" / "fp32", Sight(size=768), scratch)
        errors = {name: nmse(eyes.see(chosen[name]), wanted[name]) for name in [*chosen][: None if scratch else 1]}
        print(errors)
        assert max(errors.values()) < 1e-10
    assert took["peak_anonymous"] <= ANONYMOUS
    assert took["processor_seconds"] <= SECONDS
