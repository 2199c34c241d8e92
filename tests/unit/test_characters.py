"""No character of an answer is lost where tokens end amid one."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from pipeline.runtime.characters import WholeCharacters


class Library:
    """What the runtime's library says of a chunk, which is its bytes and whether it is the last."""

    name = "litert-lm"

    def litert_lm_stream_chunk_get_text(self, chunk: tuple[bytes | None, bool]) -> bytes | None:
        return chunk[0]

    def litert_lm_stream_chunk_is_final(self, chunk: tuple[bytes | None, bool]) -> bool:
        return chunk[1]


def streamed(parts: list[bytes | None]) -> list[str]:
    """What the Python interface makes of the parts."""
    library: Any = WholeCharacters(Library())  # type: ignore[arg-type]
    assert library.name == "litert-lm"
    chunks = [library.litert_lm_stream_chunk_get_text((part, False)) for part in parts]
    return [chunk.decode("utf-8") for chunk in [*chunks, library.litert_lm_stream_chunk_get_text((None, True))]]


@given(st.text(max_size=20), st.lists(st.integers(0, 80), max_size=12))
def test_where_the_bytes_are_cut_does_not_matter(text: str, cuts: list[int]) -> None:
    data = text.encode("utf-8", "ignore")
    edges = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    assert "".join(streamed([data[a:b] for a, b in zip(edges, edges[1:], strict=False)])) == data.decode("utf-8")


def test_what_is_no_character_is_shown_as_such_at_the_end() -> None:
    assert streamed([b"a", b"\xef\xbc"]) == ["a", "", "\N{REPLACEMENT CHARACTER}"]
    assert "".join(streamed(["！".encode()[:1], None, "！".encode()[1:]])) == "！"
