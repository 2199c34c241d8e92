"""A study: what is free, what each group of layers contributes, and a race of candidates on more and more text."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, field

from pipeline.core import log, manifest
from pipeline.search import candidates, halving
from pipeline.search.bench import SEQUENCES, Bench
from pipeline.search.candidates import Candidate, Contribution, Space
from pipeline.search.groups import Group, Layer

FINALISTS = 5
"""Candidates that see all shards, beside those that are there for comparison."""
_CONTRIBUTIONS, _CANDIDATES = 0.5, 0.9
"""The shares of the time by which contributions and candidates must be measured; speed gets the rest."""


@dataclass(kw_only=True)
class Study:
    """What a tune knows so far; all that race have been measured on `depth` shards."""

    bench: Bench
    layer_groups: list[Group]
    layers: list[Layer]
    given: Candidate
    limits: tuple[float, float]
    contributions: dict[str, Contribution] = field(default_factory=dict)
    tried: list[Candidate] = field(default_factory=list)
    speeds: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    depth: int = 1
    first: Candidate = field(init=False)

    def __post_init__(self) -> None:
        self.first = candidates.plain(self.space)

    def run(self) -> None:
        """What is free, contributions, candidates, speeds."""
        self.tried = [candidates.plain(self.space), self.given]
        self.bench.measure([(each, [0]) for each in self.tried], _CONTRIBUTIONS)
        self.first = self._first()
        self.contribute()
        most = self.limits[0] * (1 + self.unit.size)
        path = candidates.path(self.first, self.layer_groups, self.contributions, most, self.space)
        self.tried = self._distinct([*self.tried, self.unit, *path])
        log.step(f"{len(self.tried)} candidates")
        self.race()
        self.time()

    @property
    def space(self) -> Space:
        """What is searched."""
        return self.bench.space

    @property
    def unit(self) -> Candidate:
        """The file that sizes are shares of."""
        return candidates.unit(self.space, self.layers, self.first)

    def contribute(self) -> None:
        """Measure every group alone, the large ones first: what it adds to the file in which all are spared."""
        log.step(f"contributions of {len(self.layer_groups)} groups")
        ordered = sorted(self.layer_groups, key=lambda each: -each.elements)
        alone = {each.name: candidates.alone(each, self.layer_groups, self.first, self.space) for each in ordered}
        spared = [self.unit] if self.space.unit else []
        self.bench.measure([(one, [0]) for ways in [spared, *alone.values()] for one in ways], _CONTRIBUTIONS)
        least = sum(float(one.kld.mean()) for each in spared if (one := self.bench.found(each, [0])))
        for name, ways in alone.items():
            klds = [float(one.kld.mean()) for each in ways if (one := self.bench.found(each, [0]))]
            if len(klds) == len(ways):
                self.contributions[name] = Contribution(weights=klds[0] - least, activations=klds[-1] - klds[0])

    def _first(self) -> Candidate:
        """The best of what is free for the whole model: where the path begins."""
        starts = [(each, candidates.quiet(each, self.space)) for each in candidates.starts(self.space)]
        self.bench.measure([(loud, [0]) for _, loud in starts], _CONTRIBUTIONS)
        known = [self.bench.found(loud, [0]) for _, loud in starts]
        klds = [float(one.kld.mean()) if one else math.inf for one in known]
        return starts[klds.index(min(klds))][0]

    def _distinct(self, tried: Iterable[Candidate]) -> list[Candidate]:
        """Each set of values once."""
        made: dict[str, Candidate] = {}
        for each in tried:
            made.setdefault(repr(self.bench.section(each)), each)
        return list(made.values())

    def race(self) -> None:
        """Successive halving: fewer candidates on more text, until all that are left have seen all of it.

        What turns out to be too large goes at once; the plain file, the given recipe, the unit of sizes and the most
        faithful one within the limits stay.
        """
        names, shards = [candidate.name for candidate in self.tried], 1
        while True:
            racing = [candidate for candidate in self.tried if candidate.name in names]
            self.bench.measure([(candidate, range(shards)) for candidate in racing], _CANDIDATES)
            known = {name: point for name, point in self.points(shards).items() if name in names}
            if len(known) < len(names):  # time is over
                return
            self.depth = shards
            if shards == self.bench.shards:
                return
            small = {candidate.name for candidate in racing if self.relative_size(candidate) <= self.limits[0]}
            known = {name: point for name, point in known.items() if name in small}
            fitting = [candidate.name for candidate in racing if candidate.name in known and self.fits(candidate)]
            best = min(fitting, key=lambda name: known[name].kld, default=self.given.name)
            stay = {self.tried[0].name, self.given.name, self.unit.name, best}
            kept = {*stay, *halving.better_half(known, FINALISTS)}
            names = [name for name in names if name in kept]
            few = len(names) <= FINALISTS + len(stay)
            shards = self.bench.shards if few else min(2 * shards, self.bench.shards)

    def points(self, shards: int) -> dict[str, halving.Point]:
        """Cost and KLD of every candidate that is known on `shards` shards."""
        found = {each.name: (each, self.bench.found(each, range(shards))) for each in self.tried}
        return {
            name: halving.Point(self.cost(each), float(one.kld.mean())) for name, (each, one) in found.items() if one
        }

    def time(self) -> None:
        """Time the finalists against the plain file, on the step graph itself."""
        known = self.points(self.depth)
        for each in (each for each in self.tried[1:] if each.name in known):
            record = self.bench.record(each, "speed")
            if not record.is_file() and self.bench.clock.left() > 0:
                log.step(f"speed of {each.name}; {log.human_seconds(self.bench.clock.left())} left")
                manifest.write_atomically(record, json.dumps(self.bench.speed(each, self.tried[0])))
            if record.is_file():
                self.speeds[each.name] = json.loads(record.read_text(encoding="utf-8"))

    def relative_speed(self, each: Candidate) -> dict[str, float] | None:
        """Tokens a second against the plain file, by sequence length."""
        taken = self.speeds.get(each.name)
        if each is self.tried[0]:
            return {str(length): 1.0 for length in SEQUENCES}
        return {str(length): taken[str(length)][0] / taken[str(length)][1] for length in SEQUENCES} if taken else None

    def relative_size(self, each: Candidate) -> float:
        """Bytes against the unit's."""
        return self._larger(each) / self._larger(self.unit)

    def _larger(self, each: Candidate) -> float:
        """Bytes against the plain file's."""
        one, plain = self.bench.found(each, [0]), self.bench.found(self.tried[0], [0])
        return one.size / plain.size if one and plain else 1 + each.size

    def cost(self, each: Candidate) -> float:
        """Share of bytes beyond the plain file's, plus share of time: measured, or as many products take."""
        speed = self.relative_speed(each)
        slower = 1 / math.prod(speed.values()) ** (1 / len(speed)) - 1 if speed else each.work
        return self._larger(each) - 1 + slower

    def fits(self, each: Candidate) -> bool:
        """Whether the candidate keeps the limits of size and speed."""
        speed = self.relative_speed(each) or {"expected": 1 / (1 + each.work)}
        return self.relative_size(each) <= self.limits[0] and min(speed.values()) >= self.limits[1]

    def chosen(self) -> Candidate:
        """The most faithful candidate within the limits, of those that are known best."""
        known = self.points(self.depth)
        fitting = [each for each in self.tried if each.name in known and self.fits(each)]
        return min(fitting, key=lambda each: (known[each.name].kld, self.cost(each), each.name), default=self.given)
