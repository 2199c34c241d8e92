"""The comparison with llama.cpp: both sides scored by the same rule, and figures that become a table."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest

from pipeline.core.recipe import PROJECT
from pipeline.judge.reference import Head
from tools import figures, llama, rival, tables
from tools.real_models import REAL_MODELS
from tools.rival import Texts

COUNT, LENGTH, WIDTH, VOCABULARY = 5, 16, 8, 50


@pytest.fixture
def texts() -> Texts:
    random = np.random.default_rng(7)
    return Texts(
        tokens=random.integers(0, VOCABULARY, (COUNT, LENGTH + 1), dtype=np.int32),
        states=random.normal(size=(COUNT, LENGTH, WIDTH)).astype(np.float32),
        head=Head(weight=random.normal(size=(VOCABULARY, WIDTH)).astype(np.float32), cap=None),
    )


def exact(texts: Texts) -> list[np.ndarray]:
    return [texts.head.logits(states) for states in texts.states]


def test_what_predicts_as_the_reference_does_is_not_apart(texts: Texts) -> None:
    found = texts.summary(iter(exact(texts)))
    assert (found.positions, found.blocks) == (COUNT * LENGTH, COUNT)
    assert found.kld.value == pytest.approx(0, abs=1e-12) and found.top1.value == 1
    assert found.perplexity_ratio.value == pytest.approx(1)


def test_distance_is_the_mean_over_all_positions_of_all_texts(texts: Texts) -> None:
    spoilt = exact(texts)
    spoilt[3] = spoilt[3] + np.random.default_rng(8).normal(size=spoilt[3].shape)
    found = texts.summary(iter(spoilt))

    def log_p(logits: np.ndarray) -> np.ndarray:
        return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))

    right, wrong = log_p(exact(texts)[3]), log_p(spoilt[3])
    assert found.kld.value == pytest.approx((np.exp(right) * (right - wrong)).sum() / (COUNT * LENGTH))
    rows, following = np.arange(LENGTH), texts.tokens[3, 1:]
    change = (right[rows, following] - wrong[rows, following]).sum() / (COUNT * LENGTH)
    assert found.perplexity_ratio.value == pytest.approx(np.exp(change))


@pytest.mark.parametrize("count", [COUNT - 1, COUNT + 1])
def test_a_side_that_answers_for_too_few_or_too_many_texts_is_refused(texts: Texts, count: int) -> None:
    with pytest.raises(ValueError, match="argument"):
        texts.summary(iter([exact(texts)[0]] * count))


def made_by_hand(texts: Texts, model: str = "gemma3", precision: str = "int8") -> dict[str, Any]:
    noisy = [logits + 0.1 * np.random.default_rng(9).normal(size=logits.shape) for logits in exact(texts)]
    rates = {"prefill_tokens_per_s": 400.0, "decode_tokens_per_s": 50.0}
    return {
        "model": model,
        "precision": precision,
        "files": {
            "ours": {"size": 277_500_000, **rival.quality(texts.summary(iter(noisy))), **rates},
            "llama.cpp": {
                "size": 291_500_000,
                **rival.quality(texts.summary(iter(noisy))),
                **rates,
                "prefill_tokens_per_s": 500.0,
            },
        },
        "bindings": "0.3.36",
        "date": "2026-11-24",
        "threads": 2,
        "cpu": "AMD EPYC",
        "prompt_tokens": 128,
        "decode_tokens": 128,
        "rounds": 5,
    }


def test_the_readme_has_a_row_each_and_their_ratio(texts: Texts) -> None:
    (table,) = figures.rival(made_by_hand(texts)).values()
    rows = tables.markdown(table)
    assert {row.count("|") for row in rows} == {8}
    assert rows[2].startswith("| this project, int8 | 277.5 MB | ") and rows[2].endswith("| 400 tok/s | 50.0 tok/s |")
    assert rows[4] == "| this project, int8 / llama.cpp, Q8_0 | 0.95 |  |  |  | 0.80 | 1.00 |"
    assert f"{COUNT * LENGTH} positions of {COUNT} held-out texts" in table.about
    assert tables.origins(table) == [
        "Measured by `nox -s rival` on 2026-11-24, 2 threads (AMD EPYC); "
        "llama.cpp's source in llama-cpp-python 0.3.36, built for this processor."
    ]


def test_each_real_model_has_a_table_of_its_own(texts: Texts) -> None:
    named = {name: figures.rival(made_by_hand(texts, name)) for name in REAL_MODELS}
    assert [[*found] for found in named.values()] == [["bundle_rival"], ["smollm2_rival"], ["smollm2_growing_rival"]]
    table = named["smollm2"]["smollm2_rival"]
    assert table.title.startswith("SmolLM2-135M-Instruct's") and "-s rival -- smollm2`" in table.measured.command


def test_int4_is_held_against_llama_cpps_4_bits(texts: Texts) -> None:
    ((name, table),) = figures.rival(made_by_hand(texts, "smollm2", "int4")).items()
    assert name == "smollm2_int4_rival" and table.picture == ""
    assert [row.name for row in table.rows] == ["this project, int4", "llama.cpp, Q4_0"]
    assert "int4 bundle beside llama.cpp's Q4_0 of" in table.title
    assert table.measured.command == "`nox -s rival -- smollm2 --precision int4`"


@pytest.mark.parametrize("start", [[], [2]])
def test_the_prompt_has_its_length_with_and_without_a_start_token(start: list[int]) -> None:
    def tokenize(text: bytes) -> list[int]:
        return start + [7] * text.count(b" a")

    assert llama.words(tokenize, " a", 5) == (start + [7] * 5)[:5]
    with pytest.raises(RuntimeError, match="is 10 tokens, not 5"):
        llama.words(lambda text: [7, 7] * text.count(b" a"), " a", 5)


def test_the_terminal_has_the_same_figures(texts: Texts) -> None:
    head, ours, theirs = rival.table(made_by_hand(texts))
    assert head.split()[:2] == ["size", "MB"] and ours.split()[:2] == ["ours", "277.5"]
    assert theirs.split()[-2:] == ["500", "50.0"]


def test_the_source_is_pinned_by_its_hash() -> None:
    text = (PROJECT / "locks" / "llama.txt").read_text(encoding="utf-8")
    assert re.search(r"^llama-cpp-python==[\d.]+ \\\n    --hash=sha256:[0-9a-f]{64}\n$", text, re.MULTILINE)
