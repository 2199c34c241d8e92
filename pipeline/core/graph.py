"""The graph of stages: what each reads, and by which settings. The only table of it.

The runner (`stage.py`), the rules that Make includes (`rules.py`), plan and reproduce ask here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Literal

from pipeline.core.errors import UsageError
from pipeline.core.recipe import DECODER, STEP, Graphs, Recipe

Towers = Literal["none", "vision", "audio", "vision,audio", "audio,vision"]
"""What TOWERS= may say."""


def towers_in(said: Towers) -> tuple[str, ...]:
    """The towers that are taken, always in the same order."""
    return tuple(tower for tower in ("vision", "audio") if tower in said.split(","))


def tower_precision(bundle: str) -> str:
    """The precision of the towers in a bundle of some precision: with 4 bits nobody has tried them."""
    return "int8" if bundle == "int4" else bundle


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What decides which stages there are: the recipe, the graphs, the step graphs to judge (None: the recipe's).

    And the `towers` that are taken.
    """

    recipe: Recipe
    graphs: Graphs
    variants: tuple[str, ...] | None = None
    towers: Towers = "none"

    @property
    def bundles(self) -> tuple[str, ...]:
        """Precisions that become bundles."""
        return self.recipe.bundle.built if self.graphs != "step" else ()

    @property
    def tower_precisions(self) -> tuple[str, ...]:
        """Those that towers are made in: of every bundle, and float16 where the text model's files are."""
        half = ("fp16",) if self.graphs == "all" else ()
        return tuple(dict.fromkeys((*map(tower_precision, self.bundles), *half)))

    @property
    def alternative(self) -> str:
        """The scheme of int8 step graphs that the recipe does not choose."""
        return f"int8-{self.recipe.int8.alternative}"

    @property
    def judged(self) -> tuple[str, ...]:
        """The folders of the step graphs that are judged."""
        if self.graphs == "bundle":
            return ()
        if self.variants is not None:
            return self.variants
        int4 = [name for name in self.recipe.bundle.precisions if name == "int4"]
        return ("fp32", "fp16", "int8", *int4, self.alternative)


@dataclass(frozen=True, kw_only=True)
class Node:
    """A stage: the module that runs it, the stages whose folders it reads, its settings and the texts that it reads.

    `reads` are patterns of the files that it opens of a stage's folder, where it does not open all of them: those are
    checked against their manifest before it runs. `options` are always the same. `sources` are patterns of files
    of the project that it takes, beside those that its module names. `places` are settings that say where it runs, and
    nothing of what comes out.
    """

    needs: Callable[[Choice], tuple[str, ...]]
    module: str
    settings: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    texts: tuple[str, ...] = ()
    reads: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    sources: tuple[str, ...] = ()
    places: tuple[str, ...] = ()


def _int8(scheme: str | None) -> Callable[[Choice], tuple[str, ...]]:
    """The full-integer scheme runs the fp32 file for its ranges, GPTQ rounds dynamic files by moments."""

    def needs(choice: Choice) -> tuple[str, ...]:
        dynamic = scheme == "dynamic" if scheme else choice.recipe.int8.is_dynamic
        static = choice.graphs != "bundle" and not dynamic
        rounded = choice.recipe.int8.gptq and scheme in (None, "dynamic")
        return ("fetch", "graph", *(["fp32"] if static else []), *(["moments"] if rounded else []))

    return needs


def _int4(choice: Choice) -> tuple[str, ...]:
    recipe = choice.recipe
    if recipe.int4 is None:
        raise UsageError(
            f"recipe {recipe.name} has no [int4] section",
            cause="4 bits are not good enough for its models, or nobody has tried",
            remedy="add the section and its limits, as in pipeline/recipes/gemma3.toml",
        )
    return ("fetch", "graph", *(["moments"] if recipe.int4.gptq else []))


def _bundle(choice: Choice) -> tuple[str, ...]:
    if choice.graphs == "step":
        raise UsageError("GRAPHS=step builds no bundle", remedy="leave GRAPHS out, or say GRAPHS=bundle")
    return ("fetch", *choice.bundles, *_with_towers(choice))


def _with_towers(choice: Choice) -> tuple[str, ...]:
    return ("towers",) if towers_in(choice.towers) else ()


def _towers(choice: Choice) -> tuple[str, ...]:
    if not towers_in(choice.towers) or choice.graphs == "step":
        raise UsageError(
            "there are no towers to make",
            cause="GRAPHS=step builds no bundle" if choice.graphs == "step" else "the model has none, or TOWERS=none",
            remedy="say TOWERS=vision,audio, or one of them, and GRAPHS=bundle or all",
        )
    return ("fetch",)


def _judged(choice: Choice) -> tuple[str, ...]:
    """The folders of all files that are judged."""
    return tuple(dict.fromkeys((*choice.judged, *(("bundle", *choice.bundles) if choice.bundles else ()))))


def _page(choice: Choice) -> tuple[str, ...]:
    if "int8" not in choice.bundles:
        raise UsageError(
            "there is no int8 bundle, which the page runs",
            cause="GRAPHS=step builds no bundle" if choice.graphs == "step" else "the recipe's `bundle` names no int8",
            remedy="leave GRAPHS out, or name int8 in the recipe's precisions",
        )
    if choice.recipe.bundle.grows:
        raise UsageError(
            "the page can't run a bundle whose cache grows",
            cause="a browser takes graphs of fixed shapes",
            remedy='say cache = "static" under [bundle] in a recipe of your own, and RECIPE= to it',
        )
    return ("fetch", *_judged(choice), "verify")


def _space(choice: Choice) -> tuple[str, ...]:
    _page(choice)  # or the reason why there is none
    return ("publish", "page")


def _always(*needs: str) -> Callable[[Choice], tuple[str, ...]]:
    return lambda _: needs


def _quantised(module: str, needs: Callable[[Choice], tuple[str, ...]], *options: str) -> Node:
    """A stage of int8 files, by scheme."""
    settings, texts = ("graphs", "calibration"), ("calibration",)
    return Node(module=module, needs=needs, settings=settings, options=options, texts=texts, reads=_STEP_ALONE)


_STEP_ALONE = {"fp32": (STEP,)}
_SMALL = ("*.json", "*.jinja", "*.model", "*.txt", "*.md", "LICENSE*", "NOTICE*")
_SECTIONS = (DECODER, "*embedder.tflite")

STAGES: Mapping[str, Node] = {
    "fetch": Node(
        module="fetch", needs=_always(), settings=("revision", "base", "template", "towers"), texts=("template",)
    ),
    "golden": Node(
        module="golden",
        needs=_always("fetch"),
        settings=("device", "graphs", "eval", "towers"),
        texts=("verification", "recipe.calibration", "eval"),
        places=("cluster",),
    ),
    "graph": Node(module="graph", needs=_always("fetch"), settings=("graphs",)),
    "moments": Node(
        module="moments", needs=_always("fetch"), settings=("device", "calibration"), texts=("calibration",)
    ),
    "towers": Node(module="towers", needs=_towers, settings=("graphs", "towers")),
    "fp32": Node(module="fp32", needs=_always("fetch", "graph"), settings=("graphs",)),
    "fp16": Node(module="fp16", needs=_always("fetch", "graph"), settings=("graphs",)),
    "int8": replace(_quantised("int8", _int8(None)), settings=("graphs", "calibration", "rung")),
    "int4": Node(
        module="int4",
        needs=_int4,
        settings=("graphs",),
    ),
    "int8-static": _quantised("int8", _int8("static"), "--scheme", "static"),
    "int8-dynamic": _quantised("int8", _int8("dynamic"), "--scheme", "dynamic"),
    "int8-static16": _quantised("int8", _int8("static16"), "--scheme", "static16"),
    "bundle": Node(
        module="bundle",
        needs=_bundle,
        settings=("graphs", "towers"),
        reads={"fetch": _SMALL, **{name: _SECTIONS for name in ("fp32", "int8", "int4")}},
    ),
    "verify": Node(
        module="verify",
        needs=lambda choice: ("fetch", "golden", *_judged(choice), *(_with_towers(choice) if choice.bundles else ())),
        settings=("graphs", "variants", "eval", "calibration", "towers"),
        texts=("verification", "calibration", "eval"),
        places=("cluster",),
    ),
    "evaluate": Node(
        module="evaluate", needs=_always("fetch", "bundle"), settings=("task",), texts=("task",), places=("cluster",)
    ),
    "publish": Node(
        module="publish",
        needs=lambda choice: ("fetch", *_judged(choice), "verify"),
        settings=("graphs", "licence-override"),
        reads={"fetch": _SMALL},
    ),
    "page": Node(
        module="page", needs=_page, settings=("graphs",), reads={"fetch": _SMALL}, sources=("web/*.*", "web/_headers")
    ),
    "space": Node(module="space", needs=_space, settings=("graphs",)),
}
"""By folder, each after those that it reads."""
STEPS = tuple(name for name in STAGES if name.startswith(("fp", "int")))
"""The stages that make a step graph."""


def needs(name: str, choice: Choice) -> tuple[str, ...]:
    """The stages whose folders stage `name` reads; none for one that is not of the graph.

    Raises:
        UsageError: the choice leaves the stage nothing to do.
    """
    return STAGES[name].needs(choice) if name in STAGES else ()


def is_read(name: str, path: str) -> bool:
    """Whether stage `name` opens the file at `path`, in the folder of a stage that it needs."""
    stage, _, file = path.partition("/")
    patterns = STAGES[name].reads.get(stage) if name in STAGES else None
    return patterns is None or any(fnmatch(file.rpartition("/")[2], pattern) for pattern in patterns)


def behind(names: Iterable[str], choice: Choice) -> tuple[str, ...]:
    """Stages `names` and all that they need, in the order in which they run."""
    queue, wanted = list(names), set[str]()
    while queue:
        name = queue.pop()
        if name not in wanted:
            wanted.add(name)
            queue += makeable(name, choice)
    return tuple(name for name in STAGES if name in wanted)


def makeable(name: str, choice: Choice) -> tuple[str, ...]:
    """As `needs`; where the stage will refuse, what it takes for it to say so."""
    try:
        return needs(name, choice)
    except UsageError:
        return ("fetch",)


def model_root(artifacts: Path, model_id: str) -> Path:
    """The model's artefact folder.

    Raises:
        UsageError: the checkpoint lies in that very folder, in which stages, and `make clean`, remove what they find.
    """
    root = artifacts / model_name(model_id)
    refuse_within(root, Path(model_id))
    return root


def refuse_within(root: Path, folder: Path) -> None:
    """Refuse results in `root` if a checkpoint's `folder` is that or lies in it.

    Raises:
        UsageError: it does.
    """
    if folder.is_dir() and folder.resolve().is_relative_to(root.resolve()):
        raise UsageError(
            f"the results would go to {root}, where the checkpoint {folder} lies",
            cause="ARTIFACTS is the folder that the checkpoint is kept in, and results are named like the checkpoint",
            remedy="set ARTIFACTS= to another folder",
        )


def model_name(model_id: str) -> str:
    """The name of the model's artefact folder: the Hub id with `/` as `--`, or the name of a local folder."""
    return folder_name(Path(model_id)) if Path(model_id).is_dir() else model_id.replace("/", "--")


def folder_name(folder: Path) -> str:
    """What a checkpoint in a folder is called; in the Hub's cache by its model, not by its commit."""
    folder = folder.resolve()
    entry = folder.parent.parent.name
    kept = folder.parent.name == "snapshots" and entry.startswith("models--")
    return entry.removeprefix("models--") if kept else folder.name
