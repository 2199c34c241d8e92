"""What a stage or command may be told on its command line: a frozen dataclass, from which the parser is made.

    @dataclass(frozen=True, kw_only=True)
    class Options(options.Options):
        text: Path | None = field(default=None, metadata={"help": "your own text", "metavar": "FILE"})

is `--text FILE`; a field without a default is a word of its own, by its place. Known are `str`, `int` (a count, so at
least 1), `float`, `Path`, `Literal` (a choice), each also with `| None`, and `tuple[str, ...]`. A field's metadata is
for argparse.
"""

from __future__ import annotations

import argparse
import dataclasses
import types
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Options:
    """The options of a stage that has none of its own."""

    def folder(self, stage: str) -> str:
        """The name of the folder that stage `stage` writes."""
        return stage

    def judged(self) -> tuple[str, ...] | None:
        """The folders of the step graphs to judge; None: the recipe's."""
        return None


def read(name: str, summary: str, kind: type[T], argv: Sequence[str] | None = None) -> T:
    """What `argv`, else the process's command line, says to `pipeline.<name>`, which takes no more than `kind` has."""
    parser = parser_of(name, summary)
    add_to(parser, kind)
    return of(parser.parse_args(argv), kind)


def parser_of(name: str, summary: str) -> argparse.ArgumentParser:
    """An empty command line of `pipeline.<name>`."""
    return argparse.ArgumentParser(prog=f"python -m pipeline.{name}", description=summary)


def add_to(parser: argparse.ArgumentParser, kind: type) -> None:
    """Give `parser` the options of `kind`."""
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        option = hints[field.name]
        if typing.get_origin(option) in (types.UnionType, typing.Union):
            option = typing.get_args(option)[0]
        settings: dict[str, object] = {"type": _reader(option)}
        if typing.get_origin(option) is Literal:
            settings["choices"] = typing.get_args(option)
        if typing.get_origin(option) is tuple:
            settings["nargs"] = "*"
        name = field.name
        if field.default is not dataclasses.MISSING:
            name, settings["default"] = f"--{name.replace('_', '-')}", field.default
        parser.add_argument(name, **{**settings, **field.metadata})


def _reader(option: type) -> Callable[[str], object]:
    """What makes a value of the words of a command line."""
    if option is int:
        return _count
    return option if isinstance(option, type) and option is not tuple else str


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a number of at least 1")
    return int(text)


def of(arguments: argparse.Namespace, kind: type[T]) -> T:
    """The options of `kind` as they were parsed."""
    told = {field.name: getattr(arguments, field.name) for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    return kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in told.items()})
