"""plan: what the stages will make and need, from the checkpoint's headers alone, before anything large moves.

    make plan MODEL_ID=…

Says per stage the files and their sizes, peak memory and rough time, and refuses (exit code 10) what the disk or the
memory, the machine's or the container's, can't hold. Sizes follow from the configuration. Memory and time follow from
constants that were measured with the random checkpoints of `tools/make_random_checkpoint.py` on two cores (AMD EPYC,
2026-11-24, `make bench`): they are right to a factor of two, which is what a plan is for.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from pipeline.convert import gptq, intake
from pipeline.convert.checkpoint import CONFIG
from pipeline.core import log, manifest, memory
from pipeline.core.errors import PublishError, ResourceError
from pipeline.core.recipe import Graphs, Recipe
from pipeline.core.recipe import load as load_recipe
from pipeline.core.stage import common_parser, guard, model_name
from pipeline.judge import cache, corpus
from pipeline.models import architecture_for, expected, sizes
from pipeline.models.sizes import Weights
from pipeline.release.hub import Hub
from pipeline.release.licence import Claim, claimed, resolve

STAGES = ("fetch", "golden", "graph", "fp32", "fp16", "int8", "bundle", "verify", "publish")
_GIB = 1 << 30
_STEP = "step.tflite"
_DOWNLOAD = 50e6
"""Bytes per second of a download: a guess, nothing is measured beforehand."""
_HASH = 0.8e9
"""Bytes per second of reading and hashing a stage's inputs."""
_WRITE = 0.35e9
"""Bytes per second of writing a file of weights and hashing it, conversion included."""
_FLOPS = 5e10
"""Multiply-adds per second of a float32 forward in PyTorch on two cores, counted twice as is usual."""
_READ = 1.5e9
"""Parameters per second that golden lays out in float32 when it streams, and that a decoder reads per token."""


@dataclass(frozen=True, kw_only=True)
class Need:
    """What a stage makes and takes: bytes of all its files, of scratch and of anonymous memory, and seconds."""

    what: str
    size: int
    memory: float
    seconds: float
    scratch: int = 0


@dataclass(frozen=True, kw_only=True)
class Model:
    """A checkpoint, and what is to be made of it.

    `facts` as fetch records them; `download` the bytes to get (none of a local folder), `stored` those of its files;
    `shapes` of its tensors; `multiplied` the parameters that each token is multiplied with; `files` what each precision
    stores, by file.
    """

    facts: Mapping[str, Any]
    where: str
    licence: str
    download: int
    stored: int
    text: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...]]
    multiplied: int
    files: Mapping[str, Weights]
    recipe: Recipe
    graphs: Graphs

    def size(self, precision: str, *, sections: bool = False) -> int:
        """Bytes of all files of a precision, or of the bundle's sections alone."""
        return sum(held.bytes(precision) for name, held in self.files.items() if not sections or name != _STEP)

    @property
    def bundles(self) -> Sequence[str]:
        """Precisions that become bundles."""
        return self.recipe.bundle.precisions if self.graphs != "step" else ()

    @property
    def table(self) -> tuple[int, int]:
        """Tokens and width of the embedding table."""
        tokens, width = self.shapes["embed_tokens.weight"]
        return tokens, width

    @property
    def cache(self) -> int:
        """Bytes of one KV cache in float32."""
        return 0 if self.graphs == "step" else 4 * sizes.cached(self.shapes) * self.recipe.bundle.cache_length

    @property
    def conversation(self) -> int:
        """Tokens of each conversation through the cache."""
        script, _ = cache.scripts(self.recipe.bundle, int(self.text.get("sliding_window") or 0))
        return script.length


def fetch(model: Model) -> Need:
    """The download, and hashing it."""
    seconds = model.download / _DOWNLOAD + model.stored / _HASH
    return Need(what="checkpoint", size=model.download, memory=0.25 * _GIB, seconds=seconds)


def golden(model: Model) -> Need:
    """Forward passes in float32, in memory if that fits; greedy text and the cache read all weights per token."""
    recipe, bundle = model.recipe, model.recipe.bundle
    windows = max(1, recipe.corpus.positions // corpus.POSITIONS_PER_WINDOW)
    kept = windows * corpus.POSITIONS_PER_WINDOW
    tokens = 2 * windows * recipe.corpus.window  # some again, in another number of threads
    steps = recipe.corpus.continuation
    if model.graphs != "bundle":
        shapes = recipe.shapes
        rows = corpus.family_rows(corpus.shape_cases(shapes.batch, shapes.sequence, shapes.padding))
        tokens += sum(count * sequence for (sequence, _), count in rows.items())
    if model.graphs != "step":
        kept += 2 * (model.conversation + bundle.decode) + bundle.positions
        tokens += 4 * model.conversation + bundle.positions
        steps = max(steps, bundle.continuation) + bundle.decode
    parameters = int(model.facts["parameters"])
    streamed = memory.must_stream(parameters)
    return Need(
        what="Hugging Face in fp32, " + ("streamed" if streamed else "loaded"),
        size=4 * kept * model.table[1],
        memory=1.9 * _GIB if streamed else memory.of_reference(parameters),
        seconds=2 * model.multiplied * tokens / _FLOPS + steps * model.multiplied / _READ,
    )


def moments(model: Model) -> Need:
    """A forward pass over the calibration text; a square of each input's width, span by span."""
    recipe = model.recipe
    tokens = recipe.int8.calibration_samples * recipe.corpus.window
    widths = {(name.rsplit(".", 2)[0], shape[1]) for name, shape in model.shapes.items() if len(shape) == 2}
    size = sum(4 * width * gptq.span(width) for _, width in widths)
    return Need(
        what="second moments of what layers read",
        size=size,
        memory=1.9 * _GIB,
        seconds=(2 * model.multiplied * tokens + 2 * tokens * size / 4) / _FLOPS + size / _WRITE,
    )


def graph(model: Model) -> Need:
    """Export: a matter of layers and signatures, not of parameters."""
    layers = sum(held.graph_layers for held in model.files.values())
    size = sum(held.bytes("fp32") - 4 * held.elements for name, held in model.files.items() if held.graph_layers)
    return Need(
        what="graphs without matrices",
        size=size,
        memory=0.4 * _GIB + sizes.EXPORT_BYTES * layers,
        seconds=15 + sizes.EXPORT_SECONDS * layers,
    )


def _filled(model: Model, precision: str, *, sections: bool = True) -> Need:
    size = model.size(precision) if sections else model.files[_STEP].bytes(precision)
    seconds = 5 + (size + model.stored) / _WRITE
    taken = 0.45 * _GIB + 2 * model.cache  # each file is run once, with a cache in and a cache out
    return Need(what=" ".join(model.files if sections else [_STEP]), size=size, memory=taken, seconds=seconds)


def bundle(model: Model) -> Need:
    """The sections in one file each."""
    size = sum(model.size(precision, sections=True) for precision in model.bundles)
    what = " ".join(f"{precision}.litertlm" for precision in model.bundles)
    return Need(what=what, size=size, memory=0.3 * _GIB, seconds=5 + size / _WRITE)


def verify(model: Model) -> Need:
    """Each bundle speaks every position of the conversations and texts, then every prompt's continuation."""
    settings = model.recipe.bundle
    judged = 3 * settings.decode + settings.positions
    decoders = [model.files["decoder.tflite"].bytes(precision) for precision in model.bundles]
    spoken = judged + settings.prompts * settings.continuation
    seconds = 30.0 + len(decoders) * 3 * 2 * model.multiplied * model.conversation / _FLOPS
    seconds += sum(decoders) * (spoken / (4 * _READ) + 2 / _HASH)
    if model.graphs != "bundle":
        seconds += 2 * golden(model).seconds
    taken = 0.7 * _GIB + 6.5 * model.cache
    if model.graphs != "bundle":
        taken += 4 * model.multiplied  # XNNPACK packs a step graph's weights into memory
    logits = 4 * judged * model.table[0] * len(decoders)
    return Need(
        what="report.html", size=1 << 20, memory=taken, seconds=seconds, scratch=max(decoders, default=0) + logits
    )


def publish(model: Model) -> Need:
    """Links to the files."""
    size = sum(model.size(precision, sections=True) for precision in model.bundles)
    return Need(what="the folder to upload, by hard links", size=1 << 20, memory=0.1 * _GIB, seconds=5 + size / _HASH)


NEEDS: Mapping[str, Callable[[Model], Need]] = {
    "fetch": fetch,
    "golden": golden,
    "moments": moments,
    "graph": graph,
    "fp32": partial(_filled, precision="fp32"),
    "fp16": partial(_filled, precision="fp16"),
    "int8": partial(_filled, precision="int8"),
    "int4": partial(_filled, precision="int4"),
    "int8-static": partial(_filled, precision="int8", sections=False),
    "int8-static16": partial(_filled, precision="int8", sections=False),
    "int8-dynamic": partial(_filled, precision="int8", sections=False),
    "bundle": bundle,
    "verify": verify,
    "publish": publish,
}


def look(arguments: argparse.Namespace, recipe: Recipe) -> Model:
    """Read the headers of the checkpoint that the arguments name.

    Raises:
        FetchError, IntegrityError, UsageError: as fetch would.
    """
    source, kept, where = _source(arguments)
    chosen = intake.plan(source, partial(expected, recipe))
    config = source.json(CONFIG)
    architecture = architecture_for(config)
    graphs = arguments.graphs or recipe.graphs
    stored = sum(source.sizes[name] for name in chosen.names)
    return Model(
        facts=chosen.facts,
        where=where,
        licence=_licence(source, Path(arguments.model_id).name, str(config["model_type"])),
        download=0 if kept else stored,
        stored=stored,
        text=config.get("text_config", config),
        shapes=architecture.tensors(config),
        multiplied=sizes.multiplied(architecture, config),
        files=sizes.of_files(architecture, config, len(recipe.bundle.prefill), graphs),
        recipe=recipe,
        graphs=graphs,
    )


def _source(arguments: argparse.Namespace) -> tuple[intake.Source, bool, str]:
    """Where the checkpoint lies, whether that is a folder here, and in words."""
    folder = Path(arguments.model_id)
    if folder.is_dir():
        return intake.Source.of_folder(folder), True, "local folder"
    hub = Hub()
    found = hub.resolve(arguments.model_id, arguments.revision)
    sizes_ = {name: file.size for name, file in found.files.items() if "/" not in name}
    where = f"{hub.endpoint}/{found.model_id}"
    source = intake.Source(where=where, sizes=sizes_, read=partial(hub.read, found))
    return source, False, f"{where} at {found.revision}, accessible"


def _licence(source: intake.Source, name: str, model_type: str) -> str:
    """The licence, or why publish would refuse."""
    size = source.sizes.get("README.md", 0)
    said = claimed(source.read("README.md", 0, size).decode("utf-8", errors="replace") if size else "")
    try:
        return resolve(Claim(model=name, model_type=model_type, **vars(said))).name
    except PublishError as error:
        return f"none that publish accepts ({error})"


def work(arguments: argparse.Namespace) -> None:
    """Print the plan.

    Raises:
        ResourceError: the disk or the memory is too small for it.
    """
    recipe = load_recipe(arguments.recipe)
    model = look(arguments, recipe)
    root = arguments.artifacts / model_name(arguments.model_id)
    needs = {name: NEEDS[name](model) for name in arguments.stages}
    done = {name for name in needs if (root / name / manifest.NAME).is_file()}
    facts = model.facts
    log.line(f"plan · {root.name} · {model.where}")
    log.line(
        f"  {facts['model_type']}, {facts['parameters'] / 1e6:,.0f} M parameters in {facts['dtype']}, "
        f"{facts['shards']} weight files, {log.human_bytes(model.stored)}; licence: {model.licence}"
    )
    for row in _table(needs, done):
        log.line(f"  {row}")
    _check([need for name, need in needs.items() if name not in done], root)


def _check(needs: Sequence[Need], root: Path) -> None:
    """Hold what is still to be done against the machine.

    Raises:
        ResourceError: the disk or the memory is too small.
    """
    disk = sum(need.size for need in needs) + max((need.scratch for need in needs), default=0)
    most = int(max((need.memory for need in needs), default=0))
    free_disk, free_memory = shutil.disk_usage(_existing(root)).free, memory.available()
    left = log.human_bytes(free_memory) if free_memory is not None else "unknown"
    log.line(
        f"  in all: {log.human_bytes(disk)} of disk ({log.human_bytes(free_disk)} free), {log.human_bytes(most)} of "
        f"memory ({left} free), about {log.human_seconds(sum(need.seconds for need in needs))} on two cores"
    )
    if disk > free_disk:
        raise ResourceError(
            f"this needs {log.human_bytes(disk)} of disk, {log.human_bytes(free_disk)} are free",
            cause="every file that is made stays until `make clean`",
            remedy="free some, set ARTIFACTS= to a folder on another disk, or build less (GRAPHS=bundle, `make int8`)",
        )
    memory.require(most, "the largest stage", "use a larger machine")


def _existing(folder: Path) -> Path:
    """`folder`, or the innermost of those around it that exists."""
    return next(each for each in (folder.absolute(), *folder.absolute().parents) if each.is_dir())


def _table(needs: Mapping[str, Need], done: set[str]) -> list[str]:
    rows = [f"{'stage':<13}{'disk':>9}{'scratch':>9}{'memory':>9}{'about':>14}  makes"]
    for name, need in needs.items():
        sizes_ = (log.human_bytes(size) if size else "–" for size in (need.size, need.scratch, need.memory))
        about = "done" if name in done else log.human_seconds(need.seconds)
        rows.append(f"{name:<13}" + "".join(f"{size:>9}" for size in sizes_) + f"{about:>14}  {need.what}")
    return rows


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = common_parser("plan", "Say what the stages will make and need, from the checkpoint's headers alone.")
    made.add_argument("--revision", default="", help="branch, tag or commit on the Hub (default: the main branch)")
    made.add_argument(
        "--stages", nargs="*", choices=tuple(NEEDS), default=list(STAGES), help="those to plan (default: %(default)s)"
    )
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Run from the command line and return the exit code."""
    arguments = parser().parse_args(argv)
    return guard(lambda: work(arguments))


if __name__ == "__main__":
    sys.exit(main())
