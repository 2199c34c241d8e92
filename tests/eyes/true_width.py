"""Towers in their true size, random weights, against Hugging Face's (`nox -s large_eyes`).

What they take to build, and how close they are: Gemma 3n's for vision, 294 million weights, and audio, 681 million;
Gemma 3's, 417 million; Gemma 4's of E2B for vision, 153 million in the file, and audio, 305 million. `INPUTS` says how
many of the pictures and sounds that are judged (default: all).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import ears
import seeing3
import seeing4
import senses4
import torch
import whole
from line import Line, small_recipe

from pipeline import bundle, fetch, fp32, golden, graph, towers, verify
from pipeline.core import facts, manifest
from pipeline.core.facts import Patches
from pipeline.core.recipe import PROJECT, RECIPES, load
from pipeline.judge import hearing
from pipeline.judge.metrics import nmse
from pipeline.judge.pictures import write
from pipeline.judge.seeing import Eyes
from pipeline.judge.sensing import Reference, decibels
from pipeline.judge.sounds import sounds
from pipeline.reference import hearing as reference
from pipeline.reference import seeing
from pipeline.runtime.picture import Sight
from pipeline.runtime.sound import Hearing

ANONYMOUS, SECONDS, SMALLER = 1.5 * 2**30, 240.0, 0.28
FP32 = {'precisions = ["fp32", "int8"]': 'precisions = ["fp32"]'}
TRUE = {"vocab_size": 16, "vocab_offset": ears.SMALL["vocab_offset"]}
"""An audio tower of every default but the place of its tokens, which is beside the shipped model's."""


def made(line: Line, tower: str) -> dict[str, float]:
    """Build a tower's sections in processes of their own, without the weights that were drawn here; what that took."""
    take = ("--towers", tower, "--graphs", "bundle", "--artifacts", str(line.artifacts), "--recipe", str(line.recipe))
    for stage in ("fetch", "towers"):
        command = [sys.executable, "-m", f"pipeline.{stage}", "--model-id", str(line.model), *take]
        subprocess.run(command, cwd=PROJECT, check=True)
    took: dict[str, float] = json.loads((line.root / "towers" / "run.json").read_text())
    told = manifest.read(line.root / "towers")
    parts = {precision: told.part(f"{tower}-{precision}", facts.Tower) for precision in precisions(line)}
    print({name: took[name] for name in ("seconds", "processor_seconds", "peak_anonymous", "peak_resident")}, parts)
    assert took["peak_anonymous"] <= ANONYMOUS
    assert took["processor_seconds"] <= SECONDS
    assert parts["int8"].weight_bytes <= SMALLER * 4 * parts["int8"].stored
    return took


def precisions(line: Line) -> list[str]:
    return sorted(folder.name for folder in (line.root / "towers").iterdir() if folder.is_dir())


def some(named: Mapping[str, object]) -> list[str]:
    """Of inputs those that are judged, from beginning to end."""
    count = int(os.environ.get("INPUTS", len(named)))
    return [*named][:: -(-len(named) // count)]


def heard(line: Line, hearing_of: Hearing, least: float, scratch: Path) -> None:
    """Hold soft tokens of sounds against Hugging Face: `least` dB in float32, in int8 what the recipe wants."""
    played = sounds()
    chosen = {name: played[name] for name in some(played)}
    wanted = reference.listen(reference.Ears.load(line.root / "fetch" / "checkpoint"), chosen)
    gate = {"fp32": least, "int8": load(line.recipe).gates["audio-int8"].snr or 0.0}
    for precision in precisions(line):
        ears_of = hearing.Ears(line.root / "towers" / precision, hearing_of, scratch)
        found = {name: round(decibels(nmse(ears_of.hear(chosen[name]), wanted[name])), 2) for name in chosen}
        print(precision, found)
        assert min(found.values()) > gate[precision]


def seen(line: Line, sight: Sight, recipe: str, scratch: Path) -> None:
    """The same of pictures: 100 dB in float32, in int8 what the family's recipe wants."""
    files = write(scratch)
    chosen = {name: files[name] for name in some(files)}
    wanted = seeing.look(line.root / "fetch" / "checkpoint", chosen, scratch)
    gate = {"fp32": 100.0, "int8": load(RECIPES / f"{recipe}.toml").gates["vision-int8"].snr or 0.0}
    for precision in precisions(line):
        eyes = Eyes(line.root / "towers" / precision, sight, scratch)
        found = {name: round(decibels(nmse(eyes.see(chosen[name]), wanted[name])), 2) for name in chosen}
        print(precision, found)
        assert min(found.values()) > gate[precision]


def test_the_true_vision_tower_is_hugging_faces(tmp_path: Path) -> None:
    model = whole.write_model(tmp_path / "eyes")
    line = Line(artifacts=tmp_path / "artifacts", recipe=small_recipe(tmp_path / "small.toml"), model=model)
    made(line, "vision")
    files = write(tmp_path)
    chosen = {name: files[name] for name in some(files)}
    wanted = seeing.look(line.root / "fetch" / "checkpoint", chosen, tmp_path)
    for scratch in (tmp_path, None):  # with XNNPACK, and one in the built-in kernels
        eyes = Eyes(line.root / "towers" / "fp32", Sight(size=768), scratch)
        errors = {name: nmse(eyes.see(chosen[name]), wanted[name]) for name in [*chosen][: None if scratch else 1]}
        print(errors)
        assert max(errors.values()) < 1e-10


def test_gemma_3s_true_vision_tower_is_hugging_faces(tmp_path: Path) -> None:
    """All 27 layers over 4,096 patches; the built-in kernels would take an hour a picture."""
    model = seeing3.write_model(tmp_path / "eyes3", seeing3.TRUE, 256, torch.bfloat16)
    recipe = small_recipe(tmp_path / "small.toml", source=RECIPES / "gemma3_vision.toml", small=seeing3.SMALL)
    line = Line(artifacts=tmp_path / "artifacts", recipe=recipe, model=model)
    made(line, "vision")
    seen(line, Sight(size=896), "gemma3_vision", tmp_path)


def test_gemma_4s_true_vision_tower_is_hugging_faces(tmp_path: Path) -> None:
    """All 16 layers over up to 2,520 patches; the built-in kernels would take ten times as long."""
    model = seeing4.write_model(tmp_path / "eyes4", seeing4.TRUE, 280, torch.bfloat16)
    recipe = small_recipe(tmp_path / "small.toml", source=RECIPES / "gemma4.toml", small=seeing4.SMALL)
    line = Line(artifacts=tmp_path / "artifacts", recipe=recipe, model=model)
    made(line, "vision")
    seen(line, Sight(patches=Patches(size=16, pool=3, tokens=280)), "gemma4", tmp_path)


def test_the_true_audio_tower_is_hugging_faces(tmp_path: Path) -> None:
    """In float32 to 5e-9, as Hugging Face's front end computes in doubles; in int8 as the recipe wants it."""
    model = ears.write_model(tmp_path / "ears", TRUE, torch.bfloat16)
    line = Line(artifacts=tmp_path / "artifacts", recipe=small_recipe(tmp_path / "small.toml"), model=model)
    made(line, "audio")
    heard(line, Hearing(rate=16_000, frame=512, hop=160), 83.0, tmp_path)


def test_gemma_4s_true_audio_tower_is_hugging_faces(tmp_path: Path) -> None:
    model = senses4.write_model(tmp_path / "ears4", senses4.TRUE, torch.bfloat16)
    recipe = small_recipe(tmp_path / "small.toml", source=RECIPES / "gemma4.toml", small=senses4.SMALL)
    line = Line(artifacts=tmp_path / "artifacts", recipe=recipe, model=model)
    made(line, "audio")
    heard(line, Hearing(rate=16_000, frame=640, hop=640), 83.0, tmp_path)


def test_a_gemma_4_with_eyes_and_ears_passes_verify(tmp_path: Path) -> None:
    """A small one: two pictures and a sound in one message, too."""
    model = seeing4.write_model(tmp_path / "senses4", audio=senses4.AUDIO)
    # Of more prompts one is answered with tokens of turns, which transformers leaves out of a text.
    few = {"cache_length = 4096": "cache_length = 1024", "prompts = 16": "prompts = 4"}
    small = {**senses4.SMALL, **few, **FP32}
    recipe = small_recipe(tmp_path / "small.toml", source=RECIPES / "gemma4.toml", small=small)
    line = Line(artifacts=tmp_path / "artifacts", recipe=recipe, model=model)
    for stage in (fetch.STAGE, golden.STAGE, graph.STAGE, towers.STAGE, fp32.STAGE, bundle.STAGE, verify.STAGE):
        assert line.run(stage, *whole.TAKE) == 0
    asked = Reference.stored(line.root / "golden", "vision").answers
    assert {tuple(kind for kind, _ in row.media) for row in asked} >= {("image",), ("image", "image", "audio")}
