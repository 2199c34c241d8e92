"""Stage fetch against a local server that behaves as the Hub, over real HTTP with the real client, and from folders."""

from __future__ import annotations

import json
import math
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_server import Fault, HubServer, Sparse
from huggingface_hub import constants
from line import written
from safetensors.torch import load, load_file, save
from tokenizers import Tokenizer, models
from transformers import Gemma3nForCausalLM, Gemma3nTextConfig

from pipeline import fetch
from pipeline.core import manifest, stage
from pipeline.core.recipe import PROJECT
from pipeline.release import hub, origin

NAME = "org/tiny"
Files = dict[str, bytes]
README = b"---\nlicense: apache-2.0\nbase_model: org/base\n---\n# Tiny\n"


@pytest.fixture(scope="session")
def model() -> Files:
    """A Gemma 3n text checkpoint of odd geometry with two layers, as transformers and its tokenizer library save it."""
    torch.manual_seed(0)
    config = Gemma3nTextConfig(
        vocab_size=67, vocab_size_per_layer_input=61, hidden_size=24, hidden_size_per_layer_input=6,
        intermediate_size=[40, 56], num_hidden_layers=2, num_attention_heads=3, num_key_value_heads=1, head_dim=8,
        layer_types=["sliding_attention", "full_attention"], sliding_window=5, altup_num_inputs=3, laurel_rank=4,
        num_kv_shared_layers=0, activation_sparsity_pattern=[0.5, 0.0], pad_token_id=0, bos_token_id=2, eos_token_id=1,
    )  # fmt: skip
    made = Gemma3nForCausalLM(config).to(torch.bfloat16)
    tensors = {name: value for name, value in made.state_dict().items() if name != "lm_head.weight"}
    tokenizer = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1, "<bos>": 2, "a": 3}, unk_token="<pad>"))
    return {
        "config.json": json.dumps({**config.to_dict(), "architectures": ["Gemma3nForCausalLM"]}).encode(),
        "generation_config.json": b'{"eos_token_id": 1}',
        "tokenizer.json": tokenizer.to_str().encode(),
        "tokenizer_config.json": b'{"tokenizer_class": "GemmaTokenizer"}',
        "chat_template.jinja": b"{{ messages }}",
        "README.md": README,
        "LICENSE": b"Apache License 2.0",
        "model.safetensors": save(tensors, metadata={"format": "pt"}),
    }


def shards(files: Files, count: int = 3) -> Files:
    """The same checkpoint in `count` shards with an index."""
    tensors = _tensors(files)
    names = sorted(tensors)
    parts = {f"model-{i + 1:05}-of-{count:05}.safetensors": names[i::count] for i in range(count)}
    weight_map = {name: shard for shard, part in parts.items() for name in part}
    index = {
        "metadata": {"total_size": sum(t.numel() * t.element_size() for t in tensors.values())},
        "weight_map": weight_map,
    }
    rest = {name: data for name, data in files.items() if name != "model.safetensors"}
    made = {shard: save({name: tensors[name] for name in part}) for shard, part in parts.items()}
    return {**rest, **made, "model.safetensors.index.json": json.dumps(index).encode()}


def _tensors(files: Files) -> dict[str, torch.Tensor]:
    return load(files["model.safetensors"])


def changed(files: Files, **tensors: torch.Tensor | None) -> Files:
    """The checkpoint with some tensors replaced, added or (None) dropped; `__` in a name stands for a dot."""
    new = {name.replace("__", "."): value for name, value in tensors.items()}
    kept = {**_tensors(files), **new}
    return {**files, "model.safetensors": save({name: value for name, value in kept.items() if value is not None})}


def with_config(files: Files, **keys: Any) -> Files:
    return {**files, "config.json": json.dumps({**json.loads(files["config.json"]), **keys}).encode()}


class Run:
    """Runs the stage in a temporary artefact folder and keeps what it printed."""

    def __init__(self, artifacts: Path, capture: pytest.CaptureFixture[str]) -> None:
        self.artifacts, self.capture, self.text = artifacts, capture, ""

    def __call__(self, model_id: str = NAME, *more: str) -> int:
        self.capture.readouterr()
        recipe = str(PROJECT / stage.DEFAULT_RECIPE)
        arguments = ["--model-id", model_id, "--artifacts", str(self.artifacts), "--recipe", recipe, *more]
        code = stage.main(fetch.STAGE, arguments)
        captured = self.capture.readouterr()
        self.text = captured.out + captured.err
        return code

    @property
    def root(self) -> Path:
        return self.artifacts / NAME.replace("/", "--")

    def names(self) -> list[str]:
        return sorted(file.name for file in (self.root / "fetch" / "checkpoint").iterdir())

    def manifest(self) -> manifest.Manifest:
        return manifest.read(self.root / "fetch")


@pytest.fixture
def run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    return Run(tmp_path / "artifacts", capsys)


def refused(run: Run, code: int, *phrases: str, model_id: str = NAME) -> None:
    """The stage ends with `code`, says every phrase, gives a remedy where it says `do:`, and leaves no manifest."""
    assert run(model_id) == code, run.text
    for phrase in phrases:
        assert phrase in run.text, run.text
    assert "Traceback" not in run.text
    assert not list(run.artifacts.glob("*/fetch/manifest.json"))


# ---- what is fetched


def test_only_what_is_needed_is_fetched_and_recorded(server: HubServer, model: Files, run: Run) -> None:
    unneeded = {
        "pytorch_model.bin": b"x" * 1000, "training_args.bin": b"x", ".gitattributes": b"*", "onnx/model.onnx": b"x",
        "model.gguf": b"x" * 1000, "preprocessor_config.json": b"{}", "assets/README.md": b"x",
    }  # fmt: skip
    commit = server.add(NAME, {**model, **unneeded})
    assert run() == 0, run.text
    assert run.names() == sorted(model)
    for name, data in model.items():
        assert (run.root / "fetch" / "checkpoint" / name).read_bytes() == data
    made = run.manifest()
    assert (made.model, made.revision) == (NAME, commit)
    parameters = sum(tensor.numel() for tensor in _tensors(model).values())
    assert made.facts == {
        "model_type": "gemma3n_text", "parameters": parameters, "dtype": "bfloat16", "shards": 1,
        "licence": "apache-2.0", "base_models": ["org/base"],
        "lineage": [{"model": "org/base", "known": False, "licence": "", "base_models": [], "from_scratch": False}],
    }  # fmt: skip
    assert not (run.root / origin.DOWNLOADS).exists()


def test_the_base_models_are_followed_to_the_root_gated_ones_too(server: HubServer, model: Files, run: Run) -> None:
    """What a card says of its bases is all that is asked for: none of their files, and each model once."""
    server.add("org/base", {"README.md": b"---\nlicense: mit\nbase_model: [google/root, org/base]\n---\n"})
    server.add("google/root", {"README.md": b"---\nlicense: other\nlicense_name: gemma\n---\n"})
    server.repos["google/root"].gated = True
    server.add(NAME, model)
    assert run() == 0, run.text
    assert run.manifest().facts["lineage"] == [
        {"model": "org/base", "known": True, "licence": "mit", "base_models": ["google/root", "org/base"],
         "from_scratch": False},
        {"model": "google/root", "known": True, "licence": "gemma", "base_models": [], "from_scratch": False},
    ]  # fmt: skip
    assert not [asked.path for asked in server.requests if re.match(r"/(org/base|google/root)/resolve/", asked.path)]


def test_two_runs_give_the_same_manifest(server: HubServer, model: Files, run: Run) -> None:
    server.add(NAME, model)
    texts = []
    for _ in range(2):
        assert run() == 0
        texts.append((run.root / "fetch" / manifest.NAME).read_bytes())
    assert texts[0] == texts[1]


def test_sharded_checkpoint(server: HubServer, model: Files, run: Run) -> None:
    files = shards(model)
    server.add(NAME, files)
    assert run() == 0, run.text
    assert run.names() == sorted(files)
    assert run.manifest().facts["shards"] == 3


def test_revision_is_resolved_to_a_commit(server: HubServer, model: Files, run: Run) -> None:
    old = server.add(NAME, model)
    server.repos[NAME].refs["v1"] = old
    new = server.add(NAME, {**model, "LICENSE": b"another"})
    for revision, commit in (("", new), ("main", new), ("v1", old), (old, old)):
        assert run(NAME, "--revision", revision) == 0, run.text
        assert run.manifest().revision == commit
    assert (run.root / "fetch/checkpoint/LICENSE").read_bytes() == b"Apache License 2.0"


def test_conditional_generation_takes_the_text_tower(server: HubServer, model: Files, run: Run) -> None:
    text = json.loads(model["config.json"])
    stored = {name.replace("model.", "model.language_model.", 1): t for name, t in _tensors(model).items()}
    others = {
        "model.vision_tower.timm_model.conv.weight": torch.ones(3, 5, dtype=torch.int8),
        "model.embed_audio.x": torch.ones(2),
    }
    config = {"model_type": "gemma3n", "text_config": text, "vision_config": {}, "audio_config": {}}
    files = {**model, "config.json": json.dumps(config).encode(), "model.safetensors": save({**stored, **others})}
    server.add(NAME, files)
    assert run() == 0, run.text
    assert run.manifest().facts["model_type"] == "gemma3n"
    assert run.manifest().facts["parameters"] == sum(tensor.numel() for tensor in stored.values())
    server.add(NAME, {**files, "model.safetensors": save(others)})
    refused(run, 3, "are missing: ", "embed_tokens.weight")


def test_readme_with_broken_front_matter_is_no_obstacle(server: HubServer, model: Files, run: Run) -> None:
    server.add(NAME, {**model, "README.md": b"---\nlicense: [\n---\n"})
    assert run() == 0, run.text
    assert run.manifest().facts["licence"] == ""
    assert "front matter" in run.text


def test_other_licence_has_its_own_name(server: HubServer, model: Files, run: Run) -> None:
    server.add(NAME, {**model, "README.md": b"---\nlicense: other\nlicense_name: mine-1.0\n---\n"})
    assert run() == 0, run.text
    assert run.manifest().facts["licence"] == "mine-1.0"


# ---- folders


def write(files: Files, folder: Path) -> Path:
    folder.mkdir(parents=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


def test_folder_is_linked_and_its_revision_is_its_content(model: Files, run: Run, tmp_path: Path) -> None:
    revisions = []
    for parent in ("one", "two"):
        folder = write({**model, "pytorch_model.bin": parent.encode()}, tmp_path / parent / "mine")
        assert run(str(folder)) == 0, run.text
        made = manifest.read(run.artifacts / "mine" / "fetch")
        revisions.append(made.revision)
        for name in model:
            link = run.artifacts / "mine" / "fetch" / "checkpoint" / name
            assert link.is_symlink() and link.resolve() == (folder / name).resolve()
        assert made.model == "mine"
        assert str(tmp_path) not in (run.artifacts / "mine" / "fetch" / manifest.NAME).read_text()
        assert "pytorch_model.bin" not in str(made.outputs)
    assert len(revisions[0]) == 64 and revisions[0] == revisions[1]
    (tmp_path / "two" / "mine" / "LICENSE").write_bytes(b"another")
    assert run(str(tmp_path / "two" / "mine")) == 0
    assert manifest.read(run.artifacts / "mine" / "fetch").revision != revisions[0]


def test_folder_has_no_revision(model: Files, run: Run, tmp_path: Path) -> None:
    folder = write(model, tmp_path / "mine")
    assert run(str(folder), "--revision", "main") == 2
    assert "it has no revisions" in run.text


def test_shipped_model(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, hashed, right = PROJECT / stage.DEFAULT_MODEL, list[str](), manifest.FileRecord.of
    monkeypatch.setattr(manifest.FileRecord, "of", lambda file, *more: hashed.append(file.name) or right(file, *more))
    assert run(str(folder)) == 0, run.text
    assert hashed.count("model.safetensors") == 1, "for the revision, and known when the results are listed"
    made = manifest.read(run.artifacts / folder.name / "fetch")
    assert made.facts["model_type"] == "gemma3n_text"
    stored = load_file(folder / "model.safetensors")
    assert made.facts["parameters"] == sum(t.numel() for name, t in stored.items() if name != "lm_head.weight")
    names = {Path(record.path).name for record in made.outputs}
    assert names >= {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.model",
        "chat_template.jinja",
    }
    assert not {"training.json", "train.txt"} & names


def test_links_inside_the_project_are_relative(model: Files, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    project = run.artifacts.parent / "project"
    folder = write(model, project / "examples" / "mine")
    run.artifacts = project / "artifacts"
    monkeypatch.setattr(origin, "PROJECT", project)
    assert run(str(folder)) == 0, run.text
    moved = project.rename(project.with_name("moved"))
    manifest.check(manifest.read(moved / "artifacts/mine/fetch").outputs, moved / "artifacts/mine")


# ---- refusals of a model, all before its weights move


@pytest.fixture
def unmoved(server: HubServer, model: Files) -> Iterator[None]:
    """After the test: of the weights no more than a header was sent."""
    yield
    header = 8 + int.from_bytes(model["model.safetensors"][:8], "little")
    assert server.sent(".safetensors") <= 2 * header


@pytest.mark.usefixtures("unmoved")
def rounded(model: Files) -> Files:
    """The checkpoint with a tensor as bitsandbytes and others pack it."""
    return changed(model, model__norm__weight=torch.zeros(24, dtype=torch.uint8))


def test_an_index_that_names_more_than_there_is(server: HubServer, model: Files, run: Run) -> None:
    files = shards(model)
    index = json.loads(files["model.safetensors.index.json"])
    index["weight_map"]["model.ghost.weight"] = "model-00001-of-00003.safetensors"
    del index["weight_map"]["model.norm.weight"]
    server.add(NAME, {**files, "model.safetensors.index.json": json.dumps(index).encode()})
    assert run() == 0, run.text
    assert (
        "names what no shard holds: model.ghost.weight" in run.text and "does not name: model.norm.weight" in run.text
    )


def test_a_table_of_a_quantisation_that_is_gone(server: HubServer, model: Files, run: Run) -> None:
    """After a merge config.json still names bitsandbytes, and every weight is a float."""
    server.add(NAME, with_config(model, quantization_config={"load_in_4bit": True}))
    assert run() == 0, run.text
    assert "config.json still names bitsandbytes; the weights are not quantised" in run.text


class TestRefusedModel:
    """One test per sentence."""

    def test_unsupported_architecture(self, server: HubServer, model: Files, run: Run) -> None:
        server.add(NAME, with_config(model, model_type="mistral"))
        refused(run, 3, "'mistral' is not supported", "gemma3n, gemma3n_text")

    def test_a_recipe_for_other_models_names_the_one_that_fits(self, server: HubServer, model: Files, run: Run) -> None:
        server.add(NAME, with_config(model, model_type="gemma3_text"))
        said = "type gemma3_text, recipe gemma3n is for gemma3n, gemma3n_text"
        refused(run, 2, said, "RECIPE=pipeline/recipes/gemma3.toml")

    def test_missing_tensors(self, server: HubServer, model: Files, run: Run) -> None:
        server.add(NAME, changed(model, model__norm__weight=None))
        refused(run, 3, "1 tensor is missing: norm.weight", "do: ")

    def test_many_missing_tensors_are_counted(self, server: HubServer, model: Files, run: Run) -> None:
        deeper = {
            "num_hidden_layers": 3,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
            "intermediate_size": [40, 56, 56],
            "activation_sparsity_pattern": [0.5, 0.0, 0.0],
        }
        server.add(NAME, with_config(model, **deeper))
        refused(run, 3, "tensors are missing: layers.2.", "more")

    def test_extra_tensors(self, server: HubServer, model: Files, run: Run) -> None:
        server.add(NAME, changed(model, model__layers__0__bonus=torch.ones(3)))
        refused(run, 3, "1 tensor is extra: model.layers.0.bonus")

    def test_missing_and_extra_at_once(self, server: HubServer, model: Files, run: Run) -> None:
        server.add(NAME, changed(model, model__norm__weight=None, model__norm__scale=torch.ones(24)))
        refused(run, 3, "1 tensor is missing: norm.weight; 1 tensor is extra: model.norm.scale")

    def test_wrong_shape(self, server: HubServer, model: Files, run: Run) -> None:
        server.add(NAME, changed(model, model__norm__weight=torch.ones(25)))
        refused(run, 3, "1 tensor is of another shape: model.norm.weight [25] instead of [24]")

    def test_not_float(self, server: HubServer, model: Files, run: Run) -> None:
        server.add(NAME, changed(model, model__norm__weight=torch.ones(24, dtype=torch.int8)))
        refused(run, 3, "1 tensor is not float: model.norm.weight (I8)")

    def test_tensor_stored_twice(self, server: HubServer, model: Files, run: Run) -> None:
        server.add(NAME, changed(model, model__language_model__norm__weight=torch.ones(24)))
        refused(run, 3, "stored twice: ", "model.language_model.norm.weight")

    def test_missing_shard(self, server: HubServer, model: Files, run: Run) -> None:
        files = shards(model)
        del files["model-00002-of-00003.safetensors"]
        server.add(NAME, files)
        refused(run, 4, "lacks 1 of the 3 shards", "model-00002-of-00003.safetensors", "do: ")

    def test_shards_without_index(self, server: HubServer, model: Files, run: Run) -> None:
        files = shards(model)
        del files["model.safetensors.index.json"]
        server.add(NAME, files)
        refused(run, 3, "has shards but no model.safetensors.index.json")

    def test_truncated_file(self, server: HubServer, model: Files, run: Run) -> None:
        server.add(NAME, {**model, "model.safetensors": model["model.safetensors"][:-100]})
        refused(run, 4, "model.safetensors is truncated", "do: ")

    def test_header_that_lies(self, server: HubServer, model: Files, run: Run) -> None:
        data = model["model.safetensors"]
        server.add(NAME, {**model, "model.safetensors": data.replace(b'"shape":[24]', b'"shape":[25]', 1)})
        refused(run, 4, "its shape and dtype need 50")

    def test_corrupt_file(self, server: HubServer, model: Files, run: Run) -> None:
        server.add(NAME, {**model, "model.safetensors": b"\xff" * 5000})
        refused(run, 4, "more than the format allows")

    def test_git_lfs_pointer(self, server: HubServer, model: Files, run: Run) -> None:
        pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
        server.add(NAME, {**model, "model.safetensors": pointer})
        refused(run, 4, "is a Git LFS pointer", "git lfs pull")

    def test_pickle_only(self, server: HubServer, model: Files, run: Run) -> None:
        files = {**model, "pytorch_model.bin": b"x"}
        del files["model.safetensors"]
        server.add(NAME, files)
        refused(run, 3, "pickle files only (pytorch_model.bin)", "save_pretrained(FOLDER)")

    def test_gguf_only(self, server: HubServer, model: Files, run: Run) -> None:
        server.add(NAME, {"README.md": README, "tiny.gguf": b"GGUF"})
        refused(run, 3, "another format (tiny.gguf)")

    def test_no_model_at_all(self, server: HubServer, model: Files, run: Run) -> None:
        server.add(NAME, {"README.md": README})
        refused(run, 3, "has neither model.safetensors nor model.safetensors.index.json", "it holds no model")

    def test_no_config(self, server: HubServer, model: Files, run: Run) -> None:
        server.add(NAME, {name: data for name, data in model.items() if name != "config.json"})
        refused(run, 3, "has no config.json")

    def test_broken_config(self, server: HubServer, model: Files, run: Run) -> None:
        server.add(NAME, {**model, "config.json": b'{"model_type": '})
        refused(run, 4, "config.json is not JSON")

    def test_no_tokenizer(self, server: HubServer, model: Files, run: Run) -> None:
        server.add(NAME, {name: data for name, data in model.items() if name != "tokenizer.json"})
        refused(run, 3, "has no tokenizer", "save_pretrained(FOLDER)")

    @pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
    def test_code_of_its_own(self, server: HubServer, model: Files, run: Run, name: str) -> None:
        table = {**json.loads(model[name]), "auto_map": {"AutoModel": "modeling.Mine"}}
        server.add(NAME, {**model, name: json.dumps(table).encode()})
        refused(run, 3, f"needs code of its own (`auto_map` in {name}, trust_remote_code)")

    @pytest.mark.parametrize(
        ("table", "method"),
        [
            ({"quant_method": "gptq", "bits": 4}, "gptq"),
            ({"quant_method": "awq"}, "awq"),
            ({"load_in_8bit": True, "bnb_4bit_quant_type": "nf4"}, "bitsandbytes"),
        ],
    )
    def test_quantised(self, server: HubServer, model: Files, run: Run, table: dict[str, Any], method: str) -> None:
        server.add(NAME, with_config(rounded(model), quantization_config=table))
        refused(run, 3, f"is quantised already ({method}; model.norm.weight is U8)", "full-precision checkpoint")

    def test_quantised_by_the_file_beside(self, server: HubServer, model: Files, run: Run) -> None:
        server.add(NAME, {**rounded(model), "quantize_config.json": b"{}"})
        refused(run, 3, "is quantised already (quantize_config.json; ")

    def test_too_little_disk(self, server: HubServer, model: Files, run: Run) -> None:
        rows = 1 << 45  # a header that describes petabytes; no machine has room for them
        table = json.loads(model["model.safetensors"][8 : 8 + int.from_bytes(model["model.safetensors"][:8], "little")])
        end = 0
        for name, entry in table.items():
            if name != "__metadata__":
                shape = [rows, *entry["shape"][1:]] if name == "model.embed_tokens.weight" else entry["shape"]
                size = 2 * math.prod(shape)
                entry.update(shape=shape, data_offsets=[end, end + size])
                end += size
        header = json.dumps(table).encode()
        start = len(header).to_bytes(8, "little") + header
        weights = Sparse(start, len(start) + end)
        server.add(NAME, {**with_config(model, vocab_size=rows), "model.safetensors": weights})
        refused(run, 10, "the checkpoint needs", "TB", "ARTIFACTS=")


@pytest.mark.parametrize("fault", ["lora", "truncated", "shard"])
def test_folders_are_refused_alike(model: Files, run: Run, tmp_path: Path, fault: str) -> None:
    files: Files
    if fault == "lora":
        files, phrase, code = {"adapter_config.json": b"{}", "adapter_model.safetensors": b""}, "no peft_type", 3
    elif fault == "truncated":
        cut = model["model.safetensors"][:-1]
        files, phrase, code = {**model, "model.safetensors": cut}, "is truncated", 4
    else:
        files = {name: data for name, data in shards(model).items() if "00003-of" not in name}
        phrase, code = "lacks 1 of the 3 shards", 4
    refused(run, code, phrase, model_id=str(write(files, tmp_path / "mine")))


# ---- access


def test_a_ci_job_reads_gated_repositories_by_the_identity_of_a_user(
    server: HubServer, model: Files, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The token is exchanged once, and again where it ends amid the download."""
    server.add(NAME, model)
    server.repos[NAME].gated = True
    server.tokens["hf_first"] = {NAME}
    server.identities["job"] = "hf_first"
    monkeypatch.setenv("HF_OIDC_RESOURCE", "somebody")
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    monkeypatch.setenv("ACTIONS_ID_TOKEN_REQUEST_URL", f"{server.endpoint}/identity")
    monkeypatch.setenv("ACTIONS_ID_TOKEN_REQUEST_TOKEN", "job-job")

    def lapse() -> None:
        server.tokens["hf_second"] = server.tokens.pop("hf_first", {NAME})
        server.identities["job"] = "hf_second"

    server.faults = [Fault("resolve/.*safetensors", run=lapse, skip=1)]
    command = [sys.executable, "-m", "pipeline.fetch", "--model-id", NAME, "--artifacts", str(run.artifacts)]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True)  # the client asks for its Hub at import
    assert done.returncode == 0, done.stderr
    assert "hf_first" not in done.stderr and "hf_second" not in done.stderr
    assert sum(request.path == "/oauth/token" for request in server.requests) == 2


def test_unknown_model(server: HubServer, run: Run) -> None:
    refused(run, 3, f"there is no model {NAME}", "check the id")


def test_unknown_model_with_a_token(server: HubServer, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    server.tokens["hf_good"] = set()
    monkeypatch.setenv("HF_TOKEN", "hf_good")
    refused(run, 3, f"there is no model {NAME}", "another account")


def test_unknown_revision(server: HubServer, model: Files, run: Run) -> None:
    server.add(NAME, model)
    assert run(NAME, "--revision", "v9") == 3
    assert f"{NAME} has no revision 'v9'" in run.text and "/commits/main" in run.text


@pytest.mark.parametrize("model_id", ["no/such/folder", "../tiny", "a b"])
def test_neither_folder_nor_id(server: HubServer, run: Run, model_id: str) -> None:
    assert run(model_id) == 3
    assert "is neither a folder nor a Hub id" in run.text
    assert not server.requests


def test_bad_token(server: HubServer, model: Files, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    server.add(NAME, model)
    monkeypatch.setenv("HF_TOKEN", "hf_expired")
    refused(run, 3, "the Hub refuses the token", "/settings/tokens")
    assert "hf_expired" not in run.text


def test_token_that_is_none(server: HubServer, model: Files, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    server.add(NAME, model)
    monkeypatch.setenv("HF_TOKEN", "hf_ümlaut")
    refused(run, 3, "HF_TOKEN holds characters that no token has")
    assert "ümlaut" not in run.text


def test_gated_without_token(server: HubServer, model: Files, run: Run) -> None:
    server.add(NAME, model, gated=True)
    refused(run, 3, f"{NAME} is gated", f"accept it at {server.endpoint}/{NAME}", "set HF_TOKEN")


def test_gated_without_access(server: HubServer, model: Files, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    server.add(NAME, model, gated=True)
    server.tokens["hf_stranger"] = set()
    monkeypatch.setenv("HF_TOKEN", "hf_stranger")
    refused(run, 3, "this token has no access", f"accept it at {server.endpoint}/{NAME}")
    assert "hf_stranger" not in run.text


def test_token_goes_to_the_hub_alone(
    server: HubServer, model: Files, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.add(NAME, model, gated=True, private=True)
    server.tokens["hf_good"] = {NAME}
    monkeypatch.setenv("HF_TOKEN", "hf_good")
    assert run() == 0, run.text
    assert {request.token for request in server.requests if request.host == "127.0.0.1"} == {"hf_good"}
    stored = [request for request in server.requests if request.host == "localhost"]
    assert stored and {request.token for request in stored} == {""}
    assert "hf_good" not in run.text
    assert not any(b"hf_good" in file.read_bytes() for file in run.artifacts.rglob("*") if file.is_file())


def test_token_that_may_not_read(server: HubServer, model: Files, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    server.add(NAME, model)
    server.tokens["hf_narrow"] = set()
    monkeypatch.setenv("HF_TOKEN", "hf_narrow")
    server.faults = [Fault("/api/models", status=403)]
    refused(run, 3, f"the token may not read {NAME}", "fine-grained")


# ---- a network that fails


def test_no_network(server: HubServer, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{port}")
    refused(run, 3, f"can't reach http://127.0.0.1:{port}", "it goes on where it stopped")
    assert run.text.count("trying again") == len(hub.WAITS)


@pytest.mark.parametrize("endpoint", ["nonsense", "http://127.0.0.1:port", "ftp://127.0.0.1"])
def test_wrong_endpoint(server: HubServer, run: Run, monkeypatch: pytest.MonkeyPatch, endpoint: str) -> None:
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    refused(run, 3, f"can't reach {endpoint}", "HF_ENDPOINT")
    assert "trying again" not in run.text


def test_offline_mode(server: HubServer, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    refused(run, 3, "HF_HUB_OFFLINE")


@pytest.mark.parametrize("body", [b"<html>Please log in to the hotel network</html>", b"[]", b'{"id": "a"}'])
def test_something_else_answers(server: HubServer, run: Run, body: bytes) -> None:
    server.faults = [Fault("/api/models", status=200, body=body)]
    refused(run, 3, "does not answer as a Hub does")


@pytest.mark.parametrize("status", [429, 500, 503])
@pytest.mark.parametrize("path", ["/api/models", "/resolve/.*/config.json", "/resolve/.*safetensors", "/storage/"])
def test_passing_failures_pass(server: HubServer, model: Files, run: Run, status: int, path: str) -> None:
    server.add(NAME, model)
    server.faults = [Fault(path, status=status, times=2)]
    assert run() == 0, run.text
    assert run.text.count(f"status {status}; trying again") == 2


def test_the_server_may_ask_for_time(server: HubServer, model: Files, run: Run) -> None:
    server.add(NAME, model)
    server.faults = [Fault("/api/models", status=429, headers={"Retry-After": "1"})]
    started = time.monotonic()
    assert run() == 0, run.text
    assert time.monotonic() - started >= 1
    assert "trying again in 1 s" in run.text


def test_lasting_failure_ends(server: HubServer, model: Files, run: Run) -> None:
    server.add(NAME, model)
    server.faults = [Fault("/api/models", status=500, times=1000)]
    refused(run, 3, "still answers with status 500", "run the same command again")
    assert len(server.requests) == 1 + len(hub.WAITS)


@dataclass(frozen=True)
class Weights:
    """The weight file of the model, and the range that the download (not the reading of its header) begins with."""

    data: bytes

    @property
    def half(self) -> int:
        return len(self.data) // 2

    @property
    def header(self) -> int:
        return 8 + int.from_bytes(self.data[:8], "little")

    @property
    def whole(self) -> str:
        return f"=0-{len(self.data) - 1}$"


@pytest.fixture(scope="session")
def weights(model: Files) -> Weights:
    return Weights(model["model.safetensors"])


def fetched_weights(run: Run) -> bytes:
    return (run.root / "fetch/checkpoint/model.safetensors").read_bytes()


@pytest.mark.parametrize("reset", [False, True])
def test_cut_connection_is_continued(
    server: HubServer, model: Files, run: Run, weights: Weights, *, reset: bool
) -> None:
    server.add(NAME, model)
    server.faults = [
        Fault("storage.*safetensors", range=weights.whole, cut=weights.half, reset=reset),
        Fault("storage.*safetensors", range=f"={weights.half}-", cut=1000),
    ]
    assert run() == 0, run.text
    assert fetched_weights(run) == weights.data
    if not reset:  # a reset may drop bytes that were under way
        assert run.text.count("the connection broke") == 2
        assert server.ranges("model.safetensors")[-1].startswith(f"bytes={weights.half + 1000}-")
        assert server.sent(".safetensors") == len(weights.data) + weights.header


def test_stalled_connection_is_continued(
    server: HubServer, model: Files, run: Run, weights: Weights, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.3)
    server.add(NAME, model)
    server.faults = [Fault("storage.*safetensors", range=weights.whole, cut=weights.half, stall=True)]
    assert run() == 0, run.text
    assert "the connection broke" in run.text and "ReadTimeout" in run.text
    assert fetched_weights(run) == weights.data


def test_next_run_goes_on_where_the_last_one_failed(
    server: HubServer, model: Files, run: Run, weights: Weights
) -> None:
    server.add(NAME, model)
    server.faults = [
        Fault("storage.*safetensors", range=weights.whole, cut=weights.half),
        Fault("storage.*safetensors", range=f"={weights.half}-", status=503, times=1000),
    ]
    refused(run, 3, "still answers with status 503", "it goes on where it stopped")
    server.faults, server.requests = [], []
    assert run() == 0, run.text
    assert "model.safetensors: going on at" in run.text
    assert fetched_weights(run) == weights.data
    assert server.sent(".safetensors") == len(weights.data) - weights.half + weights.header
    assert server.sent("LICENSE") == 0


def test_killed_run_goes_on(server: HubServer, model: Files, run: Run, weights: Weights, tmp_path: Path) -> None:
    server.add(NAME, model)
    server.faults = [Fault("storage.*safetensors", range=weights.whole, cut=weights.half, stall=True)]
    command = [sys.executable, "-m", "pipeline.fetch", "--model-id", NAME, "--artifacts", str(run.artifacts)]
    killed = subprocess.Popen(command, cwd=PROJECT, stderr=subprocess.DEVNULL)
    partials = run.root / origin.DOWNLOADS
    try:
        deadline = time.monotonic() + 600  # however busy the machine is
        while written(partials, ".safetensors.partial") < weights.half:
            assert time.monotonic() < deadline and killed.poll() is None
            time.sleep(0.02)
    finally:
        killed.send_signal(signal.SIGKILL)
        killed.wait()
    server.faults, server.requests = [], []
    assert run() == 0, run.text
    assert server.sent(".safetensors") == len(weights.data) - weights.half + weights.header
    assert fetched_weights(run) == weights.data
    assert not partials.exists()


def test_downloads_of_another_commit_are_dropped(server: HubServer, model: Files, run: Run, weights: Weights) -> None:
    old = server.add(NAME, model)
    server.faults = [Fault("storage.*safetensors", range=weights.whole, status=404)]
    assert run() == 3
    assert (run.root / origin.DOWNLOADS / old).is_dir()
    new = server.add(NAME, {**model, "LICENSE": b"another"})
    server.faults = [Fault("storage.*safetensors", range=weights.whole, status=404)]
    assert run() == 3
    assert [folder.name for folder in (run.root / origin.DOWNLOADS).iterdir()] == [new]
    assert run() == 0, run.text
    assert (run.root / "fetch/checkpoint/LICENSE").read_bytes() == b"another"


@pytest.mark.parametrize("headers_too", [False, True])
def test_ranges_may_be_ignored(
    server: HubServer, model: Files, run: Run, weights: Weights, *, headers_too: bool
) -> None:
    server.add(NAME, model)
    server.faults = [
        Fault("storage.*safetensors", ignore_range=True, times=2 if headers_too else 0),
        Fault("storage.*safetensors", range=weights.whole, cut=weights.half),
        Fault("storage.*safetensors", range=f"={weights.half}-", ignore_range=True),
    ]
    assert run() == 0, run.text
    assert fetched_weights(run) == weights.data
    assert not any(fault.times for fault in server.faults)


@pytest.mark.parametrize(("name", "place"), [("model.safetensors", "storage"), ("LICENSE", "resolve")])
def test_wrong_hash(server: HubServer, model: Files, run: Run, name: str, place: str) -> None:
    server.add(NAME, model)
    server.faults = [Fault(f"/{place}/.*{name}", range=f"=0-{len(model[name]) - 1}$", swap=True)]
    refused(run, 4, f"{name} has not the hash that the Hub lists", "downloaded anew")
    assert not list(run.root.rglob(f"{name}*"))
    assert run() == 0, run.text


def test_answer_that_ends_early(server: HubServer, model: Files, run: Run) -> None:
    commit = server.add(NAME, model)
    cut = model["config.json"][:50]
    server.faults = [Fault("/resolve/.*/config.json", status=206, body=cut)]
    refused(run, 4, "config.json on the Hub ends at byte 50")
    assert server.repos[NAME].refs["main"] == commit
