"""Parity of a bundle in LiteRT-LM: token ids, rendered prompts, greedy text, stop tokens, scores.

Everything is held against transformers: its tokenizer and template here, its greedy text and log-likelihoods as the
golden stage stored them.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable, Mapping, Sequence, Set
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from jinja2 import TemplateError

from pipeline.checkpoint.chat import Tokenizer
from pipeline.core import log
from pipeline.core.errors import IntegrityError, UsageError
from pipeline.judge.reference import Greedy
from pipeline.runtime.litert_lm import REWRITES, LmRuntime, Message

TIE = 1e-4
"""A lead in logits below which two tokens are equally likely: sums in another order decide between them."""
_SCORED = 4
_TEXTS = 150
_SHOWN = 3
_TURNS = ("Hi", "And now?", "Well?")
_ANSWER = 16  # tokens
_REFUSED = (TemplateError, TypeError, ValueError, LookupError)
"""What a template's `raise_exception` and its expressions raise about messages that it does not take."""
_SEED = 20251124
ALPHABETS: Mapping[str, Sequence[str]] = {
    "latin": [*map(chr, range(0x20, 0x7F)), *map(chr, range(0xA1, 0x250))],
    "tifinagh": [" ", *map(chr, range(0x2D30, 0x2D68))],
    "arabic": [" ", *map(chr, range(0x600, 0x700))],
    "cjk": [*map(chr, range(0x4E00, 0x9FFF)), *map(chr, range(0x3040, 0x30FF)), *map(chr, range(0xAC00, 0xD7A3))],
    "emoji": ["\u200d", "\ufe0f", "\u20e3", *map(chr, range(0x1F300, 0x1FB00))],
    "control": ["\u200b", "\ufeff", "\u2028", *map(chr, range(1, 0x20)), *map(chr, range(0x7F, 0xA0))],
    "spaces": ["  ", "   ", "▁", *" \t\n\r\u00a0\u3000\u2009"],
    "tokens": ["<bos>", "<eos>", "<pad>", "<unk>", "<start_of_turn>", "<end_of_turn>", "<0x41>", "<s>", "a", " ", "\n"],
}


Case = TypeVar("Case")


@dataclass(frozen=True, kw_only=True)
class Tally:
    """How often something was as it should be; `examples` are the first of the others."""

    total: int
    wrong: int
    examples: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Continuation:
    """One prompt: the reference's text and the runtime's, the tokens they share, and whether they part at a tie."""

    prompt: str
    expected: str
    text: str
    tokens: int
    agree: int
    same: bool
    tie: bool


@dataclass(frozen=True, kw_only=True)
class Parity:
    """What was found about a bundle. `score_error` is the largest difference of a log-likelihood, in nats.

    `prompts` and `turns`, of a conversation, are None where the model has no chat template.
    """

    ids: Tally
    prompts: Tally | None
    turns: Tally | None
    greedy: tuple[Continuation, ...]
    stop: Tally
    stopped_at: tuple[int, ...]
    scored: int
    score_error: float | None


def texts() -> list[str]:
    """Random texts of up to 40 characters of many scripts, the same at every run."""
    drawn = random.Random(_SEED)  # noqa: S311 - test material
    letters = {**ALPHABETS, "all": [letter for alphabet in ALPHABETS.values() for letter in alphabet]}
    return ["".join(drawn.choices(kinds, k=drawn.randint(1, 40))) for kinds in letters.values() for _ in range(_TEXTS)]


def compare(
    bundle: Path,
    tokenizer: Tokenizer,
    conversations: Sequence[Sequence[Message]],
    rows: Sequence[Greedy],
    stop: Set[int],
    scratch: Path | None = None,
) -> Parity:
    """Open `bundle` in LiteRT-LM and hold it against transformers; `scratch` is where its repacked weights may lie."""
    with tempfile.TemporaryDirectory(dir=scratch) as cache, LmRuntime(bundle, cache=Path(cache)) as runtime:
        greedy = _generate(runtime, tokenizer, rows, stop, bundle.stem)
        reached = {row.continuation_ids[-1] for row, ours in zip(rows, greedy, strict=True) if ours.same} & stop
        # A stop sequence of several tokens ends no answer of a model that says one of them.
        declared = {ids[0] for ids in runtime.stop if len(ids) == 1}
        missing = sorted(stop - declared)
        errors = _score(runtime, tokenizer, rows, stop)
        return Parity(
            ids=_tokenise(runtime, tokenizer),
            prompts=_render(runtime, tokenizer, conversations) if tokenizer.chat_template else None,
            turns=_converse(runtime) if tokenizer.chat_template else None,
            greedy=tuple(greedy),
            stop=Tally(total=len(stop), wrong=len(missing), examples=tuple(map(str, missing))),
            stopped_at=tuple(sorted(reached)),
            scored=len(errors),
            score_error=float(np.max(errors)) if errors else None,
        )


def _tokenise(runtime: LmRuntime, tokenizer: Tokenizer) -> Tally:
    return _tally(
        texts(), lambda text: runtime.tokenize(text) == list(tokenizer(text, add_special_tokens=False)["input_ids"])
    )


def _render(runtime: LmRuntime, tokenizer: Tokenizer, conversations: Sequence[Sequence[Message]]) -> Tally:
    """Conversations that transformers itself refuses are left out."""
    rendered = []
    for conversation in conversations:
        with suppress(*_REFUSED):
            text = tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
            rendered.append((conversation, str(text)))
    return _tally(rendered, lambda pair: _rendered(runtime, pair[0]) == pair[1])


def _rendered(runtime: LmRuntime, conversation: Sequence[Message]) -> str | None:
    """What the runtime renders; None where it fails, which is a verdict and no end of the judging."""
    try:
        return runtime.render(conversation)
    except IntegrityError:
        return None


def _converse(runtime: LmRuntime) -> Tally:
    """Three turns in one of the runtime's own conversations."""
    try:
        answers = runtime.talk(_TURNS, _ANSWER)
    except IntegrityError as error:
        if REWRITES in (error.cause or ""):  # the template's way, of which the card speaks; no fault of the bundle
            return Tally(total=len(_TURNS), wrong=0, examples=("the template rewrites what was said before",))
        return Tally(total=len(_TURNS), wrong=1, examples=(f"{error}: {error.cause}",))
    return Tally(total=len(_TURNS), wrong=len(_TURNS) - len(answers), examples=())


def _tally(cases: Sequence[Case], holds: Callable[[Case], bool]) -> Tally:
    wrong = [case for case in cases if not holds(case)]
    return Tally(total=len(cases), wrong=len(wrong), examples=tuple(repr(case)[:200] for case in wrong[:_SHOWN]))


def _generate(
    runtime: LmRuntime, tokenizer: Tokenizer, rows: Sequence[Greedy], stop: Set[int], label: str
) -> list[Continuation]:
    continuations = []
    with log.progress(f"{label}: greedy text in LiteRT-LM", len(rows), "prompts") as bar:
        for row in rows:
            ids = row.continuation_ids
            text, fault = _greedy(runtime, row.prompt, len(ids))
            # The runtime swallows the stop token.
            words = ids[:-1] if ids and ids[-1] in stop else ids
            expected = str(tokenizer.decode(words))
            same = not fault and text == expected
            agree = len(ids) if same else _common(text, words, tokenizer)
            continuations.append(
                Continuation(
                    prompt=row.prompt,
                    expected=expected,
                    text=fault or text,
                    tokens=len(ids),
                    agree=agree,
                    same=same,
                    # The lead at the token where they part: a near-tie there is decided by the order of float
                    # additions.
                    tie=not same and not fault and row.margins[min(agree, len(row.margins) - 1)] <= TIE,
                )
            )
            bar.advance()
    return continuations


def _greedy(runtime: LmRuntime, prompt: str, count: int) -> tuple[str, str]:
    """The runtime's text, and what it says instead where it gives up, as on bytes that are no text: a verdict."""
    try:
        return runtime.greedy(prompt, count).text, ""
    except RuntimeError as error:
        return "", f"(LiteRT-LM gave up: {error})"


def _common(text: str, ids: Sequence[int], tokenizer: Tokenizer) -> int:
    """How many of `ids` `text` begins with."""
    return next(count for count in range(len(ids), -1, -1) if text.startswith(str(tokenizer.decode(ids[:count]))))


def _score(runtime: LmRuntime, tokenizer: Tokenizer, rows: Sequence[Greedy], stop: Set[int]) -> list[float]:
    """The largest error of a log-likelihood in each of a few continuations; those that can't be scored are left out.

    The runtime takes text, so the text must have the very tokens that the reference generated, and the prompt must end
    in a token that is a text of its own.
    """
    errors: list[float] = []
    for row in rows:
        words = [token for token in row.continuation_ids if token not in stop]
        target = str(tokenizer.decode(words))
        if (
            len(errors) == _SCORED
            or not words
            or list(tokenizer(target, add_special_tokens=False)["input_ids"]) != words
        ):
            continue
        with suppress(UsageError):
            pairs = zip(runtime.score(row.prompt, target), row.log_likelihoods[: len(words)], strict=True)
            errors.append(float(np.max([abs(ours - theirs) for ours, theirs in pairs])))  # NaN stays
    return errors
