"""Known defects of Gemma 3n conversions, put back one at a time: the converter gate must go red for each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import geometry
import pytest
import torch
from line import CAP, Line

from pipeline.checkpoint.reader import open_checkpoint
from pipeline.core.recipe import load
from pipeline.judge import gates, step_runs
from pipeline.judge.gates import Check, Measurement
from pipeline.judge.reference import Head, Reference
from pipeline.models import build as made
from pipeline.models import gemma3n, transformer
from pipeline.models.gemma3n import AltUp, Gemma3nForTFLite, TextConfig
from pipeline.models.transformer import Rotation
from pipeline.runtime.litert import StepModel

Weights = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def weights(judged: Line) -> Weights:
    """The shipped model's weights by canonical name."""
    checkpoint = open_checkpoint(judged.root / "fetch" / "checkpoint")
    names = made.tensor_names(checkpoint)
    return {name: torch.from_numpy(checkpoint.read(stored)) for name, stored in names.items()}


@pytest.fixture(scope="module")
def judge(judged: Line) -> Callable[[torch.nn.Module], list[Check]]:
    """The converter gate of the shipped recipe over the shape grid."""
    folder = judged.root / "fetch" / "checkpoint"
    reference = Reference(judged.root / "golden", Head.of_checkpoint(folder, CAP))
    gate = load(judged.recipe).gates["fp32"]

    def run(module: torch.nn.Module) -> list[Check]:
        grid = step_runs.run_grid(geometry.Eager(module), reference, "defect")  # type: ignore[arg-type]
        figures = [Measurement(metric=name, name=name, value=getattr(grid, name)) for name in ("nmse", "kld", "top1")]
        return [check for check in gates.judge("fp32", gate, figures) if check.name in ("nmse", "kld", "top1")]

    return run


@pytest.fixture(scope="module")
def config(judged: Line) -> TextConfig:
    return TextConfig.from_config(open_checkpoint(judged.root / "fetch" / "checkpoint").config)


def build(config: TextConfig, weights: Weights) -> Gemma3nForTFLite:
    module = Gemma3nForTFLite(config)
    module.model.load_state_dict(weights)
    return module


def red(checks: list[Check]) -> bool:
    return any(not check.passed for check in checks)


def test_without_a_defect_the_gate_is_green(judge: Callable, config: TextConfig, weights: Weights) -> None:
    assert not red(judge(build(config, weights)))


@pytest.mark.parametrize("garbage", [2e-34, 5e32, 7e-43, 1.0])
def test_uninitialised_sparsity_multiplier(
    garbage: float, judge: Callable, config: TextConfig, weights: Weights
) -> None:
    module = build(config, weights)
    for layer in module.model.layers:
        if layer.mlp.deviations is not None:
            layer.mlp.deviations = garbage
    assert red(judge(module))


@pytest.mark.parametrize(
    ("what", "changes"),
    [
        ("soft-cap missing", {"final_logit_softcapping": None}),
        ("sliding window one too small", {"sliding_window": 15}),
        ("sliding window one too large", {"sliding_window": 17}),
        ("rope base of full attention", {"rope_theta": {"full_attention": 1e4, "sliding_attention": 1e4}}),
        ("rope base of sliding attention", {"rope_theta": {"full_attention": 1e6, "sliding_attention": 1e6}}),
        ("AltUp active index", {"altup_active_idx": 1}),
        ("AltUp correction scale", {"altup_correct_scale": False}),
        ("epsilon", {"rms_norm_eps": 1e-3}),
    ],
)
def test_wrong_setting(
    what: str, changes: dict[str, object], judge: Callable, config: TextConfig, weights: Weights
) -> None:
    assert red(judge(build(replace(config, **changes), weights))), what


def test_kv_sharing_off_by_one_layer(
    judge: Callable, config: TextConfig, weights: Weights, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, source = build(config, weights), TextConfig.kv_source
    unshared = config.num_hidden_layers - config.num_kv_shared_layers

    def one_earlier(self: TextConfig, layer: int) -> int:
        kinds = self.layer_types
        if layer < unshared:
            return layer
        candidates = [i for i in range(source(self, layer)) if kinds[i] == kinds[layer]]
        return max(candidates, default=source(self, layer))

    monkeypatch.setattr(TextConfig, "kv_source", one_earlier)
    assert red(judge(module))


def test_dropped_update_of_the_other_states(
    judge: Callable, config: TextConfig, weights: Weights, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gemma3n.DecoderLayer, "_per_layer_update", lambda self, x, per_layer_input: torch.zeros_like(x))
    assert red(judge(build(config, weights)))


def test_mask_that_ignores_padding(judge: Callable, config: TextConfig, weights: Weights) -> None:
    class Unpadded(Gemma3nForTFLite):
        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> dict[str, torch.Tensor]:
            return super().forward(input_ids, torch.ones_like(attention_mask))

    module = Unpadded(config)
    module.model.load_state_dict(weights)
    assert red(judge(module))


def test_positions_that_count_padding(
    judge: Callable, config: TextConfig, weights: Weights, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rotary positions are relative, so only a shift within a row shows: here positions stop at the window."""
    counted = transformer._positions
    monkeypatch.setattr(transformer, "_positions", lambda causal: counted(causal).clamp(max=config.sliding_window))
    assert red(judge(build(config, weights)))


def test_weight_transposed(judge: Callable, config: TextConfig, weights: Weights) -> None:
    name = "layers.2.self_attn.o_proj.weight"
    assert red(judge(build(config, {**weights, name: weights[name].T.contiguous()})))


def test_two_layers_swapped(judge: Callable, config: TextConfig, weights: Weights) -> None:
    first, second = "layers.1.mlp.down_proj.weight", "layers.2.mlp.down_proj.weight"
    assert red(judge(build(config, {**weights, first: weights[second], second: weights[first]})))


def test_rotation_by_pairs_instead_of_halves(
    judge: Callable, config: TextConfig, weights: Weights, monkeypatch: pytest.MonkeyPatch
) -> None:
    def pairs(self: Rotation, x: torch.Tensor) -> torch.Tensor:
        turned = torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)
        return x * self.cos.repeat_interleave(1, -1) + turned * self.sin.abs()

    monkeypatch.setattr(Rotation, "apply", pairs)
    assert red(judge(build(config, weights)))


def test_per_layer_rows_of_another_layer(
    judge: Callable, config: TextConfig, weights: Weights, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = gemma3n.TextModel._per_layer_inputs
    monkeypatch.setattr(
        gemma3n.TextModel,
        "_per_layer_inputs",
        lambda self, embedded, tokens: right(self, embedded, tokens).roll(1, dims=2),
    )
    assert red(judge(build(config, weights)))


def test_transposed_prediction_coefficients(
    judge: Callable, config: TextConfig, weights: Weights, monkeypatch: pytest.MonkeyPatch
) -> None:
    def predict(self: AltUp, states: torch.Tensor) -> torch.Tensor:
        flat = self.prediction_coefs(self.modalities(gemma3n.state(states, self.active)))
        mixture = flat.reshape(*states.shape[:2], self.inputs, self.inputs).transpose(2, 3)
        return torch.matmul(mixture, states) + states

    monkeypatch.setattr(AltUp, "predict", predict)
    assert red(judge(build(config, weights)))


def test_a_defect_is_red_in_the_file_too(
    judged: Line, config: TextConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One defect through the converter: what the gate sees in PyTorch it sees in LiteRT."""
    checkpoint = open_checkpoint(judged.root / "fetch" / "checkpoint")
    monkeypatch.setattr(TextConfig, "from_config", lambda _: replace(config, final_logit_softcapping=None))
    recipe = load(judged.recipe)
    made.export_step(checkpoint, recipe.step, tmp_path / "bare.tflite")
    monkeypatch.undo()
    geometry.fill(checkpoint, tmp_path / "bare.tflite", tmp_path / "step.tflite")
    reference = Reference(judged.root / "golden", Head.of_checkpoint(checkpoint.folder, CAP))
    grid = step_runs.run_grid(StepModel(tmp_path / "step.tflite"), reference, "no soft-cap")
    assert red(
        gates.judge("fp32", recipe.gates["fp32"], [Measurement(metric="nmse", name="nmse", value=grid.nmse)])[:1]
    )
