"""Which candidates are worth more measuring, and which are on the frontier of quality and cost.

Cost is one number: the share by which a file is larger than the plain one, plus the share by which it is slower.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

# Below what rounding leaves of a KLD in float64; the logarithm of 0 would win every race.
_SMALLEST = 1e-12
_DIGITS = 9
"""Of a cost: differences beyond would be lost in the products that tell a hull's corners."""


@dataclass(frozen=True)
class Point:
    """A candidate's cost, and its KLD in nats."""

    cost: float
    kld: float


def better_half(points: Mapping[str, Point], fewest: int) -> list[str]:
    """The names of the half (but `fewest` at least) that lies lowest above the hull, in their order.

    The lower convex hull of cost and log KLD is what mixtures of the others reach: a candidate far above it is no good
    choice at any price. The most faithful one is always among them.
    """
    keep = max(fewest, -(-len(points) // 2))
    distance = regrets(points)
    # Names last, so that equals are ordered the same way at every run.
    best = min(points, key=lambda name: (_log(points[name].kld), points[name].cost, name), default="")
    ranked = sorted(points, key=lambda name: (name != best, distance[name], points[name].cost, name))
    return [name for name in points if name in ranked[:keep]]


def regrets(points: Mapping[str, Point]) -> dict[str, float]:
    """How far log KLD of each lies above the lower convex hull at its cost."""
    places = {name: (round(point.cost, _DIGITS), _log(point.kld)) for name, point in points.items()}
    corners = _hull(sorted({*places.values()}))
    return {name: height - _height(corners, cost) for name, (cost, height) in places.items()}


def _log(kld: float) -> float:
    return math.log(max(kld, _SMALLEST)) if math.isfinite(kld) else math.log(1 / _SMALLEST)


def _hull(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The lower hull of points in ascending order (Andrew's monotone chain, 1979), as far as it falls."""
    corners: list[tuple[float, float]] = []
    for point in points:
        # A corner that does not turn left lies on or above the line of its neighbours.
        while len(corners) > 1 and _turn(corners[-2], corners[-1], point) <= 0:
            corners.pop()
        corners.append(point)
    lowest = min(range(len(corners)), key=lambda place: corners[place][1])
    # Beyond the lowest point the hull rises: there more cost buys nothing.
    return corners[: lowest + 1]


def _turn(a: tuple[float, float], b: tuple[float, float], c: tuple[float, float]) -> float:
    return (b[0] - a[0]) * (c[1] - a[1]) - (b[1] - a[1]) * (c[0] - a[0])


def _height(corners: list[tuple[float, float]], cost: float) -> float:
    for (left, high), (right, low) in zip(corners, corners[1:], strict=False):
        if cost <= right:
            share = (max(cost, left) - left) / (right - left)
            return high * (1 - share) + low * share  # exact in the corners, which lie on the hull
    return corners[-1][1]


def frontier(points: Mapping[str, Point]) -> list[str]:
    """The names that no other beats: in ascending cost, each with less KLD than all that cost less."""
    best, found = math.inf, []
    for name in sorted(points, key=lambda name: (points[name].cost, points[name].kld, name)):
        if points[name].kld < best:
            best = points[name].kld
            found.append(name)
    return found
