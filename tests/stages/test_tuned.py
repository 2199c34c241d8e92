"""What each tool of fine-tuning leaves, as MODEL_ID: what was trained is fetched, or one sentence says why not.

Taken means: every tensor that the text model reads is the trained model's, value for value, by a merge computed here.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import tuned
from hub_server import HubServer
from tuned import FOLDERS, Q

from pipeline import fetch
from pipeline.checkpoint.reader import open_checkpoint
from pipeline.core.stage import main
from pipeline.models import build
from pipeline.reference.model import HuggingFace

TAKEN = [name for name, (_, phrase) in FOLDERS.items() if not phrase]
REFUSED = [name for name, (_, phrase) in FOLDERS.items() if phrase]


def fetched(model_id: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Run fetch by the recipe of the type; its exit code and what it said."""
    capsys.readouterr()
    code = main(fetch.STAGE, ["--model-id", model_id, "--artifacts", str(tmp_path / "made")])
    captured = capsys.readouterr()
    return code, captured.out + captured.err


def trained(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of the trained model: the shipped one's, with the adapter merged where there is one."""
    tensors = {name.removeprefix("model."): value.float() for name, value in tuned.weights().items()}
    if (folder / "adapter_model.safetensors").exists() and not (folder / "model.safetensors").exists():
        parts, name = tuned.load_file(folder / "adapter_model.safetensors"), "layers.0.self_attn.q_proj.weight"
        merged = tensors[name] + 2.0 * (parts[f"{Q}.lora_B.weight"] @ parts[f"{Q}.lora_A.weight"])
        tensors[name] = merged.bfloat16().float()
    return tensors


@pytest.mark.parametrize("name", TAKEN)
def test_what_was_trained_is_taken(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    FOLDERS[name][0](folder := tmp_path / "mine")
    code, said = fetched(str(folder), tmp_path, capsys)
    assert code == 0, said
    checkpoint = open_checkpoint(tmp_path / "made" / "mine" / "fetch" / "checkpoint")
    expected = trained(folder)
    names = build.tensor_names(checkpoint)
    assert names.keys() == expected.keys()
    for canonical, stored in names.items():
        assert torch.equal(torch.from_numpy(checkpoint.read(stored).copy()), expected[canonical]), canonical
    assert HuggingFace.load(checkpoint.folder, "cpu").stop == (1, 6), "transformers loads it too"
    beside = "adapter_model.safetensors lies beside the model" in said
    assert beside == ((folder / "model.safetensors").exists() and (folder / "adapter_model.safetensors").exists())


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_taken_is_refused_in_one_sentence(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make, phrase = FOLDERS[name]
    make(folder := tmp_path / "mine")
    code, said = fetched(str(folder), tmp_path, capsys)
    assert code == 3 and phrase.format(folder=folder) in said and "do: " in said, said
    assert "Traceback" not in said and not list(tmp_path.glob("made/*/fetch/manifest.json"))


def test_checkpoints_of_a_training_on_the_hub_are_named(
    server: HubServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As `push_to_hub` with every save leaves a repository."""
    tuned.checkpoints(tuned.whole)(folder := tmp_path / "mine")
    files = {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    server.add("me/training", files)
    code, said = fetched("me/training", tmp_path, capsys)
    assert code == 3 and "hf download" in said and "checkpoint-1000" in said, said


def test_a_file_is_no_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tuned.whole(folder := tmp_path / "mine")
    code, said = fetched(str(folder / "model.safetensors"), tmp_path, capsys)
    assert code == 2 and f"MODEL_ID={folder}" in said, said
