"""Stress models compute what they were made from: every family in PyTorch, by Hugging Face's own classes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import geometry
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma3ForCausalLM, Gemma3nForCausalLM

from pipeline.checkpoint.reader import open_checkpoint
from pipeline.judge.metrics import compare
from pipeline.models.build import tensor_names
from tools import stress

LAYERS = {
    "vocab_size": 90,
    "hidden_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
KINDS = {"layer_types": [geometry.SLIDING, geometry.FULL, geometry.SLIDING, geometry.FULL], "sliding_window": 5}
PER_LAYER = {"vocab_size_per_layer_input": 90, "hidden_size_per_layer_input": 8}
MODELS: dict[str, Any] = {
    "gemma3n": lambda: geometry.reference(
        {
            **LAYERS,
            **KINDS,
            **PER_LAYER,
            "intermediate_size": [40] * 4,
            "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0],
            "num_kv_shared_layers": 2,
            "laurel_rank": 3,
        },
        1,
        Gemma3nForCausalLM,
    ),
    "gemma3": lambda: geometry.reference(
        {**LAYERS, **KINDS, "intermediate_size": 40, "attention_bias": True, "query_pre_attn_scalar": 8},
        2,
        Gemma3ForCausalLM,
    ),
    "gemma4": lambda: geometry.gemma4_reference(
        {
            **LAYERS,
            **KINDS,
            **PER_LAYER,
            "intermediate_size": 40,
            "num_kv_shared_layers": 1,
            "global_head_dim": 16,
            "attention_k_eq_v": True,
            "num_global_key_value_heads": 1,
        },
        3,
    ),
    **{
        kind: lambda kind=kind: geometry.plain_reference({**LAYERS, "intermediate_size": 40, "model_type": kind}, 4)
        for kind in ("llama", "qwen2", "qwen3")
    },
}


def logits(model: Any) -> np.ndarray:
    """[positions, V] of two rows of drawn tokens."""
    ids = np.random.default_rng(0).integers(0, 90, (2, 24))
    with torch.inference_mode():
        found: np.ndarray = model(input_ids=torch.from_numpy(ids), use_cache=False).logits.numpy()
    return found.reshape(48, -1)


@pytest.mark.parametrize("family", MODELS)
def test_a_stressed_model_computes_the_same(family: str, tmp_path: Path) -> None:
    source = geometry.save(MODELS[family](), tmp_path / "source")
    loaded = AutoModelForCausalLM.from_pretrained(source, attn_implementation="eager").eval()
    expected, variant = logits(loaded), stress.VARIANTS["all"]
    made = stress.write(source, tmp_path / "stressed", variant)
    found = compare(expected, logits(AutoModelForCausalLM.from_pretrained(made, attn_implementation="eager").eval()))
    assert found.nmse.max() <= 1e-8
    before, after = open_checkpoint(source), open_checkpoint(made)
    changed = {
        name
        for name, stored in tensor_names(before).items()
        if not np.array_equal(before.read(stored), after.read(stored))
    }
    assert changed == set(stress.changes(before, variant))
    # Of each layer something before the MLP and down_proj, of some layers values: else nothing would be stressed.
    for layer in range(4):
        assert f"layers.{layer}.mlp.gate_proj.weight" in changed and f"layers.{layer}.mlp.down_proj.weight" in changed
    assert any("o_proj" in name for name in changed) and any("v_proj.weight" in name for name in changed)
    gate = "layers.0.mlp.gate_proj.weight"
    widest = [np.abs(held.read(tensor_names(held)[gate])).max(axis=0) for held in (before, after)]
    shares = widest[0] / widest[1]
    assert shares.max() / np.median(shares) > 32


def test_a_variant_has_its_bytes(tmp_path: Path) -> None:
    source = geometry.save(MODELS["qwen2"](), tmp_path / "source")
    names = ("all", "all", "outliers-2")
    made = [stress.write(source, tmp_path / str(i), stress.VARIANTS[name]) for i, name in enumerate(names)]
    first, again, other = ((folder / "model.safetensors").read_bytes() for folder in made)
    assert first == again != other
    assert len(stress.VARIANTS) == 12 and len(set(map(repr, stress.VARIANTS.values()))) == 12
