"""TOML files that people write, read into frozen dataclasses: a wrong key or value is named, nothing wrong passes."""

from __future__ import annotations

import dataclasses
import difflib
import re
import tomllib
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NewType, TypeVar

from pipeline.core.errors import UsageError
from pipeline.core.records import Record

SCHEMA = 1
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A kind of file: what it is called, the setting that names one, and one to start from."""

    name: str
    setting: str
    example: str


Index = NewType("Index", int)
"""A whole number that may be 0."""
Pattern = NewType("Pattern", str)
"""A regular expression."""
Size = NewType("Size", int)
"""Bytes, written as "2 GiB"."""
_UNITS = {"KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "kB": 10**3, "MB": 10**6, "GB": 10**9}
Shape = NewType("Shape", str)
"""Whole numbers of at least 1, two of them, as `1x128`."""


def read(file: Path, kind: Kind) -> bytes:
    """The bytes of `file`.

    Raises:
        UsageError: it can't be read.
    """
    try:
        return file.read_bytes()
    except OSError as error:
        raise UsageError(
            f"can't read {kind.name} {file}: {error.strerror}",
            remedy=f"set {kind.setting}= to a file in {kind.example.rpartition('/')[0]}/",
        ) from error


def parse(data: bytes, file: Path | str, kind: Kind) -> dict[str, object]:
    """The table in `data`, without its `schema`; errors call it `file`.

    Raises:
        UsageError: it is not TOML, or of another schema.
    """
    try:
        table = tomllib.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{kind.name} {file} is not TOML: {error}", remedy="correct that line") from error
    schema = table.pop("schema", None)
    # `schema = true` equals 1 in Python.
    if type(schema) is not int or schema != SCHEMA:
        raise UsageError(f"{kind.name} {file} has no `schema = {SCHEMA}`", remedy=f"start from {kind.example}")
    return table


def build(kind: object, value: object, where: str) -> object:
    """`value` (from TOML) as an instance of type `kind`; `where` names it in errors.

    A field of a dataclass whose key had another name once says so: `field(metadata={"was": "old_name"})`.

    Raises:
        ValueError: a key is unknown, renamed or missing, or a value is of another kind, empty or out of range.
    """
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        return _build_dataclass(kind, value, where)
    if origin is tuple:
        items = _expect(list, value, where)
        # tuple[T, ...] takes any number, tuple[A, B] its own.
        kinds = arguments[:1] * len(items) if Ellipsis in arguments else arguments
        if len(items) != len(kinds):
            raise ValueError(f"`{where}` is {value!r}, expected {len(kinds)} values")
        return tuple(build(*pair, f"{where}[{i}]") for i, pair in enumerate(zip(kinds, items, strict=True)))
    if origin is Mapping:
        return {key: build(arguments[1], item, f"{where}.{key}") for key, item in _expect(dict, value, where).items()}
    if origin is Literal:
        if value not in arguments:
            raise ValueError(f"`{where}` is {value!r}, expected one of {', '.join(map(repr, arguments))}")
        return value
    if arguments:  # `float | None`: TOML has no null, so a value that is there has the first type
        return build(arguments[0], value, where)
    if kind is Index:
        return _build_number(int, value, where, least=0)
    if kind is Pattern:
        return _build_pattern(value, where)
    if kind is Size:
        return _build_size(value, where)
    if kind is Shape:
        if not re.fullmatch(r"[1-9]\d*x[1-9]\d*", _expect(str, value, where), re.ASCII):
            raise ValueError(f"`{where}` is {value!r}, expected a shape such as '1x128'")
        return value
    if kind is int or kind is float:
        return _build_number(kind, value, where, least=1 if kind is int else 0)
    assert isinstance(kind, type)
    return _expect(kind, value, where)


def _build_number(kind: type[int] | type[float], value: object, where: str, least: int) -> object:
    """Integers are counts, floats are limits; one that is not finite would judge nothing."""
    number = _expect(int if kind is float and type(value) is int else kind, value, where)
    # NaN fails every comparison, infinity the last one.
    if not least <= number < 2**63:
        raise ValueError(f"`{where}` is {value!r}, expected a finite number of at least {least}")
    return kind(number)


def _build_pattern(value: object, where: str) -> object:
    try:
        re.compile(_expect(str, value, where))
    except re.error as error:
        raise ValueError(f"`{where}` is {value!r}, no regular expression: {error}") from error
    return value


def _build_size(value: object, where: str) -> object:
    number, _, unit = _expect(str, value, where).partition(" ")
    if not re.fullmatch(r"[1-9]\d{0,8}(\.\d+)?", number) or unit not in _UNITS:
        raise ValueError(f"`{where}` is {value!r}, expected a number and one of {', '.join(_UNITS)}, as in '2 GiB'")
    return int(float(number) * _UNITS[unit])


def _expect(kind: type[T], value: object, where: str) -> T:
    # true and false are ints in Python, and would pass for counts.
    if not isinstance(value, kind) or (kind is not bool and isinstance(value, bool)):
        raise ValueError(f"`{where}` is {value!r}, expected {kind.__name__}")
    return value


def _build_dataclass(kind: type[Record], value: object, where: str) -> object:
    table = dict(_expect(dict, value, where))
    # Unknown keys before missing ones: a misspelt key is both, and its own name helps more.
    _check_keys(kind, table, where)
    types = typing.get_type_hints(kind)
    arguments = {}
    for field in dataclasses.fields(kind):
        if field.name in table:
            arguments[field.name] = build(types[field.name], table[field.name], f"{where}.{field.name}")
        elif field.default is dataclasses.MISSING:
            raise ValueError(f"`{where}.{field.name}` is missing")
        if field.default is dataclasses.MISSING and arguments[field.name] in ((), {}, ""):
            raise ValueError(f"`{where}.{field.name}` is empty")
    return kind(**arguments)


def _check_keys(kind: type[Record], table: Mapping[str, object], where: str) -> None:
    """Refuse keys that `kind` hasn't: one that it had with its new name, another with the nearest there is."""
    fields = {field.name: field for field in dataclasses.fields(kind)}
    renamed = {old: name for name, field in fields.items() if (old := field.metadata.get("was"))}
    for key in sorted(table.keys() - fields.keys()):
        if key in renamed:
            raise ValueError(f"`{where}.{key}` is now called `{renamed[key]}`")
        nearest = difflib.get_close_matches(key, fields, n=1)
        hint = f"; the nearest that there is: `{nearest[0]}`" if nearest else ""
        raise ValueError(f"unknown key `{where}.{key}`{hint}")
