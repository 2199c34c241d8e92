"""Which towers a checkpoint has, by the names of its tensors: what TOWERS= is where nobody says it."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

from pipeline.core.recipe import CONFIG

_TOWER = re.compile(r"(?:^|\.)(vision|audio)_tower\.")
_DESCRIBED = ("vision_config", "audio_config")
_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"
_LARGEST = 100 << 20
"""Bytes of a header, beyond which it is none."""


def described(config: Mapping[str, object]) -> bool:
    """Whether a config.json speaks of towers, so that tensors are worth a look.

    Not where soft tokens are to see each other in some layers alone, as in the larger Gemma 4: no bundle does that. Nor
    of a Gemma 4 without per-layer tables: its decoder takes token ids.
    """
    text = config.get("text_config")
    told = text if isinstance(text, dict) else {}
    left = told.get("use_bidirectional_attention") == "vision" or told.get("hidden_size_per_layer_input") == 0
    return not left and any(config.get(key) for key in _DESCRIBED)


def among(names: Iterable[str], taken: Collection[str]) -> tuple[str, ...]:
    """Those of the towers `taken` that have tensors among `names`, in their order."""
    found = {match[1] for match in map(_TOWER.search, names) if match}
    return tuple(tower for tower in taken if tower in found)


def of_folder(folder: Path, taken: Collection[str]) -> tuple[str, ...]:
    """As `among`, of the checkpoint in a folder; none of one that can't be read, of which fetch will say why."""
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        return among(_stored(folder), taken) if described(config) else ()
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return ()


def _stored(folder: Path) -> Iterable[str]:
    """The names of all tensors; of one file and an index the file counts, as in transformers."""
    single = folder / _SINGLE
    if not single.is_file():
        names: dict[str, object] = json.loads((folder / _INDEX).read_text(encoding="utf-8"))["weight_map"]
        return names
    with single.open("rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        header: dict[str, object] = json.loads(stream.read(size)) if size < _LARGEST else {}
    return header
