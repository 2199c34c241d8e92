"""An output head that is stored beside the embedding: a copy is taken, one that differs is never passed in silence."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hub_server import HubServer
from line import changed_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from pipeline import fetch
from pipeline.core import manifest
from pipeline.core.recipe import PROJECT
from pipeline.core.stage import DEFAULT_RECIPE, main
from pipeline.judge.reference import Head
from pipeline.reference.model import HuggingFace

EMBEDDING = "model.embed_tokens.weight"
ROWS, WIDTH = 2048, 128
"""Of the shipped model's embedding."""


def with_head(folder: Path, name: str = "lm_head.weight", change: torch.Tensor | None = None) -> Path:
    """The shipped model in `folder` with a head `name`: the embedding, and `change` (float32 [V, H]) added to it."""
    model = changed_model(folder)
    tensors = load_file(model / "model.safetensors")
    tensors.pop("lm_head.weight", None)
    table = tensors[EMBEDDING]
    head = table.clone() if change is None else (table.float() + change).to(table.dtype)
    save_file({**tensors, name: head}, model / "model.safetensors", metadata={"format": "pt"})
    return model


def trained() -> torch.Tensor:
    """What training adds to every row."""
    return 0.05 * torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(0))


def one_row(row: int) -> torch.Tensor:
    """A change of a single element, as of one token that was added and trained."""
    change = torch.zeros(ROWS, WIDTH)
    change[row, 7] = 1.0
    return change


def fetched(model_id: str, artifacts: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Run fetch; its exit code and what it said."""
    capsys.readouterr()
    arguments = ["--model-id", model_id, "--artifacts", str(artifacts), "--recipe", str(PROJECT / DEFAULT_RECIPE)]
    code = main(fetch.STAGE, arguments)
    captured = capsys.readouterr()
    return code, captured.out + captured.err


@pytest.mark.parametrize("name", ["lm_head.weight", "language_model.lm_head.weight"])
@pytest.mark.parametrize("change", [trained(), one_row(0), one_row(1001), one_row(ROWS - 1)], ids=lambda _: "head")
def test_a_head_of_its_own_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, change: torch.Tensor
) -> None:
    code, said = fetched(str(with_head(tmp_path, name, change)), tmp_path / "out", capsys)
    row = int(change.abs().sum(1).argmax()) if change.count_nonzero() == 1 else 0
    assert code == 3
    assert f"{name} differs from the token embedding (in row {row})" in said and "do: " in said
    assert not list(tmp_path.glob("out/*/fetch/manifest.json"))


def test_what_config_json_says_of_tying_does_not_count(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = with_head(tmp_path, change=one_row(3))
    config = (model / "config.json").read_text()
    assert '"tie_word_embeddings": true' in config
    (model / "config.json").write_text(config.replace('"tie_word_embeddings": true,', ""))
    assert fetched(str(model), tmp_path / "out", capsys)[0] == 3


def test_a_head_of_another_shape_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = with_head(tmp_path)
    tensors = load_file(model / "model.safetensors")
    tensors["lm_head.weight"] = torch.cat([tensors["lm_head.weight"]] * 2)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    code, said = fetched(str(model), tmp_path / "out", capsys)
    assert code == 3 and f"BF16 [{2 * ROWS}, {WIDTH}], not [{ROWS}, {WIDTH}]" in said


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_copy_is_taken(tmp_path: Path, capsys: pytest.CaptureFixture[str], dtype: torch.dtype) -> None:
    """As mlx-lm's fuse and old versions of transformers store it; in float32 as well."""
    model = with_head(tmp_path)
    tensors = load_file(model / "model.safetensors")
    tensors["lm_head.weight"] = tensors["lm_head.weight"].to(dtype)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    code, said = fetched(str(model), tmp_path / "out", capsys)
    assert code == 0, said
    made = manifest.read(tmp_path / "out" / model.name / "fetch")
    assert made.facts["parameters"] == sum(t.numel() for name, t in tensors.items() if name != "lm_head.weight")


def on_hub(server: HubServer, model: Path) -> str:
    """The model as a repository."""
    server.add("org/headed", {file.name: file.read_bytes() for file in model.iterdir() if file.is_file()})
    return "org/headed"


def test_on_the_hub_it_is_refused_before_the_weights_move(
    server: HubServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = with_head(tmp_path, change=trained())
    code, said = fetched(on_hub(server, model), tmp_path / "out", capsys)
    assert code == 3 and "differs from the token embedding" in said
    assert server.sent(".safetensors") < 0.5 * (model / "model.safetensors").stat().st_size


def test_a_row_that_no_sample_meets_is_found_after_the_download(
    server: HubServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, said = fetched(on_hub(server, with_head(tmp_path, change=one_row(300))), tmp_path / "out", capsys)
    assert code == 3 and "(in row 300)" in said
    assert not list(tmp_path.glob("out/*/fetch/manifest.json"))


@pytest.mark.parametrize("streamed", [False, True])
def test_the_reference_has_the_head_that_transformers_has(tmp_path: Path, streamed: bool) -> None:
    """Were such a checkpoint to come through all the same, the gates would compare with its own head."""
    model = with_head(tmp_path, change=trained())
    ids = np.arange(3, 43, dtype=np.int32)[None]
    with torch.inference_mode():
        whole = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="eager").eval()
        expected = whole(torch.from_numpy(ids).long()).logits[0].double().numpy()
    loaded = HuggingFace.load(model, "cpu", streamed=streamed)
    head = Head.of_checkpoint(model, loaded.cap)
    np.testing.assert_allclose(head.logits(loaded.hidden(ids, np.ones_like(ids))[0]), expected, atol=2e-4)
    shutil.copytree(model, tmp_path / "tied")
    tensors = load_file(model / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, tmp_path / "tied" / "model.safetensors", metadata={"format": "pt"})
    tied = Head.of_checkpoint(tmp_path / "tied", loaded.cap)
    assert np.abs(tied.logits(loaded.hidden(ids, np.ones_like(ids))[0]) - expected).max() > 0.1
