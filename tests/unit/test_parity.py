"""What is asked of a bundle in the runtime, and what the answers mean; the runtime itself: `tests/stages`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jinja2 import TemplateError
from tokenizers import Tokenizer

from pipeline.core.manifest import FileRecord
from pipeline.core.recipe import PROJECT
from pipeline.judge import bundles, parity
from pipeline.judge.parity import ALPHABETS, Continuation, Parity, Tally
from pipeline.judge.reference import Greedy

BACKEND = Tokenizer.from_file(str(PROJECT / "examples" / "tiny-gemma3n" / "tokenizer.json"))


class Decoding:
    """The shipped model's tokenizer without transformers."""

    chat_template: str | None = None

    def __call__(self, text: str, *, add_special_tokens: bool) -> dict[str, list[int]]:
        return {"input_ids": BACKEND.encode(text, add_special_tokens=add_special_tokens).ids}

    def decode(self, ids: Sequence[int]) -> str:
        return str(BACKEND.decode(list(ids), skip_special_tokens=False))

    def apply_chat_template(self, conversation: Any, **options: Any) -> str:
        raise AssertionError("there is no template")


# --- texts


def test_there_are_a_thousand_texts_of_every_script_and_the_same_each_time() -> None:
    texts = parity.texts()
    assert len(texts) >= 1000 and texts == parity.texts()
    used = set("".join(texts))
    for name, letters in ALPHABETS.items():
        own = {letter for letter in letters if len(letter) == 1}
        assert len(used & own) >= min(50, 0.9 * len(own)), name
    assert "\0" not in used, "the runtime can't take it"
    assert {len(text) for text in texts} >= {1, 40}


def test_control_tokens_and_runs_of_spaces_are_among_them() -> None:
    texts = "\n".join(parity.texts())
    for part in ("<bos>", "<end_of_turn>", "<eos>", "   ", "\t", "\u2028", "▁"):
        assert part in texts


# --- counting


@given(st.lists(st.integers(0, 9)), st.integers(0, 9))
def test_a_tally_counts_what_does_not_hold_and_shows_the_first(cases: list[int], limit: int) -> None:
    found = parity._tally(cases, lambda case: case < limit)
    wrong = [case for case in cases if case >= limit]
    assert found == Tally(total=len(cases), wrong=len(wrong), examples=tuple(repr(case) for case in wrong[:3]))


def test_examples_are_short() -> None:
    assert len(parity._tally(["x" * 1000], lambda _: False).examples[0]) == 200


@pytest.mark.parametrize("text", ["The sea and the king", "ⴰⵣⵓⵍ ⴼⵍⵍⴰⵡⵏ", "يولد جميع الناس", "🎉 a"])
def test_agreement_is_the_tokens_that_the_text_begins_with(text: str) -> None:
    tokenizer = Decoding()
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert parity._common(tokenizer.decode(ids), ids, tokenizer) == len(ids)
    assert parity._common("", ids, tokenizer) == 0
    assert parity._common("?", ids, tokenizer) == 0
    for count in range(len(ids)):
        shared = parity._common(tokenizer.decode(ids[:count]), ids, tokenizer)
        assert shared >= count and tokenizer.decode(ids[:shared]) == tokenizer.decode(ids[:count])


# --- what the findings mean


RIGHT = Tally(total=9, wrong=0, examples=())
WRONG = Tally(total=9, wrong=2, examples=("'a'", "'b'"))
SAME = Continuation(prompt="p", expected="a b", text="a b", tokens=2, agree=2, same=True, tie=False)
TIED = replace(SAME, text="a c", agree=1, same=False, tie=True)
PARTED = replace(TIED, tie=False)
FOUND = Parity(
    ids=RIGHT, prompts=RIGHT, turns=RIGHT, greedy=[SAME, TIED], stop=RIGHT, stopped_at=[6], scored=4, score_error=1e-5
)
SUBJECT = bundles.Subject(
    precision="fp32",
    path=Path("x"),
    record=FileRecord(path="bundle/fp32.litertlm", size=1, sha256="0" * 64),
    gate=None,
    parameters=1,
    stored=1,
    weight_bytes=4,
)


def failed(found: Parity, *, exact: bool = True) -> list[str]:
    return [check.name for check in bundles._parity_checks(SUBJECT, found, exact=exact) if not check.passed]


def test_what_is_as_transformers_says_passes_and_a_tie_may_part() -> None:
    assert failed(FOUND) == []


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"ids": WRONG}, "texts with other token ids in LiteRT-LM"),
        ({"prompts": WRONG}, "conversations rendered differently by LiteRT-LM"),
        ({"stop": WRONG}, "stop tokens that LiteRT-LM does not know"),
        ({"greedy": [SAME, PARTED]}, "greedy texts of LiteRT-LM that differ"),
        ({"score_error": 1.1 * bundles.SCORE_ERROR}, "scores of LiteRT-LM that are off"),
        ({"score_error": None, "scored": 0}, "scores of LiteRT-LM that are off"),
        ({"score_error": float("nan")}, "scores of LiteRT-LM that are off"),
    ],
)
def test_what_is_not_fails(change: dict[str, Any], name: str) -> None:
    assert failed(replace(FOUND, **change)) == [name]


NONE = Tally(total=0, wrong=0, examples=())


@pytest.mark.parametrize(
    "change",
    [{"ids": NONE}, {"prompts": NONE}, {"stop": NONE}, {"greedy": []}, {"score_error": None, "scored": 0}],
)
def test_what_was_tried_on_nothing_is_inconclusive(change: dict[str, Any]) -> None:
    checks = bundles._parity_checks(SUBJECT, replace(FOUND, **change), exact=True)
    assert [check.status for check in checks].count("inconclusive") == 1
    assert len(failed(replace(FOUND, **change))) == 1


def test_a_model_without_a_template_has_no_conversations_to_render() -> None:
    checks = bundles._parity_checks(SUBJECT, replace(FOUND, prompts=None, turns=None), exact=True)
    assert len(checks) == 4 and all(check.passed for check in checks)


class Refusing(Decoding):
    """Its template takes no conversation."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def apply_chat_template(self, conversation: Any, **options: Any) -> str:
        raise self.error


def test_conversations_that_all_are_refused_are_no_pass_and_a_defect_is_no_refusal() -> None:
    talks = [[{"role": "user", "content": "Hi"}]]
    found = parity._render(Any, Refusing(TemplateError("roles must alternate")), talks)  # type: ignore[arg-type]
    assert found == NONE
    with pytest.raises(RuntimeError, match="no such file"):
        parity._render(Any, Refusing(RuntimeError("no such file")), talks)  # type: ignore[arg-type]


def test_text_and_scores_of_a_quantised_bundle_may_differ_but_nothing_else() -> None:
    assert failed(replace(FOUND, greedy=[PARTED], score_error=9.0), exact=False) == []
    assert len(failed(replace(FOUND, ids=WRONG, prompts=WRONG, stop=WRONG), exact=False)) == 3


def test_a_runtime_that_gives_up_is_a_verdict_on_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seen in litert-lm 0.18.1 where generated bytes are no UTF-8: "Stable text shrunk compared to released"."""

    class GivesUp:
        def greedy(self, prompt: str, count: int) -> Any:
            raise RuntimeError("Stable text shrunk compared to released")

    row = Greedy(
        prompt="a", prompt_ids=[2, 9], continuation_ids=[9, 9], text="", margins=[0.0, 1.0], log_likelihoods=[0.0, 0.0]
    )
    (heard,) = parity._generate(GivesUp(), Decoding(), [row], {1}, "odd")  # type: ignore[arg-type]
    assert not heard.same and not heard.tie and "Stable text shrunk" in heard.text
