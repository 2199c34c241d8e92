"""The real models that a package index has, and what benchmarks call them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class RealModel:
    """A model by its `title`, its checkpoint's folder, its recipe, and the start of its tables' names in `bench/`."""

    title: str
    folder: str
    recipe: str
    tables: str


REAL_MODELS = {
    "gemma3": RealModel(title="Gemma 3 270M", folder="gemma3-270m", recipe="gemma3", tables="bundle"),
    "smollm2": RealModel(title="SmolLM2-135M-Instruct", folder="smollm2-135m", recipe="plain", tables="smollm2"),
}
"""By the name of the session that makes the checkpoint."""
DEFAULT = "gemma3"
"""The one that README shows."""
