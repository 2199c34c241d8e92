"""Limits beside values: which checks a file has to pass, and what to do with a figure that is not there.

Each check ends in one of four ways, and only the first lets a file be published:

- `pass`: the value keeps its limit, and so does its whole 95 % interval if it has one;
- `fail`: the value misses its limit, and so does its whole interval; or it is not finite;
- `inconclusive`: the limit lies inside the interval, or there were fewer than 64 positions: judge more of them; or
  there was no case at all of what must hold in every case;
- `not measured`: there is no value, or the recipe has no limit for it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Literal

from pipeline.core.recipe import Gate
from pipeline.judge.metrics import Estimate, Summary

Direction = Literal["<=", ">="]
Status = Literal["pass", "fail", "inconclusive", "not measured"]
FEWEST = 64
"""Positions below which a figure with an interval decides nothing: four windows are no sample of a language."""


@dataclass(frozen=True, kw_only=True)
class Check:
    """One judged figure. `value` is None where it could not be had; `limit` None where the recipe has none.

    `low` and `high` bound its 95 % interval, None where it has none.
    """

    variant: str
    name: str
    value: float | None
    low: float | None
    high: float | None
    limit: float | None
    direction: Direction
    status: Status
    against: str
    detail: str

    @property
    def passed(self) -> bool:
        """Whether the file may be published as far as this check goes."""
        return self.status == "pass"

    def sentence(self) -> str:
        """The check in words, e.g. `int8: KLD on the corpus is 0.012, the limit is <= 0.01 (against fp32)`."""
        value = "not known" if self.value is None else f"{self.value:.4g}"
        if self.status == "inconclusive" and self.low is None:
            value += " (of no case: nothing was tried)"
        elif self.status == "inconclusive":
            value += f" (95 % interval {self.low:.4g} to {self.high:.4g}: too few positions to tell)"
        limit = "missing from the recipe" if self.limit is None else f"{self.direction} {self.limit:.4g}"
        against = f" (against {self.against})" if self.against else ""
        return f"{self.variant}: {self.name} is {value}, the limit is {limit}{against}"

    def facts(self) -> dict[str, object]:
        """The check as JSON."""
        return asdict(self) | {"passed": self.passed}


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """A measured value that the recipe's limit `metric` (a field of `Gate`) applies to.

    `interval` is its 95 % interval and `positions` how many it was estimated from; None where it is no estimate.
    """

    metric: str
    name: str
    value: float | None
    interval: tuple[float, float] | None = None
    positions: int | None = None
    against: str = ""
    detail: str = ""

    @classmethod
    def estimated(
        cls, metric: str, name: str, estimate: Estimate, positions: int, *, against: str = "", detail: str = ""
    ) -> Measurement:
        """A figure that was estimated from so many positions."""
        return cls(
            metric=metric,
            name=name,
            value=estimate.value,
            interval=(estimate.low, estimate.high),
            positions=positions,
            against=against,
            detail=detail,
        )


# All other metrics are distances, sizes or times, of which less is better.
_AT_LEAST = frozenset({"snr", "top1", "perplexity_ratio_min", "integer_share"})


def gate_name(variant: str, scheme: str | None) -> str:
    """The key of a variant's limits in the recipe: its own name, or for int8 folders `int8-<scheme>`."""
    return f"int8-{scheme}" if variant.startswith("int8") else variant


def judge(variant: str, gate: Gate | None, figures: Iterable[Measurement]) -> list[Check]:
    """The checks of `variant`: one per figure that `gate` limits, and a failed one per limit without a figure.

    A `gate` of None, or one without any limit, gives a single failed check: nothing to judge by is no pass.
    """
    limits = {name: limit for name, limit in asdict(gate or Gate()).items() if limit is not None}
    if not limits:
        return [_check(variant, Measurement(metric="gate", name="limits in the recipe", value=None), None)]
    measured = [figure for figure in figures if figure.metric in limits]
    seen = {figure.metric for figure in measured}
    absent = [
        Measurement(metric=name, name=name, value=None, detail="this was not measured")
        for name in limits
        if name not in seen
    ]
    return [_check(variant, figure, limits[figure.metric]) for figure in [*measured, *absent]]


def quality(where: str, summary: Summary, *, against: str, detail: str) -> list[Measurement]:
    """How close predictions are: KLD, top-1 agreement and perplexity ratio, which has a limit on each side."""

    def figure(metric: str, name: str, of: Estimate, form: str, more: str = "") -> Measurement:
        told = f"{detail}; 95 % interval {of.low:{form}} to {of.high:{form}}{more}"
        return Measurement.estimated(metric, f"{name} {where}", of, summary.positions, against=against, detail=told)

    ties = f"; {summary.ties:.2%} ties" if summary.ties else ""
    ratio = summary.perplexity_ratio
    return [
        figure("kld", "KLD", summary.kld, ".3g"),
        figure("top1", "top-1 agreement", summary.top1, ".2%", ties),
        figure("perplexity_ratio_min", "perplexity ratio", ratio, ".4f"),
        figure("perplexity_ratio_max", "perplexity ratio", ratio, ".4f"),
    ]


def must_hold(variant: str, name: str, violations: int, cases: int, detail: str = "") -> Check:
    """A check of something that holds for every file, whatever the recipe says: no violation in any of `cases`.

    If nothing was tried nothing is known, so no case is inconclusive, not a pass.
    """
    check = _check(variant, Measurement(metric=name, name=name, value=float(violations), detail=detail), 0.0)
    return check if cases else replace(check, status="inconclusive")


def _check(variant: str, figure: Measurement, limit: float | None) -> Check:
    value, (low, high) = _finite(figure.value), map(_finite, figure.interval or (None, None))
    direction: Direction = ">=" if figure.metric in _AT_LEAST else "<="
    return Check(
        variant=variant,
        name=figure.name,
        value=value,
        low=low,
        high=high,
        limit=limit,
        direction=direction,
        status=_status(figure, limit, direction),
        against=figure.against,
        detail=figure.detail,
    )


def _status(figure: Measurement, limit: float | None, direction: Direction) -> Status:
    """How a check ends. An interval that reaches its limit and not beyond does not cross it."""
    if limit is None or figure.value is None:
        return "not measured"
    # Before any comparison: NaN would be neither within a limit nor beyond it.
    if not math.isfinite(figure.value):
        return "fail"
    # The whole interval must agree with the value: a limit inside it says that more text is needed, not that all is
    # well.
    bounds = [bound for bound in (figure.value, *(figure.interval or ())) if bound is not None]
    kept = {bound >= limit if direction == ">=" else bound <= limit for bound in bounds}
    # A tight interval of few positions is no comfort: they may all come from one text.
    few = figure.positions is not None and figure.positions < FEWEST
    if few or len(kept) > 1:
        return "inconclusive"
    return "pass" if kept == {True} else "fail"


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


REFERENCE = "Hugging Face"
