"""The recipe of a model on the Hub, found by its type in the first `make`: over HTTP, with no RECIPE=."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path

import geometry
import pytest
import speaking
import torch
from hub_server import HubServer
from safetensors.torch import save_file

from pipeline.core import log
from pipeline.core.recipe import PROJECT
from pipeline.reference.model import HuggingFace
from pipeline.runtime.litert_lm import Dialogue, LmRuntime

QWEN = "owner/qwen"
GEOMETRY = {
    "model_type": "qwen3",
    "vocab_size": 2048,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "tie_word_embeddings": True,
}


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """A small Qwen 3 with the shipped tokenizer and template."""
    folder = speaking.save(geometry.plain_reference(GEOMETRY, 1), tmp_path_factory.mktemp("qwen"))
    return {file.name: file.read_bytes() for file in folder.iterdir()}


READY = ".venv/.ready"
"""A goal for which nothing is left to do once the rules are there: make finds the type out, and ends."""


class Make:
    """Runs make on a model of the server, and keeps what it ran (under -n: showed), with which recipes."""

    def __init__(self, server: HubServer, artifacts: Path) -> None:
        self.server, self.artifacts = server, artifacts

    @property
    def root(self) -> Path:
        return self.artifacts / "owner--qwen"

    def __call__(self, *words: str, model: str = QWEN, code: int = 0) -> str:
        before = len(self.server.requests)
        command = ["make", "--no-print-directory", *words, f"MODEL_ID={model}", f"ARTIFACTS={self.artifacts}"]
        done = subprocess.run(command, cwd=PROJECT, env=os.environ, capture_output=True, text=True, check=False)
        said = done.stdout + done.stderr
        assert done.returncode == code, said
        self.asked = len(self.server.requests) > before
        self.ran = re.findall(r"-m pipeline\.(\w+)", done.stdout)
        self.recipes = set(re.findall(r"--recipe pipeline/recipes/(\w+)\.toml", done.stdout))
        return said


@pytest.fixture
def make(server: HubServer, tmp_path: Path) -> Make:
    return Make(server, tmp_path / "artifacts")


def test_a_model_on_the_hub_gets_the_recipe_of_its_type_in_one_go(
    server: HubServer, make: Make, qwen: dict[str, bytes]
) -> None:
    server.add(QWEN, qwen)
    said = make("fetch")
    assert said.index("of type qwen3: recipe plain") < said.index("plan · owner--qwen") < said.index("fetch done")
    assert make.ran == ["fetch"] and make.recipes == {"plain"}
    make("fetch")  # again: nothing is made, and no network is needed
    assert not make.ran and not make.asked
    make("-n", "int4", "bundle")
    assert make.recipes == {"plain"} and not make.asked
    (make.root / ".inputs" / "identified").unlink()
    make("fetch")
    assert not make.ran and not make.asked, "what was fetched says it too"


def test_the_towers_of_a_model_on_the_hub_are_found_by_its_tensors(server: HubServer, make: Make) -> None:
    """Also with a recipe of one's own; TOWERS= settles it, and nobody looks."""
    config = {"model_type": "gemma3n", "vision_config": {}, "audio_config": {"hidden_size": 64}}
    header = json.dumps(
        {
            f"model.{part}.x.weight": {"dtype": "BF16", "shape": [1], "data_offsets": [2 * i, 2 * i + 2]}
            for i, part in enumerate(("audio_tower", "embed_vision", "language_model"))
        }
    ).encode()
    weights = len(header).to_bytes(8, "little") + header + bytes(6)
    server.add(QWEN, {"config.json": json.dumps(config).encode(), "model.safetensors": weights})
    own = "RECIPE=pipeline/recipes/gemma3n.toml"
    make(own, "TOWERS=none", READY)
    assert not make.asked
    assert "of type" not in make(own, READY), "the recipe of its type is not the one that is taken"
    assert make.asked
    shown = make("-n", own, "bundle", "GRAPHS=bundle")
    assert "--towers audio" in shown and not make.asked and "towers" in make.ran
    assert "--towers audio" in make("-n", "bundle", "GRAPHS=bundle")
    note = make.root / ".inputs" / "identified"
    told = json.loads(note.read_text())
    note.write_text(json.dumps({"model_type": told.pop("model_type")}))  # as it was before towers were taken
    make(own, READY)
    assert make.asked
    assert json.loads(note.read_text())["towers"] == told["towers"] == ["audio"]


def test_make_bundle_makes_a_bundle_of_a_model_on_the_hub_from_nothing(
    server: HubServer, make: Make, qwen: dict[str, bytes]
) -> None:
    """The whole line by the recipe that was found, and what it made answers as the model in the repository does."""
    server.add(QWEN, qwen)
    make("bundle", "GRAPHS=bundle")
    assert (make.ran[0], make.ran[-1]) == ("fetch", "bundle")
    assert sorted(make.ran[1:-1]) == ["fp32", "graph", "int4", "int8", "moments"]
    assert make.recipes == {"plain"}
    for precision in ("fp32", "int8"):
        assert (make.root / "bundle" / f"{precision}.litertlm").is_file()
    reference = HuggingFace.load(make.root / "fetch" / "checkpoint", "cpu")
    with log.progress("reference", 24, "tokens") as bar:
        expected = reference.continue_greedily([reference.as_turn("Name a colour.")], 24, bar)[0].text
    with (
        LmRuntime(make.root / "bundle" / "fp32.litertlm", threads=1) as runtime,
        Dialogue(runtime, 24, greedy=True) as dialogue,
    ):
        assert "".join(dialogue.answer("Name a colour.")) == expected
    make("bundle", "GRAPHS=bundle")
    assert not make.ran and not make.asked


def test_another_revision_is_asked_for_anew(server: HubServer, make: Make, qwen: dict[str, bytes]) -> None:
    """A repository may change its type; the old one's recipe would be refused by fetch."""
    first = server.add(QWEN, qwen)
    config = {**json.loads(qwen["config.json"]), "model_type": "gemma3n"}
    server.add(QWEN, {**qwen, "config.json": json.dumps(config).encode()})
    for revision, recipe in {first: "plain", "main": "gemma3n"}.items():
        make("-n", "fetch", f"REVISION={revision}")
        assert not make.asked, "under -n nothing is looked up"
        make(READY, f"REVISION={revision}")
        assert make.asked
        make("-n", "fetch", f"REVISION={revision}")
        assert make.recipes == {recipe} and "fetch" in make.ran


def test_nothing_is_looked_up_that_need_not_be(server: HubServer, make: Make, qwen: dict[str, bytes]) -> None:
    server.add(QWEN, qwen)
    make(READY, "RECIPE=pipeline/recipes/gemma3.toml")
    make("-n", "fetch", "RECIPE=pipeline/recipes/gemma3.toml")
    assert make.recipes == {"gemma3"} and not make.asked
    for words in (("-n", "bundle"), ("-q", "bundle")):
        assert "what type owner/qwen is of is not known yet" in make(*words, code="-q" in words)
    make("clean")
    assert not make.asked


def test_what_is_not_there_is_said_before_anything_else(make: Make) -> None:
    said = make("bundle", code=2)
    assert "there is no model owner/qwen" in said and "plan ·" not in said and not make.ran
    assert not (make.root / ".inputs" / "identified").exists()


def test_an_adapter_in_a_folder_gets_the_recipe_of_its_base_on_the_hub(
    server: HubServer, make: Make, qwen: dict[str, bytes], tmp_path: Path
) -> None:
    server.add(QWEN, qwen)
    module = "base_model.model.model.layers.0.self_attn.q_proj"
    weights = {f"{module}.lora_A.weight": torch.ones(2, 32), f"{module}.lora_B.weight": torch.ones(32, 2)}
    said = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "base_model_name_or_path": QWEN}
    (folder := tmp_path / "lora").mkdir()
    save_file(weights, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(said))
    assert "of type qwen3: recipe plain" in make(READY, model=str(folder))
    make("-n", "fetch", model=str(folder))
    assert make.recipes == {"plain"}
