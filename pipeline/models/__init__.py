"""One file per architecture: graph modules, signatures, and how checkpoint tensors map to them.

To add an architecture: its file with an `ARCHITECTURE`, its model types in `MODELS`, and a recipe that names them
(docs/adding-a-family.md).
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from pipeline.checkpoint.layout import Needed
from pipeline.checkpoint.reader import Checkpoint
from pipeline.core import records
from pipeline.core.errors import FetchError, UsageError
from pipeline.core.graph import Towers, towers_in
from pipeline.core.recipe import PROJECT, Bundle, Recipe, load, of_type
from pipeline.core.records import Record

if TYPE_CHECKING:  # torch is loaded with a family
    from pipeline.export.export import Inputs
    from pipeline.models import gemma3_vision, gemma3n_vision, gemma4_audio, gemma4_vision
    from pipeline.models.gemma3n_audio import AudioConfig
    from pipeline.models.transformer import DecoderGraph, StepGraph, Table

MODELS: Mapping[str, str] = {
    "gemma3": "gemma3",
    "gemma3_text": "gemma3",
    "gemma3n": "gemma3n",
    "gemma3n_text": "gemma3n",
    "gemma4": "gemma4",
    "gemma4_text": "gemma4",
    "gemma4_unified": "gemma4",
    "gemma4_unified_text": "gemma4",
    "llama": "plain",
    "qwen2": "plain",
    "qwen3": "plain",
}
"""`model_type` of a checkpoint's config.json → the file here that handles it."""
TERMS: Mapping[str, str] = {"gemma3": "gemma", "gemma3n": "gemma"}
"""File → the Hub's name of the licence that all weights of that family carry on, whatever a fine-tune's card says."""
DECODER = "decoder"
"""The section of a bundle that every architecture has, beside those of its `tables`."""


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """What LiteRT-LM is told of a family.

    `type` is its name there: it decides how prompts are split and tool calls are told from text, `tools` whether they
    are. Where a chat template has them, `thoughts` are the texts around what a model thinks before it answers, `calls`
    the fields of the type's message about tool calls (empty where the runtime's own values serve), and `response` is
    the token after which a tool speaks.
    """

    type: str
    tools: bool = False
    thoughts: tuple[str, str] | None = None
    calls: Mapping[str, str] = field(default_factory=dict)
    response: str = ""


@dataclass(frozen=True, kw_only=True)
class Tower:
    """A part beside the text model by which it sees or hears: its `sections`, and its `tensors`, name → shape.

    `config` are the numbers that define it; `rows` what a parameter is multiplied with at each run of its encoder.
    """

    sections: tuple[str, ...]
    rows: int
    tensors: Mapping[str, tuple[int, ...]]
    config: (
        AudioConfig
        | gemma3_vision.VisionConfig
        | gemma3n_vision.VisionConfig
        | gemma4_audio.AudioConfig
        | gemma4_vision.VisionConfig
    )


class Architecture(Protocol):
    """What the stages need to know of a model: a family, bound to a checkpoint's configuration.

    `text` is a dataclass of its numbers; `ties` whether config.json ties the head to the embedding.
    """

    text: Record
    ties: bool

    def __init__(self, config: Mapping[str, object], *, tied: bool = True) -> None:
        """Read a checkpoint's `config.json`; whether the head is `tied`, what is stored says (`Checkpoint.tied`).

        Raises:
            FetchError: it asks for something that the graph modules don't do.
        """

    def runtime(self, template: str) -> Runtime:
        """What LiteRT-LM is told of a model whose chat template is `template` (empty: it has none)."""

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Every tensor of the text model: canonical name → shape."""

    def step(self, *, all_positions: bool = False) -> StepGraph:
        """The step graph (a `torch.nn.Module`, its text model `model`), its weights still to be assigned.

        With the logits of the last attended position, or of `all_positions`.
        """

    def decoder(self, *, logits: bool) -> DecoderGraph:
        """The bundle's decoder graph with or without `logits` (as `step`), its weights still to be assigned."""

    @property
    def slides(self) -> bool:
        """Whether a layer attends to a sliding window."""

    def decoder_inputs(self, tokens: int, length: int, longest: int) -> Inputs:
        """Examples of the decoder graph's inputs but `input_pos` and `mask`: `tokens` tokens, a cache of `length`.

        The cache is for calls of up to `longest` tokens.
        """

    def tables(self) -> tuple[Table, ...]:
        """The embedding tables (`transformer.Table`) that are sections of their own."""

    def towers(self) -> Mapping[str, Tower]:
        """The towers that can be converted, as far as config.json has them: `vision`, `audio`.

        Raises:
            FetchError: one asks for something that its modules don't do.
        """

    def with_embedder(self) -> Architecture:
        """The same with a decoder that is given embeddings, which a section looks up.

        Raises:
            UsageError: no decoder of the family is.
        """

    def canonical(self, name: str) -> str | None:
        """The canonical name of checkpoint tensor `name`, or None if the text model knowingly leaves it out."""


def architecture_for(config: Mapping[str, object], *, tied: bool = True) -> Architecture:
    """The architecture of a checkpoint's `config.json`, bound to it, its head `tied` to the embedding or of its own.

    Raises:
        FetchError: no file here handles that `model_type` (the message names the supported ones), or the
            configuration asks for something that its modules don't do.
    """
    model_type = str(config.get("model_type"))
    if model_type not in MODELS:
        raise FetchError(
            f"model type {model_type!r} is not supported; supported: {', '.join(MODELS)}",
            remedy="choose a checkpoint of a supported architecture, or add this one: docs/adding-a-family.md",
        )
    family: type[Architecture] = importlib.import_module(f"{__name__}.{MODELS[model_type]}").ARCHITECTURE
    with _understood(
        cause="it was edited, or another tool wrote it",
        remedy="get it from the checkpoint's author anew, or save the model again with `save_pretrained`",
    ):
        architecture = family(config, tied=tied)
        records.build(type(architecture.text), records.table(architecture.text))
    return architecture


@contextmanager
def _understood(cause: str, remedy: str) -> Iterator[None]:
    """Tell what a value of another kind, or none, does to the arithmetic of whichever family reads it."""
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise FetchError(f"config.json can't be understood: {error}", cause=cause, remedy=remedy) from error


def terms(model_type: str) -> str:
    """The licence that weights of this type carry on; empty where a checkpoint's card alone says."""
    return TERMS.get(MODELS.get(model_type, ""), "")


def sections(architecture: Architecture) -> tuple[str, ...]:
    """The TFLite sections of its bundles, which are also the names of their files."""
    return (DECODER, *(table.name for table in architecture.tables()))


def architecture_of(checkpoint: Checkpoint, bundle: Bundle | None = None) -> Architecture:
    """The architecture of an opened checkpoint, its head as it is stored, its decoder as `bundle` has it.

    Raises:
        FetchError: as `architecture_for`.
        UsageError: as `bundled`.
    """
    return bundled(architecture_for(checkpoint.config, tied=checkpoint.tied), bundle)


def bundled(architecture: Architecture, bundle: Bundle | None) -> Architecture:
    """The same with a decoder as `bundle` has it.

    Raises:
        UsageError: it is to be given embeddings, and none of the family is.
    """
    return architecture.with_embedder() if bundle and bundle.embedder else architecture


def needed(architecture: Architecture, towers: Towers = "none") -> Needed:
    """What an architecture with a tied head needs of a checkpoint, with the `towers` that are to be taken.

    Raises:
        UsageError: it has no such tower.
    """
    taken = {name: tower_of(architecture, name).tensors for name in towers_in(towers)}
    return Needed(shapes=architecture.tensors(), canonical=architecture.canonical, ties=architecture.ties, towers=taken)


def tower_of(architecture: Architecture, name: str) -> Tower:
    """The tower `name`.

    Raises:
        UsageError: the model has none, or none that can be converted.
        FetchError: as `Architecture.towers`.
    """
    with _understood(
        cause="what it says of a tower was edited, or another tool wrote it",
        remedy="get it from the checkpoint's author anew, or say TOWERS=none",
    ):
        known = architecture.towers()
    if name not in known:
        raise UsageError(
            f"the model has no {name} tower that can be converted",
            cause="it is a text model, or of a family whose towers are not done yet",
            remedy="leave TOWERS= out, and the towers that there are come by themselves; or say TOWERS=none",
        )
    return known[name]


def expected(recipe: Recipe, towers: Towers, config: Mapping[str, object]) -> Needed:
    """What a checkpoint with this `config.json` must hold, with the `towers` that are to be taken.

    Raises:
        FetchError: as `architecture_for`.
        UsageError: the recipe is for other models, whose limits would judge this one wrongly; names one that fits.
            Or its cache grows, and the model has a sliding window; or it takes token ids, and there are `towers`.
    """
    model_type = config.get("model_type")
    if model_type in MODELS and model_type not in recipe.model_types:
        names = _by(of_type(str(model_type)))
        raise UsageError(
            f"the checkpoint is of type {model_type}, recipe {recipe.name} is for {', '.join(recipe.model_types)}",
            remedy=f"say {names}" if names else f"write a recipe that has {model_type!r} among its model_types",
        )
    architecture = architecture_for(config)
    if recipe.bundle.grows and architecture.slides:
        raise UsageError(
            f"`bundle.cache` of recipe {recipe.name} is dynamic, and this model has layers with a sliding window",
            cause="such a layer reads its window alone of a static cache; of one that grows it would read all",
            remedy='say cache = "static" there',
        )
    made, seeing = needed(architecture, towers), _by(_seeing(str(model_type)))
    if made.towers and not bundled(architecture, recipe.bundle).tables():
        raise UsageError(
            f"with recipe {recipe.name} the decoder takes token ids, so nothing seen or heard can go into it",
            remedy=f"say {seeing}" if seeing and not recipe.towers.taken else "say TOWERS=none",
        )
    return replace(made, converts=bool(recipe.towers.taken), seeing=seeing)


def _seeing(model_type: str) -> tuple[Path, ...]:
    """The shipped recipes that take the towers of a model type."""
    return tuple(file for file in of_type(model_type) if load(file).towers.taken)


def _by(files: Iterable[Path]) -> str:
    return " or ".join(f"RECIPE={file.relative_to(PROJECT)}" for file in files)
