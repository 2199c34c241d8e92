"""A conversation with a bundle at the terminal: what is typed goes in, what is answered comes out, piece by piece."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from pipeline.core import log
from pipeline.core.errors import UsageError
from pipeline.runtime.litert_lm import Dialogue, Kind, Medium, Speed
from pipeline.runtime.picture import Sight
from pipeline.runtime.sound import Hearing

_HELP = "/reset begins a new conversation, /quit or Ctrl-D leaves, Ctrl-C stops an answer"
_MEDIA: Mapping[str, tuple[Kind, str]] = {
    "/image": ("image", "/image FILE shows a picture to the model with what is said next, "),
    "/audio": ("audio", "/audio FILE plays a WAV file to the model with what is said next, "),
}


@dataclass(frozen=True)
class Senses:
    """How the bundle sees and hears, as far as it does."""

    sight: Sight | None = None
    hearing: Hearing | None = None

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """What it takes beside text."""
        there: dict[Kind, object] = {"image": self.sight, "audio": self.hearing}
        return tuple(kind for kind, sense in there.items() if sense)

    @property
    def help(self) -> str:
        """What may be typed."""
        return "".join(said for kind, said in _MEDIA.values() if kind in self.kinds) + _HELP

    def read(self, kind: Kind, file: Path) -> Medium:
        """The picture or sound in `file`.

        Raises:
            UsageError: the bundle does not see or hear, or the file is nothing that it can see or hear.
        """
        sense = self.sight if kind == "image" else self.hearing
        if not sense:
            verb, tower = ("see", "vision") if kind == "image" else ("hear", "audio")
            raise UsageError(
                f"this bundle does not {verb}",
                cause=f"it was built without the model's {tower} tower, or the model has none",
                remedy="build it without TOWERS=; `make plan` says whether there is one, and which RECIPE= takes it",
            )
        data = sense.read(file)
        return Medium(kind=kind, data=data, tokens=sense.tokens(data) if isinstance(sense, Sight) else 0)


def talk(dialogue: Dialogue, senses: Senses, media: Sequence[Medium] = ()) -> None:
    """Read, answer, repeat, until the input ends or `/quit`; `media` go with what is said first."""
    with suppress(ImportError):
        import readline  # noqa: F401  # gives input() history and editing
    log.line(senses.help)
    turns: list[Speed] = []
    given = [*media]
    for text in _inputs():
        command = text.partition(" ")[0]
        if text == "/reset":
            dialogue.reset()
            given.clear()
            log.line("a new conversation")
        elif command in _MEDIA:
            given += _taken(senses, _MEDIA[command][0], text.removeprefix(command).strip())
        elif text.startswith("/"):
            log.line(f"unknown command {text}: {senses.help}")
        elif text:
            turns += _try_turn(dialogue, text, given)
            given.clear()
    report(_total(turns))


def _taken(senses: Senses, kind: Kind, name: str) -> list[Medium]:
    """The picture or sound in the file called `name`, or none, and why."""
    try:
        medium = senses.read(kind, Path(name).expanduser())
    except UsageError as error:
        for line in error.lines():
            log.line(line)
        return []
    log.line(f"{name} goes with what you say next")
    return [medium]


def _inputs() -> Iterator[str]:
    """What is typed, line by line; Ctrl-C throws a half-typed line away."""
    while True:
        try:
            text = input("> " if sys.stdin.isatty() else "").strip()
        except KeyboardInterrupt:
            log.line()
            continue
        except EOFError:
            return
        if text == "/quit":
            return
        yield text


def _try_turn(dialogue: Dialogue, text: str, media: Sequence[Medium]) -> list[Speed]:
    """One turn; what a person can mend, such as a full context, does not end the conversation."""
    try:
        turn(dialogue, text, media)
    except UsageError as error:
        error.remedy = f"/reset, or {error.remedy}" if error.remedy else "/reset"
        for line in error.lines():
            log.line(line)
        return []
    speed = dialogue.speed()
    return [speed] if speed else []


def turn(dialogue: Dialogue, text: str, media: Sequence[Medium] = ()) -> None:
    """Stream the answer to `text` and `media`."""
    with _on_interrupt(dialogue.cancel):
        for piece in dialogue.answer(text, media):
            log.answer(piece)
        log.answer("\n")


@contextmanager
def _on_interrupt(action: Callable[[], None]) -> Iterator[None]:
    """Let Ctrl-C call `action` instead of raising."""

    def handle(_signal: int, _frame: FrameType | None) -> None:
        action()

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _total(turns: Sequence[Speed]) -> Speed | None:
    """All turns together: tokens added up, rates over the whole time, the first turn's time to its first token."""
    if not turns:
        return None
    prefill, decode = (sum(getattr(speed, f"{phase}_tokens") for speed in turns) for phase in ("prefill", "decode"))
    return Speed(
        prefill_tokens=prefill,
        prefill_per_second=_rate(prefill, [(speed.prefill_tokens, speed.prefill_per_second) for speed in turns]),
        decode_tokens=decode,
        decode_per_second=_rate(decode, [(speed.decode_tokens, speed.decode_per_second) for speed in turns]),
        first_token=turns[0].first_token,
    )


def _rate(total: int, parts: Sequence[tuple[int, float]]) -> float:
    seconds = sum(tokens / rate for tokens, rate in parts if rate)
    return total / seconds if seconds else 0.0


def report(speed: Speed | None) -> None:
    """Say how fast that was, if anything was said."""
    if speed:
        log.line(
            f"prefill {speed.prefill_tokens} tokens at {speed.prefill_per_second:.0f}/s, "
            f"decode {speed.decode_tokens} at {speed.decode_per_second:.1f}/s, "
            f"first token after {speed.first_token * 1000:.0f} ms"
        )
