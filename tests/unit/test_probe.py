"""The probe's decoder, run as LiteRT-LM runs it: what it spells is what it was given, and where."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ai_edge_litert.interpreter import Interpreter

from pipeline.judge import handed, probe
from pipeline.judge.probe import Given, Probe

START, ROWS, BEHIND, LENGTH = 9, 30, 6, 512
ALPHABET = "0123456789ABCDEFGHIJKLMNOPQRSTUV"
_DRAW = np.random.default_rng(0)
SOFT = _DRAW.standard_normal((ROWS, 48)).astype(np.float32)
INPUTS = _DRAW.standard_normal((4, 8)).astype(np.float32)


def answer(
    decoder: Probe, folder: Path, *, moved: int = 0, sees: int = 0, other: bool = False, inputs: Any = INPUTS
) -> str:
    """What it spells after a prompt in which `SOFT` stands, `moved` too far on or so many positions `sees` too many."""
    file = folder / "probe.tflite"
    decoder.graph().write(file)
    interpreter = Interpreter(model_path=str(file))
    prompt = START + ROWS + BEHIND
    given: dict[str, Any] = {
        "embeddings": np.zeros((1, probe.PREFILL, SOFT.shape[1]), np.float32),
        "input_pos": np.zeros(probe.PREFILL, np.int32),
        "mask": np.full((1, 1, probe.PREFILL, LENGTH), -2e38, np.float32),
        "kv_cache_k_0": np.zeros((1, 1, LENGTH, decoder.columns), np.float32),
        "kv_cache_v_0": np.zeros((1, 1, 1, LENGTH), np.float32),
    }
    given["embeddings"][0, START + moved : START + moved + ROWS] = SOFT
    given["input_pos"][:prompt] = np.arange(prompt)
    for row in range(prompt):
        given["mask"][0, 0, row, : row + 1 + sees] = 0
    if decoder.per_layer.size:
        given["per_layer_embeddings"] = np.tile(inputs[::-1] if other else inputs, (1, probe.PREFILL, 1, 1))
    made = interpreter.get_signature_runner(f"prefill_{probe.PREFILL}")(**given)
    decode, text = interpreter.get_signature_runner("decode"), ""
    one = {name: value[:, :1] for name, value in given.items() if name.endswith("embeddings")}
    for position in range(prompt - 1, prompt - 1 + probe.DIGITS * (probe.VALUES + 1) - 1):
        kept = {name: made[name] for name in made if name.startswith("kv_cache_")}
        where = {"input_pos": np.array([position], np.int32), "mask": given["mask"][:, :, :1]}
        made = decode(**one, **where, **kept)
        text += ALPHABET[int(made["logits"][0, 0].argmax()) - 100]
    return text


@pytest.mark.parametrize(
    ("defect", "red"),
    [
        ({}, set()),
        ({"moved": 1}, {"soft"}),
        ({"sees": 1}, {"places"}),
        ({"sees": -1}, {"places"}),
        ({"other": True}, {"inputs"}),
    ],
)
def test_each_defect_shows_where_it_is(defect: dict[str, Any], red: set[str], tmp_path: Path) -> None:
    vectors = {"a": SOFT, "short": SOFT[:1]}
    decoder = Probe(Given(start=START, vectors=vectors, per_layer=INPUTS), LENGTH, [*range(100, 132)], 200)
    prompt = handed._Prompt(START, BEHIND, "")
    read = handed._read(decoder, prompt, "a", answer(decoder, tmp_path, **defect), ALPHABET)
    errors = {"soft": handed._error(read.soft), "inputs": handed._error(read.per_layer), "places": read.misplaced}
    assert {name for name, error in errors.items() if error > 1e-10} == red
    assert len(read.soft[0]) > 40


def test_a_model_without_per_layer_inputs_has_a_probe_too(tmp_path: Path) -> None:
    none = np.zeros((0, 0), np.float32)
    decoder = Probe(Given(start=START, vectors={"a": SOFT}, per_layer=none), LENGTH, [*range(100, 132)], 200)
    read = handed._read(decoder, handed._Prompt(START, BEHIND, ""), "a", answer(decoder, tmp_path), ALPHABET)
    assert handed._error(read.soft) < 1e-10
    assert len(read.per_layer[0]) == read.misplaced == 0


def test_per_layer_inputs_of_zeros_are_zeros_or_wrong(tmp_path: Path) -> None:
    """As token 0 has them, which pads, in a model that transformers made: nothing ever trains its row."""
    none = np.zeros_like(INPUTS)
    decoder = Probe(Given(start=START, vectors={"a": SOFT}, per_layer=none), LENGTH, [*range(100, 132)], 200)
    for inputs, error in ((none, 0.0), (INPUTS, float("inf"))):
        text = answer(decoder, tmp_path, inputs=inputs)
        read = handed._read(decoder, handed._Prompt(START, BEHIND, ""), "a", text, ALPHABET)
        assert handed._error(read.per_layer) == error and len(read.per_layer[0])


def test_what_is_no_answer_of_a_probe_is_wrong() -> None:
    decoder = Probe(Given(start=START, vectors={"a": SOFT}, per_layer=INPUTS), LENGTH, [*range(100, 132)], 200)
    for text in ("", "words", "0" * 100):
        read = handed._read(decoder, handed._Prompt(START, BEHIND, ""), "a", text, ALPHABET)
        assert handed._error(read.soft) == float("inf")
        assert read.misplaced
