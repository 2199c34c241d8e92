"""chat: talk to a bundle in the terminal, or ask it one thing.

What the model says goes to standard output, everything else to standard error, so that an answer can be piped on.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

from pipeline.core import log
from pipeline.core.errors import PipelineError, UsageError
from pipeline.core.stage import INTERRUPTED
from pipeline.runtime.litert_lm import Dialogue, LmRuntime, Speed

_MAX_TOKENS = 512
_HELP = "/reset begins a new conversation, /quit or Ctrl-D leaves, Ctrl-C stops an answer"


def main(argv: Sequence[str] | None = None) -> int:
    """Run from the command line and return the exit code."""
    arguments = _parse(argv)
    try:
        with (
            LmRuntime(arguments.bundle, threads=arguments.threads, cache=arguments.cache) as runtime,
            Dialogue(runtime, arguments.max_tokens) as dialogue,
        ):
            log.line(f"{arguments.bundle.name} · loaded in {runtime.load_seconds:.1f} s")
            if arguments.prompt is None:
                _talk(dialogue)
            else:
                _turn(dialogue, arguments.prompt)
                _report(dialogue.speed())
    except PipelineError as error:
        for text in error.lines():
            log.line(text)
        return error.exit_code
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:  # whoever read the answer has enough
        sys.stdout = None  # nothing is left to flush at exit
    return 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m pipeline.chat", description="Talk to a bundle in the terminal.")
    parser.add_argument("bundle", type=Path, help="the .litertlm file")
    parser.add_argument("--prompt", help="ask this and leave")
    parser.add_argument(
        "--max-tokens", type=_positive, default=_MAX_TOKENS, help="longest answer, in tokens (default: %(default)s)"
    )
    parser.add_argument(
        "--threads", type=_positive, help="threads of the kernels (default: OMP_NUM_THREADS, else one per core)"
    )
    parser.add_argument("--cache", type=Path, help="folder for repacked weights: later starts are quicker")
    return parser.parse_args(argv)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a number of at least 1")
    return int(text)


def _talk(dialogue: Dialogue) -> None:
    """Read, answer, repeat, until the input ends or `/quit`."""
    with suppress(ImportError):
        import readline  # noqa: F401  # gives input() history and editing
    log.line(_HELP)
    spoken: list[Speed] = []
    for text in _inputs():
        if text == "/reset":
            dialogue.reset()
            log.line("a new conversation")
        elif text.startswith("/"):
            log.line(f"unknown command {text}: {_HELP}")
        elif text:
            spoken += _try_turn(dialogue, text)
    _report(_total(spoken))


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


def _try_turn(dialogue: Dialogue, text: str) -> list[Speed]:
    """One turn; what a person can mend, such as a full context, does not end the conversation."""
    try:
        _turn(dialogue, text)
    except UsageError as error:
        for line in error.lines():
            log.line(line)
        log.line("  do:    /reset")
        return []
    speed = dialogue.speed()
    return [speed] if speed else []


def _turn(dialogue: Dialogue, text: str) -> None:
    """Stream the answer to `text`."""
    with _on_interrupt(dialogue.cancel):
        for piece in dialogue.answer(text):
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


def _total(spoken: Sequence[Speed]) -> Speed | None:
    """All turns together: tokens added up, rates over the whole time, the first turn's time to its first token."""
    if not spoken:
        return None
    prefill, decode = (sum(getattr(speed, f"{phase}_tokens") for speed in spoken) for phase in ("prefill", "decode"))
    return Speed(
        prefill_tokens=prefill,
        prefill_per_second=_rate(prefill, [(speed.prefill_tokens, speed.prefill_per_second) for speed in spoken]),
        decode_tokens=decode,
        decode_per_second=_rate(decode, [(speed.decode_tokens, speed.decode_per_second) for speed in spoken]),
        first_token=spoken[0].first_token,
    )


def _rate(total: int, parts: Sequence[tuple[int, float]]) -> float:
    seconds = sum(tokens / rate for tokens, rate in parts if rate)
    return total / seconds if seconds else 0.0


def _report(speed: Speed | None) -> None:
    if speed:
        log.line(
            f"prefill {speed.prefill_tokens} tokens at {speed.prefill_per_second:.0f}/s, "
            f"decode {speed.decode_tokens} at {speed.decode_per_second:.1f}/s, "
            f"first token after {speed.first_token * 1000:.0f} ms"
        )


if __name__ == "__main__":
    sys.exit(main())
