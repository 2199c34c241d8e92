"""Sections of the shipped model whose repacked weights are a file, as verify runs them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from line import Line

from pipeline.core.errors import IntegrityError
from pipeline.judge import recorded
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


def test_what_is_recorded_is_what_follows_prefills_and_tokens(built: Line) -> None:
    sections = Sections(built.root / "int8")
    ids = [2, *(7 * place % 1500 for place in range(1, recorded.needed(sections)))]
    said = recorded.record(sections, ids)
    conversation, (short, long) = Conversation(sections), sections.prefills
    conversation.prefill(ids[:long])
    conversation.prefill(ids[long : long + short])
    assert said["prefilled"] == short + long and len(said["rows"]) == recorded.PLACES == len(ids) - short - long
    for token, row in zip(ids[short + long :], said["rows"], strict=True):
        logits = conversation.decode(token)
        logs = logits - np.log(np.exp(logits).sum())
        assert row["tokens"][0] == logits.argmax() and len(set(row["tokens"])) == recorded.LIKELIEST
        assert np.allclose(row["logs"], logs[row["tokens"]], atol=1e-4)
        assert min(row["logs"]) >= np.delete(logs, row["tokens"]).max() - 1e-4


def test_what_is_no_decoder_is_refused(tmp_path: Path) -> None:
    (tmp_path / DECODER).write_bytes(b"nothing")
    with pytest.raises(IntegrityError, match=r"decoder\.tflite can't be loaded"):
        Sections(tmp_path, weights=tmp_path / "weights")


def test_native_code_says_nothing_while_a_file_runs(
    built: Line, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    script = (
        "import sys, numpy; from pathlib import Path; from pipeline.runtime.litert import MappedModel\n"
        "run = MappedModel(Path(sys.argv[1]), Path(sys.argv[2]), 1).get_signature_runner('decode')\n"
        "run(**{name: numpy.zeros(put['shape'], put['dtype']) for name, put in run.get_input_details().items()})"
    )
    decoder = str(built.root / "fp32" / "decoder.tflite")
    subprocess.run([sys.executable, "-c", script, decoder, str(tmp_path / "packed")], check=True)
    assert not capfd.readouterr().err
