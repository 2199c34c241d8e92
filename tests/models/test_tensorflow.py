"""TensorFlow's own interpreter on the finished files of the shipped model: it must give LiteRT's logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.runtime import sections
from pipeline.runtime.litert import StepModel
from pipeline.runtime.sections import Conversation, Sections

# In an environment of its own, which `nox -s tensorflow` makes.
tf: Any = pytest.importorskip("tensorflow")
ROOT = Path("artifacts/tiny-gemma3n")


def tensorflow_interpreter(path: Path, *, xnnpack: bool, threads: int) -> Any:
    """TensorFlow's interpreter in LiteRT's place."""
    del xnnpack
    return tf.lite.Interpreter(model_path=str(path), num_threads=threads)


@pytest.mark.parametrize(("variant", "nmse"), [("fp32", 1e-9), ("fp16", 1e-9), ("int8", 1e-3)])
@pytest.mark.parametrize(("batch", "sequence"), [(1, 1), (3, 17), (2, 300), (8, 64)])
def test_same_logits(variant: str, nmse: float, batch: int, sequence: int) -> None:
    """int8 may differ in how activations are rounded; float may not."""
    file = ROOT / variant / "step.tflite"
    random = np.random.default_rng(0)
    ids = random.integers(4, 1900, (batch, sequence), dtype=np.int32)
    mask = np.ones_like(ids)
    mask[-1, : sequence // 3] = 0
    ours = StepModel(file).logits(ids, mask).astype(np.float64)
    theirs = StepModel(file, interpreter=tensorflow_interpreter).logits(ids, mask)
    assert ((ours - theirs) ** 2).sum() / (ours**2).sum() < nmse
    assert (ours.argmax(-1) == theirs.argmax(-1)).mean() >= (1 if variant != "int8" else 0.8)


@pytest.mark.parametrize(("variant", "nmse"), [("fp32", 1e-9), ("fp16", 1e-9), ("int8", 1e-3)])
def test_same_logits_through_the_cache(variant: str, nmse: float, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = [int(token) for token in np.random.default_rng(1).integers(4, 1900, 80)]

    def spoken() -> np.ndarray[Any, Any]:
        conversation = Conversation(Sections(ROOT / variant))
        for part in (ids[:32], ids[32:40], ids[40:41]):
            conversation.prefill(part)
        return np.stack([conversation.decode(token) for token in ids[41:]]).astype(np.float64)

    ours = spoken()
    monkeypatch.setattr(sections, "litert", tensorflow_interpreter)
    theirs = spoken()
    assert ((ours - theirs) ** 2).sum() / (ours**2).sum() < nmse
    assert (ours.argmax(-1) == theirs.argmax(-1)).mean() >= (1 if variant != "int8" else 0.8)
