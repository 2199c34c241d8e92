"""A checkpoint as its headers alone show it, here or on the Hub, and what is to be made of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import cast

from pipeline.checkpoint import preflight
from pipeline.checkpoint.names import EMBEDDING
from pipeline.checkpoint.reader import CONFIG
from pipeline.checkpoint.source import Source
from pipeline.core import log, memory
from pipeline.core.errors import PublishError
from pipeline.core.facts import Checkpoint
from pipeline.core.graph import Choice, Towers, tower_precision
from pipeline.core.recipe import STEP, Graphs, Recipe
from pipeline.judge import kv_cache
from pipeline.models import architecture_for, bundled, expected, sizes, terms, tower_of
from pipeline.models.sizes import Weights
from pipeline.release import origin
from pipeline.release.licence import Claim, claimed, resolve

_MAPPED = 2 << 30
"""Bytes of a section from which on iOS refuses to map it into an app without an entitlement (LiteRT-LM's #2545)."""

_TOWER_BYTES = {"fp32": 4.0, "fp16": 2.0, "int8": 1.1}
"""Bytes that a tower takes per parameter."""


@dataclass(frozen=True, kw_only=True)
class Model:
    """A checkpoint, and what is to be made of it.

    `facts` as fetch records them; `download` the bytes to get (none of a local folder), `stored` those of its files,
    `merged` those that are written anew with an adapter; `tokenizer` those of its tokenizer.json;
    `shapes` of its tensors; `multiplied` the parameters that each token is multiplied with; `rows`, by tower, what each
    of its parameters is multiplied with at a run; `files` what each precision
    stores, by file; `cache` the bytes of a conversation's KV cache, 0 where there is none; `streamed`: stage golden
    reads weights from their file.
    """

    facts: Checkpoint
    where: str
    licence: str
    download: int
    stored: int
    merged: int
    tokenizer: int
    text: Mapping[str, object]
    shapes: Mapping[str, tuple[int, ...]]
    multiplied: int
    rows: Mapping[str, int]
    files: Mapping[str, Weights]
    cache: int
    streamed: bool
    recipe: Recipe
    graphs: Graphs

    def size(self, precision: str, *, sections: bool = False) -> int:
        """Bytes of all files of a precision, or of the bundle's sections alone."""
        return sum(held.bytes(precision) for name, held in self.files.items() if not sections or name != STEP)

    @property
    def choice(self) -> Choice:
        """What decides which stages there are."""
        taken = ",".join(tower.tower for tower in self.facts.towers) or "none"
        return Choice(recipe=self.recipe, graphs=self.graphs, towers=cast(Towers, taken))

    def towers(self, precision: str) -> int:
        """Bytes of the towers' sections in a bundle of some precision."""
        taken = () if self.graphs == "step" else self.facts.towers
        return round(_TOWER_BYTES[tower_precision(precision)] * sum(tower.parameters for tower in taken))

    @property
    def bundles(self) -> Sequence[str]:
        """Precisions that become bundles."""
        return self.recipe.bundle.built if self.graphs != "step" else ()

    @property
    def table(self) -> tuple[int, int]:
        """Tokens and width of the embedding table."""
        tokens, width = self.shapes[EMBEDDING]
        return tokens, width

    @property
    def remarks(self) -> list[str]:
        """What an application has to know of the bundles before any is made."""
        if self.graphs == "step":
            return []
        length, known = self.recipe.bundle.cache_length, self.text.get("max_position_embeddings")
        most = "at most " if self.recipe.bundle.grows else ""
        said = [f"each conversation's KV cache: {most}{length:,} positions, {log.human_bytes(self.cache)} in float32"]
        if isinstance(known, int) and known < length:
            said[0] += f"; the model was made for {known:,} (max_position_embeddings): what it says beyond is untrained"
        sizes_ = {f"{each}/{name}": self.files[name].bytes(each) for each in self.bundles for name in self.files}
        large = [name for name, size in sizes_.items() if size >= _MAPPED and not name.endswith(STEP)]
        if large:
            said.append(
                f"2 GiB or more: {', '.join(large)}; an app on an iPhone can map such a section only with the "
                "entitlement com.apple.developer.kernel.extended-virtual-addressing"
            )
        return said

    @property
    def conversation(self) -> int:
        """Tokens of each conversation through the cache."""
        window = self.text.get("sliding_window")
        schedule, _ = kv_cache.schedules(self.recipe.bundle, window if isinstance(window, int) else 0)
        return schedule.length


def look(model_id: str, revision: str, base: str, recipe: Recipe, graphs: Graphs, towers: Towers = "none") -> Model:
    """Read the headers of the checkpoint `model_id`, a folder or on the Hub at `revision`; of an adapter its `base`'s.

    Raises:
        FetchError, IntegrityError, UsageError: as fetch would.
    """
    asked = origin.ask(model_id, revision, base)
    source = asked.source
    chosen = preflight.plan(source, partial(expected, recipe, towers))
    config = source.json(CONFIG)
    architecture = bundled(architecture_for(config, tied=chosen.facts.tied), recipe.bundle)
    stored = sum(source.sizes[name] for name in chosen.names)
    return Model(
        facts=chosen.facts,
        where=", an adapter for ".join(one.where for one in asked.origins),
        licence=_licence(source, Path(model_id).name, str(config["model_type"])),
        download=0 if isinstance(asked.base or asked.origin, origin.Folder) else stored,
        merged=stored if asked.base else 0,
        stored=stored,
        tokenizer=source.sizes.get("tokenizer.json", 0),
        text=nested if isinstance(nested := config.get("text_config"), dict) else config,
        shapes=architecture.tensors(),
        multiplied=sizes.multiplied(architecture),
        rows={taken.tower: tower_of(architecture, taken.tower).rows for taken in chosen.facts.towers},
        files=sizes.of_files(architecture, recipe.bundle.prefills, graphs),
        cache=0 if graphs == "step" else sizes.cache_bytes(architecture, recipe.bundle),
        streamed=memory.must_stream(chosen.facts.parameters),
        recipe=recipe,
        graphs=graphs,
    )


def _licence(source: Source, name: str, model_type: str) -> str:
    """The licence, or why publish would refuse."""
    size = source.sizes.get("README.md", 0)
    said = claimed(source.read("README.md", 0, size).decode("utf-8", errors="replace") if size else "")
    try:
        return resolve(Claim(model=name, model_type=model_type, terms=terms(model_type), **vars(said))).name
    except PublishError as error:
        return f"none that publish accepts ({error})"
