"""Documents, windows, judged positions, padded batches, shapes and prompts."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.core.errors import UsageError
from pipeline.core.recipe import Padding
from pipeline.judge import corpus


def letters(text: str) -> list[int]:
    return [ord(letter) for letter in text]


def test_text_has_one_document_a_line(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("one\n\n  two \nⴰⵣⵓⵍ\n", encoding="utf-8")
    assert corpus.read_documents(file) == ["one", "two", "ⴰⵣⵓⵍ"]


def test_json_lines_hold_text_or_a_turn(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "one"}\n{"user": "🍠", "model": "sweet potato"}\n', encoding="utf-8")
    assert corpus.read_documents(file) == ["one", "🍠\nsweet potato"]


def test_conversations_are_rendered_by_the_template(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    said = [{"role": "user", "content": "ⴰⵣⵓⵍ\u2028!"}, {"role": "assistant", "content": "hello"}]
    file.write_text(json.dumps({"messages": said}, ensure_ascii=False) + '\n{"text": "plain"}\n', encoding="utf-8")

    def render(messages: Sequence[Mapping[str, str]]) -> str:
        return "".join(f"<{message['role']}>{message['content']}" for message in messages)

    assert corpus.read_documents(file, render) == ["<user>ⴰⵣⵓⵍ\u2028!<assistant>hello", "plain"]
    assert corpus.read_documents(file) == ["ⴰⵣⵓⵍ\u2028!\nhello", "plain"]
    assert corpus.read_documents(file, corpus.first_content) == ["ⴰⵣⵓⵍ\u2028!", "plain"]


def test_a_start_token_that_a_template_renders_does_not_stand_within_a_window() -> None:
    windows = corpus.pack_windows(["\2ab", "\2cde"], letters, bos=2, window=4, limit=9)
    assert windows.tolist() == [[2, *b"ab\n"], [2, *b"cde"]]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.jsonl", b'{"messages": []}\n', "line 1"),
        ("a.jsonl", b'{"messages": [{"role": "user"}]}\n', "line 1"),
        ("a.jsonl", b'{"messages": [{"role": "user", "content": 3}]}\n', "line 1"),
        ("a.txt", b"\n \n", "holds no text"),
        ("a.txt", b"\xff\xfe", "can't read"),
        ("a.jsonl", b'{"text": "one"}\nnot json\n', "line 2"),
        ("a.jsonl", b'{"other": "one"}\n', "line 1"),
        ("a.jsonl", b'{"text": 3}\n', "line 1"),
    ],
)
def test_what_is_no_corpus_is_refused(tmp_path: Path, name: str, content: bytes, says: str) -> None:
    file = tmp_path / name
    file.write_bytes(content)
    with pytest.raises(UsageError, match=says):
        corpus.read_documents(file)


def test_a_corpus_that_is_missing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="can't read"):
        corpus.read_documents(tmp_path / "absent.txt")


def test_no_document_is_judged_and_calibrated_on() -> None:
    corpus.require_disjoint(["one", "two"], ["three"])
    with pytest.raises(UsageError, match="1 documents are in both"):
        corpus.require_disjoint(["one", "Two  words"], ["two words"])


def test_the_shipped_texts_are_disjoint() -> None:
    folder = Path(__file__).parents[2] / "examples" / "tiny-gemma3n" / "corpus"
    texts = {name: corpus.read_documents(folder / f"{name}.txt") for name in ("train", "calibration", "verification")}
    corpus.require_disjoint(texts["verification"], texts["calibration"])
    corpus.require_disjoint(texts["verification"], texts["train"])


def test_windows_begin_with_bos_and_hold_the_text_in_order() -> None:
    windows = corpus.pack_windows(["abc", "defgh"], letters, bos=2, window=5, limit=9)
    assert windows.dtype == np.int32
    assert windows.tolist() == [[2, *letters("abc\n")], [2, *letters("defg")]]


def test_a_bos_inside_a_text_belongs_to_it() -> None:
    """ChatML's turns begin with what SmolLM2 calls bos."""
    windows = corpus.pack_windows(["\2a\2b"], letters, bos=2, window=5, limit=9)
    assert windows.tolist() == [[2, *letters("a\2b\n")]]


def test_windows_are_spread_over_a_long_text() -> None:
    windows = corpus.pack_windows([chr(i) * 3 for i in range(97, 107)], letters, bos=2, window=5, limit=5)
    assert [chr(row[1]) for row in windows] == ["a", "c", "e", "g", "i"]


def test_a_text_without_one_whole_window_is_refused() -> None:
    with pytest.raises(UsageError, match="one window needs 9"):
        corpus.pack_windows(["abc"], letters, bos=2, window=10, limit=1)


@given(st.integers(1, 40), st.integers(2, 130), st.integers(1, 3000))
def test_positions_are_distinct_in_range_and_as_many_as_asked(windows: int, window: int, count: int) -> None:
    positions = corpus.spread_positions(windows, window, count)
    assert len(positions) == min(count, windows * (window - 1))
    assert len(set(zip(positions.window.tolist(), positions.length.tolist(), strict=True))) == len(positions)
    assert positions.length.min() >= 1 and positions.length.max() <= window - 1
    assert positions.window.max() < windows


def test_positions_meet_all_context_lengths() -> None:
    positions = corpus.spread_positions(128, 128, 2048)
    assert set(positions.length.tolist()) == set(range(1, 128))
    assert np.bincount(positions.window).tolist() == [16] * 128


@given(st.integers(1, 12), st.integers(2, 70), st.integers(1, 200), st.integers(1, 8))
def test_batches_hold_each_prefix_once_and_whole(windows: int, window: int, count: int, size: int) -> None:
    tokens = np.random.default_rng(0).integers(3, 99, size=(windows, window)).astype(np.int32)
    positions = corpus.spread_positions(windows, window, count)
    batches = corpus.prefix_batches(tokens, positions, size, pad=0)
    assert sorted(np.concatenate([batch.index for batch in batches]).tolist()) == list(range(len(positions)))
    for batch in batches:
        assert len(batch.index) <= size and batch.input_ids.shape[1] <= window
        for row, index in enumerate(batch.index):
            mask = batch.attention_mask[row].astype(bool)
            prefix = tokens[positions.window[index], : positions.length[index]]
            assert np.array_equal(batch.input_ids[row][mask], prefix)
            assert np.count_nonzero(np.diff(mask)) <= 1  # the padding is on one side
            assert not batch.input_ids[row][~mask].any()


def test_both_sides_are_padded_and_shapes_are_few() -> None:
    tokens = np.ones((64, 128), dtype=np.int32)
    batches = corpus.prefix_batches(tokens, corpus.spread_positions(64, 128, 1024), 8, pad=0)
    assert any(not batch.attention_mask[:, 0].all() for batch in batches)
    assert any(not batch.attention_mask[:, -1].all() for batch in batches)
    assert len({batch.input_ids.shape[1] for batch in batches}) <= 16
    padding = 1 - sum(batch.attention_mask.sum() for batch in batches) / sum(b.input_ids.size for b in batches)
    assert padding < 0.1


PADDINGS: tuple[Padding, ...] = ("none", "left", "right")


BATCHES, SEQUENCES = (1, 2, 3, 8), (1, 16, 17, 128, 300, 1024, 2048)


def test_the_shape_grid_meets_every_size_with_every_padding_up_to_one_longest_row() -> None:
    cases = list(corpus.shape_cases(BATCHES, SEQUENCES, PADDINGS))
    assert len(cases) == len({case.name for case in cases}) == (5 * 4 + 3 + 1) * 3
    assert cases[0].name == "b1_s1_none"
    assert {(case.sequence, case.padding) for case in cases} == set(product(SEQUENCES, PADDINGS))
    assert {(len(case.rows), case.padding) for case in cases} == set(product(BATCHES, PADDINGS))
    assert {(len(case.rows), case.sequence) for case in cases} == {
        (batch, sequence) for batch, sequence in product(BATCHES, SEQUENCES) if batch * sequence**2 <= 2048**2
    }


def test_a_lone_long_sequence_has_every_batch() -> None:
    assert [case.name for case in corpus.shape_cases((1, 8), (2048,), ("left",))] == ["b1_s2048_left", "b8_s2048_left"]


def test_a_family_is_as_large_as_its_largest_batch_and_small_batches_take_rows_in_turn() -> None:
    cases = list(corpus.shape_cases(BATCHES, SEQUENCES, PADDINGS))
    rows = corpus.family_rows(cases)
    assert [rows[sequence, "left"] for sequence in SEQUENCES] == [8, 8, 8, 8, 8, 3, 1]
    small = [row for case in cases if case.sequence == 17 and case.padding == "left" for row in case.rows[:3]]
    assert len(set(small)) > 3


@given(st.sampled_from([1, 2, 16, 17, 300]), st.sampled_from(PADDINGS))
def test_shape_rows_are_padded_on_their_side_and_reproducible(sequence: int, padding: Padding) -> None:
    one, other = (corpus.shape_family(8, sequence, padding, vocabulary=50, bos=2, pad=0) for _ in range(2))
    assert np.array_equal(one.input_ids, other.input_ids)
    attended = one.attention_mask.sum(axis=1)
    assert attended.min() >= 1
    if padding == "none":
        assert attended.tolist() == [sequence] * 8
    elif sequence > 1:
        assert attended[0] < sequence and attended[-1] == 1
        edge = 0 if padding == "left" else -1
        assert not one.attention_mask[attended < sequence, edge].any()
    assert all(ids[mask.astype(bool)][0] == 2 for ids, mask in zip(one.input_ids, one.attention_mask, strict=True))


def test_prompts_come_from_each_script_in_turn() -> None:
    documents = [
        "The first of many words in this line",
        "Another line of the same script here",
        "🐸 frog face, 🐼 panda face, 🐫 camel",
        "ⴽⵓ ⵢⴰⵏ ⵉⵍⵍⴰ ⴷⴰⵔⵙ ⵓⵣⵔⴼ",
        "لكل شخص الحق في حرية الرأي",
        "人人生而自由在尊严和权利上一律平等",
    ]
    prompts = corpus.pick_prompts(documents, 6)
    assert prompts[:5] == ["The first of many", "🐸 frog face, 🐼", "ⴽⵓ ⵢⴰⵏ", "لكل شخص الحق", "人人生而自由在尊"]
    assert prompts[5] == "Another line of"


@given(st.lists(st.text(min_size=1).filter(str.strip), min_size=1, max_size=12), st.integers(1, 8))
def test_prompts_are_as_many_as_there_can_be(documents: list[str], count: int) -> None:
    assert len(corpus.pick_prompts([document.strip() for document in documents], count)) == min(count, len(documents))
