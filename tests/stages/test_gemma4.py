"""Gemma 4 against Hugging Face: drawn geometries in PyTorch, one with and one without tables in the file, defects."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import geometry
import numpy as np
import pytest
import torch
from exact import all_exact_in_files, bundles, exact_in_pytorch, worst
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import Gemma4Config, Gemma4ForConditionalGeneration, Gemma4TextConfig, Gemma4UnifiedTextConfig

from pipeline.checkpoint import names
from pipeline.checkpoint.reader import open_checkpoint
from pipeline.core.errors import FetchError
from pipeline.core.recipe import Bundle
from pipeline.models import architecture_for, gemma4
from pipeline.models.gemma4 import TextConfig
from pipeline.models.transformer import FULL, SLIDING
from pipeline.reference import streaming

quickly = settings(max_examples=5, suppress_health_check=[HealthCheck.too_slow])
SMALL = {
    "vocab_size": 211,
    "hidden_size": 60,
    "intermediate_size": 40,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "global_head_dim": 16,
    "sliding_window": 5,
}
IN_FILES: dict[str, dict[str, Any]] = {
    "tables, shared keys, double width": {
        "num_hidden_layers": 4,
        "layer_types": [SLIDING, FULL, SLIDING, FULL],
        "num_kv_shared_layers": 2,
        "use_double_wide_mlp": True,
        "vocab_size_per_layer_input": 211,
        "hidden_size_per_layer_input": 8,
        "final_logit_softcapping": 2.0,
    },
    "12B: no table, keys are values": {
        "model_type": "gemma4_unified_text",
        "num_hidden_layers": 2,
        "layer_types": [SLIDING, FULL],
        "attention_k_eq_v": True,
        "num_global_key_value_heads": 1,
    },
}
E2B, UNIFIED = IN_FILES


@quickly
@given(drawn=geometry.gemma4_geometries(), bundle=bundles, seed=st.integers(0, 999))
def test_every_geometry_is_exact_in_pytorch(drawn: dict[str, Any], bundle: Bundle, seed: int) -> None:
    model = geometry.gemma4_reference(drawn, seed)
    exact_in_pytorch(model, bundle, seed, drawn)


@pytest.mark.parametrize("name", IN_FILES)
def test_it_is_exact_in_the_files(name: str, tmp_path: Path) -> None:
    all_exact_in_files(geometry.gemma4_reference({**SMALL, **IN_FILES[name]}, 3), tmp_path)


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    """A model of each kind, by name."""
    return {name: geometry.gemma4_reference({**SMALL, **drawn}, 5) for name, drawn in IN_FILES.items()}


@pytest.mark.parametrize("name", IN_FILES)
def test_without_a_defect_the_gate_is_green(name: str, models: dict[str, Any]) -> None:
    assert worst(models[name]) <= 1e-9


def test_a_dropped_layer_scalar_is_red(models: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """It starts at 1, so models that move parameters alone would hide its loss."""
    monkeypatch.setattr(gemma4.DecoderLayer, "_scaled", lambda self, x: x)
    for model in models.values():
        assert worst(model) > 1e-6


@pytest.mark.parametrize(
    ("what", "name", "change"),
    [
        ("one frequency for all of a full head", E2B, lambda it: {"frequencies": _of_whole_heads(it, FULL)}),
        ("exponents over the part that turns", E2B, lambda it: {"frequencies": _over_the_part(it)}),
        ("rope base of sliding layers", UNIFIED, lambda it: {"frequencies": _of_whole_heads(it, SLIDING)}),
        ("soft-cap dropped", E2B, lambda _: {"final_logit_softcapping": None}),
        ("sliding window one too small", E2B, lambda it: {"sliding_window": it.sliding_window - 1}),
        ("epsilon", E2B, lambda _: {"rms_norm_eps": 1e-3}),
    ],
)
def test_a_wrong_setting_is_red(
    what: str, name: str, change: Any, models: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = TextConfig.from_config

    def wrong(config: Any) -> TextConfig:
        return replace(right(config), **change(right(config)))

    monkeypatch.setattr(TextConfig, "from_config", wrong)
    assert worst(models[name]) > 1e-6, what


def _of_whole_heads(config: TextConfig, kind: str) -> dict[str, tuple[float, ...]]:
    size = config.heads[kind][1]
    return {**config.frequencies, kind: tuple(1e6 ** (-2 * i / size) for i in range(size // 2))}


def _over_the_part(config: TextConfig) -> dict[str, tuple[float, ...]]:
    size = config.heads[FULL][1]
    part = size // 8
    turned = tuple(1e6 ** (-i / part) for i in range(part))
    return {**config.frequencies, FULL: turned + (0.0,) * (size // 2 - part)}


def test_values_that_are_finished_keys_are_red(models: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    right = gemma4.Attention._keys_values

    def finished(self: Any, x: Any, rotation: Any) -> Any:
        keys, values = right(self, x, rotation)
        return (keys, self.v_norm(keys)) if self.v_proj is None else (keys, values)

    monkeypatch.setattr(gemma4.Attention, "_keys_values", finished)
    assert worst(models[UNIFIED]) > 1e-6


def test_keys_shared_of_another_layer_are_red(models: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Sliding layers take those of the last full one: of another size here, so by the wrong type where sizes agree."""
    drawn = {**SMALL, **IN_FILES[E2B], "global_head_dim": 12, "num_hidden_layers": 5}
    model = geometry.gemma4_reference({**drawn, "layer_types": [SLIDING, SLIDING, FULL, SLIDING, FULL]}, 5)
    assert worst(model) <= 1e-9
    right = TextConfig.kv_source
    monkeypatch.setattr(
        TextConfig, "kv_source", lambda self, layer: 0 if right(self, layer) == 1 != layer else right(self, layer)
    )
    assert worst(model) > 1e-6


@pytest.mark.parametrize(
    ("what", "change"),
    [("double width not read", {"use_double_wide_mlp": False}), ("one head size for all", {"per_layer_config": {}})],
)
def test_a_width_that_is_not_read_does_not_fit_the_checkpoint(
    what: str, change: dict[str, Any], models: dict[str, Any]
) -> None:
    config = models[E2B].config.to_dict()
    shapes, right = architecture_for({**config, **change}).tensors(), architecture_for(config).tensors()
    assert shapes != right and shapes.keys() == right.keys(), what


# What a checkpoint says


def test_both_forms_of_a_configuration_mean_the_same() -> None:
    """Published files name the global sizes, transformers 5.23 saves each layer's."""
    published = {**SMALL, **IN_FILES[UNIFIED], "num_global_key_value_heads": 1}
    saved = json.loads(
        Gemma4UnifiedTextConfig(**{k: v for k, v in published.items() if k != "model_type"}).to_json_string()
    )
    assert "per_layer_config" in saved and "global_head_dim" not in saved
    assert TextConfig.from_config(saved) == TextConfig.from_config(published)
    assert TextConfig.from_config(published).heads == {FULL: (1, 16), SLIDING: (2, 12)}
    nested = {"model_type": "gemma4_unified", "text_config": published}
    assert TextConfig.from_config(nested) == TextConfig.from_config(published)


@pytest.mark.parametrize(
    ("kind", "theirs"), [("gemma4_text", Gemma4TextConfig), ("gemma4_unified_text", Gemma4UnifiedTextConfig)]
)
def test_defaults_are_transformers(kind: str, theirs: Any) -> None:
    assert TextConfig.from_config({"model_type": kind}) == TextConfig.from_config(theirs().to_dict())


def test_a_checkpoint_with_towers_loads_by_name() -> None:
    tiny = {"num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "head_dim": 8}
    text = {**SMALL, **IN_FILES[E2B]}
    vision = {**tiny, "num_key_value_heads": 2}
    audio = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "output_proj_dims": 16}
    with torch.device("meta"):
        model = Gemma4ForConditionalGeneration(Gemma4Config(text_config=text, vision_config=vision, audio_config=audio))
    stored = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert any("vision_tower" in name for name in stored) and any("audio_tower" in name for name in stored)
    architecture = architecture_for(model.config.to_dict())
    named = {architecture.canonical(name): shape for name, shape in stored.items()}
    assert {name: shape for name, shape in named.items() if name not in (None, names.HEAD)} == architecture.tensors()


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"hidden_activation": "silu"}, "'silu'"),
        ({"enable_moe_block": True}, "enable_moe_block true .*26B-A4B"),
        ({"use_bidirectional_attention": "all"}, "use_bidirectional_attention 'all'"),
        ({"rope_parameters": {FULL: {"rope_type": "yarn", "factor": 2.0}}}, "'yarn' of full_attention"),
        ({"num_hidden_layers": 3, "layer_types": [FULL]}, "layer types"),
        ({"num_hidden_layers": 2, "layer_types": ["chunked_attention", FULL]}, "chunked_attention"),
        ({"num_hidden_layers": 2, "layer_types": [SLIDING, FULL], "num_kv_shared_layers": 1}, "no unshared layer"),
        ({"num_kv_shared_layers": 2, "hidden_size_per_layer_input": 0}, "num_kv_shared_layers 2"),
        ({"per_layer_config": {"00": {"head_dim": 8}}}, "different heads"),
        ({"per_layer_config": {"3": {"intermediate_size": 8}}}, "'intermediate_size' of layer 3"),
    ],
)
def test_what_the_modules_do_not_do_is_refused_by_name_and_value(wrong: dict[str, Any], says: str) -> None:
    for config in ({"model_type": "gemma4_text", **wrong}, {"model_type": "gemma4", "text_config": wrong}):
        with pytest.raises(FetchError, match=says):
            architecture_for(config)


def test_a_streamed_reference_has_the_stored_buffers(models: dict[str, Any], tmp_path: Path) -> None:
    model = models[E2B]
    geometry.save(model, tmp_path)
    streamed, report = streaming.load(type(model), model.config, open_checkpoint(tmp_path), {})
    assert not any(report.values())
    ids = torch.from_numpy(np.arange(40, dtype=np.int64)[None])
    with torch.inference_mode():
        theirs, ours = (each(input_ids=ids, use_cache=False).logits for each in (model, streamed.eval()))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    stored = load_file(tmp_path / "model.safetensors")
    del stored["model.layers.0.layer_scalar"]
    save_file(stored, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert streaming.load(type(model), model.config, open_checkpoint(tmp_path), {})[1]["missing_keys"] == [
        "model.layers.0.layer_scalar"
    ]
