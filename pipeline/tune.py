"""tune: what int8 costs where, and a recipe with better values in its [int8] section.

    make tune MODEL_ID=… RECIPE=… [MINUTES=30]

Three things are measured, all in LiteRT on the recipe's calibration text, as KL(fp32 file || candidate) at every
position of whole windows:

1. what each group of layers contributes, its weights and its activations: int8 in that group alone;
2. candidates on a greedy path from plain int8, with the best of what costs nothing at run time, by gain for cost; half
   of them go on to twice as much text, until few are left, which see all of it;
3. size and speed of these, against the plain file, in turns.

The most faithful one within `--size` and `--speed` becomes `tune/recipe.toml`, which `make int8 RECIPE=` takes as it
is; `tune/report.json` and `report.html` hold all figures. Every measurement is kept in `.tune/`, so that the same
command goes on after Ctrl-C, a kill or the end of MINUTES.
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

from pipeline.convert import dynamic, gptq, quantize
from pipeline.convert.checkpoint import Checkpoint, open_checkpoint
from pipeline.convert.flatbuffer import Graph
from pipeline.core import chat, log, manifest, parallel, versions
from pipeline.core.errors import UsageError
from pipeline.core.recipe import PROJECT, Int8, Recipe
from pipeline.core.recipe import load as load_recipe
from pipeline.core.recipe import parse as parse_recipe
from pipeline.core.stage import common_parser, guard, locked, model_name
from pipeline.judge import corpus, metrics, runtime, tuning
from pipeline.judge.corpus import POSITIONS_PER_WINDOW, Tokens
from pipeline.models import build
from pipeline.search import candidates, groups, halving, rewrite
from pipeline.search.candidates import KNOBS, Candidate, Contribution
from pipeline.search.groups import Group, Layer

SCHEMA = 1
SHARDS, WINDOWS = 8, 2
"""Pieces of the text that a measurement is of, and windows in each."""
FINALISTS = 5
"""Candidates that see all shards, beside plain int8 and the recipe as given."""
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

    def int8(self, candidate: Candidate) -> Int8:
        """The [int8] section of the candidate's recipe."""
        return parse_recipe(rewrite.with_values(self.text, candidate.values).encode(), candidate.name).int8

    def write(self, candidate: Candidate | None, source: Path, name: str) -> Path:
        """The graph `source` as the candidate, or in fp32, in the scratch folder; as stage int8 makes it."""
        with self.building:  # it uses all cores by itself
            graph = build.with_weights(self.checkpoint, source)
            if candidate:
                dynamic.make(graph, self.int8(candidate), self.moments)
            graph.prune()
            graph.write(self.scratch / f"{name}.tflite")
        return self.scratch / f"{name}.tflite"

    def record(self, candidate: Candidate, what: int | str) -> Path:
        """Where the measurement of a candidate on a shard is kept, or that of its "speed"."""
        rows = what if isinstance(what, str) else list(self.rows(what))
        key = json.dumps([self.identity, asdict(self.int8(candidate)), rows], sort_keys=True)
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
    given: Candidate
    limits: tuple[float, float]
    contributions: dict[str, Contribution] = field(default_factory=dict)
    tried: list[Candidate] = field(default_factory=list)
    speeds: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    depth: int = 1

    def run(self) -> None:
        """Contributions, candidates, speeds."""
        self.tried = [candidates.plain(), self.given]
        self.bench.measure([(each, [0]) for each in self.tried], _CONTRIBUTIONS)
        self.contribute()
        self.tried = self._distinct([self.tried[0], self.given, *self._path()])
        log.step(f"{len(self.tried)} candidates")
        self.race()
        self.time()

    def contribute(self) -> None:
        """Measure every group alone, the large ones first."""
        log.step(f"contributions of {len(self.groups)} groups")
        ordered = sorted(self.groups, key=lambda each: -each.elements)
        alone = {each.name: [candidates.alone(each, self.groups, rows) for rows in (2, 1)] for each in ordered}
        self.bench.measure([(one, [0]) for pair in alone.values() for one in pair], _CONTRIBUTIONS)
        for name, pair in alone.items():
            two, one = (self.bench.found(each, [0]) for each in pair)
            if two and one:
                weights = float(two.kld.mean())
                self.contributions[name] = Contribution(weights=weights, activations=float(one.kld.mean()) - weights)

    def _path(self) -> list[Candidate]:
        """What is free for the whole model, and the path from the best of it on."""
        starts = candidates.starts()
        self.bench.measure([(candidates.quiet(each), [0]) for each in starts], _CONTRIBUTIONS)
        known = {each.name: one for each in starts if (one := self.bench.found(candidates.quiet(each), [0]))}
        first = min(starts, key=lambda each: float(known[each.name].kld.mean()) if each.name in known else math.inf)
        return candidates.path(first, self.groups, self.contributions, self.limits[0])

    def _distinct(self, tried: Iterable[Candidate]) -> list[Candidate]:
        """Each set of values once."""
        made: dict[str, Candidate] = {}
        for each in tried:
            made.setdefault(repr(self.bench.int8(each)), each)
        return list(made.values())

    def race(self) -> None:
        """Successive halving: fewer candidates on more text, until all that are left have seen all of it.

        What turns out to be too large goes at once; plain int8 and the given recipe stay.
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
            kept = {self.tried[0].name, self.given.name, *halving.better_half(known, FINALISTS)}
            names = [name for name in names if name in kept]
            shards = self.bench.shards if len(names) <= FINALISTS + 2 else min(2 * shards, self.bench.shards)

    def points(self, shards: int) -> dict[str, halving.Point]:
        """Cost and KLD of every candidate that is known on `shards` shards."""
        found = {each.name: (each, self.bench.found(each, range(shards))) for each in self.tried}
        return {
            name: halving.Point(self.cost(each), float(one.kld.mean())) for name, (each, one) in found.items() if one
        }

    def time(self) -> None:
        """Time the finalists against plain int8, on the step graph itself."""
        known = self.points(self.depth)
        for each in (each for each in self.tried[1:] if each.name in known):
            record = self.bench.record(each, "speed")
            if not record.is_file() and self.bench.clock.left() > 0:
                log.step(f"speed of {each.name}; {log.human_seconds(self.bench.clock.left())} left")
                manifest.write_atomically(record, json.dumps(self.bench.speed(each, self.tried[0])))
            if record.is_file():
                self.speeds[each.name] = json.loads(record.read_text(encoding="utf-8"))

    def relative_speed(self, each: Candidate) -> dict[str, float] | None:
        """Tokens a second against plain int8, by sequence length."""
        taken = self.speeds.get(each.name)
        if each is self.tried[0]:
            return {str(length): 1.0 for length in _SEQUENCES}
        return {str(length): taken[str(length)][0] / taken[str(length)][1] for length in _SEQUENCES} if taken else None

    def relative_size(self, each: Candidate) -> float:
        """Bytes against plain int8."""
        one, plain = self.bench.found(each, [0]), self.bench.found(self.tried[0], [0])
        return one.size / plain.size if one and plain else 1 + each.size

    def cost(self, each: Candidate) -> float:
        """Share of bytes beyond the plain file's, plus share of time: measured, or as many products take."""
        speed = self.relative_speed(each)
        slower = 1 / math.prod(speed.values()) ** (1 / len(speed)) - 1 if speed else each.work
        return self.relative_size(each) - 1 + slower

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
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "tools": versions.installed(),
        "processor": runtime.processor(),
        "threads": parallel.threads(),
        "minutes": arguments.minutes,
        "seconds": round(bench.clock.seconds - bench.clock.left()),
        "complete": depth == bench.shards and bool(study.speeds),
        "limits": {"size": study.limits[0], "speed": study.limits[1]},
        "knobs": [asdict(knob) for knob in KNOBS],
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
    made = rewrite.with_values(study.bench.text, study.chosen().values, comment(told))
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
        UsageError: the recipe's scheme is not dynamic, or a text can't be read.
        IntegrityError: stages fetch, graph or moments are not finished, or were changed.
    """
    recipe, clock = load_recipe(arguments.recipe), Clock(60 * arguments.minutes)
    if recipe.int8.scheme != "dynamic":
        raise UsageError("tune searches dynamic int8, the recipe's scheme is static", remedy='say scheme = "dynamic"')
    root = arguments.artifacts / model_name(arguments.model_id)
    with locked(root, "tune"):
        bench = _bench(arguments, recipe, root, clock)
        try:
            layers = _layers(Graph.read(bench.every))
            values = {knob.key: _plain(getattr(recipe.int8, knob.key)) for knob in KNOBS}
            study = Study(
                bench=bench,
                groups=groups.group(layers, arguments.parts),
                given=candidates.priced("the given recipe", values, layers),
                limits=(arguments.size, arguments.speed),
            )
            try:
                study.run()
            finally:  # also when it is interrupted
                write(study, recipe, arguments, root / "tune")
        finally:
            shutil.rmtree(bench.scratch)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _bench(arguments: argparse.Namespace, recipe: Recipe, root: Path, clock: Clock) -> Bench:
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
    """Every operator that stage int8 would give int8 weights."""
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
    parser = common_parser("tune", "Measure what int8 costs where, and write a recipe with a better [int8] section.")
    parser.add_argument("--minutes", type=float, default=30.0, help="the time to search in (default: %(default)s)")
    parser.add_argument("--calibration", type=Path, metavar="FILE", help="your own text to tune on: .txt or .jsonl")
    parser.add_argument("--size", type=float, default=1.08, help="largest file, of plain int8 (default: %(default)s)")
    parser.add_argument("--speed", type=float, default=0.5, help="least tokens/s, of plain int8 (default: %(default)s)")
    parser.add_argument("--parts", type=int, default=2, help="stretches that a kind is cut into (default: %(default)s)")
    return parser


if __name__ == "__main__":
    sys.exit(guard(lambda: work(_arguments().parse_args())))
