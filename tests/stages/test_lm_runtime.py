"""A bundle of the shipped model in LiteRT-LM itself: ids, prompts, text, scores and stops against transformers."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import litert_lm
import pytest
import torch
from line import Line
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline import chat
from pipeline.bundling import litertlm, metadata, template
from pipeline.core.errors import IntegrityError, UsageError
from pipeline.core.recipe import PROJECT, SECTION_LIMIT
from pipeline.core.recipe import load as load_recipe
from pipeline.models import Runtime
from pipeline.runtime.litert_lm import Dialogue, LmRuntime

CHECKPOINT = PROJECT / "examples" / "tiny-gemma3n"
SECTIONS = ("decoder", "embedder", "per_layer_embedder")
VOCABULARY = 2048
QUESTIONS = ("What is the sea?", "And the king?", "Who are you?", "Tell me of the captain.", "And then?")
PROMPTS = ("The sea", "In the beginning God created the heaven and", "ⴰⵣⵓⵍ", "a")

ALPHABETS = {
    "latin": [*map(chr, range(0x20, 0x7F)), *map(chr, range(0xA1, 0x250))],
    "tifinagh": [" ", *map(chr, range(0x2D30, 0x2D68))],
    "arabic": [" ", *map(chr, range(0x600, 0x700))],
    "cjk": [*map(chr, range(0x4E00, 0x9FFF)), *map(chr, range(0x3040, 0x30FF)), *map(chr, range(0xAC00, 0xD7A3))],
    "emoji": ["\u200d", "\ufe0f", "\u20e3", *map(chr, range(0x1F300, 0x1FB00))],
    "control": ["\u200b", "\ufeff", "\u2028", *map(chr, range(1, 0x20)), *map(chr, range(0x7F, 0xA0))],
    "spaces": ["  ", "   ", "▁", *" \t\n\r\u00a0\u3000\u2009"],
    "tokens": ["<bos>", "<eos>", "<pad>", "<unk>", "<start_of_turn>", "<end_of_turn>", "<0x41>", "<s>", "a", " ", "\n"],
}


def texts(alphabet: str, count: int) -> list[str]:
    """Random texts of up to 40 characters, the same at every run."""
    drawn = random.Random(alphabet)
    letters = ALPHABETS.get(alphabet) or [letter for letters in ALPHABETS.values() for letter in letters]
    return ["".join(drawn.choices(letters, k=drawn.randint(0, 40))) for _ in range(count)]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(CHECKPOINT)


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32, attn_implementation="eager").eval()


class Maker:
    """Makes bundles of the shipped model in `folder` from the sections in `sections`."""

    def __init__(self, sections: Path, folder: Path, tokenizer: Any, max_tokens: int) -> None:
        self.files = {name: sections / f"{name}.tflite" for name in SECTIONS}
        self.folder, self.tokenizer = folder, tokenizer
        self.metadata = metadata.describe(
            CHECKPOINT,
            tokenizer,
            runtime=lambda _: Runtime(type="gemma3n"),
            sections=SECTIONS,
            vocabulary=VOCABULARY,
            max_tokens=max_tokens,
        )

    def make(self, name: str, limit: int = SECTION_LIMIT, **changes: Any) -> Path:
        out = self.folder / f"{name}.litertlm"
        text = metadata.tokenizer_json(self.tokenizer, VOCABULARY)
        litertlm.write(replace(self.metadata, **changes), text, self.files, out, limit)
        return out


@pytest.fixture(scope="module")
def maker(built: Line, tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Maker:
    longest = load_recipe(built.recipe).bundle.max_tokens
    return Maker(built.root / "fp32", tmp_path_factory.mktemp("bundles"), tokenizer, max_tokens=longest)


@pytest.fixture(scope="module")
def runtime(maker: Maker) -> Iterator[LmRuntime]:
    with LmRuntime(maker.make("model"), threads=2) as opened:
        yield opened


def ids_of(tokenizer: Any, text: str) -> list[int]:
    found: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return found


def greedy(model: Any, ids: Sequence[int], count: int) -> list[int]:
    with torch.inference_mode():
        output = model.generate(torch.tensor([ids]), max_new_tokens=count, do_sample=False)
    return [int(token) for token in output[0, len(ids) :]]


def shown(tokenizer: Any, ids: Sequence[int]) -> str:
    return str(tokenizer.decode([token for token in ids if token not in (1, 6)]))


def talk(*turns: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[index % 2], "content": turn} for index, turn in enumerate(turns)]


def test_nothing_is_written_beside_the_bundle(runtime: LmRuntime, maker: Maker) -> None:
    runtime.greedy("The sea", 2)
    assert {file.suffix for file in maker.folder.iterdir()} == {".litertlm"}


def test_repacked_weights_go_where_they_are_asked_to(maker: Maker, tmp_path: Path) -> None:
    for _ in range(2):
        with LmRuntime(maker.make("cached"), cache=tmp_path / "cache") as opened:
            assert opened.greedy("The sea", 4).tokens == 4
    assert list((tmp_path / "cache").iterdir())


@pytest.mark.parametrize("name", SECTIONS)
def test_weights_in_a_section_of_their_own_say_the_same(
    runtime: LmRuntime, maker: Maker, tmp_path: Path, name: str
) -> None:
    expected = runtime.greedy("The sea", 48)
    largest = {"decoder": maker.files["decoder"].stat().st_size * 2 // 3}
    limit = largest.get(name, maker.files[name].stat().st_size - 100)  # a table and its graph of some kB
    bundle = maker.make(f"divided-{name}", limit)
    divided = [section.model_type for section in litertlm.read_sections(bundle) if section.kind == litertlm.WEIGHTS]
    assert divided == [litertlm.MODEL_KINDS[name].value]
    for _ in range(2):  # with the packed weights of the first time
        with LmRuntime(bundle, cache=tmp_path) as opened:
            assert opened.greedy("The sea", 48) == expected


def test_the_runtime_reads_what_version_a_bundle_asks_for(runtime: LmRuntime, maker: Maker) -> None:
    with litert_lm.ModelInfo(str(maker.folder / "model.litertlm")) as found:
        assert found.min_runtime_version == litertlm.JUDGED_WITH


def test_start_and_stop_tokens_are_read_from_the_bundle(runtime: LmRuntime) -> None:
    assert (runtime.start, runtime.stop, runtime.start_text) == (2, ((1,), (6,)), "<bos>")


@pytest.mark.parametrize("alphabet", [*ALPHABETS, "all"])
def test_token_ids_and_text_are_transformers(runtime: LmRuntime, tokenizer: Any, alphabet: str) -> None:
    for text in texts(alphabet, 150):
        ids = ids_of(tokenizer, text)
        assert runtime.tokenize(text) == ids, repr(text)
        assert runtime.detokenize(ids) == tokenizer.decode(ids), repr(text)


@pytest.mark.parametrize("text", ["\0", "a\0b"])
def test_a_null_character_is_refused_instead_of_ending_the_text(runtime: LmRuntime, text: str) -> None:
    for call in (runtime.tokenize, lambda text: runtime.greedy(text, 1), lambda text: runtime.render(talk(text))):
        with pytest.raises(UsageError, match="U\\+0000"):
            call(text)


@pytest.mark.parametrize(
    "conversation",
    [
        *template.CONVERSATIONS,
        talk("Azul! ⵣ", "عربي 漢字 🎉", "e\u0301"),
        talk("a<end_of_turn>\n<start_of_turn>model\nb"),
        talk("<bos><eos><pad>"),
        talk("\u200b \ufeff \x7f\x1b[0m \u2028x"),
        talk("x" * 900, "y" * 300, "z"),
    ],
)
def test_rendered_prompts_are_transformers(
    runtime: LmRuntime, tokenizer: Any, conversation: list[dict[str, str]]
) -> None:
    expected = tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
    assert runtime.render(conversation) == expected
    ids = tokenizer.apply_chat_template(conversation, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert runtime.tokenize(expected) == ids


def test_a_conversation_that_the_template_refuses_is_an_error(runtime: LmRuntime) -> None:
    with pytest.raises(IntegrityError, match="roles assistant"):
        runtime.render([{"role": "assistant", "content": "x"}])


@pytest.mark.parametrize("prompt", PROMPTS)
def test_greedy_text_is_transformers(runtime: LmRuntime, model: Any, tokenizer: Any, prompt: str) -> None:
    expected = greedy(model, [2, *ids_of(tokenizer, prompt)], 48)
    found = runtime.greedy(prompt, 48)
    assert found.text.rstrip("\ufffd") == shown(tokenizer, expected).rstrip("\ufffd")
    assert found.tokens == len(expected)
    assert runtime.greedy("<bos>" + prompt, 48) == found  # the start token is not doubled


def test_a_conversation_keeps_transformers_answers(runtime: LmRuntime, model: Any, tokenizer: Any) -> None:
    said: list[str] = []
    with Dialogue(runtime, 48, greedy=True) as dialogue:
        for question in QUESTIONS:
            ids = tokenizer.apply_chat_template(talk(*said, question), add_generation_prompt=True, return_dict=True)[
                "input_ids"
            ]
            answer = "".join(dialogue.answer(question))
            assert answer == shown(tokenizer, greedy(model, ids, 48))
            assert dialogue.speed().prefill_tokens == len(ids)
            said += [question, answer]
        dialogue.reset()
        assert "".join(dialogue.answer(QUESTIONS[0])) == said[1]


def test_the_runtime_still_forgets_the_last_token_of_an_answer(runtime: LmRuntime) -> None:
    """If this fails, the defect is gone, and `Dialogue` may keep its context from turn to turn."""
    prompts = [runtime.render(talk(QUESTIONS[0]))]
    with runtime.session(48, greedy=True) as session:
        session.prefill(prompts[0])
        answers = ["".join(session.decode())]
        for question in QUESTIONS[1:3]:
            prompts.append(f"\n<start_of_turn>user\n{question}<end_of_turn>\n<start_of_turn>model\n")
            session.prefill(prompts[-1])
            answers.append("".join(session.decode()))
    anew = prompts[0] + "".join(
        f"{answer}<end_of_turn>{prompt}" for answer, prompt in zip(answers, prompts[1:], strict=False)
    )
    assert runtime.greedy(anew, 48).text != answers[-1]


@pytest.mark.parametrize("position", [0, 3, 6])
def test_it_stops_at_each_stop_token(maker: Maker, model: Any, tokenizer: Any, position: int) -> None:
    said = greedy(model, [2, *ids_of(tokenizer, "The sea")], 8)
    bundle = maker.make(f"stop-{position}", stop=tuple(sorted({1, said[position]})))
    first = said.index(said[position])
    with LmRuntime(bundle) as opened:
        found = opened.greedy("The sea", 24)
    assert found.text == tokenizer.decode(said[:first])
    assert found.tokens == first + 1


@pytest.mark.parametrize(
    ("prompt", "target"),
    [
        ("The sea", " and the captain of the host"),
        ("The", " sea"),
        ("<bos>a", "b<eos>"),
        ("<start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\n", "spouting<end_of_turn>"),
        ("It was a dark and stormy night and the king said " * 8, "to him, I am the lord"),
    ],
)
def test_scores_are_the_logits_log_likelihoods(
    runtime: LmRuntime, model: Any, tokenizer: Any, prompt: str, target: str
) -> None:
    context, ids = [2, *ids_of(tokenizer, prompt.removeprefix("<bos>"))], ids_of(tokenizer, target)
    with torch.inference_mode():
        logits = model(torch.tensor([context + ids])).logits[0].float()
    likely = torch.log_softmax(logits, -1)[len(context) - 1 : -1]
    expected = likely[torch.arange(len(ids)), torch.tensor(ids)]
    assert runtime.score(prompt, target) == pytest.approx(expected.tolist(), abs=1e-4)


def test_the_runtime_still_scores_after_a_step_too_many_back(runtime: LmRuntime) -> None:
    """If this fails, the defect is gone, and `LmRuntime.score` must no longer give the last token twice."""
    with runtime.session(1) as session:
        session.prefill("The sea")
        plain = session.score(" and")
    assert plain != pytest.approx(runtime.score("The sea", " and"), abs=1e-3)


def test_nothing_can_be_scored_after_an_empty_prompt(runtime: LmRuntime) -> None:
    with pytest.raises(UsageError, match="no text of its own"):
        runtime.score("", "a")


def test_speed_counts_tokens(runtime: LmRuntime, tokenizer: Any) -> None:
    with runtime.session(12, greedy=True) as session:
        session.prefill("The sea")
        pieces = list(session.decode())
        speed = session.speed()
    assert (speed.prefill_tokens, speed.decode_tokens) == (1 + len(ids_of(tokenizer, "The sea")), len(pieces))
    assert min(speed.prefill_per_second, speed.decode_per_second, speed.first_token) > 0


def test_a_prompt_longer_than_the_cache_is_refused(runtime: LmRuntime) -> None:
    with pytest.raises(UsageError, match="more tokens"):
        runtime.greedy("The sea " * 600, 1)
    assert runtime.greedy("The sea", 2).tokens == 2  # and nothing is left of it


@pytest.fixture(scope="module")
def endless(maker: Maker) -> Path:
    """A bundle whose answers end at their greatest length only: the model never says the pad token."""
    return maker.make("endless", stop=(0,))


def test_a_context_goes_to_the_last_token_that_has_room_and_no_further(
    maker: Maker, model: Any, tokenizer: Any
) -> None:
    room, prompt = 10, "The sea"
    ids = [2, *ids_of(tokenizer, prompt)]
    with LmRuntime(maker.make("short", stop=(0,), max_tokens=room)) as opened:
        found = opened.greedy(prompt, 2 * room)
        assert len(ids) + found.tokens == room
        assert found.text == tokenizer.decode(greedy(model, ids, found.tokens))
        words = ids_of(tokenizer, f"{prompt} and " * 5)
        last, beyond = (opened.detokenize(words[: room - left]) for left in (2, 1))  # and the start token
        assert opened.greedy(last, 8).tokens == 1
        with pytest.raises(UsageError, match="more tokens"):
            opened.greedy(beyond, 8)


def test_an_answer_can_be_stopped_and_left(endless: Path) -> None:
    with LmRuntime(endless) as opened, Dialogue(opened, 150, greedy=True) as dialogue:
        pieces = list(dialogue.answer("Hi"))
        assert len(pieces) > 50
        dialogue.reset()
        stopped = []
        for piece in dialogue.answer("Hi"):
            stopped.append(piece)
            if len(stopped) == 3:
                dialogue.cancel()
        assert stopped == pieces[: len(stopped)] and len(stopped) < len(pieces)
        dialogue.reset()
        left = dialogue.answer("Hi")
        assert next(left) == pieces[0]
        left.close()
        assert list(dialogue.answer("Hi")) == pieces  # what was left did not join the conversation


def test_a_base_model_gets_its_bos(maker: Maker, model: Any, tokenizer: Any) -> None:
    with LmRuntime(maker.make("base", chat_template="")) as opened:
        assert opened.greedy("The sea", 8).text == tokenizer.decode(
            greedy(model, [2, *ids_of(tokenizer, "The sea")], 8)
        )


def test_a_literal_bos_in_the_template_is_not_doubled(maker: Maker, tokenizer: Any) -> None:
    source = "<bos>{% for message in messages %}<start_of_turn>{{ message['content'] }}<end_of_turn>\n{% endfor %}"
    prepared = template.prepare(source, tokenizer, "gemma3n")
    assert not prepared.starts_with_bos
    bundle = maker.make("literal", chat_template=prepared.source, start=None)
    expected = tokenizer.apply_chat_template(talk("a", "b", "c"), chat_template=source, tokenize=False)
    with LmRuntime(bundle) as opened, Dialogue(opened, 2, greedy=True) as dialogue:
        assert opened.render(talk("a", "b", "c")) == expected
        list(dialogue.answer("a"))
        assert dialogue.speed().prefill_tokens == len(ids_of(tokenizer, "<bos><start_of_turn>a<end_of_turn>\n"))


@pytest.mark.parametrize(
    "source",
    [
        "{{ bos_token }}{% for message in messages %}[{{ message.role }}]{{ message.content | trim }}{{ eos_token }}\n"
        "{% endfor %}\n",
        "{{ bos_token }}{% for message in messages %}{{ message['content'].strip() + '\\n' }}{% endfor %}",
        "{{ bos_token }}{%- for message in messages %}\n    {%- if loop.last %}!{% endif %}\n"
        "  {{ message['content'].upper() if false else message['content'] }}{{ eos_token }}{% endfor %}",
    ],
)
def test_templates_of_other_kinds_render_the_same(maker: Maker, tokenizer: Any, source: str) -> None:
    prepared = template.prepare(source, tokenizer, "gemma3n")
    bundle = maker.make("other", chat_template=prepared.source, start=2 if prepared.starts_with_bos else None)
    with LmRuntime(bundle) as opened:
        for conversation in template.CONVERSATIONS:
            expected = tokenizer.apply_chat_template(conversation, chat_template=source, tokenize=False)
            assert opened.render(conversation) == expected


@pytest.mark.parametrize(("size", "cause"), [(3, "magic"), (200_000, "file size")])
def test_a_broken_bundle_is_refused_with_what_the_runtime_says(
    maker: Maker, tmp_path: Path, size: int, cause: str, capfd: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "broken.litertlm"
    broken.write_bytes(maker.make("whole").read_bytes()[:size])
    with pytest.raises(IntegrityError, match="can't load") as caught:
        LmRuntime(broken)
    assert cause in caught.value.cause
    assert capfd.readouterr().err == ""


# The terminal


def test_one_question_is_answered_on_standard_output(maker: Maker, capsys: pytest.CaptureFixture[str]) -> None:
    assert chat.main([str(maker.make("chat")), "--prompt", "What is the sea?", "--max-tokens", "8"]) == 0
    printed = capsys.readouterr()
    assert printed.out.endswith("\n") and len(printed.out.split()) == 1
    assert "tokens at" in printed.err


def test_no_bundle_says_how_to_make_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert chat.main([str(tmp_path / "none.litertlm"), "--prompt", "x"]) == 2
    assert "run `make bundle`" in capsys.readouterr().err


def test_a_conversation_in_the_terminal(
    maker: Maker, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = iter(["What is the sea?", "", "/what", "word " * 700, "And the king?", "/reset", "Who are you?", "/quit"])
    monkeypatch.setattr("builtins.input", lambda _prompt: next(lines))
    assert chat.main([str(maker.make("chat")), "--max-tokens", "8"]) == 0
    printed = capsys.readouterr()
    assert len(printed.out.splitlines()) == 3
    for text in ("unknown command /what", "a new conversation", "do:    /reset", "tokens at"):
        assert text in printed.err
    assert printed.err.count("do:") == 1  # one thing went wrong


def test_ctrl_c_stops_an_answer_and_ctrl_d_leaves(endless: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []

    def answer(text: str) -> None:
        said.append(text)
        if len(said) == 2:
            os.kill(os.getpid(), signal.SIGINT)

    typed = iter(["Hi", KeyboardInterrupt(), EOFError()])

    def read(_prompt: str) -> str:
        value = next(typed)
        if isinstance(value, BaseException):
            raise value
        return value

    monkeypatch.setattr("builtins.input", read)
    monkeypatch.setattr(chat.log, "answer", answer)
    assert chat.main([str(endless), "--max-tokens", "150"]) == 0
    assert said[-1] == "\n" and 3 <= len(said) < 50
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize("arguments", [["--max-tokens", "0"], ["--threads", "x"]])
def test_wrong_arguments_exit_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        chat.main(["x.litertlm", *arguments])
    assert "at least 1" in capsys.readouterr().err
