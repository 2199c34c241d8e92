"""Thoughts are told from answers wherever the text is cut."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from pipeline.runtime.thoughts import Channel

GEMMA = Channel("<|channel>thought\n", "<channel|>")


def joined(pieces: list[str]) -> tuple[str, str]:
    """What is thought and what is answered."""
    found = list(GEMMA.split(pieces))
    return (
        "".join(text for thinking, text in found if thinking),
        "".join(text for thought, text in found if not thought),
    )


@given(
    st.lists(st.tuples(st.text("ab<|chanel>\n", max_size=6), st.text("ab<|chanel>\n", max_size=6)), max_size=3),
    st.lists(st.integers(0, 99), max_size=12),
)
def test_where_the_text_is_cut_does_not_matter(turns: list[tuple[str, str]], cuts: list[int]) -> None:
    text = "".join(f"{GEMMA.start}{thought}{GEMMA.end}{answer}" for thought, answer in turns)
    edges = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    pieces = [text[start:end] for start, end in zip(edges, edges[1:], strict=False)]
    assert joined(pieces) == joined([text])
    if not any(mark in part for turn in turns for part in turn for mark in (GEMMA.start, GEMMA.end)):
        assert sum(map(len, joined(pieces))) == len(text) - len(turns) * (len(GEMMA.start) + len(GEMMA.end))


def test_thoughts_that_are_not_finished_stay_thoughts() -> None:
    assert joined(["<|channel>thou", "ght\nwell", ", <chan"]) == ("well, <chan", "")


def test_what_only_looks_like_a_beginning_comes_out_at_the_end() -> None:
    assert joined(["a <|channel>", "b", " <|chan"]) == ("", "a <|channel>b <|chan")


def test_a_piece_comes_as_soon_as_it_is_sure() -> None:
    def pieces() -> object:
        yield "Hello"
        raise AssertionError("the first piece was sure")

    assert next(GEMMA.split(pieces())) == (False, "Hello")  # type: ignore[arg-type]
