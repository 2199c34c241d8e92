"""Getting ready for a study: what it reads is checked, the graph that is measured on is exported, the text is cut."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

from pipeline.checkpoint import chat
from pipeline.checkpoint.reader import open_checkpoint
from pipeline.core import manifest, versions
from pipeline.core.recipe import PROJECT, STEP, Recipe
from pipeline.judge import corpus
from pipeline.models import build
from pipeline.quantize import gptq
from pipeline.search.bench import WINDOWS, Bench, Clock
from pipeline.search.candidates import Space

SHARDS = 8
"""Pieces of the text that measurements are of."""

NEEDS = ("fetch", "graph", "moments")
"""The stages that a search reads."""


def open_bench(file: Path, recipe: Recipe, calibration: Path | None, root: Path, clock: Clock, space: Space) -> Bench:
    """Check what is read, export the graph that is measured on, and cut the text.

    Args:
        file: the recipe's text, which a found one is written into.
        recipe: what it says.
        calibration: the user's own text, or none for the recipe's.
        root: the model's folder, with fetch, graph and moments.
        clock: the time that the study has.
        space: what is searched.

    Raises:
        UsageError: a text can't be read.
        IntegrityError: stages fetch, graph or moments are not finished, or were changed.
    """
    upstream = {name: manifest.read(root / name) for name in NEEDS}
    manifest.check([record for made in upstream.values() for record in made.outputs], root)
    checkpoint = open_checkpoint(root / "fetch" / "checkpoint")
    tokenizer, text = chat.open_tokenizer(checkpoint.folder), calibration or PROJECT / recipe.corpus.calibration
    windows = corpus.calibration_windows(text, tokenizer, recipe.corpus.window, SHARDS * WINDOWS)
    folder = root / ".tune"
    shutil.rmtree(folder / "scratch", ignore_errors=True)
    (folder / "scratch").mkdir(parents=True)
    source = _sources()
    all_positions = folder / f"all-positions-{source[:16]}-{windows.shape[1]}.tflite"
    if not all_positions.is_file():
        build.export_all_positions(checkpoint, windows.shape[1], folder / "scratch" / all_positions.name)
        (folder / "scratch" / all_positions.name).replace(all_positions)
    read = [record.sha256 for name in ("fetch", "moments") for record in upstream[name].outputs]
    identity = [source, hashlib.sha256(windows.tobytes()).hexdigest(), read, versions.installed()]
    return Bench(
        checkpoint=checkpoint,
        hessians=gptq.Hessians(root / "moments"),
        all_positions=all_positions,
        step=build.graph_files(upstream["graph"], root, "step")[STEP],
        text=file.read_text(encoding="utf-8"),
        windows=windows,
        folder=folder,
        clock=clock,
        space=space,
        identity=hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest(),
    )


def _sources() -> str:
    """What is measured changes with the code that makes it."""
    return hashlib.sha256(b"".join(file.read_bytes() for file in makers())).hexdigest()


def makers() -> list[Path]:
    """The files of the code that makes what is measured."""
    rooms = ("checkpoint", "export", "models", "quantize", "tflite")
    return sorted(file for room in rooms for file in (PROJECT / "pipeline" / room).rglob("*.py"))
