"""Whole characters from LiteRT-LM's stream.

Tokens of a byte-level vocabulary may end amid a character. The runtime passes such bytes on as they come, and its
Python interface decodes each chunk by itself: the character is lost, with a traceback on standard error (litert-lm
0.18.1).
"""

from __future__ import annotations

import codecs
import ctypes


class WholeCharacters:
    """The runtime's `library` for one answer, its chunks of text cut between characters.

    Bytes that are no text become U+FFFD, as tokenizers have it.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def __getattr__(self, name: str) -> object:
        return getattr(self._library, name)

    def litert_lm_stream_chunk_get_text(self, chunk: object) -> bytes:
        """The characters that `chunk` completes, as UTF-8; with the last one all that is left."""
        data = self._library.litert_lm_stream_chunk_get_text(chunk) or b""
        final = bool(self._library.litert_lm_stream_chunk_is_final(chunk))
        return self._decoder.decode(data, final).encode("utf-8")
