"""The real models that a package index has, and what benchmarks call them.

    python -m tools.real_models NAME FOLDER

Writes the recipe of one into a folder, and prints where.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tools.bench_stages import changed_recipe


@dataclass(frozen=True, kw_only=True)
class RealModel:
    """A model by its `title`, its checkpoint's folder, its recipe, and the start of its tables' names in `bench/`.

    `changes` are lines of the recipe → what stands there instead.
    """

    title: str
    folder: str
    recipe: str
    tables: str
    changes: Mapping[str, str] = field(default_factory=dict)


REAL_MODELS = {
    "gemma3": RealModel(title="Gemma 3 270M", folder="gemma3-270m", recipe="gemma3", tables="bundle"),
    "smollm2": RealModel(title="SmolLM2-135M-Instruct", folder="smollm2-135m", recipe="plain", tables="smollm2"),
    "smollm2-growing": RealModel(
        title="With a cache that grows, SmolLM2-135M-Instruct",
        folder="smollm2-135m",
        recipe="plain",
        tables="smollm2_growing",
        changes={"cache_length = 4096 ": 'cache = "dynamic"\ncache_length = 4096 '},
    ),
}
"""By the name of the session that makes the checkpoint; behind a dash what is changed."""
DEFAULT = "gemma3"
"""The one that README shows."""

if __name__ == "__main__":
    model = REAL_MODELS[sys.argv[1]]
    print(changed_recipe(model.recipe, Path(sys.argv[2]), model.changes))
