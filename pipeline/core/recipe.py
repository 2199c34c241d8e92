"""The recipe: what to build and how good it must be, read from TOML into frozen dataclasses.

Everything that changes an artefact's bytes or a verdict stands in the recipe; the environment holds secrets and cache
places only. Paths in a recipe are relative to the project's root.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from pipeline.core import toml
from pipeline.core.errors import UsageError

PROJECT = Path(__file__).resolve().parents[2]
KIND = toml.Kind(name="recipe", setting="RECIPE", example="pipeline/recipes/gemma3n.toml")

Scheme = Literal["dynamic", "static", "static16"]
Graphs = Literal["step", "bundle", "all"]
CacheKind = Literal["static", "dynamic"]
STEP, DECODER = "step.tflite", "decoder.tflite"
"""The step graph, and the bundle's decoder, in the folder of every stage that has one."""
BASELINE = "fp32"
"""The precision that shows what the conversion costs, and that what others cost is held against."""
BundlePrecision = Literal["fp32", "int8", "int4"]
Padding = Literal["none", "left", "right"]
Tower = Literal["vision", "audio"]
_ASKED = " with CONTEXT="
"""In a recipe's name, before the positions that CONTEXT= asked for."""
_OWN_LENGTH = "set `bundle.cache_length` in it instead of saying CONTEXT="
SECTION_LIMIT = 2 << 30
"""Bytes of a bundle's section beyond which iPhones can't map it without an entitlement."""


@dataclass(frozen=True, kw_only=True)
class StepLimits:
    """The largest batch and sequence (in tokens) that the step graph accepts.

    And the shapes that it has a signature of its own for besides, as `1x128`: a batch of 1, a sequence of 128.
    """

    max_batch: int
    max_sequence: int
    fixed: tuple[toml.Shape, ...] = ()

    @property
    def signatures(self) -> dict[str, tuple[int, int]]:
        """The signatures of fixed shape by name: batch and sequence."""
        return {f"serving_{shape}": _sizes(shape) for shape in self.fixed}


def _sizes(shape: toml.Shape) -> tuple[int, int]:
    batch, sequence = map(int, shape.split("x"))
    return batch, sequence


@dataclass(frozen=True, kw_only=True)
class Bundle:
    """The on-device bundle: LiteRT-LM's decoder with its cache.

    `cache_length` positions, `prefill` tokens that each prefill signature takes, `precisions` that become bundles. A
    `static` cache has all its positions from the start. A `dynamic` one grows with the conversation, and there is one
    prefill signature for any number of tokens; LiteRT-LM runs it on the CPU alone, and models without a sliding window
    can have it. Verify then reads by calls of up to `prefill` tokens.
    Verify decodes `decode` tokens in each of its conversations, then whole texts of `corpus.window` tokens until these
    have `positions` predictions (where left out: none). It holds LiteRT-LM's greedy text of `continuation` tokens after
    each of `prompts` prompts against Hugging Face's. Some weights of a model of more than `section_limit` bytes stand
    in a section of their own, and a model that can't be divided so is refused; where left out, at `SECTION_LIMIT`, it
    stays whole instead. Of `optional` precisions there are bundles besides, which may miss their limits: then
    they are not published, and all others are. Their step graphs are not judged. With an `embedder` the decoder of a
    family that looks tokens up itself is given embeddings, which a section of its own looks up: pictures go into such a
    one alone.
    """

    cache_length: int
    prefill: tuple[int, ...]
    precisions: tuple[BundlePrecision, ...]
    decode: int
    prompts: int
    continuation: int
    positions: int = 0
    cache: CacheKind = "static"
    section_limit: toml.Size | None = None
    optional: tuple[BundlePrecision, ...] = ()
    embedder: bool = False

    @property
    def built(self) -> tuple[BundlePrecision, ...]:
        """All precisions that become bundles."""
        return (*self.precisions, *self.optional)

    @property
    def grows(self) -> bool:
        """Whether the cache is as long as what it holds."""
        return self.cache == "dynamic"

    @property
    def prefills(self) -> int:
        """How many prefill signatures there are."""
        return 1 if self.grows else len(self.prefill)

    @property
    def max_tokens(self) -> int:
        """Tokens that a conversation can have: a prefill padded to the longest signature must fit behind them.

        The cache is written with one slice, which the runtime would move back, over older tokens, if it did not fit.
        """
        if self.grows:  # nothing is padded
            return self.cache_length
        return self.cache_length - max(self.prefill) + 1


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Text that files are judged on and calibrated with; one document per line, the two never overlap.

    `window` is the length of a teacher-forced context in tokens, `positions` how many next-token predictions are
    judged, spread evenly over the windows. `prompts` greedy continuations of `continuation` tokens are shown.
    `hessian_windows` contexts of the calibration text are what GPTQ rounds by (stage moments). `scripts` are those that
    a release is for besides Latin (`Tifinagh`, `Arabic`, `CJK`, `Cyrillic` …): bundles read texts of the verification
    text that are in them, and are held to a limit of their own there (`script_kld_ratio`).
    """

    verification: str
    calibration: str
    window: int
    positions: int
    prompts: int
    continuation: int
    hessian_windows: int = 64
    scripts: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Shapes:
    """The grid of input shapes on which the fp32 graph is held against Hugging Face."""

    batch: tuple[int, ...]
    sequence: tuple[int, ...]
    padding: tuple[Padding, ...]


@dataclass(frozen=True, kw_only=True)
class Int8:
    """How int8 files are made.

    `scheme` chooses what `int8/step.tflite` is; `static16` is static with 16-bit activations. `calibration_samples`
    texts set the static ranges. `keep_float` are regular expressions over the names of operators that stay in float
    (`layers.0.mlp.down_proj;`; in all such lists the word `head` by itself is the head, whatever a graph calls it),
    `int8x2` over linear layers of dynamic files that take their input in two terms, the value and its remainder, as two
    int8 rows (quantize/int8x2.py), `int8x2_static` over those of static files that take them as two int8 tensors
    (quantize/static.py), and a head, which is dynamic there, as two rows. `float_scores` leaves attention's scores in
    float in `static`, where 8 bits are too few for them. `equalize` is how strongly scales are moved between
    neighbouring layers of dynamic files, 0 to 1 (quantize/equalize.py). `groups` are regular expressions over the
    linear layers of dynamic files that have a scale per row and per `group_size` columns, where their width is a
    multiple of it (quantize/groups.py). `rotate` are regular expressions over those whose inputs are rotated in blocks
    of `rotation` channels, a power of two, where their width is a multiple of it (quantize/rotate.py). With `gptq`,
    weights of layers in dynamic files are rounded so that the layers' results stay close on calibration text, not each
    weight by itself (quantize/gptq.py). With `ladder`, dynamic files that do not keep the recipe's limits on
    calibration text are made closer, rung by rung (search/ladder.py); this section is the first rung.
    """

    scheme: Scheme
    calibration_samples: int
    keep_float: tuple[toml.Pattern, ...] = ()
    int8x2: tuple[toml.Pattern, ...] = field(default=(), metadata={"was": "two_rows"})
    int8x2_static: tuple[toml.Pattern, ...] = field(default=(), metadata={"was": "two_tensors"})
    float_scores: bool = False
    equalize: float = field(default=0.0, metadata={"was": "fold"})
    groups: tuple[toml.Pattern, ...] = field(default=(), metadata={"was": "blocks"})
    group_size: int = field(default=64, metadata={"was": "block"})
    rotate: tuple[toml.Pattern, ...] = ()
    rotation: int = 64
    gptq: bool = False
    ladder: bool = False

    @property
    def is_dynamic(self) -> bool:
        """Whether the step graph's activations become int8 while it runs, each token by itself."""
        return self.scheme == "dynamic"

    @property
    def climbs(self) -> bool:
        """Whether files are looked for on the ladder."""
        return self.ladder and self.is_dynamic

    @property
    def alternative(self) -> Scheme:
        """The scheme that is made for comparison."""
        return "static" if self.is_dynamic else "dynamic"


@dataclass(frozen=True, kw_only=True)
class Int4:
    """How int4 files are made, where a recipe has them.

    `keep_int8` are regular expressions over the names of operators (`layers.0.mlp.down_proj;`) whose weights have 8
    bits and a scale per row; all others have 4 and a scale per 32 neighbours (quantize/blockwise.py), but for those of
    `keep_float`, which stay in float32. Of a table that is the head too, the rows of `int8_tokens` have 8 bits: ranges
    `[first, behind the last]` of token ids, ascending (quantize/row_ranges.py). `int8x2`, `equalize`, `rotate`,
    `rotation` and `gptq` as in `Int8`; to `gptq`, an error of such a table's rows, looked up, is worth `lookups` times
    one of the logits (quantize/gptq.py).
    """

    keep_int8: tuple[toml.Pattern, ...] = ()
    keep_float: tuple[toml.Pattern, ...] = ()
    int8_tokens: tuple[tuple[toml.Index, toml.Index], ...] = field(default=(), metadata={"was": "wide_tokens"})
    int8x2: tuple[toml.Pattern, ...] = field(default=(), metadata={"was": "two_rows"})
    equalize: float = field(default=0.0, metadata={"was": "fold"})
    rotate: tuple[toml.Pattern, ...] = ()
    rotation: int = 64
    gptq: bool = False
    lookups: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Towers:
    """Which towers are `taken` where a checkpoint has them and TOWERS= says nothing, and how they are made.

    In fewer bits (quantize/senses.py): `keep_float16` are regular expressions over the names of weights in the
    checkpoint (`vision_tower.timm_model.conv_stem.conv.weight`) that are float16 where others are int8.
    """

    taken: tuple[Tower, ...] = ()
    keep_float16: tuple[toml.Pattern, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Gate:
    """Limits for one variant; a limit that is absent is not judged.

    `nmse` worst normalised mean square error of logits against Hugging Face over all shapes; `kld` mean
    KL(reference || file) in nats; `top1` share of equal most likely tokens; `perplexity_ratio_min` and `_max` bound the
    file's perplexity over that of what it is held against: text that gets likelier is as much of a change;
    `script_kld_ratio` a bundle's mean KLD on text in each of `corpus.scripts` over that on text in Latin;
    `size_ratio` bytes over the bytes of the fp32 file; `size_per_parameter` bytes per parameter; `bytes_per_weight`
    bytes of a bundle's weights and scales per stored weight; `integer_share` share of multiply-adds in integer kernels;
    `snr` the least signal-to-noise ratio of a tower's soft tokens over its inputs, against Hugging Face, in decibels.
    """

    nmse: float | None = None
    snr: float | None = None
    kld: float | None = None
    top1: float | None = None
    perplexity_ratio_min: float | None = None
    perplexity_ratio_max: float | None = None
    script_kld_ratio: float | None = None
    size_ratio: float | None = None
    size_per_parameter: float | None = None
    bytes_per_weight: float | None = None
    integer_share: float | None = None


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A whole recipe; `sha256` identifies the file it came from."""

    name: str
    model_types: tuple[str, ...]
    graphs: Graphs
    step: StepLimits
    bundle: Bundle
    corpus: Corpus
    shapes: Shapes
    int8: Int8
    gates: Mapping[str, Gate]
    sha256: str
    int4: Int4 | None = None
    towers: Towers = Towers()

    @property
    def context(self) -> str:
        """What CONTEXT= said, if this is `with_context`'s; else nothing."""
        asked = re.search(rf"{_ASKED}(\d+)$", self.name)
        return asked[1] if asked else ""

    def activations(self, precision: str) -> str:
        """How the step graph of `precision` makes its activations integer; empty for one that does not."""
        return {"int8": self.int8.scheme, "int4": "dynamic"}.get(precision, "")


RECIPES = PROJECT / "pipeline" / "recipes"
DEFAULT = RECIPES / "gemma3n.toml"
"""The shipped model's, and of a checkpoint whose type nobody knows."""
CONFIG = "config.json"
IDENTIFIED = ".inputs/identified"
"""What `identify` writes below a model's folder: JSON with the `model_type` of a checkpoint that is not here yet."""


def of_type(model_type: str) -> tuple[Path, ...]:
    """The shipped recipes for checkpoints of a model type."""
    return tuple(file for file in sorted(RECIPES.glob("*.toml")) if model_type in load(file).model_types)


def asked_for(recipe: Recipe, model_type: str) -> str:
    """What RECIPE= has to say so that checkpoints of a model type get `recipe`; nothing where they get it anyway."""
    fitting = of_type(model_type)
    if file := next((file for file in fitting if _says_the_same(load(file), recipe)), None):
        return "" if file == fitting[0] else str(file.relative_to(PROJECT))
    return f"path/to/{recipe.name.split(_ASKED)[0]}.toml"


def _says_the_same(shipped: Recipe, recipe: Recipe) -> bool:
    """Whether `recipe` is the `shipped` one, but for what CONTEXT= said."""
    name, length = recipe.name.split(_ASKED)[0], (recipe if recipe.context else shipped).bundle.cache_length
    bundle = replace(shipped.bundle, cache_length=length)
    return name == shipped.name and replace(shipped, name=recipe.name, sha256=recipe.sha256, bundle=bundle) == recipe


def chosen(given: Path | None, model_id: str, root: Path) -> Path:
    """The recipe: the one that is `given`, else the shipped one for the checkpoint's model type.

    Args:
        given: what the user said.
        model_id: Hub id or folder of the checkpoint.
        root: the model's artefact folder, where one from the Hub lies once it is fetched.
    """
    if given:
        return given
    files = (Path(model_id) / CONFIG, root / IDENTIFIED, root / "fetch" / "checkpoint" / CONFIG)
    return next(filter(None, map(named_in, files)), DEFAULT)


def named_in(file: Path) -> Path | None:
    """The shipped recipe for the `model_type` that a JSON file names; none if there is none, or no such file."""
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # not here; or broken, which fetch will say
        return None
    fitting = of_type(str(config.get("model_type"))) if isinstance(config, dict) else ()
    return fitting[0] if fitting else None


def load(file: Path) -> Recipe:
    """Read and check a recipe.

    Raises:
        UsageError: the file is missing, is not TOML, or has an unknown, missing or wrongly typed key.
    """
    return parse(toml.read(file, KIND), file)


def with_context(file: Path, said: str) -> str:
    """The text of the recipe in `file` with a cache of as many positions as CONTEXT= says, and a name that tells so.

    Raises:
        UsageError: that is no number of positions, or the recipe can't have it.
    """
    if not re.fullmatch(r"[1-9]\d{0,8}", said):
        raise UsageError(f"CONTEXT={said} is no number of positions of the cache", remedy="say CONTEXT=8192, as digits")
    load(file)
    text = file.read_text(encoding="utf-8")
    for key, value in (("name", rf'\g<1>"\g<2>{_ASKED}{said}"'), ("cache_length", rf"\g<1>{said}")):
        old = r'"([^"\n]*)"' if key == "name" else r"[\d_]+"
        text, count = re.subn(rf"(?m)^(\s*{key}\s*=\s*){old}", value, text, count=1)
        if not count:
            raise UsageError(f"recipe {file} doesn't say `{key}` on a line of its own", remedy=_OWN_LENGTH)
    try:
        parse(text.encode(), f"{file} with CONTEXT={said}")
    except UsageError as error:
        error.remedy = "say a larger CONTEXT="  # all else in it was right before
        raise
    return text


def parse(data: bytes, file: Path | str) -> Recipe:
    """A recipe from the bytes of a file, which errors call `file`.

    Raises:
        UsageError: as `load`.
    """
    table = toml.parse(data, file, KIND)
    try:
        if "sha256" in table:
            raise ValueError("unknown key `recipe.sha256`")
        recipe = toml.build(Recipe, {**table, "sha256": hashlib.sha256(data).hexdigest()}, "recipe")
        assert isinstance(recipe, Recipe)
        if recipe.bundle.max_tokens < 1:
            raise ValueError(
                f"`bundle.cache_length` is {recipe.bundle.cache_length}, "
                f"shorter than a prefill of {max(recipe.bundle.prefill)}"
            )
        for name, size in (("int8", recipe.int8.rotation), ("int4", recipe.int4.rotation if recipe.int4 else 1)):
            if size & (size - 1):
                raise ValueError(f"`{name}.rotation` is {size}, which is no power of two")
        if twice := set(recipe.bundle.precisions) & set(recipe.bundle.optional):
            raise ValueError(f"`bundle.optional` names {min(twice)}, which `bundle.precisions` names already")
        if "int4" in recipe.bundle.built and not recipe.int4:
            key = "precisions" if "int4" in recipe.bundle.precisions else "optional"
            raise ValueError(f"`bundle.{key}` names int4, and there is no `int4` section to say how it is made")
        for shape, (batch, sequence) in zip(recipe.step.fixed, recipe.step.signatures.values(), strict=True):
            if batch > recipe.step.max_batch or sequence > recipe.step.max_sequence:
                raise ValueError(f"`step.fixed` names {shape}, beyond `step.max_batch` or `step.max_sequence`")
        edges = [0, *(edge for ends in (recipe.int4.int8_tokens if recipe.int4 else ()) for edge in ends)]
        if edges != sorted(edges):
            raise ValueError(f"the ranges of `int4.int8_tokens` are not in ascending order: {edges[1:]}")
        if recipe.bundle.decode >= recipe.bundle.max_tokens:
            raise ValueError(
                f"`bundle.decode` is {recipe.bundle.decode}, "
                f"too many for conversations of at most {recipe.bundle.max_tokens} tokens"
            )
    except ValueError as error:
        raise UsageError(f"recipe {file}: {error}", remedy=f"compare it with {KIND.example}") from error
    return recipe
