"""Scales moved between the layers of real graphs: every group that can take them is found, and nothing changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import geometry
import numpy as np
from transformers import Gemma3ForCausalLM

from pipeline.checkpoint.reader import open_checkpoint
from pipeline.core.recipe import StepLimits
from pipeline.models import build
from pipeline.quantize import equalize

LAYERS = 2
GEOMETRY = {
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "layer_types": ["sliding_attention", "full_attention"],
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "sliding_window": 8,
}


def test_every_group_is_folded_and_logits_stay_the_same(tmp_path: Path) -> None:
    geometry.save(geometry.reference(GEOMETRY, 3, Gemma3ForCausalLM), tmp_path / "checkpoint")
    checkpoint = open_checkpoint(tmp_path / "checkpoint")
    build.export_step(checkpoint, StepLimits(max_batch=8, max_sequence=2048), tmp_path / "bare")
    results = []
    for strength in (0.0, 1.0):
        graph = build.with_weights(checkpoint, tmp_path / "bare")
        groups = len({id(factors) for factors in equalize.equalize_columns(graph, strength).values()})
        graph.prune()
        graph.write(tmp_path / "step.tflite")
        results.append(step(tmp_path / "step.tflite"))
    assert groups >= 3 * LAYERS + 1  # q, k and v; gate and up; down; the head
    np.testing.assert_array_equal(*results)
    assert results[0].std() > 0


def step(file: Path) -> Any:
    """Logits of a few tokens, by the plain kernels: they add in a fixed order."""
    from ai_edge_litert.interpreter import Interpreter, OpResolverType

    kernels = OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES
    interpreter = Interpreter(model_path=str(file), experimental_op_resolver_type=kernels)
    ids = np.arange(1, 12, dtype=np.int32)[None]
    return interpreter.get_signature_runner()(input_ids=ids, attention_mask=np.ones_like(ids))["logits"]
