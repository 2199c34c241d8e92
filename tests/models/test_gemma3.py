"""A real model, Gemma 3 270M, through the pipeline from its checkpoint to the verified bundle.

`nox -s gemma3` makes the checkpoint and says in GEMMA3_CHECKPOINT where it lies; there these tests must run, elsewhere
they are skipped.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from real_model import Build

from pipeline.core import manifest

CHECKPOINT = os.environ.get("GEMMA3_CHECKPOINT", "")
RECIPE = "pipeline/recipes/gemma3.toml"
BUILD = ("fetch", "graph", "fp32", "int8", "bundle")
pytestmark = pytest.mark.skipif(not CHECKPOINT, reason="needs the checkpoint that `nox -s gemma3` makes")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Build:
    assert Path(CHECKPOINT).is_dir(), "GEMMA3_CHECKPOINT is no folder"
    return Build.make("verify", CHECKPOINT, RECIPE, tmp_path_factory.mktemp("first"), seed=1)


def test_every_check_passes(built: Build) -> None:
    assert built.code == 0
    assert built.read("verify/report.json")["passed"]


def test_fp32_is_exact_through_the_cache(built: Build) -> None:
    built.check_fp32()


def test_litert_lm_reads_and_says_what_hugging_face_does(built: Build) -> None:
    built.check_runtime()
    found = built.bundle("fp32")
    assert found["scored"] > 0 and found["score_error"] <= 5e-3


def test_int8_is_judged_on_five_thousand_positions_and_on_perplexity(built: Build) -> None:
    judged = built.bundle("int8")["against_reference"]
    assert judged["positions"] >= 5000 and judged["blocks"] >= 40
    checks = [check for check in built.read("verify/report.json")["checks"] if check["variant"] == "bundle-int8"]
    assert [check["direction"] for check in checks if check["name"] == "perplexity ratio through the cache"] == [
        ">=",
        "<=",
    ]


def test_int8_takes_a_byte_per_parameter(built: Build) -> None:
    assert built.bundle("int8")["size_per_parameter"] <= 1.06


def test_building_needs_less_memory_than_the_weights_in_fp32_and_half_again(built: Build) -> None:
    peaks = {stage: built.read(f"{stage}/run.json")["peak_anonymous"] for stage in BUILD}
    assert max(peaks.values()) <= 1.5 * 2**30, peaks


def test_the_same_bundles_come_out_again(built: Build, tmp_path_factory: pytest.TempPathFactory) -> None:
    again = Build.make("bundle", CHECKPOINT, RECIPE, tmp_path_factory.mktemp("second"), seed=2)
    assert again.code == 0
    first, second = (manifest.read(build.root / "bundle").outputs for build in (built, again))
    assert first == second
    assert {record.path for record in first} == {f"bundle/{name}.litertlm" for name in ("fp32", "int8", "int4")}
