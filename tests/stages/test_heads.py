"""Output heads: the embedding, a copy of it, a matrix of its own, or the only one stored; as transformers 5 has it.

What is judged here through LiteRT are small odd models, in every precision; `tests/stages/intake.py` has the forms in
which checkpoints store a head.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import geometry
import numpy as np
import pytest
import torch
from geometry import BUNDLE
from hub_server import HubServer
from line import changed_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Gemma3ForCausalLM, Gemma3nForCausalLM

from pipeline import fetch
from pipeline.checkpoint.reader import Checkpoint, open_checkpoint
from pipeline.core import manifest
from pipeline.core.facts import Fetch
from pipeline.core.recipe import PROJECT, Int4, Int8, StepLimits
from pipeline.core.stage import DEFAULT_RECIPE, main
from pipeline.judge.reference import Head
from pipeline.models import build
from pipeline.quantize import float16, int4, int8
from pipeline.reference.model import HuggingFace
from pipeline.runtime.litert import StepModel
from pipeline.tflite.graph import Graph

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


def facts(tmp_path: Path, name: str) -> Fetch:
    return manifest.read(tmp_path / "out" / name / "fetch").told(Fetch)


def parameters(model: Path, *without: str) -> int:
    tensors = load_file(model / "model.safetensors")
    return sum(tensor.numel() for name, tensor in tensors.items() if name not in without)


@pytest.mark.parametrize("name", ["lm_head.weight", "language_model.lm_head.weight"])
@pytest.mark.parametrize("change", [trained(), one_row(0), one_row(1001), one_row(ROWS - 1)], ids=lambda _: "head")
@pytest.mark.parametrize("ties", ["true", "false"])
def test_a_head_of_its_own_is_one_more_matrix(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, change: torch.Tensor, ties: str
) -> None:
    """Whatever config.json says: merging a LoRA that trained the head leaves "tied" in it."""
    model = configured(with_head(tmp_path, name, change), tie_word_embeddings=ties == "true")
    code, said = fetched(str(model), tmp_path / "out", capsys)
    assert code == 0, said
    assert not facts(tmp_path, model.name).tied
    assert facts(tmp_path, model.name).parameters == parameters(model)


def configured(model: Path, **keys: Any) -> Path:
    """`model` with other keys in its config.json."""
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, **keys}))
    return model


def test_a_head_of_another_shape_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = with_head(tmp_path)
    tensors = load_file(model / "model.safetensors")
    tensors["lm_head.weight"] = torch.cat([tensors["lm_head.weight"]] * 2)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    code, said = fetched(str(model), tmp_path / "out", capsys)
    assert code == 3 and f"lm_head.weight [{2 * ROWS}, {WIDTH}] instead of [{ROWS}, {WIDTH}]" in said


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_copy_is_taken(tmp_path: Path, capsys: pytest.CaptureFixture[str], dtype: torch.dtype) -> None:
    """As mlx-lm's fuse and old versions of transformers store it; in float32 as well."""
    model = with_head(tmp_path)
    tensors = load_file(model / "model.safetensors")
    tensors["lm_head.weight"] = tensors["lm_head.weight"].to(dtype)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    code, said = fetched(str(model), tmp_path / "out", capsys)
    assert code == 0, said
    assert facts(tmp_path, model.name).tied
    assert facts(tmp_path, model.name).parameters == parameters(model, "lm_head.weight")


def alone(folder: Path, kept: str, *, ties: bool) -> Path:
    """The shipped model with only one of embedding and head in its file."""
    model = configured(with_head(folder), tie_word_embeddings=ties)
    tensors = load_file(model / "model.safetensors")
    for name in {EMBEDDING, "lm_head.weight"} - {kept}:
        del tensors[name]
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    return model


@pytest.mark.parametrize("kept", [EMBEDDING, "lm_head.weight"])
def test_one_matrix_alone_serves_as_both_only_if_config_json_ties_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kept: str
) -> None:
    model = alone(tmp_path / "tied", kept, ties=True)
    code, said = fetched(str(model), tmp_path / "tied" / "out", capsys)
    assert code == 0, said
    code, said = fetched(str(alone(tmp_path / "untied", kept, ties=False)), tmp_path / "untied" / "out", capsys)
    missing = "lm_head.weight" if kept == EMBEDDING else "embed_tokens.weight"
    assert code == 3 and f"stores no {missing}, though its config.json unties" in said and "do: " in said


def on_hub(server: HubServer, model: Path) -> str:
    """The model as a repository."""
    server.add("org/headed", {file.name: file.read_bytes() for file in model.iterdir() if file.is_file()})
    return "org/headed"


@pytest.mark.parametrize("row", [0, 300])
def test_on_the_hub_a_head_is_told_apart_by_all_its_rows(
    server: HubServer, tmp_path: Path, capsys: pytest.CaptureFixture[str], row: int
) -> None:
    """Row 300 is in no block that is looked at before the download."""
    code, said = fetched(on_hub(server, with_head(tmp_path, change=one_row(row))), tmp_path / "out", capsys)
    assert code == 0, said
    assert not facts(tmp_path, "org--headed").tied


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("stored", ["its own", "a copy", "the head alone"])
def test_the_reference_has_the_head_that_transformers_has(tmp_path: Path, streamed: bool, stored: str) -> None:
    if stored == "the head alone":
        model = alone(tmp_path, "lm_head.weight", ties=True)
    else:
        model = with_head(tmp_path, change=trained() if stored == "its own" else None)
    ids = np.arange(3, 43, dtype=np.int32)[None]
    with torch.inference_mode():
        whole = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="eager").eval()
        expected = whole(torch.from_numpy(ids).long()).logits[0].double().numpy()
    loaded = HuggingFace.load(model, "cpu", streamed=streamed)
    head = Head.of_checkpoint(model, loaded.cap)
    hidden = loaded.hidden(ids, np.ones_like(ids))
    np.testing.assert_allclose(head.logits(hidden[0]), expected, atol=2e-4)
    with torch.inference_mode():
        said = loaded.model(torch.from_numpy(ids).long()).logits[0].double().numpy()
    np.testing.assert_allclose(said, expected, atol=2e-4)
    if stored == "its own":
        checkpoint = open_checkpoint(model)
        tied = Head(checkpoint.stored(EMBEDDING), loaded.cap)
        assert np.abs(tied.logits(hidden[0]) - expected).max() > 0.1


# --- the files


LAYERS = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"],
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "sliding_window": 5,
    "vocab_size": 80,
    "tie_word_embeddings": False,
}
GEOMETRIES: dict[Any, dict[str, Any]] = {
    Gemma3ForCausalLM: {**LAYERS, "intermediate_size": 96, "query_pre_attn_scalar": 32},
    Gemma3nForCausalLM: {
        **LAYERS,
        "vocab_size_per_layer_input": 75,
        "hidden_size_per_layer_input": 32,
        "num_kv_shared_layers": 0,
        "intermediate_size": [64, 96],
        "activation_sparsity_pattern": [0.5, 0.0],
        "laurel_rank": 8,
        "altup_num_inputs": 3,
    },
}


@dataclass
class Untied:
    """A small model with a head of its own: Hugging Face's, its checkpoint, and the graphs of both kinds."""

    model: Any
    checkpoint: Checkpoint
    folder: Path

    def step(self, make: Callable[[Graph], None]) -> geometry.Agreement:
        """The step graph, made by `make`, against Hugging Face."""
        return geometry.compare_on_grid(StepModel(self.file("step.tflite", make)), self.model, (1, 3), (1, 7, 40))

    def decoder(self, make: Callable[[Graph], None]) -> geometry.Agreement:
        """The decoder, made by `make`, against Hugging Face, with embedders in fp32."""
        folder = self.file("decoder.tflite", make).parent
        for table in self.folder.glob("*embedder.tflite"):
            (folder / table.name).symlink_to(table)
        return geometry.compare_conversations(geometry.in_file(folder), self.model, BUNDLE, 1)

    def file(self, name: str, make: Callable[[Graph], None]) -> Path:
        """A graph made by `make`, in a folder of its own: the last one may still be mapped."""
        graph = build.with_weights(self.checkpoint, self.folder / f"bare-{name}")
        make(graph)
        graph.prune()
        file = Path(tempfile.mkdtemp(dir=self.folder)) / name
        graph.write(file)
        return file


@pytest.fixture(scope="module", params=GEOMETRIES, ids=lambda kind: kind.__name__)
def untied(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Untied:
    folder = tmp_path_factory.mktemp("untied")
    model = geometry.reference(GEOMETRIES[request.param], 1, request.param)
    checkpoint = geometry.save(model, folder / "checkpoint")
    geometry.convert_decoder(checkpoint, BUNDLE, folder)
    opened = open_checkpoint(checkpoint)
    build.export_step(opened, StepLimits(max_batch=8, max_sequence=2048), folder / "bare-step.tflite")
    return Untied(model, opened, folder)


def nothing(_graph: Graph) -> None:
    """fp32: weights as they are stored."""


def test_a_file_with_a_head_of_its_own_is_exact(untied: Untied) -> None:
    for result in (untied.step(nothing), untied.decoder(nothing)):
        assert result.nmse <= 1e-9 and result.top1 == 1, result


def test_a_head_of_its_own_is_stored_beside_the_table_and_once(untied: Untied) -> None:
    for name in ("step.tflite", "decoder.tflite"):
        graph = Graph.read(untied.file(name, nothing))
        stored = {
            int(view.main.tensors[tensor].buffer): view.shape(tensor)
            for view in graph.views()
            for tensor in range(len(view.main.tensors))
            if view.is_constant(tensor) and view.shape(tensor) == (LAYERS["vocab_size"], LAYERS["hidden_size"])
        }
        lookup = name == "step.tflite" or isinstance(untied.model, Gemma3ForCausalLM)
        assert len(stored) == (2 if lookup else 1), (name, stored)


def test_the_embedding_in_place_of_the_head_is_found(untied: Untied, monkeypatch: pytest.MonkeyPatch) -> None:
    """The defect: a model with a trained head, read as tied."""
    names = {**build.tensor_names(untied.checkpoint)}
    wrong = {**names, "lm_head.weight": names["embed_tokens.weight"]}
    monkeypatch.setattr(build, "tensor_names", lambda _: wrong)
    for result in (untied.step(nothing), untied.decoder(nothing)):
        assert result.nmse > 1, result


ALL = (".",)
FORMS: dict[str, tuple[Callable[[Graph], None], float]] = {
    "fp16": (float16.make_half, 1e-5),
    "int8": (lambda graph: int8.make_int8(graph, Int8(scheme="dynamic", calibration_samples=1)), 1e-2),
    "int8, equalized, in two terms": (
        lambda graph: int8.make_int8(
            graph, Int8(scheme="dynamic", calibration_samples=1, int8x2=("head",), equalize=0.5)
        ),
        1e-2,
    ),
    "int8, rotated, in groups": (
        lambda graph: int8.make_int8(
            graph,
            Int8(scheme="dynamic", calibration_samples=1, rotate=ALL, rotation=16, groups=("head",), group_size=32),
        ),
        1e-2,
    ),
    "int4": (lambda graph: int4.make_int4(graph, Int4()), 0.8),
    "int4, frequent tokens and the head in 8 bits": (
        lambda graph: int4.make_int4(graph, Int4(keep_int8=("head", "layers"), int8_tokens=((0, 20), (40, 50)))),
        0.1,
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_precision_has_both_matrices(untied: Untied, form: str) -> None:
    """Against Hugging Face in fp32: a matrix in the other's place would be beyond all of these limits."""
    make, limit = FORMS[form]
    for result in (untied.step(make), untied.decoder(make)):
        assert result.nmse <= limit, (form, result)


@pytest.mark.parametrize(("scheme", "limit"), [("static", 0.1), ("static16", 1e-2)])
def test_full_integer_step_graphs_have_both_matrices(untied: Untied, scheme: Any, limit: float) -> None:
    fp32 = untied.file("step.tflite", nothing)
    random = np.random.default_rng(3)
    samples = [random.integers(0, 75, size, dtype=np.int32) for size in (40, 33, 40, 17)]
    settings = Int8(scheme=scheme, calibration_samples=4, int8x2_static=ALL, float_scores=True)
    result = untied.step(lambda graph: int8.make_static(graph, settings, scheme, fp32, samples))
    assert result.nmse <= limit, result
