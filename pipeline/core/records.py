"""Frozen dataclasses to JSON and back, so that what one stage writes another reads by name and type.

A field of a dataclass is a key of its table. One that has a default is left out of the JSON where it holds that; one
without is always there. Known are `str`, `int`, `float`, `bool`, `object` (anything), dataclasses, `Literal`,
`X | None`, `tuple` and `Mapping` of these.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import ClassVar, Literal, Protocol, TypeVar

T = TypeVar("T")
_WORDS = {str: "a text", int: "a whole number", float: "a number", bool: "true or false"}


class Record(Protocol):
    """An instance of any dataclass."""

    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[object]]]


def table(value: Record | Mapping[str, object]) -> dict[str, object]:
    """A dataclass, or what is made of such by name, as JSON holds it."""
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    held = [(field, getattr(value, field.name)) for field in dataclasses.fields(value)]
    told = [(field, item) for field, item in held if field.default is dataclasses.MISSING or item != field.default]
    return {field.name: _plain(item) for field, item in told}


def _plain(value: object) -> object:
    if isinstance(value, Mapping) or (dataclasses.is_dataclass(value) and not isinstance(value, type)):
        return table(value)
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def build(kind: type[T], value: object, where: str = "") -> T:
    """`value`, as `table` gives it, as an instance of `kind`; `where` is its path, for errors.

    Raises:
        ValueError: a key is missing or unknown, or a value is of another kind; says which.
    """
    made: T = _build(kind, value, where)  # type: ignore[assignment]
    return made


def _build(kind: object, value: object, where: str) -> object:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind is object:
        return value
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        return _build_record(kind, value, where)
    if origin in (types.UnionType, typing.Union):
        first, none = arguments  # `X | None` is all that is known
        assert none is types.NoneType
        return None if value is None else _build(first, value, where)
    if origin is Literal:
        if value not in arguments:
            raise ValueError(f"`{where}` is {value!r}, none of {', '.join(map(repr, arguments))}")
        return value
    if origin is tuple:
        kinds = arguments[:1]
        if not isinstance(value, list):
            raise ValueError(f"`{where}` is {value!r}, not a list")
        return tuple(_build(kinds[0], item, f"{where}[{place}]") for place, item in enumerate(value))
    if origin is Mapping:
        return {name: _build(arguments[1], item, _path(where, name)) for name, item in _items(value, where)}
    return _build_leaf(kind, value, where)


def _build_record(kind: type[Record], value: object, where: str) -> object:
    table, hints = dict(_items(value, where)), typing.get_type_hints(kind)
    fields = {field.name: field for field in dataclasses.fields(kind)}
    if unknown := sorted(table.keys() - fields):
        raise ValueError(f"`{_path(where, unknown[0])}` is unknown")
    missing = [name for name, field in fields.items() if name not in table and field.default is dataclasses.MISSING]
    if missing:
        raise ValueError(f"`{_path(where, missing[0])}` is missing")
    return kind(**{name: _build(hints[name], item, _path(where, name)) for name, item in table.items()})


def _build_leaf(kind: object, value: object, where: str) -> object:
    """JSON has one kind of number: a whole one is a float too, but true is neither."""
    if kind is types.NoneType and value is None:
        return None
    fits = {str: str, int: int, float: int | float, bool: bool}
    assert kind in fits, f"no kind of JSON: {kind}"
    if not isinstance(value, fits[kind]) or (isinstance(value, bool) and kind is not bool):
        raise ValueError(f"`{where}` is {value!r}, not {_WORDS[kind]}")
    return float(value) if kind is float else value


def _items(value: object, where: str) -> list[tuple[str, object]]:
    if not isinstance(value, dict):
        raise ValueError(f"{f'`{where}`' if where else 'it'} is {value!r}, not a table")
    return list(value.items())


def _path(where: str, name: str) -> str:
    return f"{where}.{name}" if where else name
