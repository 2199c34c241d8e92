"""Groups of layers that tune switches together: all of one kind, in a stretch of the model.

Kinds that read the same tensor (q, k and v), or the same weights (the embedding and its head), are one group: what
prepares an input is paid once for all that read it, and a matrix that is stored once has one type.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from pipeline.quantize import rows
from pipeline.quantize.rows import HEAD
from pipeline.tflite.graph import Graph

_LAYER = re.compile(r"layers\.(\d+)\.")
_NUMBER = re.compile(r"\.\d+(?=\.|$)")


@dataclass(frozen=True, kw_only=True)
class Layer:
    """An operator with weights: its `name`, the tensor it `reads` and the buffer of its `weight`, each by number.

    `elements` of the weight, `products` (multiply-adds) per token, none for a table.
    """

    name: str
    reads: int
    weight: int
    elements: int
    products: int


@dataclass(frozen=True, kw_only=True)
class Group:
    """`kinds` (`layers.*.mlp.down_proj`) in the layers `numbers`, or wherever they are if that is empty.

    `elements` and `products` of all of them.
    """

    name: str
    kinds: tuple[str, ...]
    numbers: tuple[int, ...]
    elements: int
    products: int


def kind_of(name: str) -> str:
    """The kind of an operator: its path in the model with `*` for numbers; `layers.3.mlp.up_proj;1` has one number."""
    return _NUMBER.sub(".*", name.partition(";")[0])


def number_of(name: str) -> int:
    """The layer that an operator is in; −1 for what is in none."""
    found = _LAYER.match(name)
    return int(found[1]) if found else -1


def group(layers: Sequence[Layer], parts: int) -> list[Group]:
    """`layers` as groups, each kind cut into at most `parts` stretches of the model; in the order of the graph."""
    found = []
    for kinds in _together(layers):
        members = [layer for layer in layers if kind_of(layer.name) in kinds]
        numbers = sorted({number_of(layer.name) for layer in members})
        for stretch in _cut(numbers, parts):
            chosen = [layer for layer in members if number_of(layer.name) in stretch]
            found.append(_group(kinds, stretch if len(stretch) < len(numbers) else (), chosen))
    return found


def _group(kinds: tuple[str, ...], numbers: tuple[int, ...], layers: Sequence[Layer]) -> Group:
    name = " + ".join(kind.removeprefix("layers.*.") for kind in kinds)
    where = f" {numbers[0]}–{numbers[-1]}" if numbers else ""
    weights = {layer.weight: layer.elements for layer in layers}
    return Group(
        name=name + where,
        kinds=kinds,
        numbers=numbers,
        elements=sum(weights.values()),
        products=sum(layer.products for layer in layers),
    )


def _together(layers: Sequence[Layer]) -> list[tuple[str, ...]]:
    """Kinds that share an input or weights with each other, in the order of the graph."""
    sets: list[set[str]] = []
    shared: dict[tuple[str, int], set[str]] = {}
    for layer in layers:
        for key in (("reads", layer.reads), ("weight", layer.weight)):
            shared.setdefault(key, set()).add(kind_of(layer.name))
    for kinds in shared.values():
        touching = [one for one in sets if one & kinds]
        sets = [one for one in sets if not one & kinds] + [kinds.union(*touching)]
    order = list(dict.fromkeys(kind_of(layer.name) for layer in layers))
    return sorted((tuple(sorted(one, key=order.index)) for one in sets), key=lambda kinds: order.index(kinds[0]))


def _cut(numbers: Sequence[int], parts: int) -> list[tuple[int, ...]]:
    """`numbers` in at most `parts` stretches of nearly one length."""
    count = min(parts, len(numbers))
    edges = [len(numbers) * place // count for place in range(count + 1)]
    return [tuple(numbers[start:stop]) for start, stop in zip(edges, edges[1:], strict=False)]


def patterns(chosen: Iterable[str], groups: Sequence[Group]) -> tuple[str, ...]:
    """A recipe's patterns over operator names for the groups named `chosen`, as few as say it."""
    names = set(chosen)
    if names == {each.name for each in groups}:
        return (".",)
    found = []
    for kinds in dict.fromkeys(each.kinds for each in groups):
        family = [each for each in groups if each.kinds == kinds]
        taken = [each for each in family if each.name in names]
        numbers = [number for each in taken for number in each.numbers] if len(taken) < len(family) else []
        found += [_pattern(kind, numbers) for kind in kinds if taken]
    return tuple(found)


def _pattern(kind: str, numbers: Sequence[int]) -> str:
    if kind == HEAD:
        return HEAD
    first, *rest = kind.split("*")
    digits = rf"({'|'.join(map(str, numbers))})" if numbers else r"\d+"
    tail = [digits + re.escape(rest[0]), *(r"\d+" + re.escape(part) for part in rest[1:])] if rest else []
    return "^" + re.escape(first) + "".join(tail) + ";"


def layers_of(graph: Graph) -> list[Layer]:
    """Every operator of `graph` that the stages would give int8 weights."""
    layers = []
    for operator in graph.operators():
        code, weight = graph.code(operator), int(operator.inputs[1]) if len(operator.inputs) > 1 else -1
        if code not in (rows.LINEAR, rows.LOOKUP) or weight < 0:
            continue
        elements = math.prod(graph.shape(weight))
        layers.append(
            Layer(
                name=rows.layer_name(graph, operator),
                reads=int(operator.inputs[0]) if code == rows.LINEAR else -1 - weight,
                weight=weight,
                elements=elements,
                products=elements if code == rows.LINEAR else 0,
            )
        )
    return layers
