"""Thoughts and tool calls in LiteRT-LM: what a model of each family may say, told apart by what its bundle says of it.

A stand-in says it (bundling/standin.py), under the metadata that a real bundle of the family gets: how a text is parsed
depends on that alone, and random weights say no such thing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from pipeline import chat
from pipeline.bundling import litertlm, standin, template
from pipeline.bundling.metadata import Metadata
from pipeline.checkpoint.chat import open_tokenizer
from pipeline.core.recipe import PROJECT
from pipeline.core.stage import DEFAULT_MODEL
from pipeline.models import Runtime, gemma3, gemma4, plain
from pipeline.runtime.litert_lm import Dialogue, LmRuntime
from pipeline.runtime.thoughts import Channel

TEMPLATE = "{% for message in messages %}{{ message.role }}{% endfor %}{{ tools }}"
GEMMA4, FUNCTION_GEMMA = gemma4._RUNTIME, gemma3._FUNCTION_GEMMA
QWEN3, QWEN25 = (plain.FAMILIES[name].runtime for name in ("qwen3", "qwen2"))
THOUGHTS = {
    "gemma4": (GEMMA4, "<|channel>thought\nTwo and two.<channel|>Four.", "Two and two.", "Four."),
    "qwen3": (QWEN3, "<think>\nTwo and two.\n</think>\n\nFour.", "Two and two.", "\n\nFour."),
    "qwen3, not at all": (QWEN3, "<think>\n\n</think>\n\nFour.", "", "\n\nFour."),
}
_JSON = '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>'
CALLS = {
    "function_gemma": (
        FUNCTION_GEMMA,
        "<start_function_call>call:weather{city:<escape>Oslo<escape>}<end_function_call>",
    ),
    "gemma4": (GEMMA4, '<|tool_call>call:weather{city:<|"|>Oslo<|"|>}<tool_call|>'),
    "gemma4, after a thought": (
        GEMMA4,
        '<|channel>thought\nAsk.<channel|><|tool_call>call:weather{city:<|"|>Oslo<|"|>}<tool_call|>',
    ),
    "qwen3": (QWEN3, _JSON),
    "qwen2": (QWEN25, _JSON),
}


def weather(city: str) -> str:
    """The weather in a city.

    Args:
        city: its name.
    """
    return f"rain in {city}"


def written(folder: Path, told: Runtime, reply: str) -> Path:
    """A bundle that says `reply`, with the metadata of a family."""
    metadata = Metadata(
        model_type=told.type,
        sections=("decoder",),
        start=None,
        stop=(standin.STOP,),
        max_tokens=64,
        chat_template=TEMPLATE,
        thoughts=told.thoughts,
        tools=told.tools,
        calls=told.calls,
    )
    standin.write(litertlm._message(metadata), reply, folder / "says.litertlm")
    return folder / "says.litertlm"


@contextmanager
def conversation(bundle: Path, **options: Any) -> Iterator[Any]:
    """The runtime's own, which an application uses."""
    with (
        LmRuntime(bundle, threads=1) as runtime,
        runtime._engine.create_conversation(max_output_tokens=8, **options) as own,
    ):
        yield own


@pytest.mark.parametrize("name", THOUGHTS)
def test_thoughts_are_told_from_the_answer_by_an_application_and_by_make_chat(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told, reply, thought, answer = THOUGHTS[name]
    bundle = written(tmp_path, told, reply)
    with conversation(bundle) as own:
        said = own.send_message("What is two and two?")
    assert said["content"] == [{"type": "text", "text": answer}]
    assert said.get("channels", {}).get("thought", "") == thought
    assert chat.main([str(bundle), "--prompt", "What is two and two?"]) == 0
    shown = capsys.readouterr()
    assert shown.out == answer + "\n" and thought in shown.err and "<" not in shown.out
    assert answer.strip() not in shown.err


def test_the_next_turn_reads_no_thought(tmp_path: Path) -> None:
    told, reply, _, answer = THOUGHTS["gemma4"]
    bundle = written(tmp_path, told, reply)
    around = litertlm.thoughts(bundle)
    assert around == told.thoughts and around
    with LmRuntime(bundle, threads=1) as runtime, Dialogue(runtime, 8, thoughts=Channel(*around)) as dialogue:
        for text in ("One?", "Two?"):
            assert "".join(dialogue.answer(text)) == answer
        assert [message["content"] for message in dialogue._messages] == ["One?", answer, "Two?", answer]


@pytest.mark.parametrize("name", CALLS)
def test_a_tool_call_comes_back_parsed(name: str, tmp_path: Path) -> None:
    told, reply = CALLS[name]
    with conversation(written(tmp_path, told, reply), tools=[weather], automatic_tool_calling=False) as own:
        said = own.send_message("How is the weather in Oslo?")
    assert said["tool_calls"] == [
        {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}},
    ]
    assert not said.get("content") and ("channels" in said) == ("thought" in name)


@pytest.mark.parametrize("name", [name for name in CALLS if "thought" not in name])
def test_a_conversation_goes_on_after_a_tool_was_called(name: str, tmp_path: Path) -> None:
    """Three turns of the runtime's own conversation: a call, its result, and what is asked then."""
    told, reply = CALLS[name]
    source = (
        "{% for message in messages %}{{ message.role }}: {{ message.content }}"
        "{% for call in message.tool_calls or [] %}{{ call.function.arguments.city }}{% endfor %}\n{% endfor %}"
    )
    tokenizer = open_tokenizer(PROJECT / DEFAULT_MODEL)
    tokenizer.chat_template = source
    made = template.prepare(source, tokenizer, told.type, tools=True)
    assert made.goes_on
    bundle, options = written(tmp_path, told, reply), {"tools": [weather], "automatic_tool_calling": False}
    answer = {"role": "tool", "content": [{"type": "tool_response", "name": "weather", "response": "rain"}]}
    with conversation(bundle, chat_template=made.source, **options) as own:
        for message in ("How is the weather in Oslo?", answer, "And now?"):
            assert own.send_message(message)["tool_calls"][0]["function"]["arguments"] == {"city": "Oslo"}
        shown = own.render_message_to_string({"role": "user", "content": "Well?"})
    assert "user: Well?" in shown


def test_of_a_family_without_tools_it_is_text(tmp_path: Path) -> None:
    """The control: the parsing above is the metadata's doing."""
    with conversation(written(tmp_path, Runtime(type="generic_model"), _JSON)) as own:
        assert own.send_message("How is the weather in Oslo?")["content"] == [{"type": "text", "text": _JSON}]
