"""Limits beside values: which checks a file has to pass, and what to do with a figure that is not there.

A check that can't be made does not pass. A variant without limits in the recipe does not pass either.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Literal

from pipeline.core.manifest import Fact
from pipeline.core.recipe import Gate

Direction = Literal["<=", ">="]


@dataclass(frozen=True, kw_only=True)
class Check:
    """One judged figure. `value` is None where it could not be had; `limit` None where the recipe has none."""

    variant: str
    name: str
    value: float | None
    limit: float | None
    direction: Direction
    passed: bool
    against: str
    detail: str

    def sentence(self) -> str:
        """The check in words, e.g. `int8: KLD on the corpus is 0.012, the limit is <= 0.01 (against fp32)`."""
        value = "not known" if self.value is None else f"{self.value:.4g}"
        limit = "missing from the recipe" if self.limit is None else f"{self.direction} {self.limit:.4g}"
        against = f" (against {self.against})" if self.against else ""
        return f"{self.variant}: {self.name} is {value}, the limit is {limit}{against}"

    def facts(self) -> dict[str, Fact]:
        """The check as JSON."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A measured value that the recipe's limit `metric` (a field of `Gate`) applies to."""

    metric: str
    name: str
    value: float | None
    against: str = ""
    detail: str = ""


_AT_LEAST = frozenset({"top1", "integer_share"})


def gate_name(variant: str, facts: Mapping[str, Fact]) -> str:
    """The key of a variant's limits in the recipe: its own name, or for int8 folders `int8-<scheme>`."""
    return f"int8-{facts.get('scheme')}" if variant.startswith("int8") else variant


def judge(variant: str, gate: Gate | None, figures: Iterable[Figure]) -> list[Check]:
    """The checks of `variant`: one per figure that `gate` limits, and a failed one per limit without a figure.

    A `gate` of None, or one without any limit, gives a single failed check: nothing to judge by is no pass.
    """
    limits = {name: limit for name, limit in asdict(gate or Gate()).items() if limit is not None}
    if not limits:
        return [_check(variant, Figure(metric="gate", name="limits in the recipe", value=None), None)]
    measured = [figure for figure in figures if figure.metric in limits]
    seen = {figure.metric for figure in measured}
    absent = [
        Figure(metric=name, name=name, value=None, detail="this was not measured")
        for name in limits
        if name not in seen
    ]
    return [_check(variant, figure, limits[figure.metric]) for figure in [*measured, *absent]]


def must_hold(variant: str, name: str, violations: int, detail: str = "") -> Check:
    """A check of something that holds for every file, whatever the recipe says: no violation at all."""
    return _check(variant, Figure(metric=name, name=name, value=float(violations), detail=detail), 0.0)


def _check(variant: str, figure: Figure, limit: float | None) -> Check:
    value = figure.value if figure.value is not None and math.isfinite(figure.value) else None
    direction: Direction = ">=" if figure.metric in _AT_LEAST else "<="
    passed = value is not None and limit is not None and (value >= limit if direction == ">=" else value <= limit)
    return Check(
        variant=variant,
        name=figure.name,
        value=value,
        limit=limit,
        direction=direction,
        passed=passed,
        against=figure.against,
        detail=figure.detail,
    )
