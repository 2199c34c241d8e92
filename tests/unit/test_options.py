"""The command line that is made from a frozen dataclass."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from pipeline import chat, plan, reproduce, tune
from pipeline.core import options


@dataclass(frozen=True, kw_only=True)
class Every:
    """A field of each kind."""

    file: Path = field(metadata={"help": "by its place"})
    text: str = ""
    count: int | None = None
    share: float = 0.5
    own: Path | None = None
    section: Literal["int8", "int4"] = "int8"
    most_names: tuple[str, ...] = field(default=(), metadata={"choices": ("a", "b")})


def test_a_field_is_an_option_and_one_without_a_default_a_word() -> None:
    assert options.read("x", "", Every, ["here"]) == Every(file=Path("here"))
    words = ["--text", "a", "--count", "3", "--share", ".25", "--own", "f", "--section", "int4"]
    words += ["--most-names", "b", "a"]
    expected = Every(
        file=Path("x"), text="a", count=3, share=0.25, own=Path("f"), section="int4", most_names=("b", "a")
    )
    assert options.read("x", "", Every, ["x", *words]) == expected


@pytest.mark.parametrize(
    "words", ["", "x --count 0", "x --count -1", "x --count ½", "x --section fp16", "x --most-names c", "x --other 1"]
)
def test_what_does_not_fit_ends_with_2(words: str) -> None:
    with pytest.raises(SystemExit, match="2"):
        options.read("x", "", Every, words.split())


@pytest.mark.parametrize("kind", [plan.Options, tune.Options, reproduce.Options, chat.Options])
def test_commands_hold_what_they_were_told_and_nothing_can_change_it(kind: type) -> None:
    made = kind(**({"bundle": Path("x")} if kind is chat.Options else {}))
    for name in (entry.name for entry in dataclasses.fields(kind)):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(made, name, None)


def test_no_namespace_leaves_the_one_place_that_reads_it() -> None:
    sources = sorted(Path(options.__file__).parent.parent.rglob("*.py"))
    assert {file.name for file in sources if re.search(r"\bNamespace\b", file.read_text("utf-8"))} == {"options.py"}
