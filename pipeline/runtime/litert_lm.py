"""Running a bundle in LiteRT-LM: token ids, rendered prompts, greedy text, scores, conversations, speed.

The runtime gives text and scores, no logits and no token ids of what it generates. A prompt here is what the model
sees: if the bundle has a start token, it begins with that token's text, or the runtime puts it there.
"""

from __future__ import annotations

import base64
import ctypes
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

import litert_lm

from pipeline.core import parallel
from pipeline.core.errors import IntegrityError, UsageError
from pipeline.runtime.characters import WholeCharacters
from pipeline.runtime.litert import standard_error
from pipeline.runtime.thoughts import Channel

Message: TypeAlias = "Mapping[str, object]"
"""`role` (system, user, assistant or tool) and `content`; `tool_calls` of an assistant's."""
Kind: TypeAlias = Literal["image", "audio"]
"""What a message may hold beside text, as the runtime calls it."""
NO_CACHE = ":nocache"
"""Weights that XNNPACK has repacked stay in memory; by default the runtime writes them to a file beside the bundle."""
# The one sampler there is (TOP_P), held to a single candidate.
REWRITES = "does not start with the previous"
"""What the runtime says of a template that renders earlier messages otherwise once more follow."""
_GREEDY = {"top_k": 1, "top_p": 1.0, "temperature": 1.0, "seed": 0}


@dataclass(frozen=True, kw_only=True)
class Continuation:
    """What the model added to a prompt: its text without the stop token, and how many tokens with it."""

    text: str
    tokens: int


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Of the last prompt and answer of a session: tokens, tokens per second, and seconds to the first token."""

    prefill_tokens: int
    prefill_per_second: float
    decode_tokens: int
    decode_per_second: float
    first_token: float


class LmRuntime:
    """An open bundle on the CPU.

    Args:
        path: the `.litertlm` file.
        threads: how many threads run the kernels (default: `parallel.threads`).
        cache: a folder for repacked weights, so that the next start is quicker; without it nothing is written.
        senses: the kinds of media whose towers are loaded too: `image`, `audio`.

    Raises:
        UsageError: there is no such file.
        IntegrityError: the runtime can't load it; the cause is what the runtime says.
    """

    def __init__(
        self, path: Path, *, threads: int | None = None, cache: Path | None = None, senses: Collection[Kind] = ()
    ) -> None:
        if not path.is_file():
            raise UsageError(f"{path} does not exist", cause="there is no bundle yet", remedy="run `make bundle`")
        if cache:
            cache.mkdir(parents=True, exist_ok=True)  # the runtime fails without a word if the folder is not there
        self._path = path
        started = time.perf_counter()
        self._engine = _open(path, threads or parallel.threads(), str(cache or NO_CACHE), senses)
        self.load_seconds = time.perf_counter() - started
        self.start: int | None = self._engine.bos_token_id
        self.stop: tuple[tuple[int, ...], ...] = tuple(tuple(ids) for ids in self._engine.eos_token_ids)

    def __enter__(self) -> LmRuntime:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    def close(self) -> None:
        """Free the model."""
        self._engine.close()

    # Text and tokens

    def tokenize(self, text: str) -> list[int]:
        """Token ids of `text`, with control tokens in it recognised and nothing added."""
        return list(self._engine.tokenize(_checked(text)))

    def detokenize(self, ids: Sequence[int]) -> str:
        """The text of `ids`, control tokens included."""
        return str(self._engine.detokenize(list(ids)))

    @property
    def start_text(self) -> str:
        """The text of the start token; empty if the bundle has none."""
        return "" if self.start is None else self.detokenize([self.start])

    def render(
        self, messages: Sequence[Message], template: str | None = None, tools: Sequence[Mapping[str, object]] = ()
    ) -> str:
        """The prompt of a conversation up to where the model is to answer, by `template` or the bundle's own.

        `tools` are descriptions of functions, as OpenAI's interface has them.

        Raises:
            IntegrityError: the template fails on these messages; the cause is what the runtime says, with a line.
        """
        for content in (message.get("content") for message in messages):
            _checked(content if isinstance(content, str) else "")
        history = [dict(message) for message in messages]

        def attempt() -> str:
            # The runtime renders one message at a time, with those before it as history.
            options = {"messages": history[:-1], "chat_template": template}
            with self._engine.create_conversation(tools=list(map(_Described, tools)), **options) as conversation:
                return str(conversation.render_message_to_string(history[-1]))

        text = attempt()
        if not text:
            raise IntegrityError(
                f"the chat template in {self._path.name} fails on a conversation of roles "
                f"{', '.join(str(message['role']) for message in messages)}",
                cause=_complaint(attempt).rpartition("apply template: ")[2]
                or "the template refuses this order of roles, or uses what the runtime's template engine lacks",
                remedy="try the same messages with tokenizer.apply_chat_template of transformers",
            )
        return self.start_text + text

    # What the model says

    def talk(self, turns: Sequence[str], count: int, template: str | None = None) -> list[str]:
        """The answers to `turns`, at most `count` tokens each, in one of the runtime's own conversations, greedily.

        Raises:
            IntegrityError: the runtime gives up at one of them; the cause is what it says.
        """
        answers: list[str] = []

        def attempt() -> None:
            answers.clear()
            options = {"chat_template": template, "max_output_tokens": count, **_greedy()}
            with self._engine.create_conversation(**options) as conversation:
                for turn in turns:
                    said = conversation.send_message(_checked(turn))
                    answers.append("".join(part.get("text", "") for part in said["content"]))

        try:
            attempt()
        except RuntimeError as error:
            raise IntegrityError(
                f"{self._path.name} ends a conversation in LiteRT-LM at message {len(answers) + 1}",
                cause=_complaint(attempt) or str(error),
            ) from error
        return answers

    def sense(self, messages: Sequence[Message], count: int, *, greedy: bool = False) -> SensingSession:
        """A context of `messages`, in which there are media, and its answer of at most `count` tokens, as `session`.

        Media go in by the runtime's own conversations alone.
        """
        options = _greedy() if greedy else {}
        conversation = self._engine.create_conversation(messages=messages[:-1], max_output_tokens=count, **options)
        if most := max(map(_soft_tokens, messages)):
            conversation._lib = _Budgeted(conversation._lib, most)
        return SensingSession(conversation, messages[-1], count)

    def greedy(self, prompt: str, count: int) -> Continuation:
        """At most `count` tokens after `prompt`, each the most likely one, until a stop token."""
        with self.session(count, greedy=True) as session:
            session.prefill(prompt)
            return Continuation(text="".join(session.decode()), tokens=session.speed().decode_tokens)

    def session(self, count: int, *, greedy: bool = False) -> Session:
        """An empty context whose answers have at most `count` tokens, sampled as the bundle says or greedily."""
        return Session(self, self._new_session(max_output_tokens=count, **(_greedy() if greedy else {})))

    def score(self, prompt: str, target: str) -> list[float]:
        """The log-likelihood (nats) of each token of `target` after `prompt`.

        The runtime steps back in its cache twice before it scores, over the last token but one (litert-lm 0.18.1,
        https://github.com/google-ai-edge/LiteRT-LM/issues/3561). So the last token is given twice: the second takes
        the place of the first. A test fails when the runtime no longer does this.

        Raises:
            UsageError: `prompt` is empty, or can't be split before its last token.
        """
        head, tail = self._split(prompt)
        with Session(self, self._new_session()) as session:
            for part in (head, tail, tail):
                session.prefill(part)
            return session.score(target)

    def _split(self, prompt: str) -> tuple[str, str]:
        """`prompt` without its start token, divided before its last token."""
        text = prompt.removeprefix(self.start_text)
        ids = self.tokenize(text)
        head, tail = self.detokenize(ids[:-1]), self.detokenize(ids[-1:])
        if not ids or self.tokenize(head) != ids[:-1] or self.tokenize(tail) != ids[-1:]:
            raise UsageError(
                f"can't score after {prompt[-40:]!r}: its last token has no text of its own",
                remedy="end the prompt with a whole word or a control token",
            )
        return head, tail

    def _new_session(self, **options: litert_lm.SamplerConfig) -> litert_lm.Session:
        return self._engine.create_session(apply_prompt_template=False, **options)


class _Described(litert_lm.Tool):  # type: ignore[misc]  # the package has no types
    """A function as the runtime is told of it; nobody calls it here."""

    def __init__(self, description: Mapping[str, object]) -> None:
        self._description = dict(description)

    def get_tool_description(self) -> dict[str, object]:
        return self._description

    def execute(self, param: Mapping[str, object]) -> object:
        raise NotImplementedError(param)


class Session:
    """One context of an open bundle: text goes in piece by piece, and then an answer comes out, once."""

    def __init__(self, runtime: LmRuntime, session: litert_lm.Session) -> None:
        self._runtime, self._session, self._library = runtime, session, session._lib
        self._empty = True

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    def close(self) -> None:
        """Free the context."""
        self._session.close()

    def prefill(self, text: str) -> None:
        """Append `text` to the context.

        Raises:
            UsageError: there is no room for it.
        """
        if self._empty:
            text = text.removeprefix(self._runtime.start_text)  # the runtime puts it there, and would do so twice
        if not text and not self._empty:
            return
        try:
            self._session.run_prefill([_checked(text)])
        except RuntimeError as error:
            raise UsageError(
                f"the bundle can't take {len(self._runtime.tokenize(text))} more tokens",
                cause="prompt and answers are longer than the bundle's KV cache",
                remedy="give less text, begin anew, or build the bundle with a longer cache",
            ) from error
        self._empty = False

    def decode(self) -> Iterator[str]:
        """The model's answer piece by piece, until a stop token, its greatest length, a full context, or `cancel`."""
        try:
            self._session._lib = WholeCharacters(self._library)
            for response in self._session.run_decode_async():
                yield response.texts[0]
        except GeneratorExit:  # nobody reads on
            self._session.cancel_process()
            raise

    def cancel(self) -> None:
        """End the running `decode` after its present token; may be called from a signal handler."""
        self._session.cancel_process()

    def score(self, target: str) -> list[float]:
        """See `LmRuntime.score`, which gives the context that this needs."""
        return [float(value) for value in self._session.run_text_scoring([_checked(target)], True).token_scores[0]]

    def speed(self) -> Speed:
        """How fast the last prompt was read and the last answer written."""
        return _speed(self._session.get_benchmark_info())


def _speed(info: litert_lm.BenchmarkInfo) -> Speed:
    return Speed(
        prefill_tokens=info.last_prefill_token_count,
        prefill_per_second=info.last_prefill_tokens_per_second,
        decode_tokens=info.last_decode_token_count,
        decode_per_second=info.last_decode_tokens_per_second,
        first_token=info.time_to_first_token_in_second,
    )


class SensingSession:
    """A context with pictures and sounds in it, whose answer comes out once."""

    def __init__(self, conversation: litert_lm.Conversation, message: Message, count: int) -> None:
        self._conversation, self._message, self._count = conversation, message, count

    def __enter__(self) -> SensingSession:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    def close(self) -> None:
        """Free the context."""
        self._conversation.close()

    def decode(self) -> Iterator[str]:
        """The answer, as `Session.decode` gives it.

        Raises:
            UsageError: there is no room for it.
        """
        try:
            for said in self._conversation.send_message_async(self._message, max_output_tokens=self._count):
                yield "".join(part.get("text", "") for part in said["content"])
        except RuntimeError as error:
            raise UsageError(
                f"the bundle can't take a message with these pictures or sounds: {error}",
                cause="pictures, sounds, text and answers are longer than the bundle's KV cache",
                remedy="give less, or begin anew",
            ) from error
        except GeneratorExit:  # nobody reads on
            self.cancel()
            raise

    def cancel(self) -> None:
        """End the running answer; may be called from a signal handler."""
        self._conversation.cancel_process()

    def speed(self) -> Speed:
        """How fast it was."""
        return _speed(self._conversation.get_benchmark_info())


@dataclass(frozen=True, kw_only=True)
class Medium:
    """A picture or a sound as a file's bytes, of a kind that the runtime reads.

    `tokens` are the soft tokens of a picture that keeps its proportions.
    """

    kind: Kind
    data: bytes
    tokens: int = 0


def content(text: str, media: Sequence[Medium]) -> list[Message]:
    """The content of a message: `media`, and what is said about them."""
    parts: list[Message] = [
        {"type": each.kind, "blob": base64.b64encode(each.data).decode(), _TOKENS: each.tokens} for each in media
    ]
    return [*parts, {"type": "text", "text": _checked(text)}]


_TOKENS = "soft_tokens"
"""Where a part of a message says how many a picture is to have, which the runtime does not read."""


def _soft_tokens(message: Message) -> int:
    """The most that a picture of a message has."""
    parts = message["content"]
    told = [part.get(_TOKENS, 0) for part in parts if isinstance(part, dict)] if isinstance(parts, list) else []
    return max(map(int, told), default=0)


class _Budgeted:
    """The runtime's `library` for one conversation, whose pictures have `tokens` soft tokens at most.

    To as many as that the runtime enlarges a picture that keeps its proportions; one of just so many it takes as it is.
    Its C interface takes that number, its Python interface does not (litert-lm 0.18.1).
    """

    def __init__(self, library: ctypes.CDLL, tokens: int) -> None:
        self._library, self._tokens = library, tokens

    def __getattr__(self, name: str) -> object:
        return getattr(self._library, name)

    def litert_lm_conversation_optional_args_create(self) -> int:
        """What a message is sent with."""
        made = int(self._library.litert_lm_conversation_optional_args_create())
        say = self._library.litert_lm_conversation_optional_args_set_visual_token_budget
        # By type: a pointer that is handed over as a number is cut to 32 bits.
        say(ctypes.c_void_p(made), ctypes.c_int(self._tokens))
        return made


class Dialogue:
    """A conversation, read anew at every turn.

    A context can't be carried over: where embedders are sections of their own, the runtime gives the last token of an
    answer to the next prefill as zeros instead of its embedding, and its own conversation leaves out what the template
    has between the stop token and the next turn, such as Gemma's newline (litert-lm 0.18.1). Both change what the model
    answers. A test fails when the first is gone.
    """

    def __init__(
        self,
        runtime: LmRuntime,
        count: int,
        *,
        greedy: bool = False,
        thoughts: Channel | None = None,
        aside: Callable[[str], None] = lambda _: None,
    ) -> None:
        """Answers have at most `count` tokens. What stands in the channel `thoughts` goes to `aside` by pieces."""
        self._runtime, self._count, self._greedy = runtime, count, greedy
        self._thoughts, self._aside = thoughts, aside
        self._messages: list[Message] = []
        self._session: Session | SensingSession | None = None
        self._senses = False  # whether there is a picture or a sound so far

    def __enter__(self) -> Dialogue:
        return self

    def __exit__(self, *_error: object) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self._messages.clear()
        self._senses = False
        self._close()

    def answer(self, text: str, media: Sequence[Medium] = ()) -> Iterator[str]:
        """The model's answer to `media` and `text`, piece by piece.

        It joins the conversation once it has been read to its end.

        Thoughts do not: templates leave those of earlier turns out.

        Raises:
            UsageError: the conversation does not fit into the KV cache.
        """
        messages = [*self._messages, {"role": "user", "content": content(text, media) if media else text}]
        self._close()
        self._session = self._open(messages, senses=self._senses or bool(media))
        pieces = []
        thought = False
        for thinking, piece in self._told_apart(self._session.decode()):
            if thinking:
                self._aside(piece)
            else:
                self._aside("\n" if thought else "")
                pieces.append(piece)
                yield piece
            thought = thinking
        self._messages = [*messages, {"role": "assistant", "content": "".join(pieces)}]
        self._senses |= bool(media)

    def _open(self, messages: Sequence[Message], *, senses: bool) -> Session | SensingSession:
        """A context of `messages`, before the answer."""
        if senses:
            return self._runtime.sense(messages, self._count, greedy=self._greedy)
        session = self._runtime.session(self._count, greedy=self._greedy)
        session.prefill(self._runtime.render(messages))
        return session

    def _told_apart(self, pieces: Iterator[str]) -> Iterator[tuple[bool, str]]:
        return self._thoughts.split(pieces) if self._thoughts else ((False, piece) for piece in pieces)

    def cancel(self) -> None:
        """End the running answer; may be called from a signal handler."""
        if self._session:
            self._session.cancel()

    def speed(self) -> Speed | None:
        """How fast the last turn was; None before the first."""
        return self._session.speed() if self._session else None

    def _close(self) -> None:
        if self._session:
            self._session.close()
        self._session = None


def _greedy() -> dict[str, litert_lm.SamplerConfig]:
    return {"sampler_config": litert_lm.SamplerConfig(**_GREEDY)}


def _checked(text: str) -> str:
    """`text`, if the runtime can take it: its interface ends texts at U+0000 without a word."""
    if "\0" in text:
        raise UsageError("LiteRT-LM can't take a text with U+0000 in it", remedy="remove that character")
    return text


def _open(path: Path, threads: int, cache: str, senses: Collection[Kind]) -> litert_lm.Engine:
    """The engine for `path`, quietly; if it can't be had, the same attempt again to hear why."""

    def attempt() -> litert_lm.Engine:
        return litert_lm.Engine(
            str(path),
            backend=litert_lm.Backend.CPU(thread_count=threads),
            cache_dir=cache,
            vision_backend=litert_lm.Backend.CPU(thread_count=threads) if "image" in senses else None,
            audio_backend=litert_lm.Backend.CPU(thread_count=threads) if "audio" in senses else None,
            enable_benchmark=True,  # counts and times tokens; changes nothing else
        )

    litert_lm.set_min_log_severity(litert_lm.LogSeverity.SILENT)
    try:
        return attempt()
    except RuntimeError as error:
        raise IntegrityError(
            f"LiteRT-LM can't load {path}",
            cause=_complaint(lambda: attempt().close()) or str(error),
            file=path,
        ) from error


def _complaint(attempt: Callable[[], litert_lm.Engine]) -> str:
    """The first error that the runtime prints during `attempt`."""
    with tempfile.TemporaryFile() as file:
        with standard_error(file.fileno()), suppress(RuntimeError):
            litert_lm.set_min_log_severity(litert_lm.LogSeverity.ERROR)
            attempt()
        litert_lm.set_min_log_severity(litert_lm.LogSeverity.SILENT)
        file.seek(0)
        lines = file.read().decode("utf-8", "replace").splitlines()
    errors = [line.partition("] ")[2] for line in lines if line.startswith("E") and "] " in line]
    return errors[0] if errors else ""
