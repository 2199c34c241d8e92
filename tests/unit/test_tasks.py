"""Tasks in, scores out: against sacrebleu's own corpus scores, hand-made cases, and Tifinagh."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF

from pipeline.core.errors import UsageError
from pipeline.judge import tasks
from pipeline.judge.tasks import Item

TIFINAGH = ["ⴰⵣⵓⵍ ⴼⵍⵍⴰⵡⵏ", "ⵎⴰⵏⵣⴰⴽⵉⵏ ⴰⵢⴰ ⵉⵎⴷⴷⵓⴽⴰⵍ?", "ⵜⴰⵎⴰⵣⵉⵖⵜ ⵜⴳⴰ ⵜⵓⵜⵍⴰⵢⵜ ⵏⵏⵖ"]


def item(*references: str) -> Item:
    return Item(messages=({"role": "user", "content": "?"},), references=references)


def scores(texts: list[str], items: list[Item]) -> dict[str, float]:
    return {name: each.value for name, each in tasks.scored(tasks.answers(texts, items)).items()}


def test_prompts_and_conversations_with_one_reference_or_more_are_read(tmp_path: Path) -> None:
    file = tmp_path / "task.jsonl"
    said = (("user", "a\u2028b"), ("model", "c"), ("user", "d"))
    turns = [{"role": role, "content": content} for role, content in said]
    rows = [{"prompt": "ⴰⵣⵓⵍ", "reference": "hello"}, {"messages": turns, "references": ["x", "y"]}]
    file.write_text("\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n", encoding="utf-8")
    first, second = tasks.read(file)
    assert (first.prompt, first.references, len(first.messages)) == ("ⴰⵣⵓⵍ", ("hello",), 1)
    assert (second.prompt, second.references) == ("d", ("x", "y")) and second.messages == tuple(turns)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "holds no prompt"),
        (b"\xff", "can't read"),
        (b"{}", "line 1: KeyError"),
        (b'{"prompt": "a", "reference": "b"}\n{"prompt": "a"}', "line 2"),
        (b'{"prompt": "a", "reference": 3}', "is no text"),
        (b'{"prompt": "a", "references": []}', "missing"),
        (b'{"prompt": "a", "references": "abc"}', "are no list"),
        (b'{"messages": [], "reference": "b"}', "missing"),
        (b'["a"]', "line 1"),
        (b"not json", "line 1"),
    ],
)
def test_what_is_no_task_is_refused(tmp_path: Path, content: bytes, says: str) -> None:
    (tmp_path / "t.jsonl").write_bytes(content)
    with pytest.raises(UsageError, match=says):
        tasks.read(tmp_path / "t.jsonl")


def test_a_model_that_answers_itself_has_every_point() -> None:
    said = [*TIFINAGH, "hello there, my good old friend"]
    found = tasks.scored(tasks.answers(said, [item(text) for text in said]))
    for name in tasks.METRICS:
        assert (found[name].value, found[name].low, found[name].high) == pytest.approx((100, 100, 100))


def test_answers_in_tifinagh_are_compared_letter_by_letter() -> None:
    items = [item(text) for text in TIFINAGH]
    wrong = [TIFINAGH[0][:-1] + "ⵖ", *TIFINAGH[1:]]
    assert scores(wrong, items)["exact"] == pytest.approx(200 / 3)
    assert 90 < scores(wrong, items)["chrf"] < 100
    assert scores(["ⵣ", "ⵣ", "ⵣ"], items)["chrf"] < 15


def test_spaces_at_the_ends_and_composed_letters_make_no_difference() -> None:
    text = "tamaziɣt ḍ é"
    assert scores([f"  {unicodedata.normalize('NFD', text)}\n"], [item("x", text)])["exact"] == 100


WORDS = ["ⴰⵣⵓⵍ", "the", "sea", "ⵣ", "is", "blue", "and", "."]
texts = st.lists(st.sampled_from(WORDS), min_size=1, max_size=12).map(" ".join)


@settings(max_examples=40)
@given(st.lists(st.tuples(texts, texts, texts), min_size=1, max_size=6))
def test_scores_are_those_of_sacrebleu(rows: list[tuple[str, str, str]]) -> None:
    said, one, other = (list(column) for column in zip(*rows, strict=True))
    found = scores(said, [item(*pair) for pair in zip(one, other, strict=True)])
    assert found["bleu"] == pytest.approx(BLEU(force=True).corpus_score(said, [one, other]).score)
    assert found["chrf"] == pytest.approx(CHRF().corpus_score(said, [one, other]).score)
    assert found["exact"] == pytest.approx(100 * np.mean([a in (b, c) for a, b, c in rows]))


def test_prompts_may_have_different_numbers_of_references() -> None:
    said = ["the sea is blue and deep", "ⴰⵣⵓⵍ ⴼⵍⵍⴰⵡⵏ"]
    found = scores(said, [item("a", said[0]), item(said[1])])
    assert found == pytest.approx({"exact": 100.0, "chrf": 100.0, "bleu": 100.0})


def test_two_models_are_compared_on_the_same_draws() -> None:
    """Both miss the same half: their scores vary from draw to draw, their difference does not."""
    items = [item(f"answer number {place} of all") for place in range(40)]
    said = [one.references[0] if place % 2 else "something else entirely" for place, one in enumerate(items)]
    first, same = tasks.answers(said, items), tasks.answers(list(said), items)
    assert tasks.scored(first)["exact"].low < 45 < 55 < tasks.scored(first)["exact"].high
    assert all(found.within == 0 for found in tasks.compared(same, first).values())
    one_worse = tasks.answers([*said[:-1], "something else"], items)
    found = tasks.compared(one_worse, first)["exact"]
    assert found.difference.value == -2.5 and found.difference.high == 0
    assert found.within == -found.difference.low and 5 <= found.within <= 10


def test_the_signatures_are_sacrebleus_own() -> None:
    found = tasks.signatures()
    assert found["bleu"].startswith("nrefs:1|case:mixed") and "version:" in found["chrf"]
