"""What tune found, for people: a page with the frontier and the contributions, and a table for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NotRequired, TypedDict

from markupsafe import Markup

from pipeline.core import log
from pipeline.report import page, plots


class Group(TypedDict):
    """What fewer bits cost in one group of layers; None is what was not measured."""

    name: str
    weights: float | None
    activations: float | None


class Row(TypedDict):
    """A candidate. Figures of text are there once it was measured and gave numbers."""

    name: str
    finalist: bool
    cost: float
    relative_size: float
    speed: Mapping[str, float] | None
    positions: NotRequired[int]
    kld: NotRequired[Mapping[str, float]]
    top1: NotRequired[Mapping[str, float]]


class Report(TypedDict):
    """What is read of tune's report."""

    model: str
    section: str
    date: str
    tools: Mapping[str, str]
    groups: Sequence[Group]
    candidates: Sequence[Row]
    frontier: Sequence[str]
    chosen: str


def render(report: Report) -> str:
    """The page for tune's report, self-contained: no script, no external resource."""
    environment = page.environment(kld=_kld, share=_share, times=_times, size=log.human_bytes)
    points = [_point(row) for row in report["candidates"] if row["finalist"]]
    drawing = plots.frontier(points, report["frontier"], report["chosen"]) if points else ""
    return environment.get_template("tuning.html.jinja").render(
        report=report,
        frontier=Markup(drawing),  # noqa: S704 - escaped where it is made
    )


def _point(row: Row) -> plots.Tried:
    kld = row["kld"]
    return plots.Tried(name=row["name"], cost=row["cost"], kld=kld["value"], low=kld["low"], high=kld["high"])


def table(report: Report) -> list[str]:
    """Contributions, then candidates, as lines of text."""
    rows = [[f"{report['section']} there alone", "weights", "activations"]]
    for group in report["groups"]:
        rows.append([group["name"], _kld(group["weights"]), _kld(group["activations"])])
    tried = [["", "candidate", "KLD (95 %)", "top-1", "positions", "size", "S = 1", "S = 128"]]
    for row in report["candidates"]:
        if "kld" in row:
            mark = "→" if row["name"] == report["chosen"] else "·" if row["name"] in report["frontier"] else ""
            tried.append([mark, row["name"], *_cells(row)])
    return [*log.align(rows), "", *log.align(tried)]


def _cells(row: Row) -> list[str]:
    kld, speed = row["kld"], row["speed"] or {}
    return [
        f"{_kld(kld['value'])} ({_kld(kld['low'])} to {_kld(kld['high'])})",
        _share(row["top1"]["value"]),
        f"{row['positions']:,}",
        _times(row["relative_size"]),
        *(_times(speed.get(length)) for length in ("1", "128")),
    ]


def sentence(row: Row) -> str:
    """A candidate's figures in words."""
    kld, top, speed = row["kld"], row["top1"], row["speed"]
    said = f"KLD {kld['value']:.2e} ({kld['low']:.2e} to {kld['high']:.2e}), top-1 {top['value']:.1%}"
    said += f" on {row['positions']:,} positions; {_times(row['relative_size'])} of plain int8's size"
    timed = ", ".join(f"{_times(value)} at S = {length}" for length, value in (speed or {}).items())
    return said + (f"; tokens/s {timed}" if timed else "")


def comment(told: Report) -> list[str]:
    """What the written recipe says of itself."""
    rows = {row["name"]: row for row in told["candidates"]}
    tools = ", ".join(f"{name} {told['tools'][name]}" for name in ("ai-edge-litert",) if name in told["tools"])
    lines = [f"{told['date']}, {told['model']}, {tools}; KLD against fp32 with its 95 % interval, on calibration text"]
    for name in dict.fromkeys((told["candidates"][0]["name"], told["chosen"])):
        row = rows.get(name)
        if row and "kld" in row:
            lines.append(f"{name}: {sentence(row)}")
    return lines


def _kld(value: float | None) -> str:
    return "–" if value is None else f"{value:.2e}"


def _share(value: float) -> str:
    return f"{value:.1%}"


def _times(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"
