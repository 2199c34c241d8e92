"""How a finished stage was run: the words of its command line, from its manifest and what its user had given."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.core import facts, graph
from pipeline.core.manifest import Manifest
from pipeline.core.recipe import STEP
from pipeline.core.stage import Common

STAGES = tuple(name for name in graph.STAGES if name != "evaluate")
"""Those whose results depend on nothing else."""


@dataclass(frozen=True, kw_only=True)
class Given(Common):
    """What stages were given and manifests know by its contents alone, not where it is."""

    base: str = field(default="", metadata={"help": "the folder of an adapter's base, if it was given"})
    template: Path | None = field(
        default=None, metadata={"metavar": "FILE", "help": "the chat template that fetch was given, if any"}
    )
    eval: Path | None = field(
        default=None, metadata={"metavar": "FILE", "help": "the text that golden and verify were given, if any"}
    )
    calibration: Path | None = field(
        default=None, metadata={"metavar": "FILE", "help": "the text that int8 was given, if any"}
    )


def words(name: str, finished: Mapping[str, Manifest], given: Given) -> list[str]:
    """The arguments, after those that all stages have, with which stage `name` was run, by what is `finished`."""
    made = finished[name]
    return [*_words(name, made, finished, given), *_towers(name, finished)]


def _towers(name: str, finished: Mapping[str, Manifest]) -> list[str]:
    """The towers that fetch took, for the stages that are told of them."""
    taken = finished["fetch"].told(facts.Fetch).towers if "fetch" in finished else ()
    told = "towers" in graph.STAGES[name].settings
    return ["--towers", ",".join(tower.tower for tower in taken)] if told and taken else []


def _words(name: str, made: Manifest, finished: Mapping[str, Manifest], given: Given) -> list[str]:
    if name == "fetch":
        return [*(["--revision", made.revision] if "/" in made.model else []), *_base(made, given)]
    return [*_settings(name, made, finished), *_texts(name, given)]


def _settings(name: str, made: Manifest, finished: Mapping[str, Manifest]) -> list[str]:
    """The settings, as the stage's manifest tells."""
    options = ["--graphs", finished["graph"].told(facts.Files).graphs] if "graph" in finished else []
    if name == "golden":
        golden = made.told(facts.Golden)
        return [*options, "--device", golden.device, "--weights", golden.weights]
    if name == "moments":
        return [*options, "--device", made.told(facts.Moments).device]
    if name == "int8" and (climbed := made.told(facts.Precision).climbed):
        return [*options, "--rung", climbed.rung]  # a figure close to a limit could fall on its other side elsewhere
    if name.startswith("int8-"):
        return [*options, "--scheme", name.removeprefix("int8-")]
    if name == "verify":
        read = {record.path.split("/", 1)[0] for record in made.inputs if record.path.endswith(f"/{STEP}")}
        return [*options, "--variants", *(stage for stage in STAGES if stage in read)]
    if name == "publish" and (override := made.told(facts.Publish).licence_override):
        return [*options, "--licence-override", override]
    return options


def _base(made: Manifest, given: Given) -> list[str]:
    """The base of an adapter: that of the Hub at its commit; a folder, and a template, as they were said."""
    merged = made.told(facts.Fetch).adapter
    named = given.base if merged else ""
    if merged and "/" in merged.base:
        named = f"{merged.base}@{merged.base_revision}"
    options = {"--base": named, "--template": str(given.template or "")}
    return [word for option, value in options.items() if value for word in (option, value)]


def _texts(name: str, given: Given) -> list[str]:
    """The user's own texts, for the stages that read them."""
    read = {
        "eval": tuple(stage for stage, node in graph.STAGES.items() if "eval" in node.settings),
        "calibration": tuple(stage for stage, node in graph.STAGES.items() if "calibration" in node.settings),
    }
    texts = {option: getattr(given, option) for option, stages in read.items() if name in stages}
    return [word for option, file in texts.items() if file for word in (f"--{option}", str(file))]
