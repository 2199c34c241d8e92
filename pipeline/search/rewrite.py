"""A recipe with other values in one section: its comments and layout stay, only what changes is rewritten."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping, Sequence

from pipeline.core.errors import UsageError

_WIDTH = 120
_MARK = "# tune: "


def with_values(text: str, section: str, values: Mapping[str, object], comment: Sequence[str] = ()) -> str:
    """The recipe `text` with `values` in its `section`, and `comment` lines above that section's keys.

    Comments of an earlier tune go.
    A line whose value stays is left alone; one that is rewritten loses the comment behind its value, which was about
    the old one. An empty value that the recipe does not mention is not written.

    Raises:
        UsageError: the recipe has no such section of its own.
    """
    rows = _opened(text.split("\n"), section)
    start = next((place + 1 for place, row in enumerate(rows) if row.partition("#")[0].strip() == f"[{section}]"), 0)
    if not start:
        raise UsageError(f"the recipe has no [{section}] section", remedy="start from pipeline/recipes/gemma3n.toml")
    # A line that begins with a bracket begins a table, mostly; where not, reading back finds it.
    stop = next((place for place in range(start, len(rows)) if rows[place].startswith("[")), len(rows))
    own = [row for row in rows[start:stop] if not row.startswith(_MARK)]
    for key, value in values.items():
        own = _set(own, key, value)
    made = "\n".join([*rows[:start], *(f"{_MARK}{line}" for line in comment), *own, *rows[stop:]])
    wanted = tomllib.loads(text)
    # Read back as TOML: lines were moved as text, and any TOML may have been there.
    wanted[section] |= {key: value for key, value in values.items() if key in wanted[section] or not _empty(value)}
    if tomllib.loads(made) != wanted:
        raise UsageError(f"[{section}] of the recipe can't be rewritten", remedy="write one `key = value` a line")
    return made


def _opened(rows: list[str], section: str) -> list[str]:
    """The recipe with `section` as a table of its own, where it stands inline: `section = { key = value }`."""
    for start, row in enumerate(rows):
        if row.startswith("["):  # keys of the recipe itself end here
            break
        if row.partition("=")[0].strip() == section:
            stop, table = _extent(rows, start)
            held = table.items() if isinstance(table, dict) else ()
            lines = [line for key, value in held for line in _line(key, value)]
            return [*rows[:start], *rows[stop:], f"[{section}]", *lines, ""]
    return rows


def _set(rows: list[str], key: str, value: object) -> list[str]:
    """The section with `key` at `value`; a new key comes after the last one."""
    for start, row in enumerate(rows):
        if row.partition("=")[0].strip() != key:
            continue
        stop, old = _extent(rows, start)
        # 1, 1.0 and true are equal in Python and three values in TOML.
        same = type(old) is type(value) and old == value
        return rows if same else [*rows[:start], *_line(key, value), *rows[stop:]]
    if _empty(value):
        return rows
    last = max((place for place, row in enumerate(rows) if row.partition("#")[0].strip()), default=-1) + 1
    return [*rows[:last], *_line(key, value), *rows[last:]]


def _extent(rows: Sequence[str], start: int) -> tuple[int, object]:
    """Where the entry that begins in row `start` ends, and its value: it is whole once it is TOML."""
    for stop in range(start + 1, len(rows) + 1):
        try:
            return stop, next(iter(tomllib.loads("\n".join(rows[start:stop])).values()))
        except tomllib.TOMLDecodeError:
            continue
    raise UsageError("the section of the recipe can't be read", remedy="correct it")


def _empty(value: object) -> bool:
    return value in ([], {}, False, "")


def _line(key: str, value: object) -> list[str]:
    """`key = value`, an array that is too long with an item a line."""
    whole = f"{key} = {literal(value)}"
    if len(whole) <= _WIDTH or not isinstance(value, list):
        return [whole]
    return [f"{key} = [", *(f"    {literal(item)}," for item in value), "]"]


def literal(value: object) -> str:
    """`value` in TOML; text between single quotes where it can be, so that regular expressions stay readable."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        plain = "'" not in value and value.isprintable() and "\\" in value
        # JSON's text is TOML's, but for one control character that JSON takes as it is.
        return f"'{value}'" if plain else json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, list):
        return f"[{', '.join(map(literal, value))}]"
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{key} = {literal(item)}" for key, item in value.items()) + " }"
    return repr(value)
