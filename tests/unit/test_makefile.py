"""The Makefile: help, names, what rebuilds after which change. Runs make itself, without running a stage."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from pipeline.core.graph import model_name
from pipeline.core.recipe import DEFAULT, PROJECT, load

MAKEFILE = (PROJECT / "Makefile").read_text(encoding="utf-8")
STAGES = ("fetch", "golden", "graph", "fp32", "fp16", "int8", "int4", "int8-static", "bundle", "verify", "publish")


def make(*arguments: str) -> str:
    done = subprocess.run(["make", "--no-print-directory", *arguments], cwd=PROJECT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def planned(*arguments: str) -> list[str]:
    """The stages that make would run, in order."""
    rows = re.findall(r"-m pipeline\.(?!plan\b|template\b)(\w+)(.*)", make("-n", *arguments))
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


def test_make_says_at_its_end_what_the_stages_took(finished: tuple[str, ...], tmp_path: Path) -> None:
    for stage, seconds in {"graph": 17.25, "verify": 101.5}.items():
        run = {"processor_seconds": 400.0, "seconds": seconds}
        (tmp_path / "out" / "tiny" / stage / "run.json").write_text(json.dumps(run, indent=2))
    *_, command = make("-n", "all", *finished).partition("find ")
    said = subprocess.run(["bash", "-c", f"find {command}"], capture_output=True, text=True, check=True).stdout
    assert said == "took:    1:58 minutes in its stages; make plan says it of each\n"


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
    for name in ("fp32", "fp16", "int8", "int4"):
        assert planned(name, f"ARTIFACTS={tmp_path}") == ["fetch", "graph", name]


def test_int4_is_bundled_and_its_step_graph_judged_only_where_the_recipe_demands_it(tmp_path: Path) -> None:
    shipped, recipe = PROJECT / "pipeline" / "recipes" / "gemma3.toml", tmp_path / "recipe.toml"
    text = shipped.read_text().replace('optional = ["int4"]', "optional = []")
    recipe.write_text(text.replace('precisions = ["fp32", "int8"]', 'precisions = ["fp32", "int8", "int4"]'))
    for own, variants in ((shipped, "fp32 fp16 int8 int8-static"), (recipe, "fp32 fp16 int8 int4 int8-static")):
        settings = (f"ARTIFACTS={tmp_path}", f"RECIPE={own}")
        order = planned(*settings)
        assert order.index("graph") < order.index("int4") < min(order.index("bundle"), order.index("verify"))
        assert f"--variants {variants}" in make("-n", *settings)
    assert "int4" not in planned(f"ARTIFACTS={tmp_path}", f"RECIPE={shipped}", "GRAPHS=step")


def test_what_will_be_run_is_planned_first(tmp_path: Path) -> None:
    settings = (f"ARTIFACTS={tmp_path}", "REVISION=abc", "GRAPHS=bundle")
    for goals in (("int8",), ("golden", "fp32"), ("bundle",), ("publish",), ("chat",)):
        rows = re.findall(r"-m pipeline\.(\w+)(.*)", make("-n", *goals, *settings))
        assert rows[0][0] == "plan" and [name for name, _ in rows].count("plan") == 1
        assert "--revision abc" in rows[0][1] and "--graphs bundle" in rows[0][1]
        listed = rows[0][1].split("--stages ")[1].split()
        run = [name + ("-static" if "--scheme static" in options else "") for name, options in rows[1:]]
        assert set(listed) == set(run) - {"chat", "template"}
    alone = make("-n", "plan", *settings)
    assert re.findall(r"-m pipeline\.(\w+)", alone) == ["plan"] and "publish" in alone


def test_the_template_is_proven_right_after_the_checkpoint_is_there(tmp_path: Path) -> None:
    """Hours of work would be for nothing otherwise; where no bundle is made, the template does not matter."""
    for goals in (("golden",), ("int8",), ("bundle",), ("publish",)):
        order = re.findall(r"-m pipeline\.(\w+)", make("-n", *goals, f"ARTIFACTS={tmp_path}"))
        assert order[:3] == ["plan", "fetch", "template"]
        assert order.count("template") == 1
    assert "pipeline.template" not in make("-n", "int8", "GRAPHS=step", f"ARTIFACTS={tmp_path}")
    assert "pipeline.template" not in make("-n", "fetch", f"ARTIFACTS={tmp_path}")


def test_graphs_leave_out_what_others_need(tmp_path: Path) -> None:
    recipe = (f"RECIPE={PROJECT / 'pipeline' / 'recipes' / 'gemma3n.toml'}", f"ARTIFACTS={tmp_path}")
    without = {"fp16", "int8-static"}
    assert set(STAGES) - set(planned(*recipe, "GRAPHS=bundle")) == without
    assert set(STAGES) - set(planned(*recipe, "GRAPHS=step")) == {"bundle", "int4"}
    plan = make("-n", *recipe, "GRAPHS=bundle")
    runs = re.findall(r"-m pipeline\.(\w+)(.*)", plan)
    assert {name for name, options in runs if "--graphs bundle" not in options} == {"fetch", "template"}


def test_unknown_graphs_are_refused_with_a_sentence() -> None:
    done = subprocess.run(["make", "-n", "GRAPHS=decoder"], cwd=PROJECT, capture_output=True, text=True)
    assert done.returncode == 2
    assert "GRAPHS=decoder is unknown: step, bundle or all" in done.stderr


def test_towers_are_made_for_bundles_where_they_are_asked_for(tmp_path: Path) -> None:
    settings = (f"ARTIFACTS={tmp_path}", "GRAPHS=bundle")
    assert "towers" not in planned("verify", *settings)
    order = planned("verify", *settings, "TOWERS=audio")
    assert order.index("fetch") < order.index("towers") < order.index("bundle")
    rows = re.findall(r"-m pipeline\.(\w+)(.*)", make("-n", "verify", *settings, "TOWERS=audio"))
    told = {name for name, options in rows if "--towers audio" in options}
    assert told == {"plan", "fetch", "template", "golden", "towers", "bundle", "verify"}
    done = subprocess.run(["make", "-n", "TOWERS=ears"], cwd=PROJECT, capture_output=True, text=True)
    assert (done.returncode, "TOWERS=ears is unknown: none, vision, audio" in done.stderr) == (2, True)


@pytest.mark.parametrize("sharded", [True, False])
def test_towers_that_a_checkpoint_has_are_taken_unless_somebody_says_none(sharded: bool, tmp_path: Path) -> None:
    """By its tensors, and with what their reference needs; a text model, or a family without, has none."""

    def towers(folder: str, *said: str, graphs: str = "bundle") -> tuple[str, bool]:
        shown = make("-n", "golden", f"GRAPHS={graphs}", f"ARTIFACTS={tmp_path / 'a'}", f"MODEL_ID={folder}", *said)
        told = set(re.findall(r"-m pipeline.golden.*--towers (\S+)", shown))
        there = (PROJECT / ".venv-vision" / ".ready").exists()
        return ",".join(told), there or "locks/vision.txt" in shown

    def model(name: str, model_type: str, *parts: str) -> str:
        folder = tmp_path / name
        folder.mkdir()
        config = {"model_type": model_type, "vision_config": {"x": 1}, "audio_config": {"x": 1}}
        (folder / "config.json").write_text(json.dumps(config))
        names = {f"model.{part}.x.weight": "model-1.safetensors" for part in ("language_model", *parts)}
        if sharded:
            (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
        else:
            header = json.dumps(names).encode()
            (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
        return str(folder)

    both = model("both", "gemma3n", "audio_tower", "embed_audio", "vision_tower", "embed_vision")
    assert towers(both) == ("vision,audio", True)
    assert towers(both, "TOWERS=none")[0] == "", "which is what a stage takes that is told nothing"
    assert towers(both, graphs="step")[0] == "", "a step graph has none"
    assert towers(both, "TOWERS=audio")[0] == "audio"
    assert towers(model("ears", "gemma3n", "audio_tower", "embed_audio"))[0] == "audio"
    assert towers(model("text", "gemma3n", "embed_vision"))[0] == ""
    assert towers(model("other", "gemma3", "vision_tower"))[0] == ""
    if sharded:
        odd = model("odd", "gemma3n", "vision_tower")
        (Path(odd) / "model.safetensors.index.json").write_text('{"metadata": {}}')
        assert towers(odd)[0] == "", "fetch will say what is wrong with it"


def test_eyes_bring_what_their_reference_needs(tmp_path: Path) -> None:
    # As if the lock were new, so that what is installed here already shows as well.
    settings = ("-n", "-W", "locks/vision.txt", f"ARTIFACTS={tmp_path}", "GRAPHS=bundle")
    plain, sees = make("golden", *settings), make("golden", *settings, "TOWERS=vision,audio")
    assert sees.index("-r locks/vision.txt") < sees.index("-m pipeline.golden")
    assert "--towers vision,audio" in sees
    assert "locks/vision.txt" not in plain
    assert "locks/vision.txt" in make("reproduce", *settings, "TOWERS=vision"), "it runs golden again"
    for goals in (("plan",), ("fetch", "towers")):
        assert "locks/vision.txt" not in make(*goals, *settings, "TOWERS=vision"), "the reference alone sees by it"


def test_no_towers_are_the_same_said_and_unsaid(tmp_path: Path) -> None:
    """Where there are none nothing is made again, but whoever starts a job elsewhere hands it on."""
    settings = ("-n", f"ARTIFACTS={tmp_path}", "GRAPHS=bundle")

    def told(*words: str) -> dict[str, str]:
        make("verify", *settings, *words)
        return {file.name: file.read_text() for file in (tmp_path / "tiny-gemma3n" / ".inputs").iterdir()}

    unsaid, none = told(), told("TOWERS=none")
    assert {name for name in unsaid if unsaid[name] != none[name]} <= {"rules.mk"}
    assert "override TOWERS := none\n" in none["rules.mk"]


def test_a_picture_is_said_as_image_where_that_is_no_container(tmp_path: Path) -> None:
    settings = ("-n", f"ARTIFACTS={tmp_path}", "GRAPHS=bundle", "TOWERS=vision")
    told = make("run", *settings, "IMAGE=a photo's.png")
    assert f"--image '{PROJECT}/a photo'\\''s.png'" in told
    assert "--image" not in make("run", *settings)
    assert "--image" not in make("chat", *settings, "IMAGE=name")
    boxed = make("run", *settings, "IN=docker", "IMAGE=name@sha256:0", "PICTURE=/x/photo.png")
    assert "--image '/x/photo.png'" in boxed
    assert "/x/photo.png:/x/photo.png:ro" in boxed


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["CLUSTER=host:8786"], "neither a scheduler's address nor local workers"),
        (["CLUSTER=local:2", "IN=docker"], "has no network, and so no CLUSTER="),
    ],
)
def test_a_cluster_that_cannot_be_is_refused_with_a_sentence(settings: list[str], said: str) -> None:
    done = subprocess.run(["make", "-n", *settings], cwd=PROJECT, capture_output=True, text=True)
    assert done.returncode == 2 and said in done.stderr


def test_a_cluster_is_told_to_the_stages_with_shards_and_installed_before(tmp_path: Path) -> None:
    said = make("-n", "verify", "CLUSTER=tcp://host:8786", f"ARTIFACTS={tmp_path}")
    assert re.findall(r"-m pipeline\.(\w+).*--cluster tcp://host:8786", said) == ["golden", "verify"]
    environment = PROJECT / ".venv" / ".cluster"
    assert environment.exists() or said.index("locks/cluster.txt") < said.index("-m pipeline.golden")
    plain = make("-n", "verify", f"ARTIFACTS={tmp_path / 'other'}")
    assert "--cluster" not in plain and "locks/cluster.txt" not in plain


def test_nothing_changed_does_nothing(finished: tuple[str, ...]) -> None:
    assert planned(*finished) == []


@pytest.mark.parametrize(
    ("setting", "stages"),
    [
        ("DEVICE=cpu", ["golden", "verify", "publish"]),
        ("EVAL=README.md", ["golden", "verify", "publish"]),
        ("CALIBRATION=README.md", ["int8", "int8-static", "bundle", "verify", "publish"]),
        ("THREADS=1", []),
        ("CLUSTER=local:4", []),
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


def test_context_is_the_recipe_with_another_cache(finished: tuple[str, ...], tmp_path: Path) -> None:
    said = make("-n", "bundle", *finished, "CONTEXT=8192")
    recipe = next(iter(tmp_path.rglob(".inputs/recipe-8192.toml")))
    assert f"--recipe {recipe}" in said
    assert load(recipe).bundle == dataclasses.replace(load(DEFAULT).bundle, cache_length=8192)
    assert load(recipe).name == "gemma3n with CONTEXT=8192"
    assert (load(recipe).context, load(DEFAULT).context) == ("8192", "")
    assert planned("bundle", *finished, "CONTEXT=8192")[0] == "fetch"


def test_a_setting_that_the_environment_has_is_told(tmp_path: Path) -> None:
    """It is taken, as all are; nobody is to wonder where it came from."""
    command = ["make", "-n", "bundle", f"ARTIFACTS={tmp_path}"]
    there = {**os.environ, "CONTEXT": "8192", "TAG": "v1", "TASK": ""}  # an empty one says nothing
    there |= {"PYTHONHASHSEED": "0", "OMP_WAIT_POLICY": "PASSIVE", "SOURCE_DATE_EPOCH": "0"}  # as within `make test`

    def told(*more: str, **own: str) -> str:
        done = subprocess.run([*command, *more], cwd=PROJECT, env={**there, **own}, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return "".join(line for line in done.stderr.splitlines() if "environment" in line)

    assert told().startswith("warning: the environment has what is a setting here: CONTEXT TAG (")
    assert "here: TAG (" in told("CONTEXT=")
    assert "`env -u NAME make …` leaves one out" in told(), "`make MODEL_ID=` would name nothing"
    assert "here: CONTEXT TAG (" in told(IN="image", READY="")
    assert "environment" not in subprocess.run(command, cwd=PROJECT, capture_output=True, text=True).stderr


@pytest.mark.parametrize("said", ["CONTEXT=8k", "CONTEXT=0", "CONTEXT=-1", "CONTEXT=64", "CONTEXT=1;date"])
def test_a_context_that_can_not_be_is_refused(said: str, tmp_path: Path) -> None:
    assert said in refused("bundle", said, f"ARTIFACTS={tmp_path}")
    assert "no CONTEXT=" in refused("job", "CONTEXT=8192", f"ARTIFACTS={tmp_path}")


def test_a_context_that_is_too_short_says_so(tmp_path: Path) -> None:
    assert "do:    say a larger CONTEXT=" in refused("bundle", "CONTEXT=64", f"ARTIFACTS={tmp_path}")


def test_a_release_is_what_its_description_says(tmp_path: Path) -> None:
    (release,) = (PROJECT / "releases").glob("*.toml")
    said = make("-n", "release", f"RELEASE={release}", f"ARTIFACTS={tmp_path}", "CONTEXT=8192", "TOWERS=vision")
    assert "-m pipeline.publish" in said and "8192" not in said and "--towers" not in said


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
    assert len(runs) == len(STAGES) + 2  # plan, and the proof of the template
    assert online == ["plan", "fetch"]
    assert [stage for stage, row in commands.items() if "HF_TOKEN" in row] == ["plan", "fetch"]
    assert "HF_TOKEN=" not in plan, "the token goes by name, so that no list of processes shows it"


@pytest.mark.parametrize(("resource", "shown"), [("org/model", []), ("somebody", ["plan", "fetch"])])
def test_in_docker_an_identity_that_reads_is_shown_by_what_downloads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, resource: str, shown: list[str]
) -> None:
    monkeypatch.setenv("HF_OIDC_RESOURCE", resource)
    plan = make("-n", "fetch", "IN=docker", "MODEL_ID=google/gemma-3n-E2B-it", f"ARTIFACTS={tmp_path}")
    runs = [row for row in plan.replace("\\\n", " ").splitlines() if "docker run" in row]
    assert [row.rsplit("-m pipeline.", 1)[1].split()[0] for row in runs if "-e HF_OIDC_RESOURCE" in row] == shown


def test_publish_uploads_after_the_stage_and_whenever_it_is_asked_to(finished: tuple[str, ...], tmp_path: Path) -> None:
    folder = tmp_path / "out" / "tiny" / "publish"
    assert planned("publish", *finished) == []
    assert planned("publish", *finished, "HF_REPO=org/model") == ["upload"]
    plan = make("-n", "publish", *finished, "HF_REPO=org/model")
    assert f"-m pipeline.upload {folder} --repository 'org/model'" in plan and "--confirm" not in plan
    (folder / "manifest.json").unlink()
    settings = ("HF_REPO=org/it's", "CONFIRM=yes", "PARENT=abc", "TAG=v1")
    assert planned("publish", *finished, *settings) == ["publish", "upload"]
    plan = make("-n", "publish", *finished, *settings)
    assert r"--repository 'org/it'\''s' --tag 'v1' --parent 'abc' --confirm" in plan


@pytest.mark.parametrize("settings", [("CONFIRM=yes",), ("CONFIRM=1", "HF_REPO=org/model")])
def test_only_a_clear_yes_uploads(settings: tuple[str, ...]) -> None:
    done = subprocess.run(["make", "-n", "publish", *settings], cwd=PROJECT, capture_output=True, text=True)
    assert done.returncode == 2 and "CONFIRM=yes, together with HF_REPO=owner/name" in done.stderr


def test_in_docker_what_talks_to_the_hub_has_a_network_and_the_token_by_name(tmp_path: Path) -> None:
    settings = ("IN=docker", f"ARTIFACTS={tmp_path}", "HF_REPO=org/model")
    plan = make("-n", "publish", "check", *settings, "FILES=org/model@main").replace("\\\n", " ")
    runs = [row for row in plan.splitlines() if "docker run" in row]
    online = {row.rsplit("-m pipeline.", 1)[1].split()[0]: row for row in runs if "--network none" not in row}
    assert set(online) == {"upload", "check"}
    assert all(" -e HF_TOKEN " in row for row in online.values()) and "HF_TOKEN=" not in plan
    assert "-e HF_OIDC_RESOURCE" in online["upload"] and "OIDC" not in online["check"]
    assert "--network none" in make("-n", "check", "IN=docker", f"FILES={tmp_path}").replace("\\\n", " ")


def test_the_page_is_made_of_what_is_finished_with_libraries_before_all_else(finished: tuple[str, ...]) -> None:
    assert planned("page", *finished) == ["page"]
    plan = make("-n", "-W", "web/package-lock.json", "page", *finished)
    assert 0 < plan.index("npm ci --prefix web") < plan.index("-m pipeline.plan") < plan.index("-m pipeline.page")
    assert "npm" not in make("-n", "-W", "web/package-lock.json", "publish", *finished)
    assert "-m pipeline.serve" in make("-n", "page", "SERVE=yes", *finished)
    assert "the container holds no page" in refused("page", "IN=docker", *finished)


def test_a_space_is_the_page_and_the_papers_and_goes_up_alone(finished: tuple[str, ...], tmp_path: Path) -> None:
    assert planned("publish", "SPACE=org/model", *finished) == ["page", "space", "upload"]
    plan = make("-n", "publish", "SPACE=org/model", "CONFIRM=yes", "TAG=v1", *finished)
    folder = tmp_path / "out" / "tiny" / "space"
    assert f"-m pipeline.upload {folder} --repository 'org/model' --tag 'v1'  --confirm --space" in plan
    assert "/publish --repository" not in plan
    assert "say `make publish` twice" in refused("publish", "SPACE=a/b", "HF_REPO=a/b", *finished)
    assert "the container holds no page" in refused("publish", "SPACE=a/b", "IN=docker", *finished)


def test_in_docker_paths_are_mounted_where_they_are(finished: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "out" / "tiny" / "fetch" / "manifest.json").unlink()
    plan = make("-n", "IN=docker", *finished)
    assert f"-v {tmp_path / 'tiny'}:{tmp_path / 'tiny'}:ro" in plan
    assert f"-v {tmp_path / 'out'}:{tmp_path / 'out'}" in plan
    assert f"--model-id {tmp_path / 'tiny'} --artifacts {tmp_path / 'out'}" in plan


def test_in_the_image_what_needs_no_hub_is_offline_and_sees_no_token(tmp_path: Path) -> None:
    settings = ("MODEL_ID=google/gemma-3n-E2B-it", f"ARTIFACTS={tmp_path}", "HF_REPO=org/model")
    rows = re.findall(r"^(.*) -m pipeline\.(\w+)", make("-n", "publish", "IN=image", *settings), flags=re.MULTILINE)
    ways = {name: before for before, name in rows}
    online = {"plan", "fetch", "upload"}
    assert online < set(ways) and "verify" in ways
    for name, before in ways.items():
        assert before.strip() == ("python" if name in online else "env -u HF_TOKEN HF_HUB_OFFLINE=1 python"), name


@pytest.mark.parametrize(("image", "built"), [("mine", True), (f"ghcr.io/me/it@sha256:{'5' * 64}", False)])
def test_an_image_with_a_digest_is_not_built(tmp_path: Path, image: str, built: bool) -> None:
    plan = make("-n", "fetch", "IN=docker", f"IMAGE={image}", f"ARTIFACTS={tmp_path}")
    assert f" {image} python -m pipeline.fetch" in plan and ("docker build" in plan) is built


@pytest.mark.parametrize("setting", ["MODEL_ID=two words", "MODEL_ID=", "IN=podman"])
def test_a_setting_that_can_not_work_is_refused_with_a_sentence(setting: str) -> None:
    done = subprocess.run(["make", "-n", setting], cwd=PROJECT, capture_output=True, text=True)
    assert done.returncode == 2
    assert re.search(r"can't tell such a name from its own signs|unknown: leave it out", done.stderr)


HOSTILE = (
    "$(touch${IFS}PWNED)",
    "`touch${IFS}PWNED`",
    "; touch PWNED ;",
    "'; touch PWNED; '",
    '"; touch PWNED; "',
    "a\ntouch PWNED\n",
)
"""What runs a command where a name reaches a shell or Make as text."""


def refused(*arguments: str) -> str:
    """What make says when it refuses the settings."""
    done = subprocess.run(["make", "-n", *arguments], cwd=PROJECT, capture_output=True, text=True)
    assert done.returncode == 2, done.stdout
    return done.stderr


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("where", [(), ("IN=docker",)], ids=["here", "docker"])
def test_no_name_in_a_checkpoint_folder_runs_as_a_command(
    finished: tuple[str, ...], tmp_path: Path, name: str, where: tuple[str, ...]
) -> None:
    elsewhere = tmp_path / f"blobs {name}"
    elsewhere.mkdir()
    for kind in ("json", "safetensors", "md"):
        (elsewhere / f"{name}.{kind}").write_text("{}")
        (tmp_path / "tiny" / f"{name}.{kind}").symlink_to(elsewhere / f"{name}.{kind}")
        (tmp_path / "tiny" / f"LICENSE {name}.{kind}").write_text("")
    if where and "\n" in name:
        assert "can't be mounted into a container" in refused(*finished, *where)
    else:
        assert sorted(planned(*finished, *where)) == sorted(STAGES), "new files are seen"
        make("-n", "inspect", "check", *finished, *where, f"FILE={tmp_path}")
    assert not list(PROJECT.glob("PWNED*")) and not list(tmp_path.rglob("PWNED*"))


@pytest.mark.parametrize("name", [name for name in HOSTILE if "\n" not in name])
def test_a_folder_that_make_can_not_name_is_refused(tmp_path: Path, name: str) -> None:
    folder = tmp_path / name
    folder.mkdir()
    (tmp_path / "link").symlink_to(folder)
    for setting in (
        f"MODEL_ID={tmp_path / 'link'}",
        f"MODEL_ID={folder}",
        f"ARTIFACTS={folder}",
        f"RECIPE={folder}/r.toml",
    ):
        said = refused(setting.replace("$", "$$"))
        assert "can't tell such a name from its own signs" in said and "do:    rename the folder" in said
    assert not list(PROJECT.glob("PWNED*"))


@pytest.mark.parametrize("name", ["$(shell touch PWNED)", "$(touch PWNED)", "${HOME}", "a$b"])
@pytest.mark.parametrize("setting", ["MODEL_ID", "ARTIFACTS", "RECIPE", "EVAL", "PROMPT", "FILE"])
def test_a_setting_is_no_text_of_make(tmp_path: Path, setting: str, name: str) -> None:
    value = f"{tmp_path}/{name}"
    given_ = [[f"{setting}={value}"], []], [{}, {setting: value}]
    for arguments, environment in zip(*given_, strict=True):
        done = subprocess.run(
            ["make", "-n", *arguments], cwd=PROJECT, env=os.environ | environment, capture_output=True, text=True
        )
        assert done.returncode == 2 and f"{setting}={value} has a dollar sign" in done.stderr
    assert not list(PROJECT.glob("PWNED*"))


@pytest.mark.parametrize("setting", ["PROMPT", "LICENCE_OVERRIDE", "MODEL_ID", "FILE"])
def test_a_setting_of_several_lines_is_refused(tmp_path: Path, setting: str) -> None:
    """Make would take the second line for a command, or for a rule of its own."""
    value = f"one\n\ttouch {tmp_path}/PWNED; '"
    given_ = [[f"{setting}={value}"], []], [{}, {setting: value}]
    for arguments, environment in zip(*given_, strict=True):
        command = ["make", "-n", "run", "publish", *arguments]
        done = subprocess.run(command, cwd=PROJECT, env=os.environ | environment, capture_output=True, text=True)
        assert done.returncode == 2 and f"{setting} has a line break" in done.stderr


def test_two_folders_of_one_name_are_two_models(finished: tuple[str, ...], tmp_path: Path) -> None:
    """Also where every file has the name, size and time of the other's."""
    other = tmp_path / "elsewhere" / "tiny"
    shutil.copytree(tmp_path / "tiny", other)
    settings = tuple(row.replace(str(tmp_path / "tiny"), str(other)) for row in finished)
    assert sorted(planned(*settings)) == sorted(STAGES)


@pytest.mark.parametrize("goal", ["clean", "fetch"])
@pytest.mark.parametrize("inside", ["", "/newest/tiny"], ids=["the folder itself", "a folder in it"])
def test_results_never_lie_where_the_checkpoint_does(tmp_path: Path, goal: str, inside: str) -> None:
    """`make clean` removes them, and a stage what its own folder holds."""
    model = tmp_path / "models" / f"tiny{inside}"
    model.mkdir(parents=True)
    (model / "config.json").write_text("{}")
    (tmp_path / "link").symlink_to(tmp_path / "models")
    for artifacts in (tmp_path / "models", tmp_path / "link"):
        said = refused(goal, f"MODEL_ID={model}", f"ARTIFACTS={artifacts}")
        assert "where the checkpoint" in said and "do:    set ARTIFACTS= to another folder" in said
    adapter = tmp_path / "adapter" / "tiny"
    adapter.mkdir(parents=True)
    assert "where the checkpoint" in refused(goal, f"MODEL_ID={adapter}", f"BASE={model}", f"ARTIFACTS={artifacts}")
    assert list(model.iterdir()) == [model / "config.json"]


ODD_TOML = {
    "over several lines": ("bundle.precisions", 'precisions = [\n    "fp32", # why\n\n    "int8",\n  ]'),
    "in single quotes": ("graphs", "graphs = 'bundle'"),
    "indented": ("int8.gptq", "   gptq = true"),
    "inline": ("int8", 'int8 = { scheme = "dynamic", calibration_samples = 8, gptq = true }'),
    "a text in single quotes": ("corpus.calibration", "calibration = '{text}'"),
}


@pytest.mark.parametrize("way", ODD_TOML)
def test_make_reads_a_recipe_as_python_does(tmp_path: Path, way: str) -> None:
    """There is one parser: what sed and awk read of these was another pipeline."""
    place, line = ODD_TOML[way]
    text, recipe = tmp_path / "text.txt", tmp_path / "recipe.toml"
    text.write_text("Once.")
    section, _, key = place.rpartition(".")
    rows, current = list[str](), ""
    for row in (PROJECT / "pipeline" / "recipes" / "gemma3n.toml").read_text().splitlines():
        current = match[1] if (match := re.match(r"\[(\w+)\]", row)) else current
        if current == section and re.match(rf"{key}\s*=", row) or way == "inline" and current == "int8":
            continue
        rows.append(row)
    first = next((place for place, row in enumerate(rows) if row.startswith("[")), 0)
    rows.insert(
        rows.index(f"[{section}]") + 1 if section else first, line.format(text=text) if "{text}" in line else line
    )
    recipe.write_text("\n".join(rows) + "\n")
    settings = (f"RECIPE={recipe}", f"ARTIFACTS={tmp_path / 'out'}")
    loaded, order = load(recipe), planned(*settings)
    assert ("moments" in order) is loaded.int8.gptq is ("gptq" in line)
    assert ("int8-static" in order) is (loaded.graphs == "all") is (way != "in single quotes")
    assert order.count("bundle") == order.count("fp32") == 1
    recorded = (tmp_path / "out" / "tiny-gemma3n" / ".inputs" / "int8").read_text()
    assert (str(text) in recorded) is (way == "a text in single quotes")


def test_make_says_what_to_do_without_python_and_helps_all_the_same(tmp_path: Path) -> None:
    for name in ("bash", "sed", "awk", "git", "sh", "env"):
        (tmp_path / name).symlink_to(shutil.which(name) or name)
    command = [shutil.which("make") or "make", "PY=/nowhere/python"]
    environment = {"PATH": str(tmp_path)}
    done = subprocess.run([*command, "-n", "int8"], cwd=PROJECT, capture_output=True, text=True, env=environment)
    assert done.returncode == 2 and "3.11, 3.12 or 3.13 is needed" in done.stderr and "PYTHON=" in done.stderr
    helped = subprocess.run([*command, "help"], cwd=PROJECT, capture_output=True, text=True, env=environment)
    assert helped.returncode == 0 and "MODEL_ID" in helped.stdout


def setup(
    folder: Path, lock: str, pythons: dict[str, str], machine: str = "Linux x86_64", **settings: str
) -> tuple[int, str]:
    """Run set-up where only `pythons` are: name → what it fails, of `version`, `venv`, `3.11`. It ends at venv."""
    for name in ("bash", "sed", "rm", "env", "dirname", "basename"):
        (folder / name).symlink_to(shutil.which(name) or name)
    (folder / "uname").write_text(f'#!{folder}/bash\necho "{machine}"\n')
    (folder / "uname").chmod(0o755)
    for name, lacks in pythons.items():
        (folder / name).write_text(
            f"""#!{folder}/bash
case "$2" in
*"<="*) [[ "{lacks}" != *version* ]] ;;
*ensurepip*) [[ "{lacks}" != *venv* ]] ;;
*"!="*) [[ "{lacks}" != *3.11* ]] ;;
venv) echo "{name} makes it" >&2; exit 9 ;;
esac
"""
        )
        (folder / name).chmod(0o755)
    command = [PROJECT / "tools" / "setup.sh", folder / "made", lock]
    done = subprocess.run(command, env={"PATH": str(folder), **settings}, capture_output=True, text=True)
    assert not (folder / "made").exists()
    return done.returncode, done.stderr


@pytest.mark.parametrize(
    ("pythons", "chosen"),
    [
        ({"python3.11": "", "python3.12": "3.11", "python3": "3.11"}, "python3.11"),
        ({"python3.11": "version", "python3.12": "3.11", "python3": "3.11"}, "python3.12"),  # a shim of nothing
        ({"python3.11": "venv", "python3.13": "3.11"}, "python3.13"),
        ({"python3": "3.11"}, "python3"),
    ],
)
def test_setup_finds_a_python_that_the_locks_are_for(tmp_path: Path, pythons: dict[str, str], chosen: str) -> None:
    code, said = setup(tmp_path, "cuda", pythons)
    assert code == 9 and f"{chosen} makes it" in said
    assert f"made is made from {chosen}\n" in said


@pytest.mark.parametrize(
    ("lock", "pythons", "settings", "reason"),
    [
        ("cuda", {}, {}, "Python 3.11, 3.12 or 3.13 is needed"),
        ("cuda", {"python3": "version"}, {}, "none called python3.11 python3.12 python3.13 python3"),
        ("cuda", {"python3": ""}, {"PYTHON": "python3.11"}, "none called python3.11\n"),
        ("cuda", {"python3.12": "venv"}, {}, "apt install python3.12-venv"),
        ("cpu", {"python3.12": "3.11"}, {}, "make setup LOCK=cuda"),
    ],
)
def test_setup_says_what_to_do_without_a_python_that_fits(
    tmp_path: Path, lock: str, pythons: dict[str, str], settings: dict[str, str], reason: str
) -> None:
    code, said = setup(tmp_path, lock, pythons, **settings)
    assert code == 2 and reason in said, said


@pytest.mark.parametrize(
    ("machine", "lock", "reason"),
    [
        ("Darwin arm64", "cpu", "locks/cpu.txt is not for this machine, Darwin arm64"),
        ("Darwin arm64", "cuda", "locks/cuda.txt is not for this machine"),
        ("Linux x86_64", "macos", "locks/macos.txt is not for this machine, Linux x86_64"),
        ("Darwin x86_64", "auto", "for Linux on x86-64 and macOS on arm64, this is Darwin x86_64"),
        ("Linux aarch64", "auto", "put IN=docker behind make"),
    ],
)
def test_setup_refuses_a_lock_of_another_machine(tmp_path: Path, machine: str, lock: str, reason: str) -> None:
    code, said = setup(tmp_path, lock, {"python3.11": ""}, machine)
    assert code == 2 and reason in said, said


def test_an_old_make_is_refused_by_name() -> None:
    """macOS's own, 3.81, would stop at a line that says nothing of it."""
    for version in ("3.81", "4.0", "4.1"):
        done = subprocess.run(["make", f"MAKE_VERSION={version}", "help"], cwd=PROJECT, capture_output=True, text=True)
        assert done.returncode == 2 and f"GNU make 4.2 or later is needed, this is {version}" in done.stderr


def test_no_variable_is_undefined_where_make_calls_itself() -> None:
    """`make release`, and a Make that begins again with new rules, are told to warn from the first line on."""
    done = subprocess.run(["make", "--warn-undefined-variables", "help"], cwd=PROJECT, capture_output=True, text=True)
    assert done.returncode == 0 and "undefined variable" not in done.stderr


def test_a_finished_folder_is_signed_where_it_lies(finished: tuple[str, ...], tmp_path: Path) -> None:
    """Signing is no reason to make the folder again; the key's path is in the environment alone."""
    recorded = tmp_path / "out" / "tiny" / ".inputs" / "publish"
    before = recorded.read_text()
    shown = make("-n", *finished, "publish", f"SIGN_KEY={tmp_path / 'my-key.pem'}")
    assert "pipeline.sign" in shown and "--by key --signer .venv-sign/bin/python" in shown
    assert "pipeline.publish" not in shown and "my-key" not in shown
    assert recorded.read_text() == before


def test_a_licence_override_reaches_the_stage_as_it_was_written(tmp_path: Path) -> None:
    text = make("-n", "publish", f"ARTIFACTS={tmp_path}", "LICENCE_OVERRIDE=gemma: it's `a` $$(test)")
    words = next(shlex.split(row) for row in text.splitlines() if "-m pipeline.publish" in row)
    assert words[words.index("--licence-override") + 1] == "gemma: it's `a` $(test)"


def test_a_text_whose_name_holds_make_s_comment_sign_is_the_one_that_is_read(tmp_path: Path) -> None:
    """In rules and in variables, whose values end at the sign in other places."""
    named = tmp_path / "chats\\#1 é.txt"
    text = make("-n", "golden", "reproduce", f"ARTIFACTS={tmp_path}", f"EVAL={named}")
    rows = [shlex.split(row) for row in text.splitlines() if "-m pipeline.golden" in row or "reproduce" in row]
    assert [words[words.index("--eval") + 1] for words in rows] == [str(named)] * 2


@pytest.mark.parametrize("where", [(), ("IN=docker",)], ids=["here", "docker"])
def test_a_file_with_a_space_is_one_file(tmp_path: Path, where: tuple[str, ...]) -> None:
    file, other = tmp_path / "my model.tflite", "its other.tflite"
    text = make("-n", "inspect", "check", *where, f"FILE={file}", f"AGAINST={other}", f"FILES={tmp_path / 'a b'}")
    inspected = next(shlex.split(row) for row in text.splitlines() if "-m pipeline.inspection" in row)
    assert inspected[-3:] == [str(file), "--against", str(PROJECT / other)]
    assert str(tmp_path / "a b") in next(
        shlex.split(row.rstrip("\\")) for row in text.splitlines() if "-m pipeline.check" in row
    )
    mounts = [f"{file}:{file}:ro", f"{PROJECT / other}:{PROJECT / other}:ro"] if where else []
    assert [word for word in inspected if word.endswith("e:ro")] == mounts


def test_small_settings_are_words_for_the_shell() -> None:
    hostile = "8; touch PWNED"
    text = make("-n", "run", "chat", "tune", *(f"{name}={hostile}" for name in ("PRECISION", "MINUTES", "SECTION")))
    rows = [shlex.split(row) for row in text.splitlines() if "-m pipeline.chat" in row or "-m pipeline.tune" in row]
    assert len(rows) == 3 and not any("touch" in words for words in rows)
    index = "https://index/?a=1&b=2"
    install = make("-nB", ".venv/.ready", f"LOCK={hostile}", f"TORCH_INDEX={index}").splitlines()[-1]
    assert shlex.split(install)[1:] == [f"TORCH_INDEX={index}", "tools/setup.sh", ".venv", hostile]


@pytest.mark.parametrize(
    ("setting", "reason"),
    [
        ("ARTIFACTS=a=b", "with '='"),
        ("MODEL_ID=me/a=b", "with '='"),
        ("ARTIFACTS=~/results", "with '~'"),
        ("RECIPE=-r", "with '-'"),
        ("MODEL_ID=/", "a folder without a name"),
        ("VARIANTS=int8 publish", "VARIANTS names publish; step graphs are fp32"),
    ],
)
@pytest.mark.parametrize("goal", ["clean", "verify"])
def test_what_would_be_another_folder_is_refused(tmp_path: Path, setting: str, reason: str, goal: str) -> None:
    """Make takes `a=b: c` for a variable and `~` for a home; without a name, `make clean` would remove all results."""
    assert reason in refused(goal, f"ARTIFACTS={tmp_path}", setting)


def test_a_variant_that_is_named_twice_is_judged_once(tmp_path: Path) -> None:
    assert "--variants int8 fp32\n" in make("-n", "verify", f"ARTIFACTS={tmp_path}", "VARIANTS=int8 fp32 int8")


@pytest.mark.parametrize("setting", ["SIGN_KEY=k", "PUBLIC_KEY=k", "SIGN=keyless"])
def test_the_container_does_not_sign(setting: str) -> None:
    done = subprocess.run(["make", "-n", "check", "IN=docker", setting], cwd=PROJECT, capture_output=True, text=True)
    assert done.returncode == 2 and "on the host, without IN=docker" in done.stderr
