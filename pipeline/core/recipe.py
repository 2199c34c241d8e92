"""The recipe: what to build and how good it must be, read from TOML into frozen dataclasses.

Everything that changes an artefact's bytes or a verdict stands in the recipe; the environment holds secrets and cache
places only. Paths in a recipe are relative to the project's root.
"""

from __future__ import annotations

import dataclasses
import hashlib
import tomllib
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pipeline.core.errors import UsageError

SCHEMA = 1
PROJECT = Path(__file__).resolve().parents[2]

Scheme = Literal["dynamic", "static", "static16"]
Graphs = Literal["step", "bundle", "all"]
BundlePrecision = Literal["fp32", "int8"]
Padding = Literal["none", "left", "right"]


@dataclass(frozen=True, kw_only=True)
class StepLimits:
    """The largest batch and sequence (in tokens) that the step graph accepts."""

    max_batch: int
    max_sequence: int


@dataclass(frozen=True, kw_only=True)
class Bundle:
    """The on-device bundle: LiteRT-LM's decoder with its cache.

    `cache_length` positions, `prefill` tokens that each prefill signature takes, `precisions` that become bundles.
    Verify decodes `decode` tokens in each of its conversations, and holds LiteRT-LM's greedy text of `continuation`
    tokens after each of `prompts` prompts against Hugging Face's.
    """

    cache_length: int
    prefill: tuple[int, ...]
    precisions: tuple[BundlePrecision, ...]
    decode: int
    prompts: int
    continuation: int

    @property
    def max_tokens(self) -> int:
        """Tokens that a conversation can have: a prefill padded to the longest signature must fit behind them.

        The cache is written with one slice, which the runtime would move back, over older tokens, if it did not fit.
        """
        return self.cache_length - max(self.prefill) + 1


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Text that files are judged on and calibrated with; one document per line, the two never overlap.

    `window` is the length of a teacher-forced context in tokens, `positions` how many next-token predictions are
    judged, spread evenly over the windows. `prompts` greedy continuations of `continuation` tokens are shown.
    """

    verification: str
    calibration: str
    window: int
    positions: int
    prompts: int
    continuation: int


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
    texts set the static ranges. `keep_float` are regular expressions over operator names that the static schemes leave
    in float, `two_rows` over linear layers that take their input twice, the value and the remainder, as two int8 rows
    in dynamic files (convert/residual.py), as two int8 tensors in static ones (convert/static.py). `float_scores`
    leaves attention's scores in float in `static`, where 8 bits are too few for them.
    """

    scheme: Scheme
    calibration_samples: int
    keep_float: tuple[str, ...] = ()
    two_rows: tuple[str, ...] = ()
    float_scores: bool = False


@dataclass(frozen=True, kw_only=True)
class Gate:
    """Limits for one variant; a limit that is absent is not judged.

    `nmse` worst normalised mean square error of logits against Hugging Face over all shapes; `kld` mean
    KL(reference || file) in nats; `top1` share of equal most likely tokens; `size_ratio` bytes over the bytes of the
    fp32 file; `size_per_parameter` bytes per parameter; `bytes_per_weight` bytes of a bundle's weights and scales per
    stored weight; `integer_share` share of multiply-adds in integer kernels.
    """

    nmse: float | None = None
    kld: float | None = None
    top1: float | None = None
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


def load(file: Path) -> Recipe:
    """Read and check a recipe.

    Raises:
        UsageError: the file is missing, is not TOML, or has an unknown, missing or wrongly typed key.
    """
    try:
        data = file.read_bytes()
        table = tomllib.loads(data.decode("utf-8"))
    except OSError as error:
        raise UsageError(
            f"can't read recipe {file}: {error.strerror}", remedy="set RECIPE= to a file in pipeline/recipes/"
        ) from error
    except ValueError as error:
        raise UsageError(f"recipe {file} is not TOML: {error}", remedy="correct that line") from error
    schema = table.pop("schema", None)
    if type(schema) is not int or schema != SCHEMA:
        raise UsageError(f"recipe {file} has no `schema = {SCHEMA}`", remedy="start from pipeline/recipes/gemma3n.toml")
    try:
        if "sha256" in table:
            raise ValueError("unknown key `recipe.sha256`")
        recipe = _build(Recipe, {**table, "sha256": hashlib.sha256(data).hexdigest()}, "recipe")
        assert isinstance(recipe, Recipe)
        if recipe.bundle.max_tokens < 1:
            raise ValueError(
                f"`bundle.cache_length` is {recipe.bundle.cache_length}, "
                f"shorter than a prefill of {max(recipe.bundle.prefill)}"
            )
        if recipe.bundle.decode >= recipe.bundle.max_tokens:
            raise ValueError(
                f"`bundle.decode` is {recipe.bundle.decode}, "
                f"too many for conversations of at most {recipe.bundle.max_tokens} tokens"
            )
    except ValueError as error:
        raise UsageError(f"recipe {file}: {error}", remedy="compare it with pipeline/recipes/gemma3n.toml") from error
    return recipe


def _build(kind: Any, value: object, where: str) -> object:
    """`value` (from TOML) as an instance of type `kind`; `where` names it in errors."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        return _build_dataclass(kind, value, where)
    if origin is tuple:
        return tuple(_build(arguments[0], item, f"{where}[{i}]") for i, item in enumerate(_expect(list, value, where)))
    if origin is Mapping:
        return {key: _build(arguments[1], item, f"{where}.{key}") for key, item in _expect(dict, value, where).items()}
    if origin is Literal:
        if value not in arguments:
            raise ValueError(f"`{where}` is {value!r}, expected one of {', '.join(map(repr, arguments))}")
        return value
    if arguments:  # `float | None`: TOML has no null, so a value that is there has the first type
        return _build(arguments[0], value, where)
    if kind in (int, float):
        return _build_number(kind, value, where)
    return _expect(kind, value, where)


def _build_number(kind: type, value: object, where: str) -> object:
    """Integers in a recipe are counts, floats are limits; one that is not finite would judge nothing."""
    number = _expect(int if kind is float and type(value) is int else kind, value, where)
    least = 1 if kind is int else 0
    if not least <= number < 2**63:
        raise ValueError(f"`{where}` is {value!r}, expected a finite number of at least {least}")
    return kind(number)


def _expect(kind: type, value: object, where: str) -> Any:
    if not isinstance(value, kind) or (kind is not bool and isinstance(value, bool)):
        raise ValueError(f"`{where}` is {value!r}, expected {kind.__name__}")
    return value


def _build_dataclass(kind: Any, value: object, where: str) -> object:
    table = dict(_expect(dict, value, where))
    types = typing.get_type_hints(kind)
    arguments = {}
    for field in dataclasses.fields(kind):
        if field.name in table:
            arguments[field.name] = _build(types[field.name], table.pop(field.name), f"{where}.{field.name}")
        elif field.default is dataclasses.MISSING:
            raise ValueError(f"`{where}.{field.name}` is missing")
        if field.default is dataclasses.MISSING and arguments[field.name] in ((), {}, ""):
            raise ValueError(f"`{where}.{field.name}` is empty")
    if table:
        raise ValueError(f"unknown key {', '.join(f'`{where}.{key}`' for key in sorted(table))}")
    return kind(**arguments)
