"""Text to judge on: documents, teacher-forced windows, the positions that are judged, prompts, and test inputs.

Everything is a function of its arguments: no clock, no unseeded randomness, so that two runs judge the same tokens.
"""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from pipeline.checkpoint import chat
from pipeline.core.errors import UsageError
from pipeline.core.recipe import Padding
from pipeline.runtime.litert import LENGTH_STEP

Tokens = NDArray[np.int32]
Tokenize = Callable[[str], Sequence[int]]
"""Text to token ids, without special tokens such as bos."""
Render = Callable[[Sequence[Mapping[str, str]]], str]
"""A chat conversation (`role` and `content` of each message) as one text, by the model's template."""

Parsed = TypeVar("Parsed")
_REMEDY = 'each line must be JSON such as {"text": "one document"} or {"messages": [{"role": "user", …}]}'

POSITIONS_PER_WINDOW = 16
"""How many positions of one window are judged. Neighbours share their context and so say less than distant ones."""
_GOLDEN_RATIO = (5**0.5 - 1) / 2
_PROMPT_WORDS = 6
_PROMPT_CHARACTERS = 48


# Documents


def read_documents(file: Path, render: Render | None = None) -> list[str]:
    """The documents of a text file (one a line) or of a `.jsonl` file.

    A line of the latter has `text`, or `user` and `model`, or `messages`, a conversation, of which `render` makes one
    text; without it the contents follow each other.

    Raises:
        UsageError: the file can't be read, a line is not what its name says, or there is no text at all.
    """
    parse = partial(_parse_json_line, render or chat.contents) if file.suffix == ".jsonl" else str.strip
    wanted = "give a UTF-8 file, .txt or .jsonl"
    documents = [text for text in parse_lines(file, parse, "text", wanted, _REMEDY) if text]
    if not documents:
        raise UsageError(f"{file} holds no text", remedy="give one document a line")
    return documents


def parse_lines(file: Path, parse: Callable[[str], Parsed], what: str, wanted: str, remedy: str) -> list[Parsed]:
    """What `parse` makes of each line of a UTF-8 file that holds more than spaces.

    For errors: `what` the file is, `wanted` one that can be read, and what to do about a line (`remedy`).

    Raises:
        UsageError: the file can't be read, or `parse` raised ValueError, KeyError or TypeError.
    """
    try:
        lines = file.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"can't read the {what} in {file}: {error}", remedy=wanted) from error
    parsed = []
    for number, row in enumerate(lines, start=1):
        try:
            parsed += [parse(row)] if row.strip() else []
        except (ValueError, KeyError, TypeError) as error:
            raise UsageError(f"{file}, line {number}: {error!r}", remedy=remedy) from error
    return parsed


def first_content(messages: Sequence[Mapping[str, str]]) -> str:
    """What a conversation begins with."""
    return messages[0]["content"]


def _parse_json_line(render: Render, row: str) -> str:
    value = json.loads(row)
    if "messages" in value:
        return render(_messages(value["messages"])).strip()
    text = value["text"] if "text" in value else f"{value['user']}\n{value['model']}"
    if not isinstance(text, str):
        raise TypeError("`text` is not a string")
    return text.strip()


def _messages(value: object) -> list[Mapping[str, str]]:
    if not isinstance(value, list) or not value:
        raise TypeError("`messages` is not a list of messages")
    for message in value:
        if not isinstance(message["role"], str) or not isinstance(message["content"], str):
            raise TypeError("a message's `role` or `content` is not a string")
    return value


def require_disjoint(verification: Iterable[str], calibration: Iterable[str]) -> None:
    """Make sure that no file is judged on text it was calibrated on; spaces and case don't make text different.

    Raises:
        UsageError: a document is in both.
    """
    # What differs in spaces and case alone is the same text to a model.
    seen = {" ".join(document.split()).casefold() for document in calibration}
    both = [document for document in verification if " ".join(document.split()).casefold() in seen]
    if both:
        raise UsageError(
            f"{len(both)} documents are in both the verification and the calibration text, e.g. {both[0][:60]!r}",
            cause="files judged on their calibration text look better than they are",
            remedy="remove these documents from one of the two",
        )


def require_held_out(judged: Path, sha256: str, calibration: Path, tokenizer: chat.Tokenizer) -> None:
    """Make sure that the file `judged` is the text of that `sha256`, and that no file was calibrated on it.

    Raises:
        UsageError: it is not, or one was.
    """
    if hashlib.sha256(judged.read_bytes()).hexdigest() != sha256:
        raise UsageError(
            f"the reference was computed on another text than {judged}",
            cause="the text was changed, or EVAL= was not the same for golden and verify",
            remedy="run `make golden` with this EVAL=",
        )
    render = partial(chat.render, tokenizer)
    require_disjoint(read_documents(judged, render), read_documents(calibration, render))


# Windows and positions


def pack_windows(documents: Sequence[str], tokenize: Tokenize, *, bos: int, window: int, limit: int) -> Tokens:
    """The documents, a line break after each, as one stream of tokens cut into windows that each begin with `bos`.

    Returns:
        int32 [N, window]; N at most `limit`, spread evenly over the text. A last incomplete window is dropped.

    Raises:
        UsageError: the text does not fill one window.
    """
    # One stream: texts shorter than a window would give positions with little context only.
    stream = [token for document in documents for token in without_start(tokenize(document + "\n"), bos)]
    available = len(stream) // (window - 1)
    if not available:
        raise UsageError(
            f"the verification text has {len(stream)} tokens, one window needs {window - 1}",
            remedy="give more text, or make `corpus.window` in the recipe smaller",
        )
    count = min(available, limit)
    # A window less its bos: each begins with one, as the model saw text.
    body = np.array(stream[: available * (window - 1)], dtype=np.int32).reshape(available, window - 1)
    chosen = body[np.arange(count) * available // count]
    return np.concatenate([np.full((count, 1), bos, dtype=np.int32), chosen], axis=1)


def calibration_windows(text: Path, tokenizer: chat.Tokenizer, window: int, limit: int) -> Tokens:
    """At most `limit` windows of a calibration text, as `pack_windows`: not of the text that verify judges on."""
    return pack_windows(
        read_documents(text, partial(chat.render, tokenizer, where=str(text))),
        lambda document: tokenizer.encode(document, add_special_tokens=False),
        bos=chat.first_token(tokenizer),
        window=window,
        limit=limit,
    )


def calibration_documents(text: Path, tokenizer: chat.Tokenizer) -> Iterator[Sequence[int]]:
    """The token ids of each document of a calibration text, as it stands there."""
    for document in read_texts(text, partial(chat.render, tokenizer, where=str(text))):
        yield tokenizer.encode(document, add_special_tokens=False)


def without_start(ids: Sequence[int], bos: int) -> Sequence[int]:
    """`ids` without the `bos` that a template puts in front; elsewhere it belongs to the text, as in ChatML's turns."""
    return ids[1:] if ids[:1] == [bos] else ids


@dataclass(frozen=True)
class Positions:
    """Judged next-token predictions: row `window[i]`, predicted from its first `length[i]` tokens; int64 [n] each."""

    window: NDArray[np.int64]
    length: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.window)


def spread_positions(windows: int, window: int, count: int) -> Positions:
    """`count` positions (or as many as there are) spread evenly over `windows` rows of `window` tokens.

    Each row is cut into equal strata and judged once in each, at a place that moves by the golden ratio from row to
    row, so that all context lengths 1 … window-1 are met and not the same few in every row.
    """
    predictions = window - 1
    count = min(count, windows * predictions)
    # Rounded down as a running sum, so that shares differ by one at most and add up to `count`.
    shares = np.diff(np.arange(windows + 1) * count // windows)
    rows, lengths = [], []
    for row, share in enumerate(shares):
        places = (np.arange(share) + (row + 1) * _GOLDEN_RATIO % 1.0) * predictions / max(share, 1)
        rows.append(np.full(share, row))
        lengths.append(1 + np.minimum(places.astype(np.int64), predictions - 1))
    return Positions(window=np.concatenate(rows).astype(np.int64), length=np.concatenate(lengths).astype(np.int64))


@dataclass(frozen=True)
class Batch:
    """Inputs of one run of the step graph, int32 [B, S] each; `index` says which case each row belongs to."""

    input_ids: Tokens
    attention_mask: Tokens
    index: NDArray[np.int64]


def prefix_batches(windows: Tokens, positions: Positions, size: int, pad: int) -> list[Batch]:
    """The prefixes that end at `positions`, as padded batches of at most `size` rows, left and right in turn.

    Prefixes of like length share a batch, and lengths are rounded up to a multiple of 8: this costs little padding
    and keeps the number of different shapes small. Shapes come in ascending order.
    """
    # Stable: equal lengths keep the order of the text, and two runs judge the same batches.
    order = np.argsort(positions.length, kind="stable")
    rounded = -(-positions.length[order] // LENGTH_STEP) * LENGTH_STEP
    padded = np.minimum(rounded, windows.shape[1])
    batches: list[Batch] = []
    for width in np.unique(padded):
        members = order[padded == width]
        for start in range(0, len(members), size):
            index = members[start : start + size]
            rows = [windows[positions.window[i], : positions.length[i]] for i in index]
            batches.append(_pad(rows, int(width), "left" if len(batches) % 2 else "right", index, pad))
    return batches


def _pad(rows: Sequence[Tokens], width: int, side: Padding, index: NDArray[np.int64], pad: int) -> Batch:
    """`rows` padded with token `pad` to `width` on one side; the mask is 0 there."""
    ids = np.full((len(rows), width), pad, dtype=np.int32)
    mask = np.zeros_like(ids)
    for row, tokens in enumerate(rows):
        place = slice(width - len(tokens), width) if side == "left" else slice(0, len(tokens))
        ids[row, place], mask[row, place] = tokens, 1
    return Batch(input_ids=ids, attention_mask=mask, index=index)


# Shapes


@dataclass(frozen=True)
class ShapeCase:
    """One case of the shape grid: `rows` of the family (sequence, padding) that make up its batch."""

    name: str
    sequence: int
    padding: Padding
    rows: tuple[int, ...]


def shape_cases(batch: Sequence[int], sequence: Sequence[int], padding: Sequence[Padding]) -> Iterator[ShapeCase]:
    """The grid batch × sequence × padding, as far as attention is not larger than in one row of the longest sequence.

    So every batch, sequence and padding is met, each sequence and each batch with every padding, and no run takes more
    memory or time than the longest row: beyond it a run only grows. The shortest sequence is met by every batch.

    The rows of one (sequence, padding) family are shared: its largest batch takes all, the smaller ones take rows in
    turn. The reference is then computed once per row, and each file still meets every batch size.
    """
    # Attention grows with batch × sequence², and is what runs out of memory first.
    most = min(batch) * max(sequence) ** 2
    for length in sequence:
        sizes = [size for size in batch if size * length**2 <= most or length == min(sequence)]
        family = max(sizes)
        for side in padding:
            start = 0
            for size in sizes:
                rows = tuple((start + i) % family for i in range(size))
                start += size
                yield ShapeCase(f"b{size}_s{length}_{side}", length, side, rows)


def family_rows(cases: Iterable[ShapeCase]) -> dict[tuple[int, Padding], int]:
    """How many rows of each family (sequence, padding) the `cases` take: the first ones."""
    rows: dict[tuple[int, Padding], int] = {}
    for case in cases:
        family = case.sequence, case.padding
        rows[family] = max(rows.get(family, 0), 1 + max(case.rows))
    return rows


def shape_family(count: int, sequence: int, padding: Padding, *, vocabulary: int, bos: int, pad: int) -> Batch:
    """`count` rows of random tokens that begin with `bos`, each padded by another amount; seeded by the shape alone.

    The first row always has padding (where `sequence` allows any), the last has a single token attended to.
    """
    side = {"none": 0, "left": 1, "right": 2}[padding]
    # By the shape alone: a case has the same tokens in whatever grid it stands.
    random = np.random.default_rng([20251124, sequence, side])
    lengths = random.integers(1, sequence + 1, size=count)
    lengths[0], lengths[-1] = random.integers(1, max(sequence, 2)), 1
    if padding == "none":
        lengths[:] = sequence
    rows = [np.concatenate([[bos], random.integers(0, vocabulary, size=length - 1)]) for length in lengths]
    return _pad([row.astype(np.int32) for row in rows], sequence, padding, np.arange(count), pad)


# Prompts


def pick_prompts(documents: Sequence[str], count: int) -> list[str]:
    """`count` prompts: the first words of documents, taken from each script in turn (Latin, Arabic, emoji, …).

    Scripts come in the order of first appearance; a document's script is that of most of its characters.
    """
    queues: dict[str, list[str]] = {}
    for document in documents:
        queues.setdefault(_script(document), []).append(document)
    picked: list[str] = []
    for turn in range(max(map(len, queues.values()))):
        picked += [queue[turn] for queue in queues.values() if turn < len(queue)]
    return [_opening(document) for document in picked[:count]]


def _script(text: str) -> str:
    """The script of `text`: `emoji` if it holds any, else the first word of most letters' Unicode names."""
    if any(unicodedata.category(letter) == "So" for letter in text):
        return "emoji"
    names = [unicodedata.name(letter, "OTHER").split()[0] for letter in text if letter.isalpha()]
    # Sorted first, so that a tie is decided the same way each time.
    return max(sorted(set(names)), key=names.count, default="OTHER")


def _opening(document: str) -> str:
    """The first few words, at most half of the document; characters where a script has no spaces."""
    words = document.split()
    text = " ".join(words[: max(1, min(_PROMPT_WORDS, len(words) // 2))])
    return text[: max(1, min(_PROMPT_CHARACTERS, len(document) // 2))].rstrip()


def read_texts(file: Path, render: Render) -> list[str]:
    """The documents of a calibration file: one per line of a `.txt`, or of a `.jsonl` with `text` or `messages`.

    `render` makes one text of a list of chat messages.

    Raises:
        UsageError: the file can't be read, is not UTF-8, holds nothing, or a line is not what it must be.
    """
    remedy = 'give a .txt file with a document per line, or a .jsonl file with {"text": …} or {"messages": […]} lines'
    try:
        lines = file.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise UsageError(f"can't read calibration file {file}: {reason}", remedy=remedy) from error
    if file.suffix not in (".txt", ".jsonl"):
        raise UsageError(f"calibration file {file} is neither .txt nor .jsonl", remedy=remedy)
    numbered = [(number, text) for number, text in enumerate(lines, 1) if text.strip()]
    if not numbered:
        raise UsageError(f"calibration file {file} is empty", remedy=remedy)
    if file.suffix == ".txt":
        return [text for _, text in numbered]
    try:
        return [_document(text, number, render) for number, text in numbered]
    except ValueError as error:
        raise UsageError(f"calibration file {file}: {error}", remedy=remedy) from error


def _document(text: str, number: int, render: Render) -> str:
    try:
        record = json.loads(text)
    except ValueError as error:
        raise ValueError(f"line {number} is not JSON ({error})") from error
    if isinstance(record, dict) and isinstance(record.get("text"), str):
        return str(record["text"])
    messages = record.get("messages") if isinstance(record, dict) else None
    if isinstance(messages, list) and all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in messages
    ):
        return render(messages)
    raise ValueError(f'line {number} has neither a string "text" nor "messages" with role and content')
