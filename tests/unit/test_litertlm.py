"""The bundle writer: what it says about a checkpoint, the same bytes twice, and bad input."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from litert_lm_builder import litertlm_builder
from litert_lm_builder.runtime.proto import llm_metadata_pb2
from tokenizers import Tokenizer

from pipeline.bundling import litertlm, metadata, template
from pipeline.checkpoint import chat, reading
from pipeline.core.errors import BundleError, IntegrityError
from pipeline.core.facts import Section
from pipeline.core.recipe import PROJECT
from pipeline.models import Runtime

CHECKPOINT = PROJECT / "examples" / "tiny-gemma3n"
VOCABULARY = 2048
BOS, EOS, END_OF_TURN = 2, 1, 6
SECTIONS = ("decoder", "embedder", "per_layer_embedder")


class Rendering:
    """The part of transformers' tokenizer that is used, without transformers: Jinja and the backend's own tokenizer."""

    bos_token, bos_token_id, eos_token_id, pad_token_id = "<bos>", BOS, EOS, 0
    special_tokens_map = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"}
    all_special_ids = (BOS, EOS, 3, 0, 4, 5, END_OF_TURN)

    def __init__(self, source: Any = None) -> None:
        self.chat_template = (CHECKPOINT / "chat_template.jinja").read_text() if source is None else source
        self.backend_tokenizer: Any = Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json"))

    def __call__(self, text: str, *, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": self.backend_tokenizer.encode(text, add_special_tokens=add_special_tokens).ids}

    def apply_chat_template(self, conversation: template.Conversation, **options: Any) -> str:
        def refuse(message: str) -> None:
            raise TemplateError(message)

        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.globals["raise_exception"] = refuse
        source = options.pop("chat_template", self.chat_template)
        source = source["default"] if isinstance(source, Mapping) else source
        return environment.from_string(source).render(
            messages=conversation, **{**self.special_tokens_map, **options, "tokenize": None}
        )


@pytest.fixture
def models(tmp_path: Path) -> dict[str, Path]:
    """Sections of odd sizes that begin as TFLite files do."""
    folder = tmp_path / "sections"
    folder.mkdir()
    files = {}
    for number, name in enumerate(SECTIONS):
        files[name] = folder / f"{name}.tflite"
        files[name].write_bytes(b"\x1c\0\0\0TFL3" + bytes([number]) * (16384 * number + 5))
    return files


def described(source: Any = None, *, folder: Path = CHECKPOINT, **options: Any) -> metadata.Metadata:
    wanted = {
        "runtime": lambda _: Runtime(type="gemma3n"),
        "sections": SECTIONS,
        "vocabulary": VOCABULARY,
        "max_tokens": 512,
        **options,
    }
    return metadata.describe(folder, Rendering(source), **wanted)


def written(models: Mapping[str, Path], out: Path, **changes: Any) -> list[Section]:
    told = {"model_type": "gemma3n", "sections": SECTIONS, "start": BOS, "stop": (EOS, END_OF_TURN), "max_tokens": 512}
    fields = {**told, **changes}
    return litertlm.write(metadata.Metadata(**fields), '{"tokenizer": "ⵣ"}', models, out)


def checkpoint(folder: Path, **files: Mapping[str, Any]) -> Path:
    for name, table in files.items():
        (folder / f"{name}.json").write_text(json.dumps(table))
    return folder


# What the checkpoint says


def test_the_shipped_model_is_described() -> None:
    found = described()
    assert (found.start, found.stop, found.max_tokens) == (BOS, (EOS, END_OF_TURN), 512)
    assert found.sampler == metadata.Sampler(top_k=1)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"generation_config": {"eos_token_id": 9}, "config": {"eos_token_id": 8}}, (END_OF_TURN, 9)),
        ({"generation_config": {"eos_token_id": [9, 7, 9]}}, (END_OF_TURN, 7, 9)),
        ({"config": {"eos_token_id": 8}}, (END_OF_TURN, 8)),
        ({"config": {"text_config": {"eos_token_id": [8]}}}, (END_OF_TURN, 8)),
        ({}, (EOS, END_OF_TURN)),
    ],
)
def test_stop_tokens_are_eos_and_the_end_of_the_models_turn_in_order(
    tmp_path: Path, files: dict[str, dict[str, Any]], expected: tuple[int, ...]
) -> None:
    assert described(folder=checkpoint(tmp_path, **files)).stop == expected


def test_a_base_model_starts_with_bos_and_stops_at_eos(tmp_path: Path) -> None:
    found = described("", folder=checkpoint(tmp_path, generation_config={"eos_token_id": EOS}))
    assert (found.start, found.stop, found.chat_template) == (BOS, (EOS,), "")


THINKING = Runtime(
    type="gemma4",
    tools=True,
    thoughts=("<start_of_turn>thought\n", "<mask>"),
    calls={"code_fence_start": "<start_of_turn>", "open_quote": "|"},
    response="<mask>",
)
"""A family with control tokens of the shipped tokenizer in place of its own."""


def test_thoughts_and_tools_are_told_where_the_template_has_them(models: dict[str, Path], tmp_path: Path) -> None:
    mask = Rendering().backend_tokenizer.token_to_id("<mask>")
    source = SIMPLE + "{% for tool in tools %}{{ tool.function.name }}<mask>{% endfor %}"
    found = described(source, runtime=lambda _: THINKING)
    assert found.thoughts == THINKING.thoughts and found.tools and found.calls == THINKING.calls
    assert found.stop == tuple(sorted((EOS, END_OF_TURN, mask)))
    out = tmp_path / "x.litertlm"
    litertlm.write(found, "{}", models, out)
    message = llm_metadata_pb2.LlmMetadata.FromString(litertlm.read(out, litertlm.read_sections(out)[0]))
    assert message.supports_thinking and message.supports_function_calling
    assert message.llm_model_type.gemma4.code_fence_start == "<start_of_turn>"
    assert [(each.channel_name, each.start, each.end) for each in message.channels] == [("thought", *THINKING.thoughts)]
    assert litertlm.thoughts(out) == THINKING.thoughts


@pytest.mark.parametrize(("largest", "expected"), [(None, ""), (300.0, ""), (40000.0, "fp32"), (9e4, "fp32")])
def test_a_decoder_that_float16_can_not_hold_says_so(
    models: dict[str, Path], tmp_path: Path, largest: float | None, expected: str, capfd: pytest.CaptureFixture[str]
) -> None:
    kind = metadata.activation_type(largest)
    assert kind == expected
    sections = written(models, tmp_path / "x.litertlm", activation_type=kind)
    assert [section.activation_type for section in sections] == ["", "", expected, "", ""]
    assert sections == litertlm.read_sections(tmp_path / "x.litertlm") and "Adding" not in capfd.readouterr().out


def test_a_template_without_them_says_so(models: dict[str, Path], tmp_path: Path) -> None:
    found = described(SIMPLE, runtime=lambda _: THINKING)
    assert (found.thoughts, found.tools, found.calls, found.stop) == (None, False, {}, (EOS, END_OF_TURN))
    litertlm.write(found, "{}", models, tmp_path / "x.litertlm")
    assert litertlm.thoughts(tmp_path / "x.litertlm") is None


def test_the_default_of_several_templates_is_taken() -> None:
    source = Rendering().chat_template
    assert described({"default": source, "tool_use": "x"}) == described(source)


def test_sampler_is_what_generate_would_do(tmp_path: Path) -> None:
    sampling = {"eos_token_id": 1, "do_sample": True, "top_k": 64, "temperature": 0.5, "top_p": None}
    found = described(folder=checkpoint(tmp_path, generation_config=sampling))
    assert found.sampler == metadata.Sampler(top_k=64, top_p=1.0, temperature=0.5)


def test_a_sampler_that_is_no_number_is_refused(tmp_path: Path) -> None:
    sampling = {"eos_token_id": 1, "do_sample": True, "temperature": "warm"}
    with pytest.raises(BundleError, match="temperature is 'warm', expected a number"):
        described(folder=checkpoint(tmp_path, generation_config=sampling))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"runtime": lambda _: Runtime(type="gemma5")}, "no model type 'gemma5'"),
        ({"vocabulary": END_OF_TURN}, "stop token 6 is not in the model's vocabulary of 6 tokens"),
        ({"vocabulary": 300}, "token of the chat template"),
        ({"source": "{% for %}"}, "fails to render"),
        ({"source": "{{ raise_exception('never') }}"}, "fails to render"),
        (
            {"source": "{% if messages[0]['content'] is string %}{{ raise_exception('no parts') }}{% endif %}"},
            "no parts",
        ),
        ({"source": "{{ range(10**5) | random }}"}, "can't be made to render"),
    ],
)
def test_bad_checkpoints_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(BundleError, match=message):
        described(options.pop("source", None), **options)


@pytest.mark.parametrize("eos", ["one", [], [1.5], True])
def test_eos_that_is_no_token_id_is_refused(tmp_path: Path, eos: Any) -> None:
    with pytest.raises(IntegrityError, match="eos_token_id"):
        described(folder=checkpoint(tmp_path, generation_config={"eos_token_id": eos}))


def test_no_eos_at_all_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Rendering, "eos_token_id", None)
    with pytest.raises(IntegrityError, match="eos token"):
        described(folder=tmp_path)


def test_a_generation_config_that_is_no_json_is_refused(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(BundleError, match="not JSON"):
        described(folder=tmp_path)


# The template


def as_runtime(prepared: template.Template, conversation: template.Conversation) -> str:
    """What the runtime makes of a template: content in parts, no special tokens, the start token put in front."""
    parts = [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in conversation]
    empty = dict.fromkeys(Rendering.special_tokens_map, "")
    text = Rendering(prepared.source).apply_chat_template(parts, add_generation_prompt=True, **empty)
    return ("<bos>" if prepared.starts_with_bos else "") + text


SIMPLE = (
    "{{ bos_token }}{% for message in messages %}[{{ message['role'] }}]{{ message['content'] | trim }}<end_of_turn>\n"
    "{% endfor %}{% if add_generation_prompt %}[model]{% endif %}"
)


@pytest.mark.parametrize(
    ("source", "starts_with_bos"),
    [
        (SIMPLE, True),
        (SIMPLE + "\n", True),
        (SIMPLE.replace(" | trim", ".strip()"), True),
        (SIMPLE.replace("{{ bos_token }}", "<bos>"), False),
        (SIMPLE.replace("{{ bos_token }}", ""), False),
        (SIMPLE.replace("{{ bos_token }}", "{{ bos_token }}{{ bos_token }}"), False),
        (SIMPLE.replace("<end_of_turn>", "{{ eos_token }}"), True),
        (SIMPLE.replace("[model]", "[model]{{ pad_token }}"), True),
        ("{% if messages[0]['role'] == 'system' %}{{ raise_exception('no') }}{% endif %}" + SIMPLE, True),
    ],
)
def test_a_template_is_rewritten_until_the_runtime_renders_the_same(source: str, starts_with_bos: bool) -> None:
    prepared = template.prepare(source, Rendering(source), "gemma3")
    assert prepared.starts_with_bos == starts_with_bos
    assert not prepared.source.endswith("\n")
    for conversation in template.CONVERSATIONS:
        try:
            expected = Rendering(source).apply_chat_template(conversation, add_generation_prompt=True)
        except TemplateError:
            continue
        assert as_runtime(prepared, conversation) == expected


@pytest.mark.parametrize(
    ("source", "bos", "begins", "first"),
    [
        (SIMPLE, "<bos>", True, BOS),
        (SIMPLE.replace("{{ bos_token }}", "<bos>"), "<bos>", False, BOS),  # text of the template: not put there twice
        (SIMPLE.replace("{{ bos_token }}", ""), "<bos>", False, BOS),  # but its tokenizer puts it before plain text
        ("", "<bos>", True, BOS),
        (SIMPLE.replace("{{ bos_token }}", ""), None, False, EOS),  # Qwen: what ended the text before
        ("", None, False, EOS),
    ],
)
def test_bundle_and_reference_begin_prompts_by_one_rule(
    source: str, bos: str | None, begins: bool, first: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Rendering, "bos_token", bos)
    monkeypatch.setattr(Rendering, "bos_token_id", None if bos is None else BOS)
    if bos is None:
        monkeypatch.setattr(Rendering, "special_tokens_map", {"eos_token": "<eos>"})
    tokenizer = Rendering(source)
    assert chat.prompts_begin_with_bos(tokenizer) == begins
    assert chat.first_token(tokenizer) == first
    assert described(source).start == (BOS if begins else None)


def test_a_tokenizer_without_bos_and_eos_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("bos_token", "bos_token_id", "eos_token_id"):
        monkeypatch.setattr(Rendering, name, None)
    with pytest.raises(IntegrityError, match="neither a bos nor an eos token"):
        chat.first_token(Rendering(""))


@pytest.mark.parametrize(
    ("foreign", "native"),
    [
        ("{% if message.get('name') %}", "{% if message['name'] %}"),
        ('{{ message.get( "a\'b" , none) }}', '{{ message["a\'b"]|default(none) }}'),
        ("{{ tool.get('x', {}) }}", "{{ tool['x']|default({}) }}"),
        ("{% if tools is not none %}", "{% if (tools is not none and tools != none) %}"),
        ("{%- set x = y  is none -%}", "{%- set x = (y is none or y == none) -%}"),
        ("{{ 'nothing is none, see .get(\\'x\\')' }}", "{{ 'nothing is none, see .get(\\'x\\')' }}"),
        ("The answer is none. .get('x')", "The answer is none. .get('x')"),
        ("{# x is none #}{%- generation -%}a{% endgeneration %}", "{# x is none #}{%- if true -%}a{% endif %}"),
        ("{{ a.upper() + b.title()[0] }}", "{{ a | upper + b.title()[0] }}"),
        (
            "{{ '}} x is none' ~ (x.y['z'] is none) }}",
            "{{ '}} x is none' ~ ((x.y['z'] is none or x.y['z'] == none)) }}",
        ),
    ],
)
def test_what_the_runtime_lacks_is_said_otherwise_and_text_left_alone(foreign: str, native: str) -> None:
    assert template.rewritten(foreign) == native


def test_a_template_writes_a_fixed_date() -> None:
    """Reference and bundle of tomorrow are those of today."""
    source = "{%- set day = strftime_now('%d %b %Y') -%}{{ strftime_now( \"%Y\" ) }}{{ strftime_now(format) }}"
    assert chat.dated(source) == "{%- set day = '26 Jul 2024' -%}{{ '2024' }}{{ strftime_now(format) }}"


@pytest.mark.parametrize(
    ("generation", "sampler"),
    [
        ({"top_k": 0}, metadata.Sampler(top_k=2048, top_p=1.0, temperature=1.0)),
        ({"top_k": -1, "top_p": 0.9}, metadata.Sampler(top_k=2048, top_p=0.9, temperature=1.0)),
        ({"temperature": 0.0, "top_k": 64}, metadata.Sampler()),
    ],
)
def test_sampler_values_that_the_runtime_does_not_take_are_translated(
    tmp_path: Path, generation: dict[str, Any], sampler: metadata.Sampler
) -> None:
    said = {"eos_token_id": 1, "do_sample": True, **generation}
    found = described(folder=checkpoint(tmp_path, generation_config=said), vocabulary=2048)
    assert found.sampler == sampler
    assert found.remarks == ()


def test_sampler_values_that_the_runtime_has_no_word_for_are_for_the_card(tmp_path: Path) -> None:
    said = {"eos_token_id": 1, "do_sample": True, "min_p": 0.1, "repetition_penalty": 1.05, "typical_p": 1.0}
    found = described(folder=checkpoint(tmp_path, generation_config=said))
    assert len(found.remarks) == 1 and "min_p = 0.1, repetition_penalty = 1.05." in found.remarks[0]


def test_a_template_that_takes_parts_keeps_its_own_way() -> None:
    source = Rendering().chat_template
    assert "flat" not in template.prepare(source, Rendering(), "gemma3").source
    assert reading.turn_end(Rendering()) == "<end_of_turn>\n"


def test_white_space_is_what_python_strips() -> None:
    found = json.loads('"' + template.WHITE_SPACE.replace(r"\x", r"\u00") + '"')
    assert sorted(found) == [chr(code) for code in range(0x110000) if chr(code).isspace()]


# The tokenizer


def test_the_tokenizer_is_the_backends_own() -> None:
    text = metadata.tokenizer_json(Rendering(), VOCABULARY)
    assert json.loads(text) == json.loads((CHECKPOINT / "tokenizer.json").read_text())


def test_added_tokens_beyond_the_vocabulary_are_left_out() -> None:
    tokenizer = Rendering()
    size = len(tokenizer.backend_tokenizer.get_vocab())
    tokenizer.backend_tokenizer.add_special_tokens(["<image_soft_token>"])
    again = Tokenizer.from_str(metadata.tokenizer_json(tokenizer, size))
    assert "<image_soft_token>" not in again.get_vocab()
    text = "Azul! ⵣ <end_of_turn>\n"
    assert again.encode(text).ids == Rendering().backend_tokenizer.encode(text).ids


def test_other_tokens_that_are_left_out_are_said(capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = Rendering()
    size = len(tokenizer.backend_tokenizer.get_vocab())
    tokenizer.backend_tokenizer.add_special_tokens(["<image_soft_token>", "<mine>"])
    metadata.tokenizer_json(tokenizer, size)
    assert capsys.readouterr().err.rstrip().endswith("which read as text now: <mine>")


def test_an_end_of_turn_that_is_no_token_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    """ChatML on a tokenizer without its tokens."""
    turn = "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    source = f"{{% for message in messages %}}{turn}{{% endfor %}}"
    source += "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    assert described(source).stop == (EOS, END_OF_TURN)
    assert "in the chat template, which is no token: only eos ends one" in capsys.readouterr().err
    described()
    assert "which is no token" not in capsys.readouterr().err


def test_a_tokenizer_of_another_model_is_refused() -> None:
    with pytest.raises(BundleError, match="vocabulary only 1000"):
        metadata.tokenizer_json(Rendering(), 1000)


# The file


def test_the_builder_is_the_one_whose_metadata_is_replaced() -> None:
    assert version("litert-lm-builder") == litertlm.BUILDER
    assert callable(litertlm_builder.populate_system_metadata)


def test_the_runtime_that_a_bundle_asks_for_is_the_one_that_it_is_judged_with() -> None:
    assert version("litert-lm-api") == litertlm.JUDGED_WITH


@pytest.mark.parametrize(("told", "pad"), [(0, [0]), (VOCABULARY - 1, [VOCABULARY - 1]), (VOCABULARY, []), (None, [])])
def test_the_pad_token_is_told_where_the_model_has_it(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: int | None, pad: list[int]
) -> None:
    monkeypatch.setattr(Rendering, "pad_token_id", told)
    found = described()
    litertlm.write(found, "{}", models, out := tmp_path / "x.litertlm")
    message = llm_metadata_pb2.LlmMetadata.FromString(litertlm.read(out, litertlm.read_sections(out)[0]))
    assert message.HasField("pad_token") == bool(pad) and list(message.pad_token.token_ids.ids) == pad
    assert message.min_runtime_version == "0.18.1"


def test_every_section_is_in_the_file_as_given(models: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "model.litertlm"
    told = written(models, out, stop=(6, 1))
    data = out.read_bytes()
    sections = litertlm.read_sections(out)
    assert [section.size for section in sections[2:]] == [file.stat().st_size for file in models.values()]
    for section, file in zip(sections[2:], models.values(), strict=True):
        assert data[section.offset :][: section.size] == file.read_bytes()
    assert told == sections
    message = llm_metadata_pb2.LlmMetadata.FromString(data[sections[0].offset :][: sections[0].size])
    assert message.llm_model_type.WhichOneof("model_type") == "gemma3n"
    assert list(message.start_token.token_ids.ids) == [BOS]
    assert not message.HasField("jinja_prompt_template")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["model.litertlm", "sections"]


def test_the_same_content_gives_the_same_bytes(models: dict[str, Path], tmp_path: Path) -> None:
    first, second = tmp_path / "a.litertlm", tmp_path / "b.litertlm"
    written(models, first)
    os.utime(models["decoder"], (0, 0))
    written(dict(reversed(models.items())), second)
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.parametrize("change", ["content", "date"])
def test_other_content_or_date_gives_other_bytes(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    first, second = tmp_path / "a.litertlm", tmp_path / "b.litertlm"
    written(models, first)
    if change == "date":
        monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    else:
        models["embedder"].write_bytes(models["embedder"].read_bytes()[:-1] + b"x")
    written(models, second)
    assert first.read_bytes() != second.read_bytes()
    assert (b"2023-11-14T22:13:20+00:00" in second.read_bytes()) == (change == "date")


def test_a_bundle_has_the_sections_of_its_architecture_and_no_other(models: dict[str, Path], tmp_path: Path) -> None:
    alone = {"model_type": "gemma3", "sections": ("decoder",)}  # its decoder takes token ids
    with pytest.raises(BundleError, match="has no section embedder"):
        written(models, tmp_path / "x.litertlm", **alone)
    assert len(written({"decoder": models["decoder"]}, tmp_path / "x.litertlm", **alone)) == 3


def test_a_missing_section_is_named(models: dict[str, Path], tmp_path: Path) -> None:
    models["embedder"].unlink()
    with pytest.raises(BundleError, match="needs the section embedder"):
        written(models, tmp_path / "x.litertlm")
    assert not list(tmp_path.glob("x.*"))


def test_a_section_that_is_no_tflite_file_is_refused(models: dict[str, Path], tmp_path: Path) -> None:
    models["decoder"].write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(BundleError, match="not a TFLite file"):
        written(models, tmp_path / "x.litertlm")


def shortened(source: Any, target: Any, buffer_size: int = 0) -> None:
    target.write(source.read()[:-1])


def changed(source: Any, target: Any, buffer_size: int = 0) -> None:
    target.write(source.read()[:-1] + b"?")


@pytest.mark.parametrize("copy", [shortened, changed])
def test_a_writer_that_fails_leaves_nothing(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, copy: Callable[..., None]
) -> None:
    monkeypatch.setattr(litertlm_builder, "_copy_file_to_stream", copy)
    with pytest.raises(BundleError, match="x.litertlm"):
        written(models, tmp_path / "x.litertlm")
    assert [file.name for file in tmp_path.iterdir()] == ["sections"]


@pytest.mark.parametrize(
    "data", [b"", b"LITERTLM", b"TFL3" * 100, b"LITERTLM" + bytes(100), b"LITERTLM" + b"\xff" * 99]
)
def test_what_is_no_bundle_is_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "x.litertlm").write_bytes(data)
    with pytest.raises(BundleError, match="no readable bundle header"):
        litertlm.read_sections(tmp_path / "x.litertlm")
