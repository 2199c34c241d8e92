"""The chat template as the runtime needs it, and what it says about tokens.

LiteRT-LM renders with minijinja, transformers with Jinja. Where the two differ on the same source, the source is
rewritten so that both give the same text (seen in litert-lm 0.18.1):

- Jinja drops one newline at the end of the source, the runtime keeps it;
- Jinja's `trim` removes what Python calls white space, the runtime's leaves U+001C to U+001F;
- what the runtime's engine lacks as a method or says otherwise of none is said in other words (`_REWRITINGS`);
- the runtime hands message content over as a list of parts, never as a string; where a tool answered, the part holds
  its `response` and no text;
- the runtime leaves `bos_token` and `eos_token` empty and knows no other special token; it puts the bundle's start
  token in front of the first prompt itself.

Every rewriting is proved on `CONVERSATIONS` before it is used: rendered by the runtime itself, the new source must give
the text that the checkpoint's own source gives in transformers. That takes no model (`standin`).
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, TypeAlias

from pipeline.bundling import standin
from pipeline.core import log
from pipeline.core.errors import BundleError, IntegrityError
from pipeline.runtime.litert_lm import REWRITES, LmRuntime

Message: TypeAlias = "Mapping[str, object]"
Conversation: TypeAlias = "Sequence[Message]"


class Renderer(Protocol):
    """The part of a transformers tokenizer that renders."""

    special_tokens_map: Mapping[str, str | Sequence[str]]
    bos_token: str | None

    def apply_chat_template(
        self, conversation: Conversation, *, tokenize: bool, add_generation_prompt: bool, **variables: object
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
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather in a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "description": "its name"}},
            "required": ["city"],
        },
    },
}
"""What a template that takes tools is tried with."""
_CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}


def _asked(answer: object, **called: str) -> list[Message]:
    """A conversation in which the tool was called, and gave `answer`."""
    return [
        {"role": "user", "content": "Oslo?"},
        {"role": "assistant", "tool_calls": [_CALL], **called},
        {"role": "tool", "name": "weather", "content": answer},
    ]


def _part(answer: object) -> list[Message]:
    return [{"type": "tool_response", "name": "weather", "response": answer}]


_WITH_TOOLS: tuple[tuple[Conversation, Conversation], ...] = (
    *((talk, talk) for talk in (_talk("Hi"), _talk("Hi", system="Be brief."), _talk("Hi", _REPLY, "And now?"))),
    (_asked("7 degrees", content=""), _asked(_part("7 degrees"))),
    (_asked('{"degrees": 7}', content=""), _asked(_part({"degrees": 7}))),
)
"""Conversations as transformers takes them and as the runtime keeps them; a tool's result is text there, or JSON."""
TURNS = ("Hi", "And now?", "Well?")
"""What a conversation of the runtime's own is held with."""

WHITE_SPACE = (
    r"\t\n\x0b\x0c\r\x1c\x1d\x1e\x1f \x85\xa0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a"
    r"\u2028\u2029\u202f\u205f\u3000"
)
"""What Python's `str.strip` removes, as a string literal of either template language writes it."""
_STRING = re.compile(r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"", re.DOTALL)
_TAG = re.compile(rf"\{{#.*?#\}}|\{{[{{%](?:{_STRING.pattern}|.)*?[%}}]\}}", re.DOTALL)
_REWRITINGS = (
    # Python's white space, and as a method, so that whatever follows it still does.
    (re.compile(r"\|\s*trim\b(?!\s*\()"), f'| trim("{WHITE_SPACE}")'.replace("\\", r"\\")),
    (re.compile(r"\.([lr]?strip)\(\)"), rf'.\1("{WHITE_SPACE}")'.replace("\\", r"\\").replace(r"\\1", r"\1")),
    # Marks for training, which render nothing; as tags they keep their say in the white space around them.
    (re.compile(r"(\{%[-+]?\s*)generation(\s*[-+]?%\})"), r"\1if true\2"),
    (re.compile(r"(\{%[-+]?\s*)endgeneration(\s*[-+]?%\})"), r"\1endif\2"),
    # Maps have no method there.
    (re.compile(r"\.get\(\s*([^(),\s]+)\s*\)"), r"[\1]"),
    (re.compile(r"\.get\(\s*([^(),\s]+)\s*,\s*([^(),]+?)\s*\)(?!\s*[.\[(])"), r"[\1]|default(\2)"),
    # `none is none` is false there, and true of what is undefined, as are variables that transformers sets to none.
    (re.compile(r"((?:[\w.\0]|\[[^\[\]]*\])+)\s+is\s+none\b"), r"(\1 is none or \1 == none)"),
    (re.compile(r"((?:[\w.\0]|\[[^\[\]]*\])+)\s+is\s+not\s+none\b"), r"(\1 is not none and \1 != none)"),
    (re.compile(r"\.(upper|lower|title|capitalize)\(\)(?!\s*[.\[(])"), r" | \1"),
)
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
_JOIN_ANSWERS = """\
        {%- set all = namespace(text='') -%}
        {%- for part in message['content'] or [] -%}
            {%- if part['response'] is not defined -%}
                {%- set all.text = all.text + part['text'] -%}
            {%- elif part['response'] is string -%}
                {%- set all.text = all.text + part['response'] -%}
            {%- else -%}
                {%- set all.text = all.text + (part['response'] | tojson) -%}
            {%- endif -%}
        {%- endfor -%}
        {%- set text = all.text -%}
"""
"""In the place of the line that joins texts, for templates that take tools."""
_TEXTS = re.compile(r"^.*map\(attribute.*\n", re.MULTILINE)


@dataclass(frozen=True, kw_only=True)
class Template:
    """A template for the runtime. `starts_with_bos`: the runtime must put the bos token in front of what it renders.

    `goes_on`: the runtime's own conversations do, since the template leaves what was said before as it was. `no_tools`
    is why it can't have any, although the model may.
    """

    source: str
    starts_with_bos: bool
    goes_on: bool
    no_tools: str = ""


@dataclass(frozen=True, kw_only=True)
class Case:
    """A conversation that the runtime must render as `text`, where it has `tools`."""

    conversation: Conversation
    text: str
    tools: tuple[Mapping[str, object], ...] = ()


_NOWHERE: Mapping[str, str] = {}


def prepare(
    source: str, renderer: Renderer, model_type: str, *, tools: bool = False, places: Mapping[str, str] = _NOWHERE
) -> Template:
    """The template `source` for the runtime, which takes the model for one of `model_type`.

    `tools`: the model takes tools, so conversations with one are tried as well; if these fail, it is without. `places`:
    what must stand where a message has an `image` or `audio`, as far as the model sees and hears.

    Raises:
        BundleError: it fails to render, or can't be rewritten so that the runtime renders the same.
    """
    rendered = wanted(source, renderer)
    bos = renderer.bos_token or ""
    starts_with_bos = bool(bos) and all(
        text == bos + _render(source, conversation, renderer, bos_token="") for conversation, text in rendered
    )
    cases = [Case(conversation=conversation, text=text) for conversation, text in rendered]
    for kind, place in places.items():
        cases += _with_medium(source, renderer, kind, place)
    with_tools = cases + _with_tools(source, renderer) if tools else []
    if starts_with_bos:
        cases, with_tools = (
            [replace(case, text=case.text.removeprefix(bos)) for case in each] for each in (cases, with_tools)
        )
    with standin.opened(model_type) as runtime:
        candidates = _candidates(source, renderer, keep_bos_name=starts_with_bos)
        no_tools = ""
        try:
            joined = [text.replace(_JOIN_PARTS, _TEXTS.sub(_JOIN_ANSWERS, _JOIN_PARTS)) for text in candidates]
            rewritten = _proved(joined, source, with_tools, runtime) if tools else ""
        except BundleError as error:
            rewritten, no_tools = "", f"{error}: {error.cause}"
        rewritten = rewritten or _proved(candidates, source, cases, runtime)
        goes_on = _goes_on(rewritten, runtime)
    if not goes_on:
        log.warn(
            "the chat template rewrites what was said before (shortened, stripped or marked once more follows): "
            "LiteRT-LM's own conversations by it end after a turn or two; `make chat` and the card know"
        )
    return Template(source=rewritten, starts_with_bos=starts_with_bos, goes_on=goes_on, no_tools=no_tools)


def wanted(source: str, renderer: Renderer) -> list[tuple[Conversation, str]]:
    """What transformers renders; conversations that the template refuses on purpose are left out."""
    texts: list[tuple[Conversation, str]] = []
    for conversation in CONVERSATIONS:
        try:
            texts.append((conversation, _render(source, conversation, renderer)))
        except Exception as error:  # Jinja's errors and whatever the template's own expressions raise
            if conversation in _MUST_RENDER:
                raise BundleError(
                    f"the chat template fails to render a conversation: {type(error).__name__}: {error}",
                    cause="it is broken, or demands what a plain chat has not: other roles, parts with fields of "
                    "their own, variables that only its author passes",
                    remedy="give one that renders plain messages of user and assistant, TEMPLATE=file.jinja; try it "
                    "with tokenizer.apply_chat_template of transformers",
                ) from error
    return texts


def _with_medium(source: str, renderer: Renderer, kind: str, place: str) -> list[Case]:
    """What transformers renders of messages with an `image` or `audio` in them.

    Raises:
        BundleError: its place is not in it.
    """
    parts: list[list[Message]] = [
        [{"type": kind}, {"type": "text", "text": "What is this?"}],
        [{"type": "text", "text": "Listen: "}, {"type": kind}, {"type": kind}],
    ]
    talks = [[{"role": "user", "content": content}] for content in parts]
    cases = [Case(conversation=talk, text=_render(source, talk, renderer)) for talk in talks]
    if [case.text.count(place) for case in cases] != [1, 2]:
        what = {"image": "a picture", "audio": "a sound"}[kind]
        raise BundleError(
            f"the chat template has no {place} where a message has {what}",
            cause="it is that of a text model, or drops what it does not know",
            remedy="give the whole model's template with TEMPLATE=file.jinja, or say TOWERS=none",
        )
    return cases


def _with_tools(source: str, renderer: Renderer) -> list[Case]:
    """What transformers renders with a tool; what the template refuses on purpose is left out."""
    cases = []
    for conversation, kept in _WITH_TOOLS:
        try:
            text = _render(source, conversation, renderer, tools=[TOOL])
        except Exception as error:  # as in `wanted`
            log.step(f"the chat template refuses a conversation with a tool: {error}")
            continue
        cases.append(Case(conversation=kept, text=text, tools=(TOOL,)))
    return cases


def _candidates(source: str, renderer: Renderer, *, keep_bos_name: bool) -> list[str]:
    """`source` with the differences in the module's docstring taken out; without and with parts of content joined."""
    body = rewritten(source.removesuffix("\n"))
    names = [name for name in sorted(renderer.special_tokens_map) if not (keep_bos_name and name == "bos_token")]
    tokens = "".join(
        f"{{%- set {name} = {_literal(str(renderer.special_tokens_map[name]))} -%}}\n"
        for name in names
        if re.search(rf"\b{name}\b", source)
    )
    return [tokens + body, tokens + _JOIN_PARTS + body]


def rewritten(source: str) -> str:
    """`source` with what the runtime's engine lacks, or does otherwise, said in words that both engines read alike."""
    return _TAG.sub(lambda tag: _rewritten_tag(tag[0]), source)


def _rewritten_tag(tag: str) -> str:
    """A tag; what stands in its string literals is left alone."""
    if tag.startswith("{#"):
        return tag
    literals: list[str] = []

    def kept(literal: re.Match[str]) -> str:
        literals.append(literal[0])
        return f"\0{len(literals) - 1}\0"

    text = _STRING.sub(kept, tag)
    for pattern, replacement in _REWRITINGS:
        text = pattern.sub(replacement, text)
    return re.sub("\0(\\d+)\0", lambda place: literals[int(place[1])], text)


def _proved(candidates: Sequence[str], source: str, cases: Sequence[Case], runtime: LmRuntime) -> str:
    """The first of `candidates` that the runtime renders as `cases` say.

    Raises:
        BundleError: none; names the line and the construct of `source`, or the difference.
    """
    faults = []
    for candidate in candidates:
        fault = next(filter(None, (_fault(candidate, source, case, runtime) for case in cases)), None)
        if fault is None:
            return candidate
        faults.append(fault)
    case, cause = faults[-1]
    what = f"{list(case.conversation)!r}{' with a tool' if case.tools else ''}"
    raise BundleError(
        f"the chat template can't be made to render {what} in LiteRT-LM as transformers does",
        cause=cause,
        remedy="write that place otherwise, and give the file with TEMPLATE=file.jinja",
    )


def _fault(candidate: str, source: str, case: Case, runtime: LmRuntime) -> tuple[Case, str] | None:
    """What is wrong with a rendered conversation, if anything is."""
    try:
        text = runtime.render(case.conversation, candidate, case.tools)
    except IntegrityError as error:
        return case, _placed(error.cause or "", candidate, source)
    expected = case.text
    if text == expected:
        return None
    at = len(os.path.commonprefix([text, expected]))
    return (
        case,
        f"after {text[max(0, at - 20) : at]!r} it has {text[at : at + 20]!r}, not {expected[at : at + 20]!r}",
    )


def _placed(complaint: str, candidate: str, source: str) -> str:
    """The runtime's complaint about `candidate`, with the line of `source` that it is about."""
    said = re.fullmatch(r"(.*?)\s*\(in [^()]*:(\d+)\)\s*", complaint, re.DOTALL)
    lines = source.splitlines()
    # What stands before the source is lines of its own; rewriting makes none.
    line = int(said[2]) - (candidate.count("\n") - source.removesuffix("\n").count("\n")) if said else 0
    if not said or not 0 < line <= len(lines):
        return complaint
    return f"{said[1]}, in line {line}: {lines[line - 1].strip()[:100]}"


def _goes_on(source: str, runtime: LmRuntime) -> bool:
    """Whether the runtime goes on with a conversation by this template: what is rendered must stay as it was.

    Raises:
        BundleError: not even a first answer comes.
    """
    try:
        runtime.talk(TURNS, 8, source)
    except IntegrityError as error:
        if REWRITES in (error.cause or ""):
            return False
        raise BundleError(
            f"LiteRT-LM can't hold a conversation by the chat template: {error}",
            cause=error.cause,
            remedy="correct that place, and give the file with TEMPLATE=file.jinja",
        ) from error
    return True


def _literal(text: str) -> str:
    """`text` as a string literal of either template language."""
    escaped = text.replace("\\", r"\\").replace("'", r"\'").replace("\n", r"\n")
    return f"'{escaped}'"


def _render(source: str, conversation: Conversation, renderer: Renderer, **variables: object) -> str:
    """`conversation` up to where the model is to answer, rendered by transformers."""
    return str(
        renderer.apply_chat_template(
            conversation, chat_template=source, tokenize=False, add_generation_prompt=True, **variables
        )
    )
