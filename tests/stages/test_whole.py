"""Whole ways from what people have to a verified bundle: a model with a head of its own, and an adapter with its base.

Both are small odd models. The wrong result that such a checkpoint invites, the tied head or the bare base, fails the
gate; and what the bundle says is held against Hugging Face's model as it was before it was saved.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import geometry
import pytest
import speaking
import torch
from line import Line, small_recipe
from safetensors.torch import save_file
from transformers import Gemma3ForCausalLM

from pipeline import bundle, fetch, fp32, golden, graph, int8, verify
from pipeline.checkpoint import merging
from pipeline.checkpoint.reader import open_checkpoint
from pipeline.core import log, manifest
from pipeline.core.facts import Fetch
from pipeline.models import build
from pipeline.reference.model import HuggingFace
from pipeline.runtime.litert_lm import Dialogue, LmRuntime

ODD: dict[str, Any] = {
    "vocab_size": speaking.VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 72,
    "num_hidden_layers": 2,
    "layer_types": [geometry.SLIDING, geometry.FULL],
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "sliding_window": 12,
    "query_pre_attn_scalar": 12,
}
ASKED = ("What is two and two?", "Name a colour.", "Say good night.")
LENGTH = 24
GATES = {
    'model_types = ["gemma3n", "gemma3n_text"]': 'model_types = ["gemma3_text"]',
    "ladder = true": "ladder = false",
    "[gates.bundle-int8]\nkld = 0.01\ntop1 = 0.96": "[gates.bundle-int8]\nkld = 0.01\ntop1 = 0.9",
    "bytes_per_weight = 1.06": "bytes_per_weight = 1.1",
}
"""A random model's logits lie close together, so that rounding changes more tokens; short rows have as long scales."""


def line(model: Path, tmp_path: Path, *precisions: str) -> Line:
    """A line of a Gemma 3, with bundles of `precisions`."""
    chosen = {'precisions = ["fp32", "int8"]': f"precisions = {json.dumps(precisions)}"}
    recipe = small_recipe(tmp_path / "recipe.toml", **GATES, **chosen)
    return Line(artifacts=tmp_path / "artifacts", recipe=recipe, model=model)


def made(line: Line, *stages: Any) -> None:
    """Run stages of the bundle."""
    for stage in stages:
        assert line.run(stage.STAGE, "--graphs", "bundle") == 0, stage.__name__


def judged(line: Line) -> int:
    """Verify's exit code."""
    return line.run(verify.STAGE, "--graphs", "bundle")


def kld(line: Line, precision: str) -> float:
    report = json.loads((line.root / "verify" / "report.json").read_text(encoding="utf-8"))
    return float(report["bundles"][f"bundle-{precision}"]["against_reference"]["kld"]["value"])


def spoken(line: Line, precision: str = "fp32") -> list[str]:
    """What the bundle answers in LiteRT-LM."""
    with LmRuntime(line.root / "bundle" / f"{precision}.litertlm", threads=1) as runtime:
        return [_answer(runtime, asked) for asked in ASKED]


def _answer(runtime: LmRuntime, asked: str) -> str:
    with Dialogue(runtime, LENGTH, greedy=True) as dialogue:
        return "".join(dialogue.answer(asked))


def expected(model: Any, checkpoint: Path) -> list[str]:
    """What `model`, one of Hugging Face's in memory, answers with the tokenizer in `checkpoint`."""
    loaded = HuggingFace.load(checkpoint, "cpu")
    original = HuggingFace(**{**vars(loaded), "model": model.eval()})
    prompts = [original.as_turn(asked) for asked in ASKED]
    with log.progress("reference", LENGTH, "tokens") as bar:
        return [row.text for row in original.continue_greedily(prompts, LENGTH, bar)]


def test_a_trained_head_beside_a_tied_config_reaches_the_bundle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = geometry.reference({**ODD, "tie_word_embeddings": False}, 3, Gemma3ForCausalLM)
    way = line(speaking.save(model, tmp_path / "headed", tie_word_embeddings=True), tmp_path, "fp32", "int8")
    made(way, fetch, golden, graph, fp32, int8, bundle)
    assert not manifest.read(way.root / "fetch").told(Fetch).tied
    assert judged(way) == 0
    assert spoken(way) == expected(model, way.model)

    names = build.tensor_names(open_checkpoint(way.model))
    wrong = {**names, "lm_head.weight": names["embed_tokens.weight"]}
    monkeypatch.setattr(build, "tensor_names", lambda _: wrong)
    made(way, fp32, int8, bundle)
    assert judged(way) == 8
    assert kld(way, "fp32") > 0.1 and kld(way, "int8") > 0.1
    assert spoken(way) != expected(model, way.model)


def lora(model: Any, base: Path, folder: Path) -> None:
    """An adapter of `base` as PEFT saves it in `folder`; `model`, which the base was saved from, gets its values.

    Rank-stabilised, on the queries and on what the MLP gives; one layer has a rank of its own.
    """
    drawn = torch.Generator().manual_seed(5)
    said = {
        "peft_type": "LORA", "r": 3, "lora_alpha": 6, "use_rslora": True, "bias": "none", "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base), "target_modules": ["q_proj", "down_proj"],
        "rank_pattern": {"layers.1.mlp.down_proj": 5},
    }  # fmt: skip
    tensors = {}
    for name, matrix in model.named_parameters():
        if name.endswith(("q_proj.weight", "down_proj.weight")):
            rank = 5 if "layers.1.mlp.down_proj" in name else 3
            down = 0.4 * torch.randn(rank, matrix.shape[1], generator=drawn)
            up = 0.4 * torch.randn(matrix.shape[0], rank, generator=drawn)
            module = f"base_model.model.{name.removesuffix('.weight')}"
            tensors |= {f"{module}.lora_A.weight": down, f"{module}.lora_B.weight": up}
            matrix.data += (6 / rank**0.5) * (up @ down)
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(said))


def test_an_adapter_and_its_base_become_one_bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = geometry.reference({**ODD, "tie_word_embeddings": True}, 4, Gemma3ForCausalLM)
    base, folder = speaking.save(model, tmp_path / "base"), tmp_path / "tuned"
    bare = expected(model, base)
    lora(model, base, folder)
    way = line(folder, tmp_path, "fp32")
    made(way, fetch, golden, graph, fp32, bundle)
    assert judged(way) == 0
    assert spoken(way) == expected(model, base) != bare

    (other := tmp_path / "unmerged").mkdir()
    monkeypatch.setattr(merging, "_changed", lambda _part, _tensors, rows, _start, _kind: rows)
    unmerged = Line(artifacts=other, recipe=way.recipe, model=folder)
    made(unmerged, fetch, golden, graph, fp32, bundle)
    assert spoken(unmerged) == bare, "what a merge that does nothing leaves"
    monkeypatch.setattr(fp32, "open_checkpoint", lambda _: open_checkpoint(base))
    made(way, fp32, bundle)
    assert judged(way) == 8
    assert kld(way, "fp32") > 0.1
