"""What a study found, as JSON: `report.json` of tune."""

from __future__ import annotations

import time
from dataclasses import asdict

from pipeline.core import host, parallel, versions
from pipeline.core.recipe import Recipe
from pipeline.search import halving
from pipeline.search.candidates import Candidate
from pipeline.search.groups import Group
from pipeline.search.study import Study

SCHEMA = 1


def report(study: Study, recipe: Recipe, model: str, minutes: float) -> dict[str, object]:
    """Everything that was measured of `model`, the name of its folder, in a search that was given `minutes`."""
    bench, depth, chosen = study.bench, study.depth, study.chosen()
    points = study.points(depth)
    return {
        "schema": SCHEMA,
        "model": model,
        "recipe": recipe.name,
        "section": study.space.section,
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "tools": versions.installed(),
        "processor": host.processor(),
        "threads": parallel.threads(),
        "minutes": minutes,
        "seconds": round(bench.clock.seconds - bench.clock.left()),
        "complete": depth == bench.shards and bool(study.speeds),
        "limits": {"size": study.limits[0], "speed": study.limits[1]},
        "knobs": [asdict(knob) for knob in study.space.knobs],
        "text": {"windows": len(bench.windows), "window": bench.windows.shape[1], "shards": bench.shards},
        "groups": [_group_facts(study, each) for each in study.layer_groups],
        "frontier": halving.frontier(points),
        "chosen": chosen.name,
        "candidates": [_candidate_facts(study, each, depth) for each in study.tried],
    }


def _group_facts(study: Study, group: Group) -> dict[str, object]:
    found = study.contributions.get(group.name)
    return {**asdict(group), "weights": found and found.weights, "activations": found and found.activations}


def _candidate_facts(study: Study, candidate: Candidate, depth: int) -> dict[str, object]:
    shards = next((n for n in range(study.bench.shards, 0, -1) if study.bench.found(candidate, range(n))), 0)
    measured = study.bench.found(candidate, range(shards))
    facts = measured.facts() if measured else {}
    return {
        "name": candidate.name,
        "values": dict(candidate.values),
        "shards": shards,
        "finalist": shards >= depth and bool(facts),
        "size": measured and measured.size,
        "relative_size": study.relative_size(candidate),
        "speed": study.relative_speed(candidate),
        "seconds": study.speeds.get(candidate.name),
        "cost": study.cost(candidate),
        **facts,
    }
