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
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.convert import dynamic, gptq, mixed, quantize
from pipeline.convert.checkpoint import Checkpoint, open_checkpoint
from pipeline.convert.flatbuffer import Graph
from pipeline.core import chat, log, manifest, parallel, versions
from pipeline.core.errors import UsageError
from pipeline.core.recipe import PROJECT, Int4, Int8, Recipe
from pipeline.core.recipe import load as load_recipe
from pipeline.core.recipe import parse as parse_recipe
from pipeline.core.stage import common_parser, guard, locked, model_name
from pipeline.judge import corpus, metrics, runtime, tuning
from pipeline.judge.corpus import POSITIONS_PER_WINDOW, Tokens
from pipeline.models import build
from pipeline.search import candidates, groups, halving, rewrite
from pipeline.search.candidates import SPACES, Candidate, Contribution, Space
from pipeline.search.groups import Group, Layer

SCHEMA = 1
SHARDS, WINDOWS = 8, 2
"""Pieces of the text that a measurement is of, and windows in each."""
FINALISTS = 5
"""Candidates that see all shards, beside those that are there for comparison."""
_JUDGED = slice(1, -1)
"""Positions of a window: the first says the same in every window, the last predicts what is not there."""
_CONTRIBUTIONS, _CANDIDATES = 0.5, 0.9
"""The shares of the time by which contributions and candidates must be measured; speed gets the rest."""
_SEQUENCES, _ROUNDS = (1, 128), 7
_Logits = NDArray[np.float32]


@dataclass
class Clock:
    """The time that there is, in seconds; `longest` evaluation so far."""

    seconds: float
    started: float = field(default_factory=time.monotonic)
    longest: float = 0.0

    def left(self, share: float = 1.0) -> float:
        """Seconds until `share` of the time is over."""
        return self.started + share * self.seconds - time.monotonic()

    def open(self, share: float) -> bool:
        """Whether another evaluation fits in."""
        return self.left(share) > self.longest


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One candidate on some shards: figures per position, the block each is in, and the bytes of its file."""

    kld: metrics.Doubles
    top1: metrics.Doubles
    log_ratio: metrics.Doubles
    blocks: metrics.Indices
    size: int

    def facts(self) -> dict[str, Any]:
        """The figures with 95 % intervals; none where the file gives no numbers."""
        if not np.isfinite(self.kld).all():
            return {}
        draws = metrics.Draws.of(self.blocks)
        mean = partial(metrics.bootstrap, draws=draws)
        return {
            "positions": len(self.kld),
            "kld": asdict(mean(lambda means: means[..., 0], [self.kld])),
            "top1": asdict(mean(lambda means: means[..., 0], [self.top1])),
            "perplexity_ratio": asdict(mean(lambda means: np.exp(means[..., 0]), [self.log_ratio])),
        }


@dataclass(frozen=True, kw_only=True)
class Bench:
    """Where candidates are built and measured. `identity` of all that a measurement depends on but the candidate."""

    checkpoint: Checkpoint
    moments: gptq.Moments
    every: Path
    step: Path
    text: str
    windows: Tokens
    folder: Path
    clock: Clock
    identity: str
    space: Space
    building: threading.Lock = field(default_factory=threading.Lock)

    @property
    def shards(self) -> int:
        """How many there are; a text that is short has fewer."""
        return max(1, len(self.windows) // WINDOWS)

    @property
    def scratch(self) -> Path:
        """Files that are gone when tune ends."""
        return self.folder / "scratch"

    def rows(self, shard: int) -> range:
        """The windows of a shard, spread over the text as a whole."""
        return range(shard, len(self.windows), self.shards)

    @cached_property
    def references(self) -> list[Path]:
        """The fp32 file's logits [positions, V] of each window."""
        model = runtime.StepModel(self.write(None, self.every, "fp32"), threads=parallel.threads())
        files = []
        with log.progress("fp32", len(self.windows), "windows") as bar:
            for place, row in enumerate(self.windows):
                files.append(self.scratch / f"{place}.npy")
                np.save(files[-1], _logits(model, row))
                bar.advance()
        (self.scratch / "fp32.tflite").unlink()
        return files

    def section(self, candidate: Candidate) -> Int8 | Int4:
        """The section of the candidate's recipe that is searched."""
        text = rewrite.with_values(self.text, self.space.section, candidate.values)
        found: Int8 | Int4 = getattr(parse_recipe(text.encode(), candidate.name), self.space.section)
        return found

    def write(self, candidate: Candidate | None, source: Path, name: str) -> Path:
        """The graph `source` as the candidate, or in fp32, in the scratch folder; as stage int8 or int4 makes it."""
        with self.building:  # it uses all cores by itself
            graph = build.with_weights(self.checkpoint, source)
            section = self.section(candidate) if candidate else None
            if isinstance(section, Int8):
                dynamic.make(graph, section, self.moments)
            elif section:
                mixed.make(graph, section, self.moments)
            graph.prune()
            graph.write(self.scratch / f"{name}.tflite")
        return self.scratch / f"{name}.tflite"

    def record(self, candidate: Candidate, what: int | str) -> Path:
        """Where the measurement of a candidate on a shard is kept, or that of its "speed"."""
        rows = what if isinstance(what, str) else list(self.rows(what))
        key = json.dumps([self.identity, self.space.section, asdict(self.section(candidate)), rows], sort_keys=True)
        return self.folder / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"

    def measure(self, wanted: Iterable[tuple[Candidate, Sequence[int]]], share: float) -> None:
        """Measure candidates × shards, as far as they are not yet known and there is time.

        This map is the one seam between searching and measuring: the calls are independent of each other.
        """
        tasks = [(each, [s for s in shards if not self.record(each, s).is_file()]) for each, shards in wanted]
        tasks = [(each, missing) for each, missing in tasks if missing]
        if not tasks or not self.clock.open(share):
            return
        _ = self.references
        due = takewhile(lambda _: self.clock.open(share), tasks)
        for place, said in enumerate(parallel.ordered(lambda task: self.evaluate(*task), due), start=1):
            log.step(f"{place} of {len(tasks)}: {said}; {log.human_seconds(self.clock.left())} left")

    def evaluate(self, candidate: Candidate, shards: Sequence[int]) -> str:
        """Build the candidate, run the shards, keep what was found; the figures in words."""
        started = time.monotonic()
        file = self.write(candidate, self.every, self.record(candidate, shards[0]).stem)
        model = runtime.StepModel(file, threads=1)
        for shard in shards:
            scores = metrics.join([self._score(model, place) for place in self.rows(shard)])
            ratio = scores.nll - scores.reference_nll
            kept = {"kld": list(scores.kld), "top1": list(scores.top1), "log_ratio": list(ratio)}
            kept["size"] = [file.stat().st_size]
            manifest.write_atomically(self.record(candidate, shard), json.dumps(kept))
        file.unlink()
        self.clock.longest = max(self.clock.longest, time.monotonic() - started)
        return f"{candidate.name}: KLD {scores.kld.mean():.2e}, top-1 {scores.top1.mean():.1%}"

    def speed(self, candidate: Candidate, plain: Candidate) -> dict[str, list[float]]:
        """Seconds of one step of the plain candidate and of this one, by sequence length."""
        first = self.scratch / "plain.tflite"
        if not first.is_file():
            self.write(plain, self.step, first.stem)
        files, bos = [first, self.write(candidate, self.step, "other")], int(self.windows[0, 0])
        return {str(length): runtime.measure_in_turns(files, length, bos=bos, rounds=_ROUNDS) for length in _SEQUENCES}

    def _score(self, model: runtime.StepModel, place: int) -> metrics.Scores:
        targets = self.windows[place, 1:][_JUDGED.start :]
        return metrics.compare(
            np.load(self.references[place], mmap_mode="r"), _logits(model, self.windows[place]), targets
        )

    def found(self, candidate: Candidate, shards: Iterable[int]) -> Measured | None:
        """What is known of the candidate on all of `shards`; None if it is not all known."""
        records = [(self.record(candidate, shard), self.rows(shard)) for shard in shards]
        if not records or not all(file.is_file() for file, _ in records):
            return None
        kept = [json.loads(file.read_text(encoding="utf-8")) for file, _ in records]
        joined = {key: np.concatenate([np.asarray(one[key]) for one in kept]) for key in kept[0]}
        return Measured(
            kld=joined["kld"],
            top1=joined["top1"],
            log_ratio=joined["log_ratio"],
            blocks=np.concatenate([_blocks(place, self.windows.shape[1]) for _, rows in records for place in rows]),
            size=int(joined["size"][0]),
        )


def _logits(model: runtime.StepModel, row: Tokens) -> _Logits:
    """[positions, V] of one window."""
    return model.logits(row[None], np.ones_like(row)[None])[0, _JUDGED]


def _blocks(place: int, window: int) -> metrics.Indices:
    """The stretch of 16 tokens that each judged position of window `place` is in: what resampling draws."""
    positions: metrics.Indices = np.arange(window)[_JUDGED]
    return place * window + positions // POSITIONS_PER_WINDOW


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

        What turns out to be too large goes at once; the plain file, the given recipe and the unit of sizes stay.
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
            stay = {self.tried[0].name, self.given.name, self.unit.name}
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
            return {str(length): 1.0 for length in _SEQUENCES}
        return {str(length): taken[str(length)][0] / taken[str(length)][1] for length in _SEQUENCES} if taken else None

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
        "processor": runtime.processor(),
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
        moments=gptq.Moments(root / "moments"),
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
