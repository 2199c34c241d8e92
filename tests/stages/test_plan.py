"""The plan against the files that the stages really make, on too small a machine, of a model on a Hub, and of a job."""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import subprocess
import sys
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import hub_server
import pytest
from hub_server import HubServer, Sparse
from line import Line

from pipeline import job, plan
from pipeline.core import log, manifest, memory, options
from pipeline.core.graph import STAGES
from pipeline.core.recipe import DECODER, PROJECT
from pipeline.core.recipe import load as load_recipe
from pipeline.core.stage import DEFAULT_MODEL, Common
from pipeline.models import sizes
from pipeline.models.gemma3n import ARCHITECTURE
from pipeline.planning.model import Model, look
from pipeline.planning.needs import MODELLED, NEEDS
from pipeline.planning.speed import FILE, REFERENCE
from pipeline.tflite.graph import Graph
from tools import plan_fit
from tools import planned as tool
from tools.make_random_checkpoint import GEOMETRIES

SHIPPED = PROJECT / DEFAULT_MODEL


def planned(line: Line, *words: str) -> tuple[int, Model]:
    """The exit code, and what the plan knows."""
    common = ["--model-id", str(line.model), "--artifacts", str(line.artifacts), "--recipe", str(line.recipe)]
    given, recipe = options.read("plan", "", plan.Options, [*common, *words]), load_recipe(line.recipe)
    return plan.main([*common, *words]), look(
        given.model_id, given.revision, given.base, recipe, given.graphs or recipe.graphs
    )


def test_sizes_are_those_of_the_files(built: Line) -> None:
    code, model = planned(built)
    assert code == 0
    assert model.files["step.tflite"].elements < model.facts.parameters  # vectors are counted apart
    for precision in ("fp32", "fp16", "int8"):
        made = {Path(record.path).name: record.size for record in manifest.read(built.root / precision).outputs}
        assert model.files.keys() == made.keys()
        for name, size in made.items():
            assert model.files[name].bytes(precision) == pytest.approx(size, rel=0.05), f"{precision}/{name}"
    for stage in ("graph", "bundle", "golden"):
        made_size = sum(record.size for record in manifest.read(built.root / stage).outputs)
        assert NEEDS[stage](model).size == pytest.approx(made_size, rel=0.2), stage


def test_every_stage_that_make_plans_has_its_needs() -> None:
    assert NEEDS.keys() == STAGES.keys() - {"evaluate"}  # whose task decides


def test_a_configuration_that_leaves_keys_to_their_defaults_is_planned_too(built: Line) -> None:
    """As transformers reads it: 35 layers, of which 20 have a cache, 4 of them of all positions; two heads of 256."""
    architecture, bundle = (
        ARCHITECTURE({"model_type": "gemma3n_text"}),
        load_recipe(PROJECT / "pipeline" / "recipes" / "gemma3n.toml").bundle,
    )
    assert (bundle.cache_length, max(bundle.prefill)) == (4096, 128)
    assert sizes.layers(architecture.tensors()) == 35
    assert sizes.cache_bytes(architecture, bundle) == 4 * (4 * 4096 + 16 * (512 + 128)) * 2 * 2 * 256
    endless = replace(bundle, cache_length=10**9)
    assert sizes.cache_bytes(architecture, endless) > 4 * 4 * 10**9, "which no memory would hold"
    _, model = planned(built)
    graph = Graph.read(built.root / "graph" / DECODER)
    held = [graph.shape(port.tensorIndex) for port in graph.ports() if str(port.name).startswith("kv_cache_")]
    assert model.cache == 4 * sum(map(math.prod, held))


def test_what_is_done_takes_no_more_disk(built: Line, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    planned(built, "--stages", "fetch", "graph", "fp32")
    text = capsys.readouterr().err
    took = json.loads((built.root / "graph" / "run.json").read_text())["seconds"]
    assert len(re.findall(r"^  (fetch|graph|fp32) .* took (?:\d+ min )?\d+ s ", text, flags=re.MULTILINE)) == 3
    assert f" took {log.human_seconds(took)} " in text and re.search(
        r"^  done: .* s, by this plan .* s$", text, flags=re.MULTILINE
    )
    assert "in all: 0 B of disk" in text


def test_too_small_a_disk(judged: Line, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = plan.shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(plan.shutil, "disk_usage", lambda _: usage)
    line = Line(artifacts=tmp_path / "not" / "there", recipe=judged.recipe)
    assert planned(line)[0] == 10
    assert not line.artifacts.exists(), "a plan makes nothing"


def test_too_little_memory(
    judged: Line, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(memory, "available", lambda *_: 100_000_000)
    assert planned(Line(artifacts=tmp_path, recipe=judged.recipe))[0] == 10
    assert "100.0 MB are free" in capsys.readouterr().err


def header(config: dict[str, object]) -> bytes:
    """Bytes before the first weight of a whole checkpoint in one file."""
    entries, start = {}, 0
    for name, shape in ARCHITECTURE(config).tensors().items():
        end = start + 2 * math.prod(shape)
        entries[f"model.{name}"] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(entries).encode()
    return len(text).to_bytes(8, "little") + text


def add_large(server: HubServer, geometry: str = "e2b") -> bytes:
    """Put a model of a true size on the Hub, all zeros, and return what is before its weights."""
    config = GEOMETRIES[geometry] | {"max_position_embeddings": 2048}
    start = header(config)
    parameters = sum(math.prod(shape) for shape in ARCHITECTURE(config).tensors().values())
    server.add(
        "org/large",
        {
            "config.json": json.dumps(config).encode(),
            "tokenizer.json": (SHIPPED / "tokenizer.json").read_bytes(),
            "README.md": b"---\nlicense: gemma\nbase_model: google/gemma-3n-E2B-it\n---\n",
            "model.safetensors": Sparse(start, len(start) + 2 * parameters),
        },
    )
    return start


def test_a_large_model_on_the_hub_is_planned_from_its_headers(
    server: HubServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start = add_large(server)
    options = [
        "--model-id",
        "org/large",
        "--artifacts",
        str(tmp_path),
        "--graphs",
        "bundle",
        "--stages",
        "fetch",
        "int8",
        "bundle",
    ]
    code = plan.main(options)
    text = capsys.readouterr().err
    assert code in (0, 10), "this machine's disk may be too small"
    assert "accessible" in text and "Gemma Terms of Use" in text and "4,435 M parameters" in text
    assert re.search(r"fetch +8\.9 GB", text) and re.search(r"int8 +5\.0 GB", text)
    assert "4,096 positions, " in text and "the model was made for 2,048 (max_position_embeddings)" in text
    assert "2 GiB or more: fp32/decoder.tflite, " in text and "entitlement" in text
    assert server.sent("model.safetensors") < 2 * len(start)
    assert [file.name for file in tmp_path.iterdir()] == [FILE], "how fast the machine is, and nothing else"


IMAGE = f"ghcr.io/org/it@sha256:{'5' * 64}"


def submitted(tmp_path: Path, *options: str, image: str = IMAGE, target: str = "mine/large-litert") -> int:
    common = ["--model-id", "org/large", "--artifacts", str(tmp_path), "--graphs", "bundle"]
    return job.main([*common, target, image, *options])


def test_a_job_is_printed_as_it_is_submitted(
    server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the Hub's own command line and by its client; the machine is the cheapest that is large enough."""
    add_large(server)
    server.tokens["hidden"] = set()
    assert submitted(tmp_path) == 0 and server.jobs == []
    printed = shlex.split(capsys.readouterr().out)
    assert printed[:3] == ["hf", "jobs", "run"] and printed[printed.index("--secrets") + 1] == "HF_TOKEN"
    monkeypatch.setenv("HF_TOKEN", "hidden")
    assert submitted(tmp_path, "--confirm", "yes") == 0
    told = capsys.readouterr()
    assert "hidden" not in told.out + told.err
    assert f"submitted: {server.endpoint}/jobs/mine/job1" in told.err
    command = [str(Path(sys.executable).parent / "hf"), *printed[1:]]
    done = subprocess.run(
        command, env={**os.environ, "HF_HUB_DISABLE_UPDATE_CHECK": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    ours, theirs = server.jobs
    assert ours == theirs
    commit = server.repos["org/large"].refs["main"]
    assert ours["command"][:2] == ["/app/tools/entry.sh", "publish"] and f"REVISION={commit}" in ours["command"]
    assert ours["secrets"] == {"HF_TOKEN": "hidden"} and "hidden" not in " ".join(ours["command"])
    assert ours["environment"] == {"IMAGE_DIGEST": IMAGE.split("@")[1]}
    assert ours["dockerImage"] == IMAGE and ours["namespace"] == "mine" and ours["timeoutSeconds"] >= 3600
    assert ours["flavor"] == "cpu-xl"  # 16 GB of disk for the checkpoint and its files are too little on the others


def test_a_watched_model_is_built_again_by_a_webhook(
    server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of its branch, not of today's commit; by the Hub's own command line and by its client."""
    add_large(server)
    server.tokens["hidden"] = set()
    monkeypatch.setenv("HF_TOKEN", "hidden")
    monkeypatch.setenv("HF_HUB_DISABLE_UPDATE_CHECK", "1")
    assert submitted(tmp_path, "--watch", "yes") == 0 and server.webhooks == []
    _, hook = capsys.readouterr().out.splitlines()
    assert submitted(tmp_path, "--watch", "yes", "--confirm", "yes") == 0
    told = capsys.readouterr()
    assert (
        "hidden" not in told.out + told.err and "webhook hook1: the job runs again when org/large changes" in told.err
    )
    assert "REVISION=main" in server.jobs[0]["command"]
    command = shlex.split(hook.replace("JOB", "job1"))
    done = subprocess.run([str(Path(sys.executable).parent / "hf"), *command[1:]], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    ours, theirs = server.webhooks
    assert ours == theirs and ours["secrets"] == {"HF_TOKEN": "hidden"} and ours["jobSourceId"] == "job1"
    assert ours["watched"] == [{"type": "model", "name": "org/large"}] and ours["domains"] == ["repo"]


def test_a_job_with_a_gpu_takes_a_machine_that_has_one(server: HubServer, tmp_path: Path, capsys: Any) -> None:
    add_large(server)
    assert submitted(tmp_path, "--device", "cuda") == 0
    assert " --flavor a10g-large " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        ({"image": "hf-to-litert"}, 2, "name a pushed one by its digest"),
        ({"image": "ghcr.io/org/it:v1"}, 2, "name a pushed one by its digest"),
        ({"target": ""}, 2, "HF_REPO does not say where to"),
        ({"recipe": "own.toml"}, 2, "is not in the image"),
        ({"model": str(SHIPPED)}, 2, "is a folder"),
        ({"confirm": "yes"}, 9, "a job needs a token"),
        ({"confirm": "yes", "token": "other"}, 3, "refuses the token"),
    ],
)
def test_what_can_be_no_job_is_refused_with_a_sentence(
    server: HubServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: dict[str, str],
    code: int,
    said: str,
) -> None:
    add_large(server)
    words = ["--confirm", "yes"] if "confirm" in options else []
    words += ["--model-id", options["model"]] if "model" in options else []
    if "token" in options:
        monkeypatch.setenv("HF_TOKEN", options["token"])
    if "recipe" in options:
        own = tmp_path / options["recipe"]
        own.write_bytes((PROJECT / "pipeline" / "recipes" / "gemma3n.toml").read_bytes())
        words += ["--recipe", str(own)]
    settings = {key: options[key] for key in ("image", "target") if key in options}
    assert submitted(tmp_path, *words, **settings) == code
    assert said in capsys.readouterr().err and server.jobs == []


def test_no_machine_is_large_enough_for_the_largest(
    server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    add_large(server)
    monkeypatch.setattr(hub_server, "HARDWARE", hub_server.HARDWARE[:2])
    assert submitted(tmp_path) == 10
    assert "no machine of the Hub has" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "code", "said"), [({"gated": True}, 3, "gated"), ({"private": True}, 3, "set HF_TOKEN")]
)
def test_a_model_without_access(
    server: HubServer,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    settings: dict[str, bool],
    code: int,
    said: str,
) -> None:
    server.add("org/closed", {"config.json": b"{}", "model.safetensors": b""}, **settings)
    assert plan.main(["--model-id", "org/closed", "--artifacts", str(tmp_path)]) == code
    assert said in capsys.readouterr().err


def test_what_was_planned_stands_beside_what_it_took(built: Line) -> None:
    given = Common(model_id=str(built.model), artifacts=built.artifacts, recipe=built.recipe)
    told = {row.stage: row for row in tool.rows(given)}
    assert list(told) == ["fetch", "golden", "graph", "fp32", "fp16", "int8", "bundle"]
    run = json.loads((built.root / "graph" / "run.json").read_text())
    row = told["graph"]
    assert [row.took, row.processor, row.memory] == [
        run[key] for key in ("seconds", "processor_seconds", "peak_anonymous")
    ]
    assert row.cells()[4] == f"{row.planned / run['seconds']:.2f}"


ROW = tool.Row(stage="golden", planned=20.0, took=18.0, processor=30.0, planned_memory=1e9, memory=1.2e9)


@pytest.mark.parametrize(
    ("changes", "out"),
    [
        ({}, ""),
        ({"took": 90.0}, ""),  # beside other work; the processor has the last word
        ({"took": 90.0, "processor": 81.0}, "seconds"),
        ({"took": 9.0, "processor": 9.0}, "seconds"),
        ({"memory": 2.1e9}, "memory"),  # an end by the kernel where exit code 10 was promised
        ({"memory": 4e8}, "memory"),
        ({"planned": 0.1, "took": 0.3, "processor": 0.4}, ""),
    ],
)
def test_a_plan_that_is_out_by_more_than_a_factor_of_two_is_red(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], changes: dict[str, float], out: str
) -> None:
    monkeypatch.setattr(tool, "rows", lambda _given: [replace(ROW, **changes)])
    assert tool.main([]) == (8 if out else 0)
    assert (f"factor of 2: golden ({out})" in capsys.readouterr().err) is bool(out)
    assert tool.main(["--judge", "memory"]) == (8 if out == "memory" else 0)


def test_factors_bring_the_worst_of_several_models_as_close_as_can_be(built: Line, tmp_path: Path) -> None:
    found = list(plan_fit.runs("tiny", str(built.model), built.artifacts, built.recipe, ""))
    assert [run.stage for run in found] == ["fetch", "golden", "graph", "fp32", "fp16", "int8", "bundle"]
    slow = [replace(run, took={key: 4 * value for key, value in run.took.items()}) for run in found]
    for run in found:
        factor = plan_fit.fit([run], REFERENCE)[run.stage]
        need = MODELLED[run.stage](run.model)
        assert need.memory * factor["memory"] == pytest.approx(run.memory, rel=0.01)
        assert need.seconds * factor["seconds"] == pytest.approx(run.seconds, rel=0.01, abs=0.01)
        other = next(each for each in slow if each.stage == run.stage)
        between = plan_fit.fit([run, other], REFERENCE)[run.stage]
        assert between["memory"] == pytest.approx(2 * factor["memory"], rel=0.01)
    assert tomllib.loads(plan_fit.dump(plan_fit.fit(found, REFERENCE))) == plan_fit.fit(found, REFERENCE)
    made = plan_fit.table(found, REFERENCE)
    assert made.row("tiny, graph").values["took memory"].value == pytest.approx(found[2].memory / 2**30)
