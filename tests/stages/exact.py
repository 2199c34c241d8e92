"""Our modules beside Hugging Face's model: what the tests of every family ask, in PyTorch and of the files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import geometry
from geometry import BUNDLE
from hypothesis import strategies as st

from pipeline.checkpoint.names import HEAD
from pipeline.core.recipe import DECODER, Bundle
from pipeline.judge import kv_cache as cache
from pipeline.judge.kv_cache import Trace
from pipeline.models import architecture_for
from pipeline.quantize import rows
from pipeline.runtime.litert import StepModel
from pipeline.tflite.graph import Graph

bundles = st.builds(
    Bundle,
    cache_length=st.sampled_from([90, 160, 700]),
    prefill=st.sampled_from([(1,), (8,), (3, 20), (33, 5)]),
    precisions=st.just(("fp32",)),
    decode=st.just(12),
    prompts=st.just(1),
    continuation=st.just(1),
)


def eager(model: Any) -> geometry.Eager:
    """The step graph with the weights of Hugging Face's `model`."""
    config = model.config.to_dict()
    architecture = architecture_for(config)
    module = architecture.step()
    named = {architecture.canonical(name): tensor for name, tensor in model.state_dict().items()}
    module.model.load_state_dict({name: tensor for name, tensor in named.items() if name not in (None, HEAD)})
    return geometry.Eager(module)


def check_names(model: Any) -> None:
    """Every tensor of Hugging Face's `model` has the name and shape that our modules know it by."""
    config = model.config.to_dict()
    architecture = architecture_for(config)
    stored = {architecture.canonical(name): tuple(t.shape) for name, t in model.state_dict().items()}
    for left_out in (None, HEAD):
        stored.pop(left_out, None)
    assert stored == architecture.tensors()


def in_pytorch(model: Any, bundle: Bundle) -> Callable[[Trace], cache.Logits]:
    """Our modules with the weights of Hugging Face's `model`."""
    config = model.config.to_dict()
    architecture = architecture_for(config)
    named = {architecture.canonical(name): tensor for name, tensor in model.state_dict().items()}
    return geometry.in_pytorch(
        config, {name: tensor for name, tensor in named.items() if name not in (None, HEAD)}, bundle
    )


def exact_in_files(model: Any, folder: Path, seed: int, drawn: dict[str, Any]) -> None:
    """The decoder in both kinds of kernels, in conversations; recipes find its head."""
    sections = geometry.convert_decoder(geometry.save(model, folder / "checkpoint"), BUNDLE, folder)
    views, head = Graph.read(sections / DECODER).views(), rows.keeper(["head"])
    layers = [
        [rows.layer_name(view, operator) for operator in view.operators() if view.code(operator) == rows.LINEAR]
        for view in views
    ]
    # recipes find it, in `decode` alone, whatever the converter calls it
    assert sorted(sum(map(head, names)) for names in layers) == [*[0] * len(BUNDLE.prefill), 1]
    for xnnpack in (True, False):
        play = geometry.in_file(sections, xnnpack=xnnpack)
        result = geometry.compare_conversations(play, model, BUNDLE, seed)
        assert result.nmse <= 1e-9 and result.top1 == 1, (xnnpack, result, drawn)


def worst(model: Any) -> float:
    """The worse NMSE of whole prompts and of the cache."""
    whole = geometry.compare_on_grid(eager(model), model, batches=(2,), sequences=(40, 90))
    cached = geometry.compare_conversations(in_pytorch(model, BUNDLE), model, BUNDLE, 5)
    return min(whole.nmse, cached.nmse)


def exact_in_pytorch(model: Any, bundle: Bundle, seed: int, drawn: dict[str, Any]) -> None:
    """Names and shapes are the checkpoint's, whole prompts and the cache within the gate of the recipe."""
    check_names(model)
    whole = geometry.compare_on_grid(eager(model), model, batches=(1, 3), sequences=(1, 7, 40))
    cached = geometry.compare_conversations(in_pytorch(model, bundle), model, bundle, seed)
    for result in (whole, cached):
        assert result.nmse <= 1e-6 and result.top1 == 1, (result, drawn)


def all_exact_in_files(model: Any, folder: Path) -> None:
    """The decoder, and the step graph at several shapes."""
    exact_in_files(model, folder, 3, {})
    step = StepModel(geometry.convert(folder / "checkpoint", folder / "step.tflite"))
    result = geometry.compare_on_grid(step, model, batches=(1, 3), sequences=(1, 17, 128))
    assert result.nmse <= 1e-9 and result.top1 == 1, result
