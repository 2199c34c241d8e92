"""Candidates: a recipe with other values in its [int8] or [int4] section, on a greedy path from the plain file on.

`SPACES` is all that is searched. A key that should be searched as well is one line more there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Literal

from pipeline.core.errors import UsageError
from pipeline.core.recipe import Int4, Int8, Recipe
from pipeline.quantize.rows import keeper
from pipeline.search import rewrite
from pipeline.search.groups import Group, Layer, patterns

Side = Literal["weights", "activations"]
Value = str | float | bool | list[str]
SIDES: tuple[Side, ...] = ("weights", "activations")
_FREE = 1e-6
"""The cost of what costs nothing, in the unit of costs: such moves come first, the largest gain before the others."""


@dataclass(frozen=True, kw_only=True)
class Knob:
    """A key of a section to search.

    A knob is set for groups of layers, by patterns over operator names. Of the sides in `lessens` it takes away about
    those shares of their contribution. It costs `size` bytes per byte of weights and `work` products per product of a
    plain layer. A layer that has it needs none of `spares`. Without `tables`, what is only looked up can't have it.

    One with `values` is set for the whole model, to one of them, the first being that at rest. It costs neither size
    nor time, so the best combination of such values is where the path begins.
    """

    key: str
    lessens: Mapping[Side, float] = field(default_factory=dict)
    size: float = 0.0
    work: float = 0.0
    spares: tuple[str, ...] = ()
    tables: bool = False
    values: tuple[Value, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Space:
    """What is searched of a recipe's `section`, from the plain file on, where every knob is at rest.

    `spare` is the key of the layers that are left as they were. With the values `quiet` errors of weights are heard
    beside those of activations; `rows` are the ways in which a group's input is tried, two rows being as good as float.
    With the values `unit` a file has the size that sizes are shares of, `most` as a rule at most. A kind of layer is
    cut into `parts` stretches of the model.
    """

    section: Literal["int8", "int4"]
    knobs: tuple[Knob, ...]
    spare: str
    quiet: Mapping[str, Value]
    rows: tuple[int, ...]
    unit: Mapping[str, Value]
    most: float
    parts: int


FREE = (Knob(key="equalize", values=(0.0, 0.7)), Knob(key="gptq", values=(False, True)))
INT8 = Space(
    section="int8",
    knobs=(
        Knob(key="int8x2", lessens={"activations": 1.0}, work=1.0),
        Knob(key="rotate", lessens={"activations": 0.6, "weights": 0.2}, work=0.1),
        Knob(key="groups", lessens={"weights": 0.65, "activations": 0.4}, size=0.03, work=0.3),
        Knob(
            key="keep_float",
            lessens={"weights": 1.0, "activations": 1.0},
            size=3.0,
            work=2.0,
            spares=("int8x2", "rotate", "groups"),
            tables=True,
        ),
        *FREE,
    ),
    spare="keep_float",
    quiet={"int8x2": ["."]},
    rows=(2, 1),
    unit={},
    most=1.08,
    parts=2,
)
INT4 = Space(  # how a layer takes its input stays as the recipe says: activations cost little beside 4-bit weights
    section="int4",
    knobs=(
        Knob(key="keep_int8", lessens={"weights": 0.95}, size=0.78, tables=True),
        *FREE,
        Knob(key="rotate", values=([], ["."])),  # beside the fewer bits it costs next to nothing
    ),
    spare="keep_int8",
    quiet={},
    rows=(1,),
    unit={"keep_int8": ["."]},
    most=0.7,
    parts=3,
)
SPACES = {space.section: space for space in (INT8, INT4)}


@dataclass(frozen=True, kw_only=True)
class Contribution:
    """What fewer bits in one group alone cost, KLD in nats with the rest spared: its weights, its activations."""

    weights: float
    activations: float


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """`values` of the section's keys; `size` and `work` expected beyond the plain file's, as shares of it."""

    name: str
    values: Mapping[str, Value]
    size: float = 0.0
    work: float = 0.0


@dataclass(frozen=True, kw_only=True)
class _Move:
    knob: Knob
    group: str
    gain: float
    size: float
    work: float

    @property
    def worth(self) -> float:
        return self.gain / max(self.size + self.work, _FREE)


@dataclass(frozen=True, kw_only=True)
class _State:
    """How far a path is: groups by key, and what is left of each group's contributions."""

    groups: Mapping[str, frozenset[str]]
    left: Mapping[tuple[str, Side], float]


def values_of(recipe: Recipe, space: Space) -> dict[str, Value]:
    """What the section that is searched says of its knobs.

    Raises:
        UsageError: the recipe has none, or its scheme is not dynamic.
    """
    if space.section == "int8" and not recipe.int8.is_dynamic:
        raise UsageError("tune searches dynamic int8, the recipe's scheme is static", remedy='say scheme = "dynamic"')
    section: Int8 | Int4 | None = getattr(recipe, space.section)
    if section is None:
        raise UsageError(
            f"recipe {recipe.name} has no [int4] section", remedy="add one, as in pipeline/recipes/gemma3.toml"
        )
    said = {knob.key: getattr(section, knob.key) for knob in space.knobs}
    return {key: list(value) if isinstance(value, tuple) else value for key, value in said.items()}


def plain(space: Space) -> Candidate:
    """Every knob at rest: plain dynamic int8, or 4 bits everywhere."""
    return Candidate(name="plain", values={knob.key: knob.values[0] if knob.values else [] for knob in space.knobs})


def unit(space: Space, layers: Sequence[Layer], first: Candidate) -> Candidate:
    """The file whose size is the unit: `first`, from which a path begins, or the same with 8 bits everywhere."""
    moved = [f"{key} everywhere" for key in space.unit]
    name = ", ".join([*([] if moved and first.name == "plain" else [first.name]), *moved])
    return priced(name, {**first.values, **space.unit}, layers, space)


def priced(name: str, values: Mapping[str, Value], layers: Sequence[Layer], space: Space) -> Candidate:
    """A candidate of any `values`, with the size and work that its patterns over `layers` mean."""
    elements = sum({layer.weight: layer.elements for layer in layers}.values())
    products, size, work = sum(layer.products for layer in layers), 0.0, 0.0
    for knob in (knob for knob in space.knobs if not knob.values):
        named = values[knob.key]
        assert isinstance(named, list)
        chosen = keeper(named)
        own = [layer for layer in layers if chosen(layer.name)]
        size += knob.size * sum({layer.weight: layer.elements for layer in own}.values()) / elements
        work += knob.work * sum(layer.products for layer in own) / products
    return Candidate(name=name, values=dict(values), size=size, work=work)


def alone(group: Group, groups: Sequence[Group], first: Candidate, space: Space) -> list[Candidate]:
    """One `group` as plain as `first`, the others spared; one for each of `space.rows` that its input may take."""
    others = [each.name for each in groups if each is not group]
    spared = {**first.values, space.spare: list(patterns(others, groups))}
    two = {"int8x2": list(patterns([group.name], groups))}
    return [
        Candidate(name=f"only {group.name}, two rows", values={**spared, **two})
        if rows == 2
        else Candidate(name=f"only {group.name}", values=spared)
        for rows in space.rows
    ]


def starts(space: Space) -> list[Candidate]:
    """Every combination of the values that knobs of the whole model have, no group moved; the plain one first."""
    whole = [knob for knob in space.knobs if knob.values]
    made = []
    for values in product(*(knob.values for knob in whole)):
        chosen = {knob.key: value for knob, value in zip(whole, values, strict=True)}
        moved = [
            f"{knob.key} {rewrite.literal(chosen[knob.key])}" for knob in whole if chosen[knob.key] != knob.values[0]
        ]
        made.append(Candidate(name=", ".join(moved) or "plain", values={**plain(space).values, **chosen}))
    return made


def quiet(start: Candidate, space: Space) -> Candidate:
    """The same with two rows everywhere: beside one row's error nothing would be heard of what is done to weights."""
    return Candidate(name=f"{start.name}, two rows", values={**start.values, **space.quiet}) if space.quiet else start


def path(
    first: Candidate,
    groups: Sequence[Group],
    found: Mapping[str, Contribution],
    most: float,
    space: Space,
) -> list[Candidate]:
    """Candidates from `first` on, each a move further: always the one with the most gain for its cost.

    Gains are what `found` says of the groups and `lessens` of the knobs; costs are in shares of the plain file's size
    plus shares of its products. None is expected to be more than `most` times as large as the plain file.
    """
    knobs = [knob for knob in space.knobs if not knob.values]
    left = {(name, side): max(getattr(one, side), 0.0) for name, one in found.items() for side in SIDES}
    state = _State(groups={knob.key: frozenset() for knob in knobs}, left=left)
    steps = [first]
    while moves := [move for move in _moves(state, groups, knobs) if steps[-1].size + move.size <= most - 1]:
        best = max(moves, key=lambda move: (move.worth, move.knob.key, move.group))
        state = _after(state, best)
        chosen = {key: list(patterns(names, groups)) for key, names in state.groups.items()}
        steps.append(
            Candidate(
                name=f"{'' if first.name == 'plain' else first.name + ' '}+ {best.knob.key} {best.group}",
                values={**first.values, **chosen},
                size=steps[-1].size + best.size,
                work=steps[-1].work + best.work,
            )
        )
    return steps


def _moves(state: _State, groups: Sequence[Group], knobs: Sequence[Knob]) -> list[_Move]:
    """Moves that gain anything."""
    elements, products = sum(group.elements for group in groups), sum(group.products for group in groups)
    possible_moves = []
    for knob in knobs:
        for group in groups:
            possible = group.products or knob.tables
            if not possible or group.name in state.groups[knob.key] or _spared(state, knob, group.name, knobs):
                continue
            spared = sum(other.work for other in knobs if other.key in knob.spares and _has(state, other, group.name))
            gain = sum(share * state.left.get((group.name, side), 0.0) for side, share in knob.lessens.items())
            size, work = knob.size * group.elements / elements, (knob.work - spared) * group.products / products
            possible_moves.append(_Move(knob=knob, group=group.name, gain=gain, size=size, work=work))
    return [move for move in possible_moves if move.gain > 0]


def _has(state: _State, knob: Knob, group: str) -> bool:
    return group in state.groups.get(knob.key, ())


def _spared(state: _State, knob: Knob, group: str, knobs: Sequence[Knob]) -> bool:
    return any(knob.key in other.spares and _has(state, other, group) for other in knobs)


def _after(state: _State, move: _Move) -> _State:
    knob = move.knob
    groups = {key: names - {move.group} if key in knob.spares else names for key, names in state.groups.items()}
    rest = {
        (move.group, side): state.left.get((move.group, side), 0.0) * (1 - share)
        for side, share in knob.lessens.items()
    }
    return _State(groups={**groups, knob.key: groups[knob.key] | {move.group}}, left={**state.left, **rest})
