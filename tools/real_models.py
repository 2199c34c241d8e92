"""The real models that a package index has, and what benchmarks call them.

    python -m tools.real_models NAME FOLDER

Writes the recipe of one into a folder, and prints where.
"""

from __future__ import annotations

import subprocess
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

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
TIMED = REAL_MODELS | {
    "gemma3-1b": RealModel(
        title="Random weights of Gemma 3 1B's geometry", folder="gemma3-1b", recipe="gemma3", tables="wide"
    )
}
"""And what only time is measured of; `tools.make_random_checkpoint` makes its checkpoint."""
Found = TypeVar("Found")


def command_line(
    description: str | None, *, rounds: int, models: Mapping[str, RealModel] = REAL_MODELS
) -> ArgumentParser:
    """What each benchmark of one of `models` is told."""
    parser = ArgumentParser(description=description, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=[*models], help="which it is")
    parser.add_argument("checkpoint", type=Path, help="its checkpoint")
    parser.add_argument("--work", type=Path, required=True, help="an empty folder for all that is made")
    parser.add_argument("--rounds", type=int, default=rounds, help="measurements of speed (default: %(default)s)")
    return parser


def measured(parser: ArgumentParser, work: Path, measure: Callable[[Path], Found]) -> Found:
    """What `measure` finds in the folder `work`, which is made; the command ends if a program that it ran failed."""
    work = work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    try:
        return measure(work)
    except subprocess.CalledProcessError as error:
        parser.exit(1, f"{error}\nWhat it said is above.\n")


if __name__ == "__main__":
    model = REAL_MODELS[sys.argv[1]]
    print(changed_recipe(model.recipe, Path(sys.argv[2]), model.changes))
