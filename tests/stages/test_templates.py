"""Chat templates in LiteRT-LM itself, without a model: rewritten, proven, or refused with line and construct."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from line import changed_model
from transformers import AutoTokenizer

from pipeline import fetch
from pipeline import template as command
from pipeline.bundling import metadata, standin, template
from pipeline.core import manifest, stage
from pipeline.core.errors import BundleError
from pipeline.core.facts import Fetch
from pipeline.core.recipe import PROJECT

TOKENIZER = AutoTokenizer.from_pretrained(PROJECT / stage.DEFAULT_MODEL)


def opened(source: str) -> Any:
    """The shipped model's tokenizer with another template."""
    TOKENIZER.chat_template = source
    return TOKENIZER


TURN = "{{ '<start_of_turn>' }}{{ message.role }} "


def each(body: str) -> str:
    """A template that renders every message by `body`."""
    return f"{{% for message in messages %}}{TURN}{body}<end_of_turn>\n{{% endfor %}}"


@pytest.mark.parametrize(
    "body",
    [
        "{{ message.get('content') }}",
        "{{ message.get('name', 'nobody') ~ message['content'] }}",
        "{% generation %}\n{{ message.content }}{% endgeneration %}\n",
        "{%- generation -%} {{ message.content }} {%- endgeneration -%} ",
        "{{ message['content'].strip().split(',')[0] }}",
        "{{ message.content.lstrip() }}|{{ message.content.rstrip() }}",
        "{{ 'none' if tools is none else 'some' }}{{ message.content }}{{ 'x' if tools is not none }}",
        "{{ message.role.upper() }}{{ message.content }}",
        "{{ ' x is none' ~ message.content }}",
    ],
)
def test_what_the_runtime_lacks_is_rewritten_and_proven_in_it(body: str) -> None:
    source = each(body)
    prepared = template.prepare(source, opened(source), "gemma3")
    with standin.opened("gemma3") as runtime:
        for conversation in template.CONVERSATIONS:
            expected = opened(source).apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
            assert runtime.render(conversation, prepared.source) == expected


@pytest.mark.parametrize(
    ("body", "construct"),
    [
        ("{{ message.content | reverse | list | tojson(indent=2) }}", "in line 2: "),
        ("{{ '{}'.format(message.content) }}", "string has no method named format"),
        ("{% if loop.last %}{% break %}{% endif %}{{ message.content }}", "unknown statement break"),
        ("{{ message.keys() | list }}{{ message.content }}", "map has no method named keys"),
        ("{{ loop.last }}{{ message.content }}", "it has 'true"),
        ("{{ message.content.strip()[0:3] }}", "in line 2: "),
    ],
)
def test_what_the_runtime_cannot_render_is_refused_with_line_and_construct(body: str, construct: str) -> None:
    source = "{{ '' }}\n" + each(body)
    with pytest.raises(BundleError, match="can't be made to render") as caught:
        template.prepare(source, opened(source), "gemma3")
    said = "\n".join(caught.value.lines())
    assert construct in said and "TEMPLATE=file.jinja" in said


CALLS = (
    "{% if tools %}{% for tool in tools %}<tool>{{ TOOL }}</tool>\n{% endfor %}{% endif %}"
    "{% for message in messages %}{{ '<start_of_turn>' }}{{ message.role }} {{ message.content }}"
    "{% for call in message.tool_calls or [] %}<call>{{ call.function.name }} {{ call.function.arguments | tojson }}"
    "</call>{% endfor %}<end_of_turn>\n{% endfor %}"
)
"""A template that takes tools, which it describes by `TOOL`."""


@pytest.mark.parametrize("model_type", ["gemma4", "qwen2p5", "qwen3"])
def test_tools_and_what_they_answer_are_rendered_as_transformers_does(model_type: str) -> None:
    """The runtime keeps a tool's result as a part without text, which read as nothing: the model never saw it."""
    source = CALLS.replace("TOOL", "tool | tojson")
    prepared = template.prepare(source, opened(source), model_type, tools=True)
    assert not prepared.no_tools
    with standin.opened(model_type) as runtime:
        for conversation, kept in template._WITH_TOOLS:
            expected = opened(source).apply_chat_template(
                conversation, tools=[template.TOOL], tokenize=False, add_generation_prompt=True
            )
            assert runtime.render(kept, prepared.source, [template.TOOL]) == expected
    assert '{"degrees": 7}<end_of_turn>' in expected, "the last one has a result"


@pytest.mark.parametrize(
    ("model_type", "tool", "construct"),
    [
        ("qwen3", "tool.keys() | list", "map has no method named keys, in line 1"),
        ("function_gemma", "tool.function.name", "undefined value, in line 1"),  # it hands over texts of its own
    ],
)
def test_a_bundle_says_that_it_takes_tools_only_if_they_are_rendered_alike(
    model_type: str, tool: str, construct: str
) -> None:
    source = CALLS.replace("TOOL", tool)
    prepared = template.prepare(source, opened(source), model_type, tools=True)
    assert construct in prepared.no_tools and "with a tool" in prepared.no_tools
    assert prepared == replace(template.prepare(source, opened(source), model_type), no_tools=prepared.no_tools)
    assert "takes no tools" in metadata._remarks({}, prepared)[-1]


@pytest.mark.parametrize("mark", ["{% if loop.last %}!{% endif %}", "{{ 'old' if not loop.last }}"])
def test_a_template_that_rewrites_what_was_said_is_named_as_such(mark: str, capsys: pytest.CaptureFixture[str]) -> None:
    source = each(mark + "{{ message.content }}")
    prepared = template.prepare(source, opened(source), "gemma3")
    assert not prepared.goes_on
    assert "rewrites what was said before" in capsys.readouterr().err
    assert "render the whole conversation anew" in metadata._remarks({}, prepared)[0]
    assert template.prepare(each("{{ message.content }}"), opened(source), "gemma3").goes_on


@pytest.mark.parametrize("model_type", ["gemma3", "gemma3n", "gemma4", "qwen3", "generic_model"])
def test_the_stand_in_answers_as_a_model_would(model_type: str) -> None:
    """Render and three turns, whatever LiteRT-LM takes the model for."""
    source = each("{{ message.content[0].text }}")
    with standin.opened(model_type) as runtime:
        assert runtime.render([{"role": "user", "content": "Hi"}], source) == "<start_of_turn>user Hi<end_of_turn>\n"
        assert runtime.talk(template.TURNS, 8, source) == [standin.REPLY] * 3


def made(folder: Path, tmp_path: Path, *options: str) -> tuple[int, int]:
    """Exit codes of fetch and of the proof of the template."""
    where = ["--model-id", str(folder), "--artifacts", str(tmp_path / "artifacts")]
    return stage.main(fetch.STAGE, [*where, *options]), command.main(where)


def test_a_bad_template_is_refused_before_any_section_and_another_takes_its_place(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = changed_model(tmp_path / "bad", **{"chat_template.jinja": each("{{ message.keys()|list }}")})
    assert made(bad, tmp_path) == (0, 7)
    said = capsys.readouterr().err
    assert "map has no method named keys, in line 1" in said and "TEMPLATE=file.jinja" in said
    good = tmp_path / "good.jinja"
    good.write_text(each("{{ message.content }}"))
    assert made(bad, tmp_path, "--template", str(good)) == (0, 0)
    checkpoint = tmp_path / "artifacts" / bad.name / "fetch" / "checkpoint"
    assert (checkpoint / "chat_template.jinja").read_text() == good.read_text()
    assert (bad / "chat_template.jinja").read_text() != good.read_text()
    assert manifest.read(checkpoint.parent).told(Fetch).template
    assert AutoTokenizer.from_pretrained(checkpoint).chat_template == good.read_text()
