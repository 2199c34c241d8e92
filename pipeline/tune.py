"""tune: what int8 costs where, and a recipe with better values in its [int8] section; the same for [int4].

    make tune MODEL_ID=… RECIPE=… [MINUTES=30] [SECTION=int4]

Three things are measured, all in LiteRT on the recipe's calibration text, as KL(fp32 file || candidate) at every
position of whole windows:

1. what costs nothing at run time, and with the best of it what each group of layers contributes, its weights and its
   activations: int8 in that group alone, or 4 bits in it and 8 elsewhere;
2. candidates on a greedy path from plain int8, or 4 bits everywhere, by gain for cost; half of them go on to twice as
   much text, until few are left, which see all of it;
3. size and speed of these, against the plain file, in turns.

The most faithful one within `--size` and `--speed` becomes `tune/recipe.toml`, which `make int8 RECIPE=` takes as it
is, or `tune-int4/recipe.toml` for `make int4`; `report.json` and `report.html` beside it hold all figures. Every
measurement is kept in `.tune/`, so that the same command goes on after Ctrl-C, a kill or the end of MINUTES.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import shutil
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from pipeline.checkpoint import chat
from pipeline.checkpoint.reader import open_checkpoint
from pipeline.core import log, manifest, parallel, versions
from pipeline.core.errors import UsageError
from pipeline.core.recipe import PROJECT, Recipe
from pipeline.core.recipe import load as load_recipe
from pipeline.core.recipe import parse as parse_recipe
from pipeline.core.stage import common_parser, guard, locked, model_name
from pipeline.judge import corpus
from pipeline.judge.corpus import Tokens
from pipeline.models import build
from pipeline.quantize import gptq
from pipeline.quantize import rows as quantize
from pipeline.report import tuning
from pipeline.runtime import litert
from pipeline.search import candidates, groups, halving, rewrite
from pipeline.search.bench import SEQUENCES, WINDOWS, Bench, Clock
from pipeline.search.candidates import SPACES, Candidate, Contribution, Space
from pipeline.search.groups import Group, Layer
from pipeline.tflite.graph import Graph

SCHEMA = 1
SHARDS = 8
"""Pieces of the text that measurements are of."""
FINALISTS = 5
"""Candidates that see all shards, beside those that are there for comparison."""
_CONTRIBUTIONS, _CANDIDATES = 0.5, 0.9
"""The shares of the time by which contributions and candidates must be measured; speed gets the rest."""


# --- the search


@dataclass(kw_only=True)
class Study:
    """What a tune knows so far; all that race have been measured on `depth` shards."""

    bench: Bench
    groups: list[Group]
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
        path = candidates.path(self.first, self.groups, self.contributions, most, self.space)
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
        log.step(f"contributions of {len(self.groups)} groups")
        ordered = sorted(self.groups, key=lambda each: -each.elements)
        alone = {each.name: candidates.alone(each, self.groups, self.first, self.space) for each in ordered}
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
        self.bench.measure([(heard, [0]) for _, heard in starts], _CONTRIBUTIONS)
        known = [self.bench.found(heard, [0]) for _, heard in starts]
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
        names, shards = [each.name for each in self.tried], 1
        while True:
            racing = [each for each in self.tried if each.name in names]
            self.bench.measure([(each, range(shards)) for each in racing], _CANDIDATES)
            known = {name: point for name, point in self.points(shards).items() if name in names}
            if len(known) < len(names):  # time is over
                return
            self.depth = shards
            if shards == self.bench.shards:
                return
            small = {each.name for each in racing if self.relative_size(each) <= self.limits[0]}
            known = {name: point for name, point in known.items() if name in small}
            fitting = [each.name for each in racing if each.name in known and self.fits(each)]
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


# --- what comes out


def report(study: Study, recipe: Recipe, arguments: argparse.Namespace) -> dict[str, Any]:
    """Everything that was measured, as JSON."""
    bench, depth, chosen = study.bench, study.depth, study.chosen()
    points = study.points(depth)
    return {
        "schema": SCHEMA,
        "model": model_name(arguments.model_id),
        "recipe": recipe.name,
        "section": study.space.section,
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "tools": versions.installed(),
        "processor": litert.processor(),
        "threads": parallel.threads(),
        "minutes": arguments.minutes,
        "seconds": round(bench.clock.seconds - bench.clock.left()),
        "complete": depth == bench.shards and bool(study.speeds),
        "limits": {"size": study.limits[0], "speed": study.limits[1]},
        "knobs": [asdict(knob) for knob in study.space.knobs],
        "text": {"windows": len(bench.windows), "window": bench.windows.shape[1], "shards": bench.shards},
        "groups": [_group_facts(study, each) for each in study.groups],
        "frontier": halving.frontier(points),
        "chosen": chosen.name,
        "candidates": [_candidate_facts(study, each, depth) for each in study.tried],
    }


def _group_facts(study: Study, group: Group) -> dict[str, Any]:
    found = study.contributions.get(group.name)
    return {**asdict(group), "weights": found and found.weights, "activations": found and found.activations}


def _candidate_facts(study: Study, each: Candidate, depth: int) -> dict[str, Any]:
    shards = next((n for n in range(study.bench.shards, 0, -1) if study.bench.found(each, range(n))), 0)
    measured = study.bench.found(each, range(shards))
    facts = measured.facts() if measured else {}
    return {
        "name": each.name,
        "values": dict(each.values),
        "shards": shards,
        "finalist": shards >= depth and bool(facts),
        "size": measured and measured.size,
        "relative_size": study.relative_size(each),
        "speed": study.relative_speed(each),
        "seconds": study.speeds.get(each.name),
        "cost": study.cost(each),
        **facts,
    }


def comment(told: dict[str, Any]) -> list[str]:
    """What the written recipe says of itself."""
    rows = {row["name"]: row for row in told["candidates"]}
    tools = ", ".join(f"{name} {told['tools'][name]}" for name in ("ai-edge-litert",) if name in told["tools"])
    lines = [f"{told['date']}, {told['model']}, {tools}; KLD against fp32 with its 95 % interval, on calibration text"]
    for name in dict.fromkeys((told["candidates"][0]["name"], told["chosen"])):
        row = rows.get(name, {})
        if "kld" in row:
            lines.append(f"{name}: {tuning.sentence(row)}")
    return lines


def write(study: Study, recipe: Recipe, arguments: argparse.Namespace, folder: Path) -> None:
    """Write the recipe of the best candidate so far, and the report."""
    if not any(study.bench.found(each, [0]) for each in study.tried):
        log.warn("nothing is measured yet, so there is no recipe: give it more MINUTES=")
        return
    folder.mkdir(parents=True, exist_ok=True)
    told = report(study, recipe, arguments)
    made = rewrite.with_values(study.bench.text, study.space.section, study.chosen().values, comment(told))
    parse_recipe(made.encode(), "the tuned recipe")
    manifest.write_atomically(folder / "recipe.toml", made)
    manifest.write_atomically(folder / "report.json", manifest.dump_json(told))
    manifest.write_atomically(folder / "report.html", tuning.render(told))
    for row in tuning.table(told):
        log.line(f"  {row}")
    log.line(f"recipe: {folder / 'recipe.toml'}")


# --- getting ready


def work(arguments: argparse.Namespace) -> None:
    """Search, and write what was found, also when time ends or someone stops it.

    Raises:
        UsageError: the recipe has no such section, its scheme is not dynamic, or a text can't be read.
        IntegrityError: stages fetch, graph or moments are not finished, or were changed.
    """
    recipe, clock, space = load_recipe(arguments.recipe), Clock(60 * arguments.minutes), SPACES[arguments.section]
    section = getattr(recipe, space.section)
    if section is None:
        raise UsageError(
            f"recipe {recipe.name} has no [int4] section", remedy="add one, as in pipeline/recipes/gemma3.toml"
        )
    if space.section == "int8" and recipe.int8.scheme != "dynamic":
        raise UsageError("tune searches dynamic int8, the recipe's scheme is static", remedy='say scheme = "dynamic"')
    root = arguments.artifacts / model_name(arguments.model_id)
    with locked(root, "tune"):
        bench = _bench(arguments, recipe, root, clock, space)
        try:
            layers = _layers(Graph.read(bench.every))
            values = {knob.key: _plain(getattr(section, knob.key)) for knob in space.knobs}
            study = Study(
                bench=bench,
                groups=groups.group(layers, arguments.parts or space.parts),
                layers=layers,
                given=candidates.priced("the given recipe", values, layers, space),
                limits=(arguments.size or space.most, arguments.speed),
            )
            try:
                study.run()
            finally:  # also when it is interrupted
                write(study, recipe, arguments, root / ("tune" if space.section == "int8" else f"tune-{space.section}"))
        finally:
            shutil.rmtree(bench.scratch)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _bench(arguments: argparse.Namespace, recipe: Recipe, root: Path, clock: Clock, space: Space) -> Bench:
    """Check what is read, export the graph that is measured on, and cut the text."""
    upstream = {name: manifest.read(root / name) for name in ("fetch", "graph", "moments")}
    manifest.check([record for made in upstream.values() for record in made.outputs], root)
    checkpoint = open_checkpoint(root / "fetch" / "checkpoint")
    windows = _windows(arguments, recipe, root / "fetch" / "checkpoint")
    folder = root / ".tune"
    shutil.rmtree(folder / "scratch", ignore_errors=True)
    (folder / "scratch").mkdir(parents=True)
    source = _sources()
    every = folder / f"every-{source[:16]}-{windows.shape[1]}.tflite"
    if not every.is_file():
        build.export_every(checkpoint, windows.shape[1], folder / "scratch" / every.name)
        (folder / "scratch" / every.name).replace(every)
    read = [record.sha256 for name in ("fetch", "moments") for record in upstream[name].outputs]
    identity = [source, hashlib.sha256(windows.tobytes()).hexdigest(), read, versions.installed()]
    return Bench(
        checkpoint=checkpoint,
        hessians=gptq.Hessians(root / "moments"),
        every=every,
        step=build.graph_files(upstream["graph"], root, "step")[build.STEP],
        text=arguments.recipe.read_text(encoding="utf-8"),
        windows=windows,
        folder=folder,
        clock=clock,
        space=space,
        identity=hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest(),
    )


def _sources() -> str:
    """What is measured changes with the code that makes it."""
    rooms = ("convert", "models")
    files = sorted(file for room in rooms for file in (PROJECT / "pipeline" / room).rglob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def _windows(arguments: argparse.Namespace, recipe: Recipe, checkpoint: Path) -> Tokens:
    """Windows of the calibration text, spread evenly: not of the text that verify judges on."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(checkpoint, local_files_only=True)
    text = arguments.calibration or PROJECT / recipe.corpus.calibration
    documents = corpus.read_documents(text, partial(chat.render, tokenizer, where=str(text)))
    return corpus.pack_windows(
        documents,
        lambda document: tokenizer.encode(document, add_special_tokens=False),
        bos=int(tokenizer.bos_token_id),
        window=recipe.corpus.window,
        limit=SHARDS * WINDOWS,
    )


def _layers(graph: Graph) -> list[Layer]:
    """Every operator that the stages would give int8 weights."""
    found = []
    for operator in graph.operators():
        code, weight = graph.code(operator), int(operator.inputs[1]) if len(operator.inputs) > 1 else -1
        if code not in (quantize.LINEAR, quantize.LOOKUP) or weight < 0:
            continue
        elements = math.prod(graph.shape(weight))
        found.append(
            Layer(
                name=graph.operator_name(operator),
                reads=int(operator.inputs[0]) if code == quantize.LINEAR else -1 - weight,
                weight=weight,
                elements=elements,
                products=elements if code == quantize.LINEAR else 0,
            )
        )
    return found


def _arguments() -> argparse.ArgumentParser:
    parser = common_parser("tune", "Measure what fewer bits cost where, and write a recipe with a better section.")
    parser.add_argument("--section", choices=SPACES, default="int8", help="what is searched (default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=30.0, help="the time to search in (default: %(default)s)")
    parser.add_argument("--calibration", type=Path, metavar="FILE", help="your own text to tune on: .txt or .jsonl")
    sizes, parts = (
        ", ".join(f"{space.section} {getattr(space, key)}" for space in SPACES.values()) for key in ("most", "parts")
    )
    parser.add_argument("--size", type=float, help=f"largest file, of plain int8 (default: {sizes})")
    parser.add_argument(
        "--speed", type=float, default=0.5, help="least tokens/s, of the plain file (default: %(default)s)"
    )
    parser.add_argument("--parts", type=int, help=f"stretches that a kind is cut into (default: {parts})")
    return parser


if __name__ == "__main__":
    sys.exit(guard(lambda: work(_arguments().parse_args())))
