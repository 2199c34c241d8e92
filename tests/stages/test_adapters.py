"""A LoRA adapter as MODEL_ID: merged while fetching, both models pinned, both terms passed on, or refused by name.

That values are PEFT's is for tests/adapters; here adapters are written by hand.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hub_server import HubServer
from release_line import STAGES
from release_line import Line as ReleaseLine
from safetensors.torch import load_file, save

from pipeline import fetch, plan
from pipeline.core import manifest, rules, stage
from pipeline.core.facts import Fetch, Merged
from pipeline.core.recipe import PROJECT
from pipeline.release import origin

SHIPPED = PROJECT / stage.DEFAULT_MODEL
ADAPTER, BASE = "me/tuned-lora", "org/base"
CARD = b"---\nlicense: cc0-1.0\nbase_model: org/base\ntags: [lora]\n---\n# Tuned\n"
Files = dict[str, bytes]
Q = "base_model.model.model.layers.0.self_attn.q_proj"
EMBEDDING = "base_model.model.model.embed_tokens"


def random(*shape: int) -> torch.Tensor:
    values = np.random.default_rng(sum(shape)).normal(0, 0.1, shape)
    return torch.from_numpy(values.astype(np.float32))


def pair(module: str = Q, rank: int = 4) -> dict[str, torch.Tensor]:
    return {f"{module}.lora_A.weight": random(rank, 128), f"{module}.lora_B.weight": random(128, rank)}


def adapter(tensors: Mapping[str, torch.Tensor] | None = None, **said: Any) -> Files:
    """An adapter for the shipped model, of one matrix if nothing else is said."""
    table = {
        "peft_type": "LORA", "r": 4, "lora_alpha": 8, "bias": "none", "target_modules": ["q_proj"],
        "base_model_name_or_path": BASE, "revision": None, "inference_mode": True, "peft_version": "0.21.2",
    }  # fmt: skip
    return {
        "adapter_config.json": json.dumps({**table, **said}).encode(),
        "adapter_model.safetensors": save(dict(tensors or pair())),
        "README.md": CARD,
    }


def base() -> Files:
    return {file.name: file.read_bytes() for file in SHIPPED.iterdir() if file.is_file()}


def write(files: Files, folder: Path) -> Path:
    folder.mkdir(parents=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


class Run:
    """Fetches into a temporary artefact folder and keeps what was printed."""

    def __init__(self, artifacts: Path, capture: pytest.CaptureFixture[str]) -> None:
        self.artifacts, self.capture, self.text = artifacts, capture, ""

    def __call__(self, model_id: str = ADAPTER, *more: str) -> int:
        self.capture.readouterr()
        code = stage.main(fetch.STAGE, ["--model-id", model_id, "--artifacts", str(self.artifacts), *more])
        captured = self.capture.readouterr()
        self.text = captured.out + captured.err
        assert "Traceback" not in self.text, self.text
        return code

    def folder(self, name: str = "me--tuned-lora") -> Path:
        return self.artifacts / name / "fetch"

    def refused(self, *phrases: str, model_id: str = ADAPTER, code: int = 3) -> None:
        assert self(model_id) == code, self.text
        for phrase in phrases:
            assert phrase in self.text, self.text
        assert not list(self.artifacts.glob("*/fetch/manifest.json"))


@pytest.fixture
def run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    return Run(tmp_path / "artifacts", capsys)


def merged(run: Run, name: str = "me--tuned-lora") -> Merged:
    """What the manifest says of the base."""
    said = manifest.read(run.folder(name)).told(Fetch).adapter
    assert said
    return said


def expected_q() -> torch.Tensor:
    """q_proj of layer 0, merged."""
    stored = load_file(SHIPPED / "model.safetensors")["model.layers.0.self_attn.q_proj.weight"]
    parts = pair()
    delta = parts[f"{Q}.lora_B.weight"] @ parts[f"{Q}.lora_A.weight"] * 2.0
    return (stored.float() + delta).to(torch.bfloat16)


def test_from_the_hub_both_at_their_commit(server: HubServer, run: Run) -> None:
    trained = server.add(ADAPTER, {**adapter(), "LICENSE": b"the tuner's terms"})
    original = server.add(BASE, {**base(), "README.md": b"---\nlicense: cc0-1.0\ntags: [trained-from-scratch]\n---\n"})
    assert run() == 0, run.text
    made, checkpoint = manifest.read(run.folder()), run.folder() / "checkpoint"
    assert (made.model, made.revision) == (ADAPTER, trained)
    assert made.facts["adapter"] == {"base": BASE, "base_revision": original, "changed": 1}
    assert made.facts["base_models"] == [BASE]
    assert made.facts["lineage"] == [
        {"model": BASE, "known": True, "licence": "cc0-1.0", "base_models": [], "from_scratch": True}
    ]
    got, stored = load_file(checkpoint / "model.safetensors"), load_file(SHIPPED / "model.safetensors")
    assert torch.equal(got.pop("model.layers.0.self_attn.q_proj.weight"), expected_q())
    assert all(torch.equal(value, stored[name]) for name, value in got.items())
    assert len(got) == len(stored) - 1
    assert (checkpoint / "LICENSE").read_bytes() == b"the tuner's terms"
    assert (checkpoint / "LICENSE.base").read_bytes() == (SHIPPED / "LICENSE").read_bytes()
    assert (checkpoint / "README.md").read_bytes() == CARD
    assert (checkpoint / "tokenizer.json").read_bytes() == (SHIPPED / "tokenizer.json").read_bytes()
    assert not list(checkpoint.glob("adapter*"))
    assert not list((run.artifacts / "me--tuned-lora" / origin.DOWNLOADS).glob("*"))
    assert f"{ADAPTER} merged into {BASE}: 1 tensors changed" in run.text


def test_the_same_adapter_makes_the_same_bytes(server: HubServer, run: Run, tmp_path: Path) -> None:
    """From the Hub or from folders, by the base that it names or by BASE=."""
    server.add(ADAPTER, adapter())
    server.add(BASE, base())
    folder = write(adapter(base_model_name_or_path="/gone"), tmp_path / "mine")
    assert run() == 0, run.text
    assert run(str(folder), "--base", str(SHIPPED)) == 0, run.text
    weights = [run.folder(name) / "checkpoint/model.safetensors" for name in ("me--tuned-lora", "mine")]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    said = merged(run, "mine")
    assert (said.base, len(said.base_revision)) == ("tiny-gemma3n", 64)


def test_merged_weights_are_hashed_as_they_are_written_alone(
    server: HubServer, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last file was read once more: it was too young for its hash to be remembered."""
    hashed, right = list[str](), manifest.FileRecord.of
    monkeypatch.setattr(manifest.FileRecord, "of", lambda file, *more: hashed.append(str(file)) or right(file, *more))
    server.add(ADAPTER, adapter())
    server.add(BASE, base())
    assert run() == 0, run.text
    assert hashed and not [file for file in hashed if file.endswith("checkpoint/model.safetensors")]


def test_a_base_in_4_bits_is_replaced_by_its_original(server: HubServer, run: Run) -> None:
    server.add(ADAPTER, adapter(base_model_name_or_path=f"{BASE}-unsloth-bnb-4bit"))
    server.add(BASE, base())
    assert run() == 0, run.text
    assert (
        f"the base {BASE}-unsloth-bnb-4bit is rounded to 4 bits: its 16-bit original {BASE} takes its place" in run.text
    )
    assert merged(run).base == BASE


def test_the_base_may_be_said_with_its_commit(server: HubServer, run: Run) -> None:
    old = server.add("org/other", base())
    server.add("org/other", {**base(), "config.json": b"{}"})
    server.add(ADAPTER, adapter())
    assert run(ADAPTER, "--base", f"org/other@{old}") == 0, run.text
    assert merged(run).base_revision == old


def test_an_adapter_speaks_with_its_own_tokenizer_and_template(server: HubServer, run: Run) -> None:
    tokenizer = {name: base()[name] for name in ("tokenizer.json", "tokenizer_config.json")}
    server.add(ADAPTER, {**adapter(), **tokenizer, "chat_template.jinja": b"{{ 'mine' }}"})
    server.add(BASE, base())
    assert run() == 0, run.text
    checkpoint = run.folder() / "checkpoint"
    assert (checkpoint / "chat_template.jinja").read_bytes() == b"{{ 'mine' }}"
    assert not (checkpoint / "tokenizer.model").exists()


def test_what_is_downloaded_survives_a_failure(server: HubServer, run: Run) -> None:
    """The second try asks for neither of the two again."""
    added = {"id": 5000, "content": "<new>"}
    tokenizer = {
        "tokenizer.json": json.dumps({**json.loads(base()["tokenizer.json"]), "added_tokens": [added]}).encode()
    }
    server.add(ADAPTER, {**adapter(), **tokenizer})
    server.add(BASE, base())
    assert run() == 3
    assert "was trained with new tokens, but has no embedding of theirs: <new>" in run.text
    before = server.sent("model.safetensors")
    assert run() == 3
    assert server.sent("model.safetensors") - before < 100_000


def test_an_embedding_that_was_saved_leaves_the_head_as_it_was(server: HubServer, run: Run, tmp_path: Path) -> None:
    """Whether a model with a head of its own can be converted is judged as for any checkpoint."""
    table = load_file(SHIPPED / "model.safetensors")["model.embed_tokens.weight"]
    tensors = {**pair(), f"{EMBEDDING}.weight": table + 1}
    server.add(ADAPTER, adapter(tensors, modules_to_save=["embed_tokens"]))
    folder = write(base(), tmp_path / "base")
    code = run(ADAPTER, "--base", str(folder))
    made = load_file(run.folder() / "checkpoint/model.safetensors")
    assert torch.equal(made["lm_head.weight"], table)
    assert torch.equal(made["model.embed_tokens.weight"], table + 1)
    assert code == 0 or "lm_head.weight differs from the token embedding" in run.text


@pytest.mark.parametrize(
    ("said", "phrase"),
    [
        ({"peft_type": "LOHA"}, "peft_type = 'LOHA'"),
        ({"peft_type": "LOKR"}, "peft_type = 'LOKR'"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights = 'pissa'"),
        ({"init_lora_weights": "olora"}, "path_initial_model_for_weight_conversion"),
        ({"init_lora_weights": "loftq"}, "init_lora_weights = 'loftq'"),
        ({"target_parameters": ["experts.gate_up_proj"]}, "target_parameters = ['experts.gate_up_proj']"),
        ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens"),
        ({"bias": "all"}, "bias = 'all'"),
        ({"lora_bias": True}, "lora_bias = True"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"use_qalora": True}, "use_qalora"),
        ({"some_new_setting": {"a": 1}}, "some_new_setting"),
        ({"r": "many"}, "can't be understood"),
        ({"rank_pattern": {"(": 3}}, "can't be understood"),
        ({"r": 5}, "has rank 4, adapter_config.json says 5"),
        ({"use_dora": True}, "does not fit"),
    ],
)
def test_what_cannot_be_merged_truly_is_refused_by_name(
    server: HubServer, run: Run, said: dict[str, Any], phrase: str
) -> None:
    server.add(ADAPTER, adapter(**said))
    server.add(BASE, base())
    run.refused(phrase)
    assert server.sent("model.safetensors") < 100_000  # headers alone


@pytest.mark.parametrize(
    ("tensors", "phrase"),
    [
        (pair(Q.replace("layers.0", "layers.77")), "that has no model.layers.77.self_attn.q_proj"),
        ({**pair(), f"{Q}.lora_B.weight": random(96, 4)}, "is [128, 128] there"),
        ({**pair(), f"{Q}.lora_X.weight": random(4)}, "that has no model.layers.0.self_attn.q_proj.lora_X"),
        ({**pair(), f"{Q}.odd": random(4)}, "a tensor called"),
        ({f"{Q}.lora_A.weight": random(4, 128)}, "has A alone"),
        ({f"{Q}.lora_A.weight": random(4, 128).long(), f"{Q}.lora_B.weight": random(128, 4)}, "has type I64"),
        (pair("base_model.model.vision_tower.layers.0.q_proj"), "nothing of it belongs to the text model"),
        ({f"{EMBEDDING}.lora_embedding_A": random(4, 99), f"{EMBEDDING}.lora_embedding_B": random(128, 4)}, "there"),
    ],
)
def test_what_does_not_fit_the_base_is_refused_by_name(
    server: HubServer, run: Run, tensors: dict[str, torch.Tensor], phrase: str
) -> None:
    server.add(ADAPTER, adapter(tensors))
    server.add(BASE, base())
    run.refused(phrase)


def test_a_resized_embedding_without_its_head_is_refused(server: HubServer, run: Run) -> None:
    wide = {f"{EMBEDDING}.weight": random(2050, 128)}
    server.add(ADAPTER, adapter({**pair(), **wide}, modules_to_save=["embed_tokens"]))
    server.add(BASE, base())
    run.refused(
        "the token embedding has 2050 rows, the output head 2048", "modules_to_save=['embed_tokens', 'lm_head']"
    )


def test_other_formats_and_missing_bases_are_said(server: HubServer, run: Run) -> None:
    files = adapter()
    server.add("me/pickle", {"adapter_config.json": files["adapter_config.json"], "adapter_model.bin": b"x"})
    run.refused("is an adapter without adapter_model.safetensors", "pickle", model_id="me/pickle")
    server.add("me/mlx", {"adapter_config.json": b'{"fine_tune_type": "lora"}', "adapters.safetensors": b"x"})
    run.refused("none of PEFT's", "mlx_lm.fuse", model_id="me/mlx")
    server.add("me/away", adapter(base_model_name_or_path="/home/somebody/model"))
    run.refused("is an adapter for /home/somebody/model, which is not here", "BASE=owner/name", model_id="me/away")
    server.add("me/gone", adapter(base_model_name_or_path="org/gone"))
    run.refused("there is no model org/gone", model_id="me/gone")
    server.add("me/model", base())
    assert run("me/model", "--base", BASE) == 2
    assert "is no adapter" in run.text


def test_an_adapter_of_the_hub_reads_no_folder_that_it_names(server: HubServer, run: Run) -> None:
    server.add(ADAPTER, adapter(base_model_name_or_path=str(SHIPPED)))
    run.refused("which is not here")


def test_plan_counts_base_and_merged_weights(
    server: HubServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.add(ADAPTER, adapter())
    server.add(BASE, base())
    assert plan.main(["--model-id", ADAPTER, "--artifacts", str(tmp_path)]) == 0
    said = capsys.readouterr().err
    assert f"{ADAPTER} at " in said
    assert f"an adapter for {server.endpoint}/{BASE} at " in said
    row = next(line.split() for line in said.splitlines() if line.strip().startswith("fetch "))
    assert row[1:3] == row[3:5]  # as much is written as is downloaded


def test_make_asks_the_hub_for_the_base_of_a_folder(tmp_path: Path) -> None:
    """In a container fetch has a network where it needs one, and both folders where it needs none."""
    folder = write(adapter(), tmp_path / "mine")
    makefile = (PROJECT / "Makefile").read_text(encoding="utf-8")
    names = next(line for line in makefile.splitlines() if line.startswith("SAID := ")).split()[2:]
    said = dict.fromkeys(names, "") | {
        "RECIPE": stage.DEFAULT_RECIPE,
        "ARTIFACTS": str(tmp_path / "out"),
        "IN": "docker",
    }
    asked = rules.ask({**said, "MODEL_ID": str(folder)})
    assert asked.online
    assert asked.folders == [folder]
    asked = rules.ask({**said, "MODEL_ID": str(folder), "BASE": str(SHIPPED)})
    assert not asked.online
    assert asked.folders == [folder, SHIPPED]
    text = rules.rules(asked)
    assert f"-v {SHIPPED}:{SHIPPED}:ro" in text
    assert f"--base {SHIPPED}" in text
    before = rules.record(asked, "fetch")
    assert str(SHIPPED / "model.safetensors") in before


def test_the_papers_name_both_models_with_their_commits(tmp_path: Path) -> None:
    line = ReleaseLine(tmp_path, model=ADAPTER, base_models=[BASE])
    line.lineage = [{"model": BASE, "known": True, "licence": "cc0-1.0", "base_models": [], "from_scratch": True}]
    line.adapter = {"base": BASE, "base_revision": "b" * 40, "changed": 7}
    line.licence_files = ("LICENSE", "LICENSE.base")
    line.fetch()
    for name in STAGES:
        line.variant(name, name.encode())
    assert line.verify() == 0
    assert line.publish() == 0
    card = (line.folder / "README.md").read_text(encoding="utf-8")
    assert f"[{ADAPTER}](https://huggingface.co/{ADAPTER}) at commit `{'a' * 40}`" in card
    assert f"merged into [{BASE}](https://huggingface.co/{BASE}) at commit `{'b' * 40}` (licence: cc0-1.0)" in card
    assert f"MODEL_ID={ADAPTER} REVISION={'a' * 40} BASE={BASE}@{'b' * 40}" in card
    build = json.loads((line.folder / "provenance.json").read_text())["predicate"]["buildDefinition"]
    assert build["externalParameters"]["BASE"] == f"{BASE}@{'b' * 40}"
    assert [one["uri"] for one in build["resolvedDependencies"][:2]] == [
        f"pkg:huggingface/{ADAPTER}@{'a' * 40}", f"pkg:huggingface/{BASE}@{'b' * 40}",
    ]  # fmt: skip
    assert {file.name for file in (line.folder / "checkpoint").iterdir()} == {"LICENSE", "LICENSE.base"}
