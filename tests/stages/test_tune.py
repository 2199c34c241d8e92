"""tune on the shipped model: killed, stopped, gone on with; its recipe makes the int8 file that it measured."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from line import Line

from pipeline import int4, int8, moments
from pipeline.core import manifest
from pipeline.core.recipe import PROJECT
from pipeline.core.recipe import load as load_recipe
from pipeline.quantize import rows as quantize
from pipeline.quantize.int8x2 import ROWS
from pipeline.tflite.graph import Graph

OPTIONS = ("--parts", "1", "--speed", "0.01")
LONGEST = 600.0
"""Seconds within which a tune must have measured something."""


def begin(line: Line, *options: str) -> subprocess.Popen[bytes]:
    common = ["--model-id", str(line.model), "--artifacts", str(line.artifacts), "--recipe", str(line.recipe)]
    return subprocess.Popen([sys.executable, "-m", "pipeline.tune", *common, *OPTIONS, *options], cwd=PROJECT)


def finish(line: Line, *options: str) -> None:
    with begin(line, *options) as process:
        assert process.wait() == 0


def records(line: Line) -> dict[str, int]:
    """Measurements that are kept, with the times at which they were written."""
    return {file.name: file.stat().st_mtime_ns for file in (line.root / ".tune").glob("*.json")}


def wait_for_records(line: Line, process: subprocess.Popen[bytes], count: int) -> None:
    deadline = time.monotonic() + LONGEST
    while len(records(line)) < count:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)


def report(line: Line, folder: str = "tune") -> dict[str, Any]:
    found: dict[str, Any] = json.loads((line.root / folder / "report.json").read_text(encoding="utf-8"))
    return found


@pytest.fixture(scope="module")
def tuned(built: Line, tmp_path_factory: pytest.TempPathFactory) -> Line:
    """A tune that was killed, then stopped, then went on to its end; nothing was measured twice."""
    line = built.copy(tmp_path_factory.mktemp("tuned"), "fetch", "graph")
    assert line.run(moments.STAGE) == 0
    with begin(line) as process:
        wait_for_records(line, process, 3)
        process.kill()
    assert not (line.root / "tune").exists()
    killed = records(line)
    with begin(line) as process:
        wait_for_records(line, process, 8)
        process.send_signal(signal.SIGTERM)
        assert process.wait() == 130
    assert load_recipe(line.root / "tune" / "recipe.toml").name == "gemma3n"
    assert not report(line)["complete"]
    stopped = records(line)
    finish(line, "--minutes", "20")
    assert killed.items() <= stopped.items() <= records(line).items()
    return line


def test_every_group_and_candidate_is_measured(tuned: Line) -> None:
    told = report(tuned)
    assert told["complete"]
    assert all(each["weights"] >= 0 and each["activations"] is not None for each in told["groups"])
    heads = [each for each in told["groups"] if "head" in each["kinds"]]
    assert len(heads) == 1 and heads[0]["weights"] > 1e-6
    plain = told["candidates"][0]
    finalists = [each for each in told["candidates"] if each["finalist"]]
    assert plain["name"] == "plain" and plain["speed"] == {"1": 1.0, "128": 1.0} and len(finalists) > 2
    for each in finalists:
        assert each["positions"] == 16 * 30 and each["kld"]["low"] < each["kld"]["value"] < each["kld"]["high"]
        assert 0.9 < each["top1"]["value"] <= 1 and each["size"] > 2_000_000 and each["speed"]["128"] > 0


def test_the_frontier_is_monotone_and_the_chosen_one_is_better_than_plain(tuned: Line) -> None:
    told = report(tuned)
    rows = {each["name"]: each for each in told["candidates"]}
    best = [rows[name] for name in told["frontier"]]
    assert all(a["cost"] < b["cost"] and a["kld"]["value"] > b["kld"]["value"] for a, b in zip(best, best[1:]))  # noqa: B905
    chosen = rows[told["chosen"]]
    assert chosen["kld"]["value"] < 0.9 * rows["plain"]["kld"]["value"]
    assert chosen["relative_size"] <= told["limits"]["size"]


def test_make_int8_takes_the_recipe_and_makes_what_was_measured(built: Line, tuned: Line) -> None:
    recipe, told = tuned.root / "tune" / "recipe.toml", report(tuned)
    chosen = next(each for each in told["candidates"] if each["name"] == told["chosen"])
    loaded = load_recipe(recipe)
    assert all(list(getattr(loaded.int8, key)) == chosen["values"][key] for key in ("int8x2", "rotate", "groups"))
    assert loaded.gates == load_recipe(tuned.recipe).gates
    assert tuned.run(int8.STAGE, "--graphs", "step", recipe=recipe) == 0
    made = manifest.read(tuned.root / "int8").output("step.tflite")
    assert made.size == pytest.approx(chosen["size"], rel=0.05)
    plain, graph = (Graph.read(root / "int8" / "step.tflite") for root in (built.root, tuned.root))
    named = quantize.keeper(loaded.int8.int8x2)
    products = [
        o for o in plain.operators() if plain.code(o) == "FULLY_CONNECTED" and named(quantize.layer_name(plain, o))
    ]
    doubled = [o for o in graph.operators() if graph.operator_name(o).endswith(f";{ROWS}")]
    layers = [o for o in doubled if graph.code(o) == "FULLY_CONNECTED"]
    sums = [sum(each.code(o) == "SUM" for o in each.operators()) for each in (plain, graph)]
    assert sums[1] - sums[0] == len(layers) >= len(products)  # a layer in blocks is several
    turned = [
        quantize.keeper(loaded.int8.rotate)(o) for o in (quantize.layer_name(plain, o) for o in plain.operators())
    ]
    assert any(turned) == any(graph.code(o) == "CONV_2D" for o in graph.operators())
    assert products or any(turned)


def test_the_page_stands_alone(tuned: Line) -> None:
    page = (tuned.root / "tune" / "report.html").read_text(encoding="utf-8")
    assert "<svg" in page and "http" not in page and "<script" not in page and "src=" not in page
    assert report(tuned)["chosen"] in page.replace("&#43;", "+")


def test_equal_measurements_give_the_same_recipe(tuned: Line) -> None:
    before, told = records(tuned), report(tuned)
    recipe = (tuned.root / "tune" / "recipe.toml").read_bytes()
    finish(tuned, "--minutes", "0")
    again = report(tuned)
    assert {**again, "seconds": 0, "minutes": 0} == {**told, "seconds": 0, "minutes": 0}
    assert (tuned.root / "tune" / "recipe.toml").read_bytes() == recipe and records(tuned) == before


def test_which_layers_stay_at_eight_bits_is_found_for_int4(tuned: Line) -> None:
    finish(tuned, "--section", "int4", "--size", "0.8", "--minutes", "20")
    told, given = report(tuned, "tune-int4"), load_recipe(tuned.recipe)
    rows = {each["name"]: each for each in told["candidates"]}
    plain, chosen = rows["plain"], rows[told["chosen"]]
    unit = next(row for name, row in rows.items() if name.endswith("keep_int8 everywhere"))
    assert told["complete"] and unit["relative_size"] == 1 > 0.8 >= chosen["relative_size"] > plain["relative_size"]
    assert unit["kld"]["value"] < chosen["kld"]["value"] < 0.7 * plain["kld"]["value"]
    recipe = tuned.root / "tune-int4" / "recipe.toml"
    loaded = load_recipe(recipe)
    assert loaded.int4 and given.int4 and loaded.int8 == given.int8
    assert list(loaded.int4.keep_int8) == chosen["values"]["keep_int8"] != []
    assert loaded.int4.int8_tokens == given.int4.int8_tokens
    assert tuned.run(int4.STAGE, "--graphs", "step", recipe=recipe) == 0
    made = manifest.read(tuned.root / "int4").output("step.tflite")
    assert made.size == pytest.approx(chosen["size"], rel=0.05)


def test_a_static_recipe_is_refused(built: Line, tmp_path: Path) -> None:
    recipe = tmp_path / "static.toml"
    recipe.write_text(built.recipe.read_text(encoding="utf-8").replace('scheme = "dynamic"', 'scheme = "static"'))
    with begin(Line(artifacts=built.artifacts, recipe=recipe)) as process:
        assert process.wait() == 2
