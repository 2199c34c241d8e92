"""One file per architecture: graph modules, signatures, and how checkpoint tensors map to them.

To add an architecture, write its file with an `ARCHITECTURE`, and a recipe that names its model types.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from typing import Any, Protocol

from pipeline.checkpoint.preflight import Canonical
from pipeline.core.errors import FetchError, UsageError
from pipeline.core.recipe import PROJECT, Recipe, load

RECIPES = PROJECT / "pipeline" / "recipes"


class Architecture(Protocol):
    """What the stages need to know of a model family.

    `model_types` are those of `config.json`, `runtime_type` is what LiteRT-LM calls the family. Every method raises
    FetchError where the configuration asks for something that the graph modules don't do.
    """

    model_types: tuple[str, ...]
    runtime_type: str

    def tensors(self, config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        """Every tensor of the text model: canonical name → shape."""

    def step(self, config: Mapping[str, Any], *, every: bool = False) -> Any:
        """The step graph (a `torch.nn.Module`, its text model `model`), its weights still to be assigned.

        With the logits of the last attended position, or of `every` one.
        """

    def decoder(self, config: Mapping[str, Any], *, logits: bool) -> Any:
        """The bundle's decoder graph with or without `logits` (as `step`), its weights still to be assigned."""

    def decoder_inputs(self, config: Mapping[str, Any], tokens: int, length: int) -> dict[str, Any]:
        """Examples of the decoder graph's inputs but `input_pos` and `mask`: `tokens` tokens, a cache of `length`."""

    def tables(self, config: Mapping[str, Any]) -> tuple[Any, ...]:
        """The embedding tables (`transformer.Table`) that are sections of their own."""

    def canonical(self, name: str, config: Mapping[str, Any]) -> str | None:
        """The canonical name of checkpoint tensor `name`, or None if the text model knowingly leaves it out."""


def architectures() -> list[Architecture]:
    """Every `ARCHITECTURE` in this folder, by file name."""
    modules = (importlib.import_module(f"{__name__}.{found.name}") for found in pkgutil.iter_modules(__path__))
    return [module.ARCHITECTURE for module in modules if hasattr(module, "ARCHITECTURE")]


def architecture_for(config: Mapping[str, Any]) -> Architecture:
    """The architecture of a checkpoint's `config.json`.

    Raises:
        FetchError: no file here handles that `model_type`; the message names the supported ones.
    """
    known = architectures()
    model_type = config.get("model_type")
    for architecture in known:
        if model_type in architecture.model_types:
            return architecture
    supported = ", ".join(name for architecture in known for name in architecture.model_types)
    raise FetchError(
        f"model type {model_type!r} is not supported; supported: {supported}",
        remedy="choose a checkpoint of a supported architecture",
    )


def expected(recipe: Recipe, config: Mapping[str, Any]) -> tuple[dict[str, tuple[int, ...]], Canonical]:
    """What a checkpoint with this `config.json` must hold: shapes by canonical name, and how stored names map to them.

    Raises:
        FetchError: as `architecture_for`.
        UsageError: the recipe is for other models, whose limits would judge this one wrongly; names one that fits.
    """
    architecture = architecture_for(config)
    model_type = config["model_type"]
    if model_type not in recipe.model_types:
        fitting = [file for file in sorted(RECIPES.glob("*.toml")) if model_type in load(file).model_types]
        names = " or ".join(f"RECIPE={file.relative_to(PROJECT)}" for file in fitting)
        raise UsageError(
            f"the checkpoint is of type {model_type}, recipe {recipe.name} is for {', '.join(recipe.model_types)}",
            remedy=f"say {names}" if names else f"write a recipe that has {model_type!r} among its model_types",
        )
    return architecture.tensors(config), lambda name: architecture.canonical(name, config)
