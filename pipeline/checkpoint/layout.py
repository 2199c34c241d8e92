"""Which stored tensor is which of the model's: a checkpoint's names held against those that an architecture needs."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import NoReturn

from pipeline.checkpoint.headers import FLOATS, TensorInfo, listed
from pipeline.checkpoint.names import EMBEDDING, HEAD, LEFT_OVERS, inner, tower_name
from pipeline.checkpoint.packed import INT4
from pipeline.checkpoint.reader import CONFIG
from pipeline.core.errors import FetchError

_TAKEN = {*FLOATS, INT4}
Canonical = Callable[[str], "str | None"]


@dataclass(frozen=True, kw_only=True)
class Needed:
    """What an architecture needs of a checkpoint.

    `shapes` of its tensors by canonical name, were the head tied; the `canonical` name of a stored tensor, None if it
    is knowingly not used; whether config.json `ties` the head to the embedding. `towers` are the parts beside the text
    model that are taken too, name → shapes of its tensors by name; `converts`: whether any of this family could be;
    `seeing` is what to say for a recipe that does.
    """

    shapes: Mapping[str, tuple[int, ...]]
    canonical: Canonical
    ties: bool = True
    towers: Mapping[str, Mapping[str, tuple[int, ...]]] = field(default_factory=dict)
    converts: bool = False
    seeing: str = ""

    def used_as(self, name: str) -> str | None:
        """The canonical name of a stored tensor, whatever wraps the model; None for one that is not used."""
        return None if LEFT_OVERS.search(name) else self.canonical(inner(name))


def lay_out(tensors: Mapping[str, TensorInfo], needed: Needed, where: str, *, tied: bool) -> dict[str, str]:
    """Hold the stored tensors against an architecture, both ways by name.

    Args:
        tensors: what the checkpoint holds.
        needed: what the architecture needs.
        where: the checkpoint, for messages.
        tied: whether one matrix serves as embedding and head (`heads.is_tied`): then whichever is stored is taken for
            both, as transformers does, unless config.json unties them.

    Returns:
        Canonical name → name in the checkpoint, for every tensor that the model needs.

    Raises:
        FetchError: names the tensors that are missing, extra, stored twice, of another shape, or not float.
    """
    used: dict[str, list[str]] = {}
    for name in tensors:
        target = needed.used_as(name)
        if target is not None:
            used.setdefault(target, []).append(name)
    heads, stored = used.get(HEAD, []), len({HEAD, EMBEDDING} & used.keys())
    if tied and (needed.ties or stored == 2):
        expected = needed.shapes
        if used.pop(HEAD, None) and stored == 1:
            used[EMBEDDING] = heads
    else:
        expected = {**needed.shapes, HEAD: needed.shapes[EMBEDDING]}
    first = {name: used[name][0] for name in expected if name in used}
    faults = [
        _fault("missing", [name for name in expected if name not in used]),
        _fault("extra", [name for target, names in used.items() if target not in expected for name in names]),
        _fault(
            "stored twice", [" = ".join(twice) for twice in (*map(used.get, first), heads) if twice and len(twice) > 1]
        ),
        _fault("of another shape", _wrong_shapes(first, tensors, expected)),
        _fault("not float", [f"{n} ({tensors[n].dtype})" for n in first.values() if tensors[n].dtype not in _TAKEN]),
    ]
    if not needed.ties and stored == 1:
        _refuse_one_of_two(next(iter({HEAD, EMBEDDING} - used.keys())), where)
    if any(faults):
        raise FetchError(
            f"{where} does not hold the model that its {CONFIG} describes: {'; '.join(filter(None, faults))}",
            cause=f"the weights and {CONFIG} belong to different models, or a tool renamed or dropped tensors",
            remedy="get the checkpoint from its author anew, or save it again with `save_pretrained` of transformers",
        )
    return first


def lay_out_tower(
    tensors: Mapping[str, TensorInfo], shapes: Mapping[str, tuple[int, ...]], tower: str, where: str
) -> dict[str, str]:
    """As `lay_out`, of the tower called `tower`, whose tensors have these `shapes`.

    Raises:
        FetchError: names the tensors that are missing, extra, of another shape, or not float.
    """
    parts = {name.partition(".")[0] for name in shapes}
    own = {tower_name(name): name for name in tensors}
    first = {name: own[name] for name in shapes if name in own}
    faults = [
        _fault("missing", [name for name in shapes if name not in own]),
        _fault("extra", [own[name] for name in own if name.partition(".")[0] in parts and name not in shapes]),
        _fault("of another shape", _wrong_shapes(first, tensors, shapes)),
        _fault("not float", [f"{n} ({tensors[n].dtype})" for n in first.values() if tensors[n].dtype not in FLOATS]),
    ]
    if any(faults):
        raise FetchError(
            f"{where} does not hold the {tower} tower that its {CONFIG} describes: {'; '.join(filter(None, faults))}",
            cause="the fine-tune was saved without it, or a tool dropped or renamed tensors",
            remedy="say TOWERS=none, or the other tower's name, or put the base model's tower into the checkpoint",
        )
    return first


def _refuse_one_of_two(missing: str, where: str) -> NoReturn:
    raise FetchError(
        f"{where} stores no {missing}, though its {CONFIG} unties output head and token embedding",
        cause="the model was saved by a tool that left one of the two out: transformers would invent it",
        remedy=f'if one matrix serves as both, say "tie_word_embeddings": true in {CONFIG}; else save it again, whole',
    )


def _fault(kind: str, names: Collection[str]) -> str:
    verb = "is" if len(names) == 1 else "are"
    return f"{len(names)} tensor{'' if len(names) == 1 else 's'} {verb} {kind}: {listed(names)}" if names else ""


def _wrong_shapes(
    first: Mapping[str, str], tensors: Mapping[str, TensorInfo], expected: Mapping[str, tuple[int, ...]]
) -> list[str]:
    return [
        f"{name} {list(tensors[name].shape)} instead of {list(expected[target])}"
        for target, name in first.items()
        if tensors[name].shape != tuple(expected[target])
    ]
