"""One file per architecture: graph modules, signatures, and how checkpoint tensors map to them.

To add an architecture, write its file with an `ARCHITECTURE` and list it here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from pipeline.core.errors import FetchError


class Architecture(Protocol):
    """What the stages need to know of a model family."""

    model_types: tuple[str, ...]

    def tensors(self, config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        """Every tensor of the text model: canonical name → shape.

        Raises:
            FetchError: the configuration asks for something the graph modules don't do.
        """

    def step(self, config: Mapping[str, Any]) -> Any:
        """The step graph (a `torch.nn.Module`, its text model `model`), its weights still to be assigned."""

    def canonical(self, name: str, config: Mapping[str, Any]) -> str | None:
        """The canonical name of checkpoint tensor `name`, or None if the text model knowingly leaves it out."""


def architecture_for(config: Mapping[str, Any]) -> Architecture:
    """The architecture of a checkpoint's `config.json`.

    Raises:
        FetchError: no file here handles that `model_type`; the message names the supported ones.
    """
    from pipeline.models import gemma3n

    known: tuple[Architecture, ...] = (gemma3n.ARCHITECTURE,)
    model_type = config.get("model_type")
    for architecture in known:
        if model_type in architecture.model_types:
            return architecture
    supported = ", ".join(name for architecture in known for name in architecture.model_types)
    raise FetchError(
        f"model type {model_type!r} is not supported; supported: {supported}",
        remedy="choose a checkpoint of a supported architecture",
    )
