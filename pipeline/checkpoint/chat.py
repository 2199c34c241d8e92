"""A model's own tokenizer, and a conversation as one text by its chat template."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, cast

from pipeline.checkpoint.reader import read_json
from pipeline.core.errors import IntegrityError, UsageError

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend


TODAY = date(2024, 7, 26)
"""The day that templates write: Llama 3.2's own where it is told none."""
_NOW = re.compile(r"""strftime_now\(\s*(?P<quote>["'])(?P<format>[^"']*)(?P=quote)\s*\)""")


class Tokenizer(Protocol):
    """What is used of a tokenizer of transformers, which has no types."""

    chat_template: str | Mapping[str, str] | None
    bos_token: str | None
    bos_token_id: int | None
    eos_token_id: int | None
    pad_token_id: int | None
    all_special_ids: Sequence[int]
    special_tokens_map: Mapping[str, str | Sequence[str]]
    backend_tokenizer: Backend

    def __call__(self, text: str, *, add_special_tokens: bool = True) -> Mapping[str, list[int]]:
        """Token ids in `input_ids`."""

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """The token ids alone."""

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """The text of `ids`."""

    def apply_chat_template(
        self,
        conversation: Sequence[Mapping[str, object]],
        *,
        tokenize: bool,
        add_generation_prompt: bool,
        **variables: object,
    ) -> str:
        """The conversation as text, with `tokenize` False."""


def open_tokenizer(checkpoint: Path) -> Tokenizer:
    """The tokenizer in the folder `checkpoint`, one of transformers', with its chat template, `TODAY` its date.

    A template that stands in chat_template.json alone counts: processors, which saved it there, read it; tokenizers
    do not (transformers 5.23.0), and an instruct model would become a base model without a word. One that writes the
    day (Llama 3.2's) would give another reference and another bundle tomorrow.

    Raises:
        IntegrityError: chat_template.json is no JSON.
    """
    from transformers import AutoTokenizer

    # Nothing is fetched behind the user's back, and no code of the checkpoint runs: trust_remote_code stays off.
    tokenizer = cast("Tokenizer", AutoTokenizer.from_pretrained(checkpoint, local_files_only=True))
    legacy = checkpoint / "chat_template.json"
    if not tokenizer.chat_template and legacy.is_file():
        tokenizer.chat_template = str(read_json(legacy).get("chat_template") or "") or None
    templates = tokenizer.chat_template
    if isinstance(templates, dict):
        tokenizer.chat_template = {name: dated(source) for name, source in templates.items()}
    elif isinstance(templates, str):
        tokenizer.chat_template = dated(templates)
    return tokenizer


def dated(source: str) -> str:
    """A chat template with `TODAY` in place of the day on which it is rendered."""
    return _NOW.sub(lambda found: f"'{TODAY.strftime(found['format'])}'", source)


def prompts_begin_with_bos(tokenizer: Tokenizer) -> bool:
    """Whether the runtime must put bos in front of a prompt: the chat template does, or a base model's tokenizer.

    A template that has bos as text of its own, or none, says no.

    Raises:
        UsageError: the template refuses a user's message.
    """
    bos = tokenizer.bos_token or ""
    if not bos or not tokenizer.chat_template:
        return bool(bos) and _adds_bos(tokenizer)
    hello = [{"role": "user", "content": "Hi"}]
    # With bos left empty, a template that has it as a variable loses it, and one that spells it out does not.
    return _apply(tokenizer, hello, prompt=True) == bos + _apply(tokenizer, hello, prompt=True, bos_token="")


def first_token(tokenizer: Tokenizer) -> int:
    """What stands before a text that is read from its beginning: bos; where prompts have none, what ended the last one.

    Raises:
        IntegrityError: the tokenizer has neither.
    """
    begins = tokenizer.bos_token_id is not None and (prompts_begin_with_bos(tokenizer) or _adds_bos(tokenizer))
    chosen = tokenizer.bos_token_id if begins else tokenizer.eos_token_id
    if chosen is None:
        raise IntegrityError(
            "the tokenizer names neither a bos nor an eos token", remedy="add `eos_token` to tokenizer_config.json"
        )
    return int(chosen)


def _adds_bos(tokenizer: Tokenizer) -> bool:
    # Tried, since tokenizers say it in several ways: a flag, a post-processor, a class.
    return bool(tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id])


def render(
    tokenizer: Tokenizer, messages: Sequence[Mapping[str, str]], *, prompt: bool = False, where: str = ""
) -> str:
    """`messages` (`role` and `content` of each) by the template of `tokenizer`, one of transformers'.

    `prompt`: up to where the model answers. `where` they stand, for the error. Without a template the contents follow
    each other, and a prompt is what was said last.

    Raises:
        UsageError: the template refuses them.
    """
    if not tokenizer.chat_template:
        return messages[-1]["content"] if prompt else contents(messages)
    return _apply(tokenizer, messages, prompt=prompt, where=where)


def _apply(
    tokenizer: Tokenizer, messages: Sequence[Mapping[str, str]], *, prompt: bool, where: str = "", **variables: str
) -> str:
    try:
        return str(
            tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=prompt, **variables)
        )
    except Exception as error:  # the template is the model's own code: whatever it raises is about the messages
        raise UsageError(
            f"the model's chat template refuses a conversation{f' in {where}' if where else ''}: {error}",
            remedy="check the roles: usually user and model or assistant in turn",
        ) from error


def contents(messages: Sequence[Mapping[str, str]]) -> str:
    """A conversation without a template, a line break between messages."""
    return "\n".join(message["content"] for message in messages)
