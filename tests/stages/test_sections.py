"""Sections of the shipped model whose repacked weights are a file, as verify runs them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from line import Line

from pipeline.core.errors import IntegrityError
from pipeline.runtime.sections import DECODER, Conversation, Sections


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_repacked_weights_in_a_file_change_nothing(built: Line, precision: str, tmp_path: Path) -> None:
    folder, weights = built.root / precision, tmp_path / "weights"
    spoken = []
    for sections in (Sections(folder), Sections(folder, weights=weights)):
        first, second = Conversation(sections), Conversation(sections)
        first.prefill([2, *range(10, 30)])
        second.decode(2)  # in between: each has a cache of its own
        spoken.append(np.stack([first.decode(5), second.decode(6), first.decode(7)]))
    assert np.array_equal(*spoken)
    assert weights.stat().st_size > (folder / DECODER).stat().st_size / 2


def test_what_is_no_decoder_is_refused(tmp_path: Path) -> None:
    (tmp_path / DECODER).write_bytes(b"nothing")
    with pytest.raises(IntegrityError, match=r"decoder\.tflite can't be loaded"):
        Sections(tmp_path, weights=tmp_path / "weights")
