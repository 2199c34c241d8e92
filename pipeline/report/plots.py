"""The report's plots as SVG text: the same bytes for the same figures, coloured by the page's style sheet."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from pipeline.judge.metrics import DECADES, kld_edges

_WIDTH = 720
_LEFT, _RIGHT = 156, 24


@dataclass(frozen=True, kw_only=True)
class Distribution:
    """KLD per position of one file: `counts` per bin of `kld_edges`, the mean, and the limit on the mean if any."""

    name: str
    against: str
    counts: Sequence[int]
    mean: float
    limit: float | None


def kld_distributions(rows: Sequence[Distribution]) -> str:
    """One histogram below another over a common logarithmic axis, with mean and limit marked."""
    step, top = 84, 14
    height = top + step * len(rows) + 40
    parts = [_open(height, "Distribution of the KL divergence per position, one histogram per file")]
    bottom = top + step * len(rows)
    for power in range(DECADES[0], DECADES[1] + 1, 2):
        x = _x(10.0**power)
        parts.append(f'<line class="grid" x1="{x:.1f}" y1="{top}" x2="{x:.1f}" y2="{bottom}"/>')
        label = "≤ 10" if power == DECADES[0] else "10"
        parts.append(_text(x, bottom + 18, f"{label}{_superscript(power)}", "middle", "tick"))
    parts.append(
        _text((_LEFT + _WIDTH - _RIGHT) / 2, bottom + 36, "KL divergence per position, nats", "middle", "tick")
    )
    for index, row in enumerate(rows):
        parts += _histogram(row, index, top + step * (index + 1), step - 30)
    return "".join([*parts, "</svg>"])


def _histogram(row: Distribution, index: int, base: float, height: float) -> list[str]:
    edges = kld_edges()
    most = max(max(row.counts), 1)
    parts = [f'<g class="series s{index}">']
    for place, count in enumerate(row.counts):
        if not count:
            continue
        left, right = _x(edges[place]), _x(edges[place + 1])
        tall = height * count / most
        title = f"<title>{count} positions, {edges[place]:.1e} to {edges[place + 1]:.1e} nats</title>"
        box = f'x="{left + 0.5:.1f}" y="{base - tall:.1f}" width="{right - left - 1:.1f}" height="{tall:.1f}"'
        parts.append(f'<rect class="bar" {box}>{title}</rect>')
    parts.append("</g>")
    parts.append(f'<line class="axis" x1="{_LEFT}" y1="{base}" x2="{_WIDTH - _RIGHT}" y2="{base}"/>')
    parts.append(_text(_LEFT - 12, base - height / 2, row.name, "end", "name"))
    parts.append(_text(_LEFT - 12, base - height / 2 + 16, f"against {row.against}", "end", "tick"))
    missed = row.limit is not None and row.mean > row.limit
    parts += _marker(row.mean, base, height, "mean", after=missed)
    if row.limit is not None:
        parts += _marker(row.limit, base, height, "limit", after=not missed)
    return parts


def _marker(value: float, base: float, height: float, kind: str, *, after: bool) -> list[str]:
    """A vertical line at `value`, its label before or `after` it as asked unless that would leave the picture."""
    x = _x(value)
    after = x < _LEFT + 48 or (after and x < _WIDTH - _RIGHT - 48)
    anchor, offset = ("start", 4) if after else ("end", -4)
    return [
        f'<line class="{kind}" x1="{x:.1f}" y1="{base - height - 12:.1f}" x2="{x:.1f}" y2="{base}"/>',
        _text(x + offset, base - height - 3, kind, anchor, "mark"),
    ]


@dataclass(frozen=True, kw_only=True)
class Point:
    """One file: size in bytes, mean KLD in nats and its 95 % interval."""

    name: str
    size: int
    kld: float
    low: float
    high: float


def size_against_quality(points: Sequence[Point]) -> str:
    """Files by size (left is smaller) and KLD against Hugging Face (low is better), both axes from data."""
    height, top, bottom = 340, 20, 284
    least = 10.0 ** DECADES[0]
    powers = [math.log10(max(value, least)) for point in points for value in (point.kld, point.low, point.high)]
    low, high = math.floor(min(powers)) - 1, math.ceil(max(powers)) + 1
    widest = max(point.size for point in points) * 1.12

    def across(size: float) -> float:
        return _LEFT + (_WIDTH - _RIGHT - _LEFT) * size / widest

    def up(kld: float) -> float:
        power = min(max(math.log10(max(kld, least)), low), high)
        return bottom - (bottom - top) * (power - low) / (high - low)

    parts = [_open(height, "Size of each file against its mean KL divergence from Hugging Face")]
    for power in range(low, high + 1, math.ceil((high - low) / 7)):
        y = up(10.0**power)
        parts.append(f'<line class="grid" x1="{_LEFT}" y1="{y:.1f}" x2="{_WIDTH - _RIGHT}" y2="{y:.1f}"/>')
        parts.append(_text(_LEFT - 10, y + 4, f"10{_superscript(power)}", "end", "tick"))
    for size in _round_steps(widest):
        parts.append(_text(across(size), bottom + 20, _bytes(size), "middle", "tick"))
    parts.append(_text((_LEFT + _WIDTH - _RIGHT) / 2, bottom + 44, "size of the file", "middle", "tick"))
    parts.append(_text(_LEFT - 44, top + 4, "mean KLD, nats", "end", "tick"))
    parts.append(f'<line class="axis" x1="{_LEFT}" y1="{bottom}" x2="{_WIDTH - _RIGHT}" y2="{bottom}"/>')
    for index, point in enumerate(points):
        x, y = across(point.size), up(point.kld)
        parts.append(
            f'<g class="series s{index}"><line class="whisker" x1="{x:.1f}" y1="{up(point.low):.1f}" '
            f'x2="{x:.1f}" y2="{up(point.high):.1f}"/><circle class="dot" cx="{x:.1f}" cy="{y:.1f}" r="6"/></g>'
        )
    taken: list[tuple[float, float]] = []
    for point in sorted(points, key=lambda point: -point.kld):
        parts.append(_place_label(point.name, across(point.size), up(point.kld), taken))
    return "".join([*parts, "</svg>"])


@dataclass(frozen=True, kw_only=True)
class Tried:
    """One candidate of a tune: its cost beyond plain int8 as a share, mean KLD in nats and its 95 % interval."""

    name: str
    cost: float
    kld: float
    low: float
    high: float


def frontier(tried: Sequence[Tried], best: Sequence[str], chosen: str) -> str:
    """Candidates by cost and KLD (low is better), a line through those named `best`, the `chosen` one marked."""
    height, top, bottom, least = 380, 20, 324, 10.0 ** DECADES[0]
    powers = [math.log10(max(value, least)) for point in tried for value in (point.kld, point.low, point.high)]
    low, high = math.floor(min(powers) * 2) / 2, math.ceil(max(powers) * 2) / 2 + 1e-9
    left, widest = min(0.0, *(point.cost for point in tried)), max(0.05, *(point.cost for point in tried)) * 1.3

    def across(cost: float) -> float:
        return _LEFT + (_WIDTH - _RIGHT - _LEFT) * (cost - left) / (widest - left)

    def up(kld: float) -> float:
        return bottom - (bottom - top) * (math.log10(max(kld, least)) - low) / max(high - low, 0.5)

    parts = [_open(height, "Cost of each candidate against its mean KL divergence from fp32")]
    for power in range(math.ceil(low), math.floor(high) + 1):
        for factor in (1, 2, 5):
            if (y := up(factor * 10.0**power)) >= top:
                parts.append(f'<line class="grid" x1="{_LEFT}" y1="{y:.1f}" x2="{_WIDTH - _RIGHT}" y2="{y:.1f}"/>')
                parts.append(_text(_LEFT - 10, y + 4, f"{factor} · 10{_superscript(power)}", "end", "tick"))
    for cost in _round_steps(widest):
        parts.append(_text(across(cost), bottom + 20, f"{cost:.0%}", "middle", "tick"))
    parts.append(
        _text((_LEFT + _WIDTH - _RIGHT) / 2, bottom + 44, "larger and slower than plain int8", "middle", "tick")
    )
    parts.append(_text(_LEFT - 44, top + 4, "mean KLD, nats", "end", "tick"))
    parts.append(f'<line class="axis" x1="{_LEFT}" y1="{bottom}" x2="{_WIDTH - _RIGHT}" y2="{bottom}"/>')
    named = {point.name: point for point in tried}
    line = " ".join(f"{across(named[n].cost):.1f},{up(named[n].kld):.1f}" for n in best if n in named)
    parts.append(f'<polyline class="line" points="{line}"/>')
    taken: list[tuple[float, float]] = []
    for point in sorted(tried, key=lambda point: -point.kld):
        x, y = across(point.cost), up(point.kld)
        parts.append(
            f'<g class="{"chosen" if point.name == chosen else "series"}"><line class="whisker" x1="{x:.1f}" '
            f'y1="{up(point.low):.1f}" x2="{x:.1f}" y2="{up(point.high):.1f}"/>'
            f'<circle class="dot" cx="{x:.1f}" cy="{y:.1f}" r="6"/></g>'
        )
        parts.append(_place_label(point.name, x, y, taken))
    return "".join([*parts, "</svg>"])


def signal_to_noise(name: str, curve: Sequence[tuple[str, float]]) -> str:
    """Decibels of every operator's result in the order of execution, `curve` of (layer, decibels); down is noise."""
    height, top, bottom, most = 300, 20, 244, 80.0
    places = len(curve)

    def across(place: float) -> float:
        return _LEFT + (_WIDTH - _RIGHT - _LEFT) * place / max(places - 1, 1)

    def up(decibels: float) -> float:
        return bottom - (bottom - top) * min(max(decibels, 0.0), most) / most

    parts = [_open(height, f"Signal to noise of every operator of {name}, against fp32")]
    for level in range(0, int(most) + 1, 20):
        kind = "limit" if level == 20 else "grid"
        parts.append(
            f'<line class="{kind}" x1="{_LEFT}" y1="{up(level):.1f}" x2="{_WIDTH - _RIGHT}" y2="{up(level):.1f}"/>'
        )
        parts.append(_text(_LEFT - 10, up(level) + 4, f"{'≥ ' if level == most else ''}{level} dB", "end", "tick"))
    for label, start, stop in _stretches(curve):
        x, middle = across(start), across((start + stop) / 2)
        parts.append(f'<line class="grid" x1="{x:.1f}" y1="{top}" x2="{x:.1f}" y2="{bottom}"/>')
        if across(stop) - x > 18 and label.startswith("layers."):
            parts.append(_text(middle, bottom + 18, label.removeprefix("layers."), "middle", "tick"))
    line = " ".join(f"{across(place):.1f},{up(level):.1f}" for place, (_, level) in enumerate(curve))
    parts.append(f'<g class="series s2"><polyline class="line" points="{line}"/></g>')
    parts.append(_text((_LEFT + _WIDTH - _RIGHT) / 2, bottom + 40, "layer", "middle", "tick"))
    parts.append(_text(_LEFT - 62, top + 4, name, "end", "name"))
    return "".join([*parts, "</svg>"])


def _stretches(curve: Sequence[tuple[str, float]]) -> list[tuple[str, int, int]]:
    """Neighbours of one layer: its name, first place and last."""
    found: list[tuple[str, int, int]] = []
    for place, (layer, _) in enumerate(curve):
        if found and found[-1][0] == layer:
            found[-1] = (layer, found[-1][1], place)
        else:
            found.append((layer, place, place))
    return found


def _place_label(name: str, x: float, y: float, taken: list[tuple[float, float]]) -> str:
    """The name beside its dot, moved down until it is clear of the names above it."""
    side = -1 if x > _WIDTH * 0.8 else 1
    line = y + 4
    while any(abs(line - other_y) < 16 and abs(x - other_x) < 130 for other_x, other_y in taken):
        line += 16
    taken.append((x, line))
    return _text(x + 12 * side, line, name, "start" if side > 0 else "end", "name")


def _x(kld: float) -> float:
    low, high = DECADES
    power = min(max(math.log10(kld) if kld > 0 else low, low), high)
    return _LEFT + (_WIDTH - _RIGHT - _LEFT) * (power - low) / (high - low)


def _round_steps(widest: float) -> list[float]:
    """Three to six round sizes from 0 to `widest`."""
    rough = widest / 5
    unit = 10 ** math.floor(math.log10(rough))
    step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= rough)
    return [step * place for place in range(int(widest / step) + 1)]


def _bytes(size: float) -> str:
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= scale:
            return f"{size / scale:g} {unit}"
    return f"{size:.0f}"


def _superscript(power: int) -> str:
    return str(power).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def _open(height: float, title: str) -> str:
    return f'<svg viewBox="0 0 {_WIDTH} {height:g}" role="img" aria-label="{escape(title)}">'


def _text(x: float, y: float, text: str, anchor: str, kind: str) -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
