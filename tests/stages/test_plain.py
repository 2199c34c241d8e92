"""Decoders of the common kind against Hugging Face: drawn geometries in PyTorch, one of each in the file, defects."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import geometry
import pytest
import torch
from exact import all_exact_in_files, bundles, exact_in_pytorch, worst
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.core.errors import FetchError
from pipeline.core.recipe import Bundle
from pipeline.models import architecture_for, plain, transformer
from pipeline.models.plain import TextConfig
from pipeline.models.transformer import FULL
from pipeline.runtime.litert import StepModel

quickly = settings(max_examples=5, suppress_health_check=[HealthCheck.too_slow])
SMALL = {
    "vocab_size": 211,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}
IN_FILES: dict[str, dict[str, Any]] = {
    "qwen3, yarn": {
        "model_type": "qwen3",
        "hidden_size": 60,
        "head_dim": 12,
        "attention_bias": True,
        "rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6, **geometry.SCALINGS["yarn"]},
    },
    "llama": {
        "model_type": "llama",
        "hidden_size": 48,
        "attention_bias": True,
        "mlp_bias": True,
        "rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **geometry.SCALINGS["llama3"]},
    },
    "qwen2": {
        "model_type": "qwen2",
        "hidden_size": 48,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    },
}


@quickly
@given(drawn=geometry.plain_geometries(), bundle=bundles, seed=st.integers(0, 999))
def test_every_geometry_is_exact_in_pytorch(drawn: dict[str, Any], bundle: Bundle, seed: int) -> None:
    model = geometry.plain_reference(drawn, seed)
    exact_in_pytorch(model, bundle, seed, drawn)


@pytest.mark.parametrize("name", IN_FILES)
def test_it_is_exact_in_the_files(name: str, tmp_path: Path) -> None:
    all_exact_in_files(geometry.plain_reference({**SMALL, **IN_FILES[name]}, 3), tmp_path)


Judge = Callable[[], float]


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    """A model of each kind, by name."""
    return {name: geometry.plain_reference({**SMALL, **drawn}, 5) for name, drawn in IN_FILES.items()}


@pytest.mark.parametrize("name", IN_FILES)
def test_without_a_defect_the_gate_is_green(name: str, models: dict[str, Any]) -> None:
    assert worst(models[name]) <= 1e-9


@pytest.mark.parametrize(
    ("what", "name", "changes"),
    [
        ("rope scaling dropped", "qwen3, yarn", {"frequencies": tuple(1e6 ** (-i / 6) for i in range(6))}),
        ("rope scaling dropped", "llama", {"frequencies": tuple(5e5 ** (-i / 4) for i in range(4))}),
        ("YaRN's attention factor dropped", "qwen3, yarn", {"rotary_scale": 1.0}),
        ("rope base", "qwen2", {"frequencies": tuple(1e6 ** (-i / 4) for i in range(4))}),
        ("epsilon", "qwen3, yarn", {"rms_norm_eps": 1e-3}),
    ],
)
def test_a_wrong_setting_is_red(
    what: str, name: str, changes: dict[str, Any], models: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = TextConfig.from_config
    monkeypatch.setattr(TextConfig, "from_config", lambda config: replace(right(config), **changes))
    assert worst(models[name]) > 1e-6, what


@pytest.mark.parametrize(
    ("what", "name", "part"),
    [
        ("bias of the queries dropped", "qwen2", "q_proj.bias"),
        ("bias of the values dropped", "qwen2", "v_proj.bias"),
        ("bias of what attention gives dropped", "qwen3, yarn", "o_proj.bias"),
        ("bias in the MLP dropped", "llama", "down_proj.bias"),
        ("norm of the queries dropped", "qwen3, yarn", "q_norm.weight"),
        ("norm of the keys dropped", "qwen3, yarn", "k_norm.weight"),
    ],
)
def test_a_dropped_part_is_red(
    what: str, name: str, part: str, models: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    module, kind = part.split(".")
    block: Any = transformer.GatedMLP if module == "down_proj" else plain.Attention
    made = block.__init__

    def neutral(owner: torch.nn.Module, _keys: Any) -> None:
        getattr(owner, kind).data.fill_(float(kind == "weight"))

    def without(self: Any, *about: Any, **options: Any) -> None:
        made(self, *about, **options)
        getattr(self, module).register_load_state_dict_post_hook(neutral)

    monkeypatch.setattr(block, "__init__", without)
    assert worst(models[name]) > 1e-6, what


def test_unscaled_scores_are_red(models: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plain.Rotation, "scaled", lambda self, factor: self)
    assert worst(models["qwen2"]) > 1e-6


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"hidden_act": "gelu"}, "'gelu'"),
        ({"use_sliding_window": True}, "use_sliding_window True"),
        ({"layer_types": [FULL, "sliding_attention"]}, "'sliding_attention'"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "'dynamic'"),
        ({"rope_scaling": {"rope_type": "longrope"}}, "'longrope'"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "'original_max_position_embeddings'"),
        ({"partial_rotary_factor": 0.75}, "partial_rotary_factor"),
    ],
)
def test_what_the_modules_do_not_do_is_refused_by_name_and_value(wrong: dict[str, Any], says: str) -> None:
    with pytest.raises(FetchError, match=says):
        architecture_for({"model_type": "qwen3", "tie_word_embeddings": True, **wrong})


def test_keys_of_version_4_mean_the_same() -> None:
    scaling = {"factor": 4.0, "original_max_position_embeddings": 32_768}
    old = {"rope_theta": 1e6, "rope_scaling": {"type": "yarn", **scaling}}
    new = {"rope_parameters": {"rope_theta": 1e6, "rope_type": "yarn", **scaling}}
    first, second = (
        TextConfig.from_config({"model_type": "qwen3", "tie_word_embeddings": True, **said}) for said in (old, new)
    )
    assert first == second and first.rotary_scale == pytest.approx(0.1 * math.log(4) + 1)


def test_each_is_what_litert_lm_calls_it() -> None:
    kinds = {name: architecture_for({"model_type": name, "tie_word_embeddings": True}) for name in plain.FAMILIES}
    assert {name: each.runtime("").type for name, each in kinds.items()} == {
        "llama": "generic_model",
        "qwen2": "qwen2p5",
        "qwen3": "qwen3",
    }
    assert not any(each.tables() for each in kinds.values())
    assert kinds["qwen3"].canonical("model.layers.0.self_attn.rotary_emb.inv_freq") is None
    with torch.device("meta"):  # where exports make the modules
        assert TextConfig.from_config({"model_type": "qwen3", "tie_word_embeddings": True}).frequencies[0] == 1.0


def test_a_head_of_its_own_is_exact_in_the_file(tmp_path: Path) -> None:
    """As larger Qwen and Llama models have it; one that is tied is another model."""
    drawn = {**SMALL, **IN_FILES["llama"], "tie_word_embeddings": False}
    model = geometry.plain_reference(drawn, 3)
    step = StepModel(geometry.convert(geometry.save(model, tmp_path / "checkpoint"), tmp_path / "step.tflite"))
    result = geometry.compare_on_grid(step, model, batches=(1, 3), sequences=(1, 17))
    assert result.nmse <= 1e-9 and result.top1 == 1, result
    model.lm_head.weight.data = model.get_input_embeddings().weight.data
    assert geometry.compare_on_grid(step, model, batches=(1,), sequences=(17,)).nmse > 1e-6
