"""A real model of the common kind, SmolLM2-135M-Instruct, from its checkpoint to the verified bundle.

`nox -s smollm2` makes the checkpoint and says in SMOLLM2_CHECKPOINT where it lies; there these tests must run, else
they are skipped.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from real_model import Build

from pipeline.runtime.litert_lm import Dialogue, LmRuntime

CHECKPOINT = os.environ.get("SMOLLM2_CHECKPOINT", "")
RECIPE = "pipeline/recipes/plain.toml"
pytestmark = pytest.mark.skipif(not CHECKPOINT, reason="needs the checkpoint that `nox -s smollm2` makes")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Build:
    assert Path(CHECKPOINT).is_dir(), "SMOLLM2_CHECKPOINT is no folder"
    return Build.make("verify", CHECKPOINT, RECIPE, tmp_path_factory.mktemp("built"), seed=1)


def test_every_check_passes(built: Build) -> None:
    assert built.code == 0
    assert built.read("verify/report.json")["passed"]


def test_fp32_is_exact_through_the_cache(built: Build) -> None:
    built.check_fp32()


def test_litert_lm_reads_and_says_what_hugging_face_does(built: Build) -> None:
    built.check_runtime()


def test_it_answers_in_three_turns(built: Build) -> None:
    """Knowledge of a model that was trained, by the int8 bundle: not a measure, a sign of life."""
    with LmRuntime(built.root / "bundle" / "int8.litertlm") as runtime, Dialogue(runtime, 48, greedy=True) as dialogue:
        answers = ["".join(dialogue.answer(text)) for text in ("What is the capital of France?", "Of Italy?", "Thanks")]
    assert "Paris" in answers[0] and "Rome" in answers[1] and answers[2]
