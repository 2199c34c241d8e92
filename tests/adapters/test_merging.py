"""Adapters that PEFT made, merged here and by PEFT's `merge_and_unload`: no value may differ."""

from __future__ import annotations

import json
import math
import tempfile
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Gemma3ForCausalLM, Gemma3TextConfig

from pipeline.checkpoint import adapters, merging
from pipeline.checkpoint.reader import open_checkpoint
from pipeline.checkpoint.source import Source
from pipeline.models import architecture_for

# In a folder beside the environment, which `nox -s adapters` makes.
peft: Any = pytest.importorskip("peft")
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
TYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
VOCABULARY, WIDTH = 211, 24


@pytest.fixture(scope="module", params=TYPES)
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Gemma 3 of odd geometry, in each type that checkpoints are stored in."""
    torch.manual_seed(1)
    config = Gemma3TextConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=70, num_hidden_layers=2, num_attention_heads=3,
        num_key_value_heads=1, head_dim=8, layer_types=["sliding_attention", "full_attention"], sliding_window=5,
        pad_token_id=0, bos_token_id=2, eos_token_id=1,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp(str(request.param))
    Gemma3ForCausalLM(config).to(TYPES[request.param]).save_pretrained(folder)
    return folder


def trained(base: Path, adapter: Path, seed: int, stored: torch.dtype, **chosen: Any) -> dict[str, torch.Tensor]:
    """An adapter in `adapter` that looks trained, its values `stored` so; what PEFT makes of it and `base`."""
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype="auto"), peft.LoraConfig(**chosen))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn(parameter.shape) * 0.1)
        model.to(stored).save_pretrained(adapter)
        fresh = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
        merged = peft.PeftModel.from_pretrained(fresh, adapter).merge_and_unload()
    return dict(merged.state_dict())


def merged(base: Path, adapter: Path, out: Path) -> dict[str, torch.Tensor]:
    """What is made of them here; tensors that did not change come along."""
    opened, described = open_checkpoint(base), adapters.open_adapter(Source.of_folder(adapter))
    canonical = architecture_for(opened.config).canonical
    changes = adapters.changes(described, opened.tensors, canonical, "the base")
    out.mkdir()
    merging.write(opened, described, adapter, changes.changed, out)
    return load_file(out / "model.safetensors")


def differing(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> dict[str, int]:
    """How many values differ, by tensor; a tied head is the embedding."""
    head = ours.get("lm_head.weight", ours["model.embed_tokens.weight"])
    whole = {**ours, "lm_head.weight": head}
    assert whole.keys() == theirs.keys()
    assert all(whole[name].dtype == value.dtype for name, value in theirs.items())
    counts = {name: int((whole[name] != value).sum()) for name, value in theirs.items()}
    return {name: count for name, count in counts.items() if count}


KINDS: dict[str, dict[str, Any]] = {
    "LoRA": {"r": 5, "target_modules": list(LINEAR)},
    "rank-stabilised": {"r": 16, "lora_alpha": 3, "use_rslora": True, "target_modules": list(LINEAR)},
    "DoRA": {"r": 7, "use_dora": True, "target_modules": list(LINEAR)},
    "patterns": {
        "r": 8, "lora_alpha": 12, "target_modules": list(LINEAR),
        "rank_pattern": {"q_proj": 3, r"layers\.1\.mlp\.(up|gate)_proj": 33}, "alpha_pattern": {"1.mlp.up_proj": 1.5},
    },
    "embedding": {"r": 6, "target_modules": ["embed_tokens", "q_proj"]},
    "embedding and head": {"r": 6, "target_modules": ["lm_head", "embed_tokens"], "fan_in_fan_out": True},
    "head": {"r": 6, "target_modules": ["lm_head", "v_proj"]},
    "saved embedding": {"r": 4, "target_modules": ["v_proj"], "modules_to_save": ["embed_tokens"]},
    "saved head": {"r": 4, "target_modules": ["v_proj"], "modules_to_save": ["lm_head"]},
    "both saved": {"r": 4, "target_modules": ["v_proj"], "modules_to_save": ["lm_head", "embed_tokens"]},
    "both saved as one": {
        "r": 4, "target_modules": ["v_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True,
    },
    "saved norms": {"r": 4, "target_modules": ["v_proj"], "modules_to_save": ["input_layernorm"]},
    "tokens": {"r": 4, "target_modules": ["v_proj"], "trainable_token_indices": [200, 3, 77]},
    "tokens by name": {"r": 4, "target_modules": ["v_proj"], "trainable_token_indices": {"embed_tokens": [9, 8]}},
    "kept initialisation": {"r": 4, "target_modules": ["v_proj"], "init_lora_weights": "gaussian"},
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_no_value_differs_from_peft(base: Path, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = trained(base, tmp_path / "adapter", 0, torch.float32, **KINDS[kind])
    original = load_file(base / "model.safetensors")
    monkeypatch.setattr(merging, "_BLOCK", 3_000)  # several blocks, the last one of another height
    ours = merged(base, tmp_path / "adapter", tmp_path / "merged")
    assert differing(ours, theirs) == {}
    assert any(not torch.equal(original[name], ours[name]) for name in original)
    assert ("lm_head.weight" in ours) == (kind in ("saved embedding", "saved head", "both saved"))


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_value_differs_from_peft_whatever_is_drawn(base: Path, data: st.DataObject) -> None:
    """Ranks, targets, patterns, what is saved, how the adapter is stored, and how many rows are merged at a time."""
    draw = data.draw
    targets = draw(st.lists(st.sampled_from(LINEAR), min_size=1, unique=True), label="targets")
    dora = draw(st.booleans(), label="dora")
    table = draw(st.sampled_from(["", "lora", "saved", "tokens"]), label="embedding")
    chosen: dict[str, Any] = {
        "r": draw(st.integers(1, 64), label="r"),
        "lora_alpha": draw(st.integers(1, 64), label="alpha"),
        "use_rslora": draw(st.booleans(), label="rslora"),
        "use_dora": dora,
        "target_modules": [*targets, *(["embed_tokens"] if table == "lora" and not dora else [])],
        "rank_pattern": draw(st.dictionaries(st.sampled_from(targets), st.integers(1, 40)), label="ranks"),
        "alpha_pattern": draw(st.dictionaries(st.sampled_from(targets), st.floats(0.25, 40)), label="alphas"),
    }
    if table == "saved":
        chosen["modules_to_save"] = ["embed_tokens", *(["lm_head"] if draw(st.booleans(), label="head too") else [])]
    if table == "tokens":
        indices = st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=9, unique=True)
        chosen["trainable_token_indices"] = draw(indices, label="tokens")
    stored = TYPES[draw(st.sampled_from(list(TYPES)), label="stored")]
    with tempfile.TemporaryDirectory() as scratch, pytest.MonkeyPatch.context() as patch:
        theirs = trained(base, Path(scratch) / "adapter", draw(st.integers(0, 99), label="seed"), stored, **chosen)
        patch.setattr(merging, "_BLOCK", draw(st.sampled_from([1, 2_000, 3_333, 1 << 22]), label="block"))
        assert differing(merged(base, Path(scratch) / "adapter", Path(scratch) / "merged"), theirs) == {}


def test_the_scale_is_of_the_rank_that_a_pattern_gives(tmp_path: Path) -> None:
    del tmp_path
    said = adapters.Settings(
        rank=8,
        alpha=16.0,
        ranks={"q_proj": 4},
        alphas={},
        rslora=True,
        dora=False,
        saved=(),
        keeps_tie=False,
        tokens={},
    )
    assert said.scale("model.layers.0.self_attn.q_proj") == 16 / math.sqrt(4)
    assert said.scale("model.layers.0.self_attn.xq_proj") == 16 / math.sqrt(8)


def test_a_resized_vocabulary_comes_along(base: Path, tmp_path: Path) -> None:
    """More tokens, their embedding saved with the adapter: the merged configuration knows of them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wide = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
        wide.resize_token_embeddings(VOCABULARY + 3)
        model = peft.get_peft_model(wide, peft.LoraConfig(r=4, target_modules=["q_proj"]))
        model.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    ours = merged(base, tmp_path / "adapter", tmp_path / "merged")
    assert torch.equal(ours["model.embed_tokens.weight"], wide.get_input_embeddings().weight)
    assert json.loads((tmp_path / "merged/config.json").read_text())["vocab_size"] == VOCABULARY + 3
