"""A model's own tokenizer, and a conversation as one text by its chat template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.core.errors import UsageError


def open_tokenizer(checkpoint: Path) -> Any:
    """The tokenizer in the folder `checkpoint`, one of transformers'."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(checkpoint, local_files_only=True)


def render(tokenizer: Any, messages: Sequence[Mapping[str, str]], *, prompt: bool = False, where: str = "") -> str:
    """`messages` (`role` and `content` of each) by the template of `tokenizer`, one of transformers'.

    `prompt`: up to where the model answers. `where` they stand, for the error. Without a template the contents follow
    each other, and a prompt is what was said last.

    Raises:
        UsageError: the template refuses them.
    """
    if not tokenizer.chat_template:
        return messages[-1]["content"] if prompt else contents(messages)
    try:
        return str(tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=prompt))
    except Exception as error:  # the template is the model's own code: whatever it raises is about the messages
        raise UsageError(
            f"the model's chat template refuses a conversation{f' in {where}' if where else ''}: {error}",
            remedy="check the roles: usually user and model or assistant in turn",
        ) from error


def contents(messages: Sequence[Mapping[str, str]]) -> str:
    """A conversation without a template, a line break between messages."""
    return "\n".join(message["content"] for message in messages)
