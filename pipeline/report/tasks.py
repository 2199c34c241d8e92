"""The figures of a user's own task for a terminal: a table, and a sentence for each bundle."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypedDict

from pipeline.core import log
from pipeline.judge import tasks
from pipeline.judge.tasks import TITLES


class Task(TypedDict):
    """The user's file."""

    file: str
    prompts: int


class Report(TypedDict):
    """What is read of evaluate's report: scores by model and metric, and each bundle's beside the original's.

    A metric's figures are `value`, `low`, `high`, and beside the original's `within`.
    """

    model: str
    task: Task
    scores: Mapping[str, Mapping[str, Mapping[str, float]]]
    against_original: Mapping[str, Mapping[str, Mapping[str, float]]]
    rows: Sequence[object]


def summary(report: Report) -> list[str]:
    """The figures for people: a table, and a sentence for each bundle."""
    prompts = report["task"]["prompts"]
    rows = [["", *TITLES.values()]]
    for name, scores in report["scores"].items():
        cells = [f"{one['value']:.1f} ({one['low']:.1f} to {one['high']:.1f})" for one in _ordered(scores)]
        rows.append([name, *cells])
    lines = [f"{report['model']} on {report['task']['file']}: {prompts} prompts, points of 100 (95 % interval)", ""]
    lines += [*log.align(rows), ""]
    for name, found in report["against_original"].items():
        titles = zip(_ordered(found), TITLES.values(), strict=True)
        within = ", ".join(f"{one['within']:.1f} points in {title}" for one, title in titles)
        lines.append(f"{name} is within {within} of the original (95 %).")
        lines.append(f"  {found['identical']:.0%} of its answers are the original's to the last character.")
    if prompts < tasks.FEWEST:
        lines.append(f"Only {prompts} prompts: take the intervals as rough, and give at least {tasks.FEWEST}.")
    return lines


def _ordered(figures: Mapping[str, Mapping[str, float]]) -> list[Mapping[str, float]]:
    """The figures of each metric in the order of the table."""
    return [figures[metric] for metric in TITLES]
