"""Small random models of each family, the shipped tokenizer and template, through all stages to a verified bundle.

LiteRT-LM reads what Hugging Face reads and says what it says: ids, prompts, three turns, greedy text, scores. Rows of
tokens that are no plain text are short, so that what a random model says is text.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import geometry
import pytest
import torch
from line import Line, small_recipe

from pipeline import bundle, fetch, fp32, golden, graph, verify
from pipeline.checkpoint import chat
from pipeline.core.recipe import PROJECT
from pipeline.core.stage import DEFAULT_MODEL

FULL, SLIDING = geometry.FULL, geometry.SLIDING
VOCABULARY = 2048
COMMON = {"vocab_size": VOCABULARY, "num_attention_heads": 4, "num_key_value_heads": 2}
FAMILIES = {
    "gemma4": {
        **COMMON,
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "layer_types": [SLIDING, FULL, SLIDING, FULL],
        "num_kv_shared_layers": 2,
        "use_double_wide_mlp": True,
        "head_dim": 16,
        "global_head_dim": 32,
        "sliding_window": 16,
        "vocab_size_per_layer_input": VOCABULARY,
        "hidden_size_per_layer_input": 16,
        "final_logit_softcapping": 30.0,
    },
    "gemma4_unified": {
        **COMMON,
        "model_type": "gemma4_unified_text",
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "layer_types": [SLIDING, FULL],
        "attention_k_eq_v": True,
        "num_global_key_value_heads": 1,
        "head_dim": 16,
        "global_head_dim": 32,
        "sliding_window": 16,
    },
    "qwen3": {
        **COMMON,
        "model_type": "qwen3",
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "head_dim": 16,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    },
    "llama": {
        **COMMON,
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **geometry.SCALINGS["llama3"]},
    },
}


def checkpoint(name: str, folder: Path) -> tuple[Path, str]:
    """A model of the family in a folder of its name, and its model type."""
    drawn = FAMILIES[name]
    shipped, model_folder = PROJECT / DEFAULT_MODEL, folder / name
    tokenizer = chat.open_tokenizer(shipped)
    make = geometry.gemma4_reference if name.startswith("gemma4") else geometry.plain_reference
    model = make(drawn, 7)
    texts = [tokenizer.decode([token]) for token in range(VOCABULARY)]
    spoken = torch.tensor([text.isascii() and text.isprintable() and "<" not in text for text in texts])
    model.get_input_embeddings().weight.data[~spoken] *= 0.05
    geometry.save(model, model_folder)
    for file in (*shipped.glob("tokenizer*"), *shipped.glob("chat_template*"), shipped / "generation_config.json"):
        shutil.copy(file, model_folder)
    config = json.loads((model_folder / "config.json").read_text(encoding="utf-8"))
    config |= {"bos_token_id": 2, "eos_token_id": [1, 6], "pad_token_id": 0}
    (model_folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return model_folder, config["model_type"]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_bundle_of_each_family_says_what_hugging_face_says(name: str, tmp_path: Path) -> None:
    model, kind = checkpoint(name, tmp_path)
    kinds = {'model_types = ["gemma3n", "gemma3n_text"]': f'model_types = ["{kind}"]'}
    more = {'precisions = ["fp32", "int8"]': 'precisions = ["fp32"]', "prompts = 16": "prompts = 12"}
    recipe = small_recipe(tmp_path / "recipe.toml", **kinds, **more)
    line = Line(artifacts=tmp_path / "artifacts", recipe=recipe, model=model)
    for stage in (fetch, golden, graph, fp32, bundle, verify):
        assert line.run(stage.STAGE, "--graphs", "bundle") == 0, stage.__name__
    report = json.loads((line.root / "verify" / "report.json").read_text(encoding="utf-8"))
    found = report["bundles"]["bundle-fp32"]
    assert found["against_reference"]["nmse_max"] <= 1e-9 and found["token_ids"]["wrong"] == 0
    assert found["greedy"]["same"] + found["greedy"]["ties"] == len(found["greedy"]["rows"]) > 0
