"""What stored tensors are called: the text model's own names, whatever class or wrapper a checkpoint was saved from."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable

HEAD = "lm_head.weight"
"""Canonical name of an output head that is stored beside the embedding."""
EMBEDDING = "embed_tokens.weight"
"""Canonical name of the token embedding, which a tied model uses as its head as well."""
PER_LAYER = "embed_tokens_per_layer.weight"
"""Canonical name of the table of per-layer inputs, which Gemma 3n and Gemma 4 have."""
TEXT_PREFIXES = ("model.language_model.model.", "model.language_model.", "language_model.model.", "model.")
"""Where checkpoints have the text model: of its own, in a model with towers, and as transformers 4 saved these."""
_HEADS = (HEAD, *(f"{prefix}{HEAD}" for prefix in ("language_model.", "model.language_model.", "model.")))

WRAPPERS = re.compile(r"^(?:(?:base_model\.model|_orig_mod|module)\.)+")
"""What PEFT, torch.compile and data-parallel training put before the names of the model that they wrap."""
LEFT_OVERS = re.compile(r"(^|\.)(rotary_emb\w*\.\w*inv_freq|embed_tokens\w*\.embed_scale|\w*position_ids)$")
"""Buffers that old versions stored and transformers computes anew: no weights."""
UNMERGED = re.compile(r"\.(lora_\w+|base_layer|modules_to_save|original_module)\.")
"""What an adapter that was not merged leaves in the names."""
_TOWER = re.compile(r"^(?:model\.)?(?!layers\.|language_model\.|embed_tokens\w*\.|norm\.|lm_head\.)(\w+)\.")

_SIGLIP = re.compile(r"^vision_tower\.vision_model\.")
"""Where transformers 4 saved Gemma 3's vision tower."""


def inner(name: str) -> str:
    """A stored tensor's name without what wraps the model."""
    return WRAPPERS.sub("", name)


def towers(names: Iterable[str]) -> dict[str, int]:
    """How many tensors each part beside the text model has, among `names` that it leaves out."""
    found = (_TOWER.match(inner(name)) for name in names if not LEFT_OVERS.search(name))
    return dict(sorted(Counter(match[1] for match in found if match).items()))


def tower_name(name: str) -> str:
    """A stored tensor's name, if it belongs to a tower, as transformers has it in the whole model."""
    return _SIGLIP.sub("vision_tower.", inner(name).removeprefix("model."))


def text_name(name: str) -> str:
    """The canonical name of a stored tensor that belongs to the text model."""
    if name in _HEADS:
        return HEAD
    return name.removeprefix(next((prefix for prefix in TEXT_PREFIXES if name.startswith(prefix)), ""))


def outer(stored: Iterable[str]) -> dict[str, str]:
    """Embedding and head among the names of `stored` tensors: canonical → stored name, as far as there are any."""
    return {text_name(inner(name)): name for name in stored if text_name(inner(name)) in (EMBEDDING, HEAD)}
