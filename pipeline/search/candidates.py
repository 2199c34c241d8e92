"""Candidates: a recipe with other values in its [int8] section, on a greedy path from the plain file on.

`KNOBS` is the whole search space. A key of [int8] that should be searched is one line more there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from pipeline.search.groups import Group, patterns

Side = Literal["weights", "activations"]
Value = str | float | bool | list[str]
SIDES: tuple[Side, ...] = ("weights", "activations")
_FREE = 1e-3
"""The cost of what costs nothing, in the unit of costs: such moves come first, the largest gain before the others."""


@dataclass(frozen=True, kw_only=True)
class Knob:
    """A key of [int8] to search.

    A knob is set for groups of layers, by patterns over operator names; one with `values` is set to one of these for
    the whole model, and `off` is its value before. `lessens` are the sides whose contribution it takes away, by about
    `share`. It costs `size` bytes per weight and `work` products per product of an int8 layer. A layer that has it
    needs none of `spares`.
    """

    key: str
    lessens: tuple[Side, ...]
    share: float = 1.0
    size: float = 0.0
    work: float = 0.0
    spares: tuple[str, ...] = ()
    values: tuple[Value, ...] = ()
    off: Value = False


KNOBS = (
    Knob(key="two_rows", lessens=("activations",), work=1.0),
    Knob(key="keep_float", lessens=("weights", "activations"), size=3.0, work=2.0, spares=("two_rows",)),
)


@dataclass(frozen=True, kw_only=True)
class Contribution:
    """What int8 in one group alone costs, KLD in nats with the rest in float: its weights, its activations."""

    weights: float
    activations: float


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """`values` of [int8] keys; `size` and `work` expected beyond the plain file's, as shares of it."""

    name: str
    values: Mapping[str, Value]
    size: float = 0.0
    work: float = 0.0


@dataclass(frozen=True, kw_only=True)
class _Move:
    knob: Knob
    group: str
    value: Value
    gain: float
    size: float
    work: float

    @property
    def worth(self) -> float:
        return self.gain / max(self.size + self.work, _FREE)


@dataclass(frozen=True, kw_only=True)
class _State:
    """How far a path is: groups by key, values by key, and what is left of each group's contributions."""

    groups: Mapping[str, frozenset[str]]
    values: Mapping[str, Value]
    left: Mapping[tuple[str, Side], float]


def plain(knobs: Sequence[Knob] = KNOBS) -> Candidate:
    """Every knob at rest: plain dynamic int8."""
    return Candidate(name="plain", values={knob.key: knob.off if knob.values else [] for knob in knobs})


def alone(group: Group, groups: Sequence[Group], rows: int) -> Candidate:
    """Int8 in one `group`, float elsewhere; its input as one row or two, whose activations are as good as float."""
    others = [each.name for each in groups if each is not group]
    two = list(patterns([group.name], groups)) if rows == 2 else []
    values: dict[str, Value] = {"keep_float": list(patterns(others, groups)), "two_rows": two}
    return Candidate(name=f"only {group.name}, {'two rows' if rows == 2 else 'one row'}", values=values)


def path(
    groups: Sequence[Group], found: Mapping[str, Contribution], most: float, knobs: Sequence[Knob] = KNOBS
) -> list[Candidate]:
    """Candidates from the plain one on, each a move further: always the one with the most gain for its cost.

    Gains are what `found` says of the groups and `share` of the knobs; costs are in shares of the plain file's size
    plus shares of its products. None is expected to be more than `most` times as large as the plain file.
    """
    left = {(name, side): max(getattr(one, side), 0.0) for name, one in found.items() for side in SIDES}
    state = _State(groups={knob.key: frozenset() for knob in knobs if not knob.values}, values={}, left=left)
    made = [plain(knobs)]
    while moves := [move for move in _moves(state, groups, knobs) if made[-1].size + move.size <= most - 1]:
        best = max(moves, key=lambda move: (move.worth, move.knob.key, move.group))
        state = _after(state, best)
        made.append(_candidate(state, best, made[-1], groups, knobs))
    return made


def _moves(state: _State, groups: Sequence[Group], knobs: Sequence[Knob]) -> list[_Move]:
    """Moves that gain anything."""
    elements, products = sum(each.elements for each in groups), sum(each.products for each in groups)
    found = []
    for knob in knobs:
        if knob.values:
            found += _settings(state, knob)
            continue
        for each in groups:
            if each.name in state.groups[knob.key] or _spared(state, knob, each.name, knobs):
                continue
            spared = sum(other.work for other in knobs if other.key in knob.spares and _has(state, other, each.name))
            gain = knob.share * sum(state.left.get((each.name, side), 0.0) for side in knob.lessens)
            size, work = knob.size * each.elements / elements, (knob.work - spared) * each.products / products
            found.append(_Move(knob=knob, group=each.name, value="", gain=gain, size=size, work=work))
    return [move for move in found if move.gain > 0]


def _settings(state: _State, knob: Knob) -> list[_Move]:
    """Setting a knob of the whole model, once: each value is a move of its own."""
    if knob.key in state.values:
        return []
    gain = knob.share * sum(left for (_, side), left in state.left.items() if side in knob.lessens)
    return [_Move(knob=knob, group="", value=v, gain=gain, size=knob.size, work=knob.work) for v in knob.values]


def _has(state: _State, knob: Knob, group: str) -> bool:
    return group in state.groups.get(knob.key, ())


def _spared(state: _State, knob: Knob, group: str, knobs: Sequence[Knob]) -> bool:
    return any(knob.key in other.spares and _has(state, other, group) for other in knobs)


def _after(state: _State, move: _Move) -> _State:
    knob = move.knob
    if knob.values:
        left = {key: rest * (1 - knob.share) if key[1] in knob.lessens else rest for key, rest in state.left.items()}
        return _State(groups=state.groups, values={**state.values, knob.key: move.value}, left=left)
    groups = {key: names - {move.group} if key in knob.spares else names for key, names in state.groups.items()}
    lessened = {(move.group, side): state.left[move.group, side] * (1 - knob.share) for side in knob.lessens}
    return _State(
        groups={**groups, knob.key: groups[knob.key] | {move.group}},
        values=state.values,
        left={**state.left, **lessened},
    )


def _candidate(
    state: _State, move: _Move, before: Candidate, groups: Sequence[Group], knobs: Sequence[Knob]
) -> Candidate:
    values: dict[str, Value] = dict(plain(knobs).values) | dict(state.values)
    values |= {key: list(patterns(names, groups)) for key, names in state.groups.items() if names}
    name = f"+ {move.knob.key} {move.group or move.value}"
    return Candidate(name=name, values=values, size=before.size + move.size, work=before.work + move.work)
