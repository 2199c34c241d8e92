"""What a stage may be told on its command line: a frozen dataclass, from which the parser is made.

    @dataclass(frozen=True, kw_only=True)
    class Options(options.Options):
        text: Path | None = field(default=None, metadata={"help": "your own text", "metavar": "FILE"})

is `--text FILE`. Known are `str`, `int`, `Path`, `Literal` (a choice), each also with `| None`, and `tuple[str, ...]`.
Every field has a default; its metadata is for argparse.
"""

from __future__ import annotations

import argparse
import dataclasses
import types
import typing
from dataclasses import dataclass
from typing import Literal, TypeVar

T = TypeVar("T", bound="Options")


@dataclass(frozen=True, kw_only=True)
class Options:
    """The options of a stage that has none of its own."""

    def folder(self, stage: str) -> str:
        """The name of the folder that stage `stage` writes."""
        return stage

    def judged(self) -> tuple[str, ...] | None:
        """The folders of the step graphs to judge; None: the recipe's."""
        return None


def add_to(parser: argparse.ArgumentParser, kind: type[Options]) -> None:
    """Give `parser` the options of `kind`."""
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        option = hints[field.name]
        if typing.get_origin(option) in (types.UnionType, typing.Union):
            option = typing.get_args(option)[0]
        choices = typing.get_args(option) if typing.get_origin(option) is Literal else None
        several = typing.get_origin(option) is tuple
        parser.add_argument(
            f"--{field.name.replace('_', '-')}",
            type=str if choices or several else option,
            choices=choices,
            nargs="*" if several else None,
            default=field.default,
            **field.metadata,
        )


def of(arguments: argparse.Namespace, kind: type[T]) -> T:
    """The options of `kind` as they were parsed."""
    told = {field.name: getattr(arguments, field.name) for field in dataclasses.fields(kind)}
    return kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in told.items()})
