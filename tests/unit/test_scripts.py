"""Positions by script: what a text and a token count as, and how a script's loss is held against Latin's."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from pipeline.core.recipe import PROJECT
from pipeline.judge import metrics, scripts


@pytest.mark.parametrize(
    ("text", "script"),
    [
        ("ⵉⵙⵙⴰⴼⵖ ⴷ ⵓⴳⵔⴰⵡ", "Tifinagh"),
        ("كل شخص", "Arabic"),
        ("人人有权", "CJK"),
        ("すべての人は", "CJK"),
        ("모든 사람", "CJK"),
        ("Каждый человек", "Cyrillic"),
        ("Tout individu a droit à l’éducation.", "Latin"),
        ("1948, 10!", ""),
        ("🐁 🍚", "emoji"),
        ("def _of(x): return {y[0]: (y[1] + 1) for y in x if y}", "code"),
    ],
)
def test_a_text_has_the_script_of_most_of_its_letters(text: str, script: str) -> None:
    assert scripts.of_text(text) == script


def test_sources_are_code_and_prose_is_none() -> None:
    sources = [file.read_text(encoding="utf-8") for file in (PROJECT / "pipeline").rglob("*.py")]
    assert sum(scripts.of_text(text) == "code" for text in sources) > 0.8 * len(sources)
    prose = (PROJECT / "examples/tiny-gemma3n/corpus/verification.txt").read_text(encoding="utf-8").splitlines()
    assert not [line for line in prose if scripts.of_text(line) == "code"]


def test_a_token_without_a_letter_belongs_to_its_neighbours() -> None:
    # Tokens are bytes, as in vocabularies that know little of a script.
    text = "The first ⵉⵙⵙⴰⴼⵖⵓⴳⵔⴰⵡ, the last 🐁"
    ids = list(text.encode())
    found = scripts.of_tokens(ids, lambda part: bytes(part).decode("utf-8", errors="replace"))
    assert found[0] == found[3] == found[-6] == "Latin"  # a letter, a space, a space before the emoji
    middle = len("The first ⵉⵙⵙ".encode())
    assert found[middle : middle + 6] == ["Tifinagh"] * 6


def scores(kld: NDArray[np.float64]) -> metrics.Scores:
    ones = np.ones_like(kld)
    return metrics.Scores(
        kld=kld,
        top1=ones,
        top5=ones,
        tie=ones,
        margin=ones,
        nll=ones,
        reference_nll=ones,
        squared_error=ones,
        squared_reference=ones,
        max_abs=ones,
    )


def test_a_script_is_held_against_latin() -> None:
    found = ["Latin"] * 320 + ["Tifinagh"] * 96 + [""] * 16
    kld = np.r_[np.full(320, 0.002), np.full(96, 0.005), np.full(16, 9.0)]
    figures = scripts.figures(scores(kld), np.arange(432) // 16, found)
    assert list(figures) == ["Latin", "Tifinagh"] and figures["Latin"].kld_ratio is None
    own = figures["Tifinagh"]
    assert own.positions == 96 and own.kld.value == pytest.approx(0.005)
    assert own.kld_ratio and own.kld_ratio.value == pytest.approx(2.5) and own.kld_ratio.low > 2.4


def test_without_latin_there_is_no_ratio() -> None:
    figures = scripts.figures(scores(np.full(64, 0.1)), np.arange(64) // 16, ["Arabic"] * 64)
    assert figures["Arabic"].kld_ratio is None
