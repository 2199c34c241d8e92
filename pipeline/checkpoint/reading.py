"""What a checkpoint says of text: its tokenizer, and the tokens that frame and end what is said.

Bundle and reference both read it here: two opinions on when an answer ends would make a bundle that stops where its
reference goes on. What the bundle adds, where LiteRT-LM ends a tool call at it, stands in bundling/metadata.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pipeline.checkpoint import chat
from pipeline.checkpoint.chat import Tokenizer
from pipeline.checkpoint.reader import Checkpoint
from pipeline.core.errors import IntegrityError, UsageError

_REPLY = "REPLY"


@dataclass(frozen=True, kw_only=True)
class Reading:
    """A checkpoint's `tokenizer` (one of transformers') and what frames text.

    Attributes:
        begins: whether prompts begin with bos.
        first: the token before a text that is read from its beginning.
        pad: what fills rows that are too short.
        stop: the tokens that end an answer, ascending: those that the configuration names, and the special token that
            ends the model's turn in the template.
    """

    tokenizer: Tokenizer
    begins: bool
    first: int
    pad: int
    stop: tuple[int, ...]


def read(checkpoint: Checkpoint) -> Reading:
    """Read what `checkpoint` says of text.

    Raises:
        IntegrityError: nothing says which token ends an answer, or with which a text begins; or what does is no token.
        UsageError: the template refuses a user's message.
    """
    tokenizer = chat.open_tokenizer(checkpoint.folder)
    config = checkpoint.config
    named = (table.get("pad_token_id") for table in (config, _text(config)))
    pads = (tokenizer.pad_token_id, *named, 0)
    return Reading(
        tokenizer=tokenizer,
        begins=chat.prompts_begin_with_bos(tokenizer),
        first=chat.first_token(tokenizer),
        pad=next(token for token in pads if type(token) is int),
        stop=stop_tokens(checkpoint.generation_config, config, tokenizer),
    )


def stop_tokens(
    generation: Mapping[str, object], config: Mapping[str, object], tokenizer: Tokenizer
) -> tuple[int, ...]:
    """As `Reading.stop`, from generation_config.json, config.json and the tokenizer.

    Raises:
        IntegrityError: nothing names any, or what does is no token.
    """
    tables = (generation, config, _text(config))
    return tuple(sorted(_named(tables, tokenizer) | _special(turn_end(tokenizer), tokenizer)))


def _text(config: Mapping[str, object]) -> Mapping[str, object]:
    """The text model's own configuration in that of a model with towers, else nothing."""
    nested = config.get("text_config")
    return nested if isinstance(nested, dict) else {}


def _named(tables: tuple[Mapping[str, object], ...], tokenizer: Tokenizer) -> set[int]:
    """The eos ids of the first source that has any, as `generate` looks for them; the tokenizer is the last."""
    # generation_config wins: instruction-tuned models add the end of a turn there alone.
    for value in (*(table.get("eos_token_id") for table in tables), tokenizer.eos_token_id):
        if value is not None:
            given = value if isinstance(value, list) else [value]
            # type() and not isinstance: true is an int in Python.
            ids = {item for item in given if type(item) is int}
            if not ids or any(type(item) is not int for item in given):
                raise IntegrityError(
                    f"eos_token_id is {value!r}, expected token ids",
                    cause="generation_config.json or config.json was edited",
                    remedy="write the id of the token that ends an answer, or a list of ids",
                )
            return ids
    raise IntegrityError(
        "neither generation_config.json, config.json nor the tokenizer names an eos token",
        cause="without one the model would never stop",
        remedy="add `eos_token_id` to generation_config.json",
    )


def turn_end(tokenizer: Tokenizer) -> str:
    """What the template has after the model's text in its turn, e.g. `<end_of_turn>` and a newline."""
    if not tokenizer.chat_template:
        return ""
    try:
        turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": _REPLY}]
        return chat.render(tokenizer, turns).rpartition(_REPLY)[2]
    except UsageError:  # one that takes no such conversation; the bundle says whether it can be used at all
        return ""


def _special(ending: str, tokenizer: Tokenizer) -> set[int]:
    """The first special token in what ends the model's turn, if there is one."""
    ids = tokenizer(ending, add_special_tokens=False)["input_ids"] if ending else []
    # The first: behind the end of the turn templates put line breaks, or the next turn's beginning.
    return {*[token for token in ids if token in tokenizer.all_special_ids][:1]}
