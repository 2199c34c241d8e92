"""The chat template as the runtime needs it, and what it says about tokens.

LiteRT-LM renders with minijinja, transformers with Jinja. Where the two differ on the same source, the source is
rewritten so that both give the same text (seen in litert-lm 0.18.1):

- Jinja drops one newline at the end of the source, the runtime keeps it;
- Jinja's `trim` removes what Python calls white space, the runtime's leaves U+001C to U+001F;
- Jinja's maps have Python's `get`, the runtime's do not;
- the runtime's test `is none` is true of what is undefined and false of none;
- the runtime hands message content over as a list of text parts, never as a string;
- the runtime leaves `bos_token` and `eos_token` empty and knows no other special token; it puts the bundle's start
  token in front of the first prompt itself.

Every rewriting is proved on `CONVERSATIONS` before it is used: rendered by transformers under the runtime's conditions,
the new source must give the text that the checkpoint's own source gives.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

from pipeline.core.errors import BundleError

Message: TypeAlias = "Mapping[str, str | Sequence[Mapping[str, str]]]"
Conversation: TypeAlias = "Sequence[Message]"


class Renderer(Protocol):
    """The part of a transformers tokenizer that renders."""

    special_tokens_map: Mapping[str, str | Sequence[str]]
    bos_token: str | None

    def apply_chat_template(
        self, conversation: Conversation, *, tokenize: bool, add_generation_prompt: bool, **variables: str
    ) -> str:
        """The conversation as text."""


def _talk(*turns: str, system: str | None = None) -> list[dict[str, str]]:
    """A conversation of user and model in turns."""
    first = [] if system is None else [{"role": "system", "content": system}]
    return first + [
        {"role": ("user", "assistant")[index % 2], "content": content} for index, content in enumerate(turns)
    ]


_REPLY = "REPLY"
_MUST_RENDER = (_talk("Hi"), _talk("Hi", _REPLY, "And now?"))
CONVERSATIONS = (
    *_MUST_RENDER,
    _talk(""),
    _talk(" \tspaces around\r\n \n", " here too ", "x"),
    _talk("\x1c\x85controls\x1f\u2028", "\x1d", "\x0b"),
    _talk("<start_of_turn>user\n<bos>{{ braces }} {% if %} 'quotes' \"\\n"),
    _talk("Hi", system="Be brief."),
    _talk("a", "b", "c", system=" two\n\nparagraphs "),
    _talk("ⴰⵣⵓⵍ, 你好, مرحبا 👩🏽‍🚀", "Azul!", "😀"),
    _talk("<end_of_turn>\n<start_of_turn>model\nI say<eos>", "No.", "<|im_end|></s>[INST]"),
    _talk("1", "2", "3", "4", "5", system=""),
)
"""What a template is tried on; one that refuses system messages is tried without them."""

WHITE_SPACE = (
    r"\t\n\x0b\x0c\r\x1c\x1d\x1e\x1f \x85\xa0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a"
    r"\u2028\u2029\u202f\u205f\u3000"
)
"""What Python's `str.strip` removes, as a string literal of either template language writes it."""
_TRIM = re.compile(r"\|\s*trim\b(?!\s*\()|\.strip\(\)")
_CODE = re.compile(r"{%.*?%}|{{.*?}}", re.DOTALL)
_TEXT = r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*\""""
_FOREIGN = re.compile(
    rf"\.get\(\s*(?P<key>{_TEXT})\s*(?:,\s*(?P<otherwise>{_TEXT}|[\w.]+|\[\]|{{}})\s*)?\)"
    rf"|\bis\s+(?P<negated>not\s+)?none\b|{_TEXT}",
    re.DOTALL,
)
"""What the runtime lacks or means otherwise; or text, which is left alone."""
_JOIN_PARTS = """\
{%- set flat = namespace(messages=[]) -%}
{%- for message in messages -%}
    {%- if message['content'] is string -%}
        {%- set flat.messages = flat.messages + [message] -%}
    {%- else -%}
        {%- set text = message['content'] | map(attribute='text') | join('') -%}
        {%- set flat.messages = flat.messages + [dict(message, content=text)] -%}
    {%- endif -%}
{%- endfor -%}
{%- set messages = flat.messages -%}
"""


@dataclass(frozen=True, kw_only=True)
class Template:
    """A template for the runtime. `starts_with_bos`: the runtime must put the bos token in front of what it renders.

    `after_reply` is what follows the model's text in its turn, e.g. `<end_of_turn>` and a newline.
    """

    source: str
    starts_with_bos: bool
    after_reply: str


def prepare(source: str, renderer: Renderer) -> Template:
    """The template `source` for the runtime.

    Raises:
        BundleError: it fails to render, or can't be rewritten so that the runtime renders the same.
    """
    wanted = _wanted(source, renderer)
    bos = renderer.bos_token or ""
    starts_with_bos = bool(bos) and all(
        text == bos + _render(source, conversation, renderer, bos_token="") for conversation, text in wanted
    )
    rewritten = _rewrite(source, wanted, renderer, keep_bos_name=starts_with_bos)
    for conversation, text in wanted:
        expected = text.removeprefix(bos) if starts_with_bos else text
        if _as_runtime(rewritten, conversation, renderer) != expected:
            raise BundleError(
                f"the chat template can't be made to render {list(conversation)!r} in LiteRT-LM as transformers does",
                cause="it depends on message content being a string, or on special tokens in an unusual way",
                remedy="write the template so that it takes content as text or as a list of parts, as Gemma's own does",
            )
    return Template(source=rewritten, starts_with_bos=starts_with_bos, after_reply=_after_reply(source, renderer))


def _wanted(source: str, renderer: Renderer) -> list[tuple[Conversation, str]]:
    """What transformers renders; conversations that the template refuses on purpose are left out."""
    texts: list[tuple[Conversation, str]] = []
    for conversation in CONVERSATIONS:
        try:
            texts.append((conversation, _render(source, conversation, renderer)))
        except Exception as error:  # Jinja's errors and whatever the template's own expressions raise
            if conversation in _MUST_RENDER:
                raise BundleError(
                    f"the chat template fails to render a conversation: {type(error).__name__}: {error}",
                    cause="chat_template in the checkpoint is broken, or needs variables that only its author passes",
                    remedy="correct the template; try it with tokenizer.apply_chat_template of transformers",
                ) from error
    return texts


def _rewrite(
    source: str, wanted: Sequence[tuple[Conversation, str]], renderer: Renderer, *, keep_bos_name: bool
) -> str:
    """`source` with the differences in the module's docstring taken out."""
    body = _CODE.sub(lambda code: _FOREIGN.sub(_native, code[0]), source.removesuffix("\n"))
    body = _TRIM.sub(lambda _: f'| trim("{WHITE_SPACE}")', body)
    names = [name for name in sorted(renderer.special_tokens_map) if not (keep_bos_name and name == "bos_token")]
    tokens = "".join(
        f"{{%- set {name} = {_literal(str(renderer.special_tokens_map[name]))} -%}}\n"
        for name in names
        if re.search(rf"\b{name}\b", source)
    )
    takes_parts = all(
        _try(tokens + body, _in_parts(conversation), renderer) == _render(tokens + body, conversation, renderer)
        for conversation, _ in wanted
    )
    return tokens + ("" if takes_parts else _JOIN_PARTS) + body


def _native(found: re.Match[str]) -> str:
    """An expression that both engines understand alike."""
    if key := found["key"]:
        return f"[{key}]" + (f"|default({found['otherwise']})" if found["otherwise"] else "")
    if found[0].endswith("none"):
        return "!= none" if found["negated"] else "== none"
    return found[0]


def _literal(text: str) -> str:
    """`text` as a string literal of either template language."""
    escaped = text.replace("\\", r"\\").replace("'", r"\'").replace("\n", r"\n")
    return f"'{escaped}'"


def _render(source: str, conversation: Conversation, renderer: Renderer, **variables: str) -> str:
    """`conversation` up to where the model is to answer, rendered by transformers."""
    return str(
        renderer.apply_chat_template(
            conversation, chat_template=source, tokenize=False, add_generation_prompt=True, **variables
        )
    )


def _as_runtime(source: str, conversation: Conversation, renderer: Renderer) -> str | None:
    """The same under the runtime's conditions: content in parts, no special tokens."""
    return _try(source, _in_parts(conversation), renderer, **dict.fromkeys(renderer.special_tokens_map, ""))


def _try(source: str, conversation: Conversation, renderer: Renderer, **variables: str) -> str | None:
    """The text, or None where the template fails."""
    try:
        return _render(source, conversation, renderer, **variables)
    except Exception:  # a template that can't take parts fails in ways of its own
        return None


def _in_parts(conversation: Conversation) -> Conversation:
    """The conversation with each content as a list of one text part."""
    return [{**message, "content": [{"type": "text", "text": str(message["content"])}]} for message in conversation]


def _after_reply(source: str, renderer: Renderer) -> str:
    """What a rendered conversation has after the model's last text."""
    whole = str(
        renderer.apply_chat_template(
            _talk("Hi", _REPLY), chat_template=source, tokenize=False, add_generation_prompt=False
        )
    )
    return whole.rpartition(_REPLY)[2]
