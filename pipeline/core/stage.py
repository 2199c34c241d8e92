"""What is the same for every stage: arguments, checked inputs, a clean folder, the manifest last, exit codes.

A stage is a function from a `Context` to an `Outcome`. It reads the folders of the stages it needs and writes only
its own; `main` does the rest:

1. check every input file against its manifest;
2. clear the stage's own folder, so that nothing of an interrupted run survives;
3. run the stage;
4. hash what it wrote, write `run.json` (time, memory: differs from run to run) and, last and by rename,
   `manifest.json` (identical from run to run).
"""

from __future__ import annotations

import errno
import fcntl
import os
import platform
import shutil
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from pipeline.core import facts, graph, host, log, manifest, process, records, versions
from pipeline.core.errors import PipelineError, ResourceError
from pipeline.core.graph import Towers
from pipeline.core.manifest import Fact, Manifest, Source
from pipeline.core.options import Options, add_to, of, parser_of
from pipeline.core.recipe import DEFAULT, PROJECT, Graphs, Recipe, chosen
from pipeline.core.recipe import load as load_recipe
from pipeline.core.records import Record

DEFAULT_MODEL = "examples/tiny-gemma3n"
DEFAULT_RECIPE = str(DEFAULT.relative_to(PROJECT))
INTERRUPTED = 130
_INTERRUPTED_TEXT = "interrupted: nothing finished is lost, the same command goes on from here"
_PATIENCE = 5.0
"""Seconds that an interrupted stage has to end by itself."""
_NOT_OUTPUTS = (manifest.NAME, "run.json")
Chosen = TypeVar("Chosen", bound=Options)


@dataclass(frozen=True, kw_only=True)
class Common:
    """What all stages may be told, and every command about a model: which, where its results lie, and how."""

    model_id: str = field(default=DEFAULT_MODEL, metadata={"help": "Hub id or folder (default: %(default)s)"})
    artifacts: Path = field(default=Path("artifacts"), metadata={"help": "output root (default: %(default)s)"})
    recipe: Path | None = field(
        default=None, metadata={"help": "recipe (default: the shipped one for the checkpoint's model type)"}
    )
    graphs: Graphs | None = field(default=None, metadata={"help": "what to build (default: the recipe's)"})
    towers: Towers = field(
        default="none", metadata={"help": "what the bundles hear or see by, beside text (default: %(default)s)"}
    )

    @property
    def root(self) -> Path:
        """The model's artefact folder.

        Raises:
            UsageError: the checkpoint lies in it.
        """
        return graph.model_root(self.artifacts, self.model_id)

    @property
    def recipe_file(self) -> Path:
        """The recipe that was named, else the one for the checkpoint's model type."""
        return chosen(self.recipe, self.model_id, self.root)


@dataclass(frozen=True, kw_only=True)
class Context:
    """What a stage gets: its own `folder` (empty), the model's `root`, and the manifests of the stages it needs.

    `graphs` says which are built and judged: the step graph, the bundle's sections, or both; `towers` which of the
    model's are taken. `known` are the hashes of
    files that were read before.
    """

    options: Options
    model_id: str
    root: Path
    folder: Path
    recipe: Recipe
    graphs: Graphs
    towers: Towers
    upstream: Mapping[str, Manifest]
    known: manifest.Known

    @property
    def bundled(self) -> tuple[str, ...]:
        """The precisions that there is a bundle of: an optional one may have been left out."""
        made = self.upstream["bundle"].facts if "bundle" in self.upstream else {}
        return tuple(name for name in self.recipe.bundle.built if name in made)

    @property
    def moments_device(self) -> str:
        """What computed the moments that this stage rounds by; the CPU where there are none."""
        return self.upstream["moments"].told(facts.Moments).device if "moments" in self.upstream else "cpu"

    def chosen(self, kind: type[Chosen]) -> Chosen:
        """The options, which are those of the stage itself."""
        assert isinstance(self.options, kind)
        return self.options


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a stage found: a dataclass of core/facts.py, or several by name.

    `model` and `revision` are set by fetch alone; later stages inherit them.
    """

    facts: Record | Mapping[str, Record | Fact] = field(default_factory=dict)
    model: str = ""
    revision: str = ""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage: `name` is its folder, and stands in `graph.STAGES` with what it reads.

    `needs_of` says what it reads, by the model's folder and its options, where that is known at run time alone
    (publish goes by what verify read).
    `after` runs once the manifest is written: the place to remove what a killed run would have gone on from.
    `measured` are files, by path in the stage's folder, that hold timings: they differ from run to run, so the manifest
    does not list them.
    """

    name: str
    summary: str
    work: Callable[[Context], Outcome]
    options: type[Options] = Options
    needs_of: Callable[[Path, Options], tuple[str, ...]] | None = None
    after: Callable[[Context], None] | None = None
    measured: tuple[str, ...] = ()


def main(stage: Stage, argv: Sequence[str] | None = None) -> int:
    """Run `stage` from the command line and return its exit code."""
    parser = parser_of(stage.name, stage.summary)
    for kind in (Common, stage.options):
        add_to(parser, kind)
    arguments = parser.parse_args(argv)
    return guard(lambda: _run(stage, of(arguments, Common), of(arguments, stage.options)))


def guard(work: Callable[[], None], interrupted: str = _INTERRUPTED_TEXT) -> int:
    """Do `work`, say what went wrong, and return the exit code; `interrupted` is what to say after Ctrl-C, if anything.

    Every command ends through here: nothing else maps errors to exit codes.
    """
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        work()
    except PipelineError as error:
        for text in error.lines():
            log.line(text)
        return error.exit_code
    except KeyboardInterrupt:
        if interrupted:
            log.line(interrupted)
        return INTERRUPTED
    except Exception as error:
        return _report_unexpected(error)
    return 0


def _interrupt(_signal: int, _frame: object) -> None:
    raise KeyboardInterrupt


def _report_unexpected(error: Exception) -> int:
    """A full disk or memory is a resource error; anything else is a defect: where it happened, and what it is, last."""
    code = error.errno if isinstance(error, OSError) else None
    full = code in (errno.ENOSPC, errno.EDQUOT)
    if full or isinstance(error, MemoryError) or code == errno.ENOMEM:
        what = "the disk is full" if full else "there is not enough memory"
        reported: PipelineError = ResourceError(
            what, remedy="free some and run the same command again; finished stages are kept"
        )
    else:
        traceback.print_exception(error)
        reported = PipelineError(
            f"unexpected {type(error).__name__}: {error}",
            cause="a defect of this program, or of the machine",
            remedy="report it with all that is printed above",
        )
    for text in reported.lines():
        log.line(text)
    return reported.exit_code


def _run(stage: Stage, common: Common, options: Options) -> None:
    host.one_arena()
    before = source()
    root, recipe = common.root, load_recipe(common.recipe_file)
    choice = graph.Choice(
        recipe=recipe, graphs=common.graphs or recipe.graphs, variants=options.judged(), towers=common.towers
    )
    name = options.folder(stage.name)
    needs = stage.needs_of(root, options) if stage.needs_of else graph.needs(name, choice)
    tools = versions.installed()
    versions.check(tools, PROJECT / "locks" / "cpu.txt")
    log.line(f"{name} · {root.name} · {versions.line(tools)}")
    with locked(root, name):
        upstream = {need: manifest.read(root / need) for need in needs}
        read = (record for need in upstream.values() for record in need.outputs if graph.is_read(name, record.path))
        inputs, known = tuple(read), manifest.Known(root)
        manifest.check(inputs, root, known)
        folder = _clear(root / name)
        context = Context(
            options=options,
            model_id=common.model_id,
            root=root,
            folder=folder,
            recipe=recipe,
            graphs=choice.graphs,
            towers=choice.towers,
            upstream=upstream,
            known=known,
        )
        with _measure() as usage, _cleared_on_interrupt(folder), made_again(root, (name, *needs)):
            outcome = stage.work(context)
        outputs = manifest.describe(_files(folder, stage.measured), root, known)
        known.keep()
        manifest.write_atomically(folder / "run.json", manifest.dump_json(usage.facts()))
        first = next(iter(upstream.values()), None)
        manifest.write(
            Manifest(
                stage=name,
                model=first.model if first else outcome.model,
                revision=first.revision if first else outcome.revision,
                recipe_sha256=recipe.sha256,
                inputs=inputs,
                outputs=outputs,
                facts=records.table(outcome.facts),
                tools=tools,
                image_digest=os.environ.get("IMAGE_DIGEST", ""),
                source=_source_of(name, before),
            ),
            folder,
        )
        if stage.after:
            stage.after(context)
    total = sum(record.size for record in outputs)
    log.line(f"{name} done: {len(outputs)} files, {log.human_bytes(total)}, {usage.text()}")


@contextmanager
def locked(root: Path, name: str) -> Iterator[None]:
    """Hold the stage's lock, so that two runs never write the same folder.

    Raises:
        ResourceError: another run holds it.
    """
    root.mkdir(parents=True, exist_ok=True)
    with (root / f".{name}.lock").open("w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ResourceError(
                f"another run is working on {root / name}",
                remedy="wait for it to end, or set ARTIFACTS= to another folder",
            ) from None
        yield


@contextmanager
def made_again(root: Path, stages: Sequence[str]) -> Iterator[None]:
    """Say what to do about a file that is to blame, if it is in the folder of one of `stages` below `root`."""
    try:
        yield
    except PipelineError as error:
        own = [root / name for name in stages if error.file and error.file.is_relative_to(root / name)]
        if own and not error.remedy:
            error.remedy = f"remove {own[0]} and run make again"
        raise


def _clear(folder: Path) -> Path:
    """Empty `folder`, the manifest first, so that a half-cleared folder never looks finished."""
    (folder / manifest.NAME).unlink(missing_ok=True)
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    return folder


@contextmanager
def _cleared_on_interrupt(folder: Path) -> Iterator[None]:
    """Leave nothing half-written behind when someone stops the work; what failed by itself stays to be looked at.

    Some libraries swallow the exception and go on (torch.export does now and then): the process ends all the same.
    """
    asked: list[threading.Timer] = []

    def interrupt(_signal: int, _frame: object) -> None:
        asked.append(threading.Timer(_PATIENCE, leave))
        asked[-1].daemon = True
        asked[-1].start()
        raise KeyboardInterrupt

    def leave() -> None:
        _clear(folder)
        log.line(_INTERRUPTED_TEXT)
        os._exit(INTERRUPTED)

    signals = [sent for sent in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(sent) is not signal.SIG_IGN]
    before = {sent: signal.signal(sent, interrupt) for sent in signals}
    try:
        yield
        if asked:
            raise KeyboardInterrupt
    except KeyboardInterrupt:
        _clear(folder)
        raise
    finally:
        for timer in asked:
            timer.cancel()
        for sent, handler in before.items():
            signal.signal(sent, handler)


def _files(folder: Path, measured: tuple[str, ...]) -> list[Path]:
    left_out = {folder / name for name in (*_NOT_OUTPUTS, *measured)}
    return sorted(file for file in folder.rglob("*") if file.is_file() and file not in left_out)


def source() -> Source:
    """The project's commit and whether its tracked or new files differ from it."""
    commit = process.output(["git", "rev-parse", "HEAD"], cwd=PROJECT)
    changes = process.output(["git", "status", "--porcelain"], cwd=PROJECT)
    if commit is None:  # the container holds no git repository: the host says what its sources are
        return Source(commit=os.environ.get("SOURCE_COMMIT", ""), dirty=bool(os.environ.get("SOURCE_DIRTY")))
    return Source(commit=commit, dirty=bool(changes))


def _source_of(name: str, before: Source) -> Source:
    """What a stage was made by: the code as it stood when the stage began, which Python had read by then, mostly.

    If it is another one now, nobody can say what was read before the change and what after it: it is no commit's.
    """
    if source() == before:
        return before
    log.warn(f"the project's code changed while {name} ran: its manifest says so, and it can't be published")
    return Source(commit=before.commit, dirty=True)


@dataclass
class Usage:
    """Time and memory of a running stage: resident (all mapped pages) and anonymous (what only swap could hold).

    Processor seconds are those of this process, set-up included, and of the children that it has waited for: other work
    on the machine lengthens the seconds, and these hardly.
    """

    started: float = field(default_factory=time.monotonic)
    seconds: float = 0.0
    processor_seconds: float = 0.0
    peak_resident: int = 0
    peak_anonymous: int = 0

    def sample(self) -> None:
        """Read the memory in use now."""
        resident, anonymous = host.memory_held()
        self.peak_resident = max(self.peak_resident, resident)
        self.peak_anonymous = max(self.peak_anonymous, anonymous)

    def facts(self) -> dict[str, manifest.Fact]:
        """What goes to `run.json`; sizes in bytes."""
        return {
            "seconds": round(self.seconds, 2),
            "processor_seconds": round(self.processor_seconds, 2),
            "peak_resident": self.peak_resident,
            "peak_anonymous": self.peak_anonymous,
            "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "host": platform.platform(),
            "cores": os.cpu_count(),
        }

    def text(self) -> str:
        """Time and memory for people."""
        return f"{log.human_seconds(self.seconds)}, {log.human_bytes(self.peak_anonymous)} of memory at most"


@contextmanager
def _measure() -> Iterator[Usage]:
    """Sample the memory of this process until the block ends."""
    usage, stop = Usage(), threading.Event()

    def watch() -> None:
        while not stop.wait(0.1):
            usage.sample()

    watcher = threading.Thread(target=watch, daemon=True)
    usage.sample()
    watcher.start()
    try:
        yield usage
    finally:
        stop.set()
        watcher.join()
        usage.seconds = time.monotonic() - usage.started
        usage.processor_seconds = sum(os.times()[:4])
