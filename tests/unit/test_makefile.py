"""The Makefile: help, names, what rebuilds after which change. Runs make itself, without running a stage."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from pipeline.core.recipe import PROJECT
from pipeline.core.stage import model_name

MAKEFILE = (PROJECT / "Makefile").read_text(encoding="utf-8")
STAGES = ("fetch", "golden", "graph", "fp32", "fp16", "int8", "int8-static", "bundle", "verify", "publish")


def make(*arguments: str) -> str:
    done = subprocess.run(["make", "--no-print-directory", *arguments], cwd=PROJECT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def planned(*arguments: str) -> list[str]:
    """The stages that make would run, in order."""
    rows = re.findall(r"-m pipeline\.(?!plan\b)(\w+)(.*)", make("-n", *arguments))
    return [name + ("-static" if "--scheme static" in options else "") for name, options in rows]


@pytest.fixture
def finished(tmp_path: Path) -> tuple[str, ...]:
    """Settings of a small model in a folder for which every stage is finished."""
    model = tmp_path / "tiny"
    model.mkdir()
    (model / "config.json").write_text("{}")
    recipe = tmp_path / "recipe.toml"
    recipe.write_text((PROJECT / "pipeline" / "recipes" / "gemma3n.toml").read_text())
    settings = (f"MODEL_ID={model}", f"ARTIFACTS={tmp_path / 'out'}", f"RECIPE={recipe}")
    assert planned(*settings) != []
    for stage in STAGES:  # in the order of the graph, so that each is newer than what it reads
        folder = tmp_path / "out" / "tiny" / stage
        folder.mkdir()
        (folder / "manifest.json").write_text("{}")
    return settings


def test_help_lists_every_target_and_every_setting() -> None:
    text = make("help")
    listed = set(re.findall(r"^  ([a-z][\w-]*) ", text, flags=re.MULTILINE))
    phony = re.search(r"^\.PHONY: (.*)", MAKEFILE, flags=re.MULTILINE)
    assert phony
    assert listed == set(phony[1].split()) - {"$(ALTERNATIVE)"}
    settings = set(re.findall(r"^([A-Z_]+) \?=", MAKEFILE, flags=re.MULTILINE))
    assert settings == set(re.findall(r"^  ([A-Z_]+) ", text, flags=re.MULTILINE))


def test_a_clean_run_makes_every_stage_after_what_it_reads(tmp_path: Path) -> None:
    order = planned(f"ARTIFACTS={tmp_path}")
    assert sorted(order) == sorted(STAGES)
    assert order[0] == "fetch" and order[-2:] == ["verify", "publish"]
    assert order.index("graph") < min(order.index(name) for name in ("fp32", "fp16", "int8", "int8-static"))
    assert order.index("fp32") < order.index("int8-static"), "it takes its ranges from there"
    assert max(order.index("fp32"), order.index("int8")) < order.index("bundle")


def test_one_precision_alone_builds_only_what_it_needs(tmp_path: Path) -> None:
    for name in ("fp32", "fp16", "int8"):
        assert planned(name, f"ARTIFACTS={tmp_path}") == ["fetch", "graph", name]


def test_what_will_be_run_is_planned_first(tmp_path: Path) -> None:
    settings = (f"ARTIFACTS={tmp_path}", "REVISION=abc", "GRAPHS=bundle")
    for goals in (("int8",), ("golden", "fp32"), ("bundle",), ("publish",), ("chat",)):
        rows = re.findall(r"-m pipeline\.(\w+)(.*)", make("-n", *goals, *settings))
        assert rows[0][0] == "plan" and [name for name, _ in rows].count("plan") == 1
        assert "--revision abc" in rows[0][1] and "--graphs bundle" in rows[0][1]
        listed = rows[0][1].split("--stages ")[1].split()
        run = [name + ("-static" if "--scheme static" in options else "") for name, options in rows[1:]]
        assert set(listed) == set(run) - {"chat"}
    alone = make("-n", "plan", *settings)
    assert re.findall(r"-m pipeline\.(\w+)", alone) == ["plan"] and "publish" in alone


def test_graphs_leave_out_what_others_need(tmp_path: Path) -> None:
    recipe = (f"RECIPE={PROJECT / 'pipeline' / 'recipes' / 'gemma3n.toml'}", f"ARTIFACTS={tmp_path}")
    without = {"fp16", "int8-static"}
    assert set(STAGES) - set(planned(*recipe, "GRAPHS=bundle")) == without
    assert set(STAGES) - set(planned(*recipe, "GRAPHS=step")) == {"bundle"}
    plan = make("-n", *recipe, "GRAPHS=bundle")
    runs = re.findall(r"-m pipeline\.(\w+)(.*)", plan)
    assert {name for name, options in runs if "--graphs bundle" not in options} == {"fetch"}


def test_unknown_graphs_are_refused_with_a_sentence() -> None:
    done = subprocess.run(["make", "-n", "GRAPHS=decoder"], cwd=PROJECT, capture_output=True, text=True)
    assert done.returncode == 2
    assert "GRAPHS=decoder is unknown: step, bundle or all" in done.stderr


def test_nothing_changed_does_nothing(finished: tuple[str, ...]) -> None:
    assert planned(*finished) == []


@pytest.mark.parametrize(
    ("setting", "stages"),
    [
        ("DEVICE=cpu", ["golden", "verify", "publish"]),
        ("EVAL=README.md", ["golden", "verify", "publish"]),
        ("CALIBRATION=README.md", ["int8", "bundle", "int8-static", "verify", "publish"]),
        ("THREADS=1", []),
    ],
)
def test_a_changed_setting_rebuilds_what_depends_on_it(
    finished: tuple[str, ...], setting: str, stages: list[str]
) -> None:
    assert planned(*finished, setting) == stages


def test_a_changed_recipe_rebuilds_everything(finished: tuple[str, ...], tmp_path: Path) -> None:
    with (tmp_path / "recipe.toml").open("a") as stream:
        stream.write("# another limit\n")
    assert sorted(planned(*finished)) == sorted(STAGES)


def test_a_touched_but_equal_recipe_rebuilds_nothing(finished: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").touch()
    assert planned(*finished) == []


def test_a_changed_checkpoint_file_rebuilds_everything(finished: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "tiny" / "config.json").write_text('{"changed": true}')
    assert sorted(planned(*finished)) == sorted(STAGES)


def test_a_removed_manifest_rebuilds_that_stage_and_what_follows(finished: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "out" / "tiny" / "int8" / "manifest.json").unlink()
    assert planned(*finished) == ["int8", "bundle", "verify", "publish"]


def test_a_static_recipe_makes_dynamic_the_alternative(tmp_path: Path) -> None:
    recipe = tmp_path / "static.toml"
    text = (PROJECT / "pipeline" / "recipes" / "gemma3n.toml").read_text()
    recipe.write_text(re.sub(r'^scheme = ".*"', 'scheme = "static"', text, flags=re.MULTILINE))
    plan = make("-n", f"RECIPE={recipe}", f"ARTIFACTS={tmp_path / 'out'}")
    assert "--scheme dynamic" in plan
    assert "--variants fp32 fp16 int8 int8-dynamic" in plan


def test_sixteen_bits_are_built_where_they_are_asked_for(tmp_path: Path) -> None:
    out = f"ARTIFACTS={tmp_path / 'out'}"
    assert "--scheme static16" in make("-n", "int8-static16", out)
    assert "static16" not in make("-n", out)
    judged = make("-n", "verify", out, "VARIANTS=fp32 int8-static16")
    assert "--scheme static16" in judged and "--variants fp32 int8-static16" in judged


@pytest.mark.parametrize("model_id", ["examples/tiny-gemma3n", "examples/tiny-gemma3n/", "google/gemma-3n-E2B-it", "."])
def test_make_and_the_stages_agree_on_the_models_folder(
    model_id: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(PROJECT)
    plan = make("-n", "all", f"MODEL_ID={model_id}", f"ARTIFACTS={tmp_path}")
    assert f"{tmp_path}/{model_name(model_id)}/publish" in plan


def test_in_docker_only_a_download_has_a_network(tmp_path: Path) -> None:
    plan = make("-n", "IN=docker", "MODEL_ID=google/gemma-3n-E2B-it", f"ARTIFACTS={tmp_path}")
    runs = [row for row in plan.replace("\\\n", " ").splitlines() if "docker run" in row]
    commands = {row.rsplit("-m pipeline.", 1)[1].split()[0]: row for row in runs}
    online = [stage for stage, row in commands.items() if "--network none" not in row]
    assert len(runs) == len(STAGES) + 1
    assert online == ["plan", "fetch"]
    assert [stage for stage, row in commands.items() if "HF_TOKEN" in row] == ["plan", "fetch"]
    assert "HF_TOKEN=" not in plan, "the token goes by name, so that no list of processes shows it"


def test_in_docker_paths_are_mounted_where_they_are(finished: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "out" / "tiny" / "fetch" / "manifest.json").unlink()
    plan = make("-n", "IN=docker", *finished)
    assert f"-v {tmp_path / 'tiny'}:{tmp_path / 'tiny'}:ro" in plan
    assert f"-v {tmp_path / 'out'}:{tmp_path / 'out'}" in plan
    assert f"--model-id {tmp_path / 'tiny'} --artifacts {tmp_path / 'out'}" in plan


@pytest.mark.parametrize("setting", ["MODEL_ID=two words", "MODEL_ID=", "IN=podman"])
def test_a_setting_that_can_not_work_is_refused_with_a_sentence(setting: str) -> None:
    done = subprocess.run(["make", "-n", setting], cwd=PROJECT, capture_output=True, text=True)
    assert done.returncode == 2
    assert re.search(r"one name each|unknown: leave it out", done.stderr)


def test_setup_says_what_to_do_without_python_311(tmp_path: Path) -> None:
    done = subprocess.run(
        [PROJECT / "tools" / "setup.sh", tmp_path / "env", "cpu"],
        env={"PATH": "/usr/bin:/bin", "PYTHON": "python3.11-that-is-not-there"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert "Python 3.11 is needed" in done.stderr and "make setup PYTHON=" in done.stderr
    assert not (tmp_path / "env").exists()
