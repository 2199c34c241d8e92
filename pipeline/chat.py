"""chat: talk to a bundle in the terminal, or ask it one thing.

What the model says goes to standard output, everything else, its thoughts too, to standard error, so that an answer can
be piped on.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from pipeline.bundling import litertlm
from pipeline.core import log
from pipeline.core.stage import guard
from pipeline.runtime.litert_lm import Dialogue, LmRuntime
from pipeline.runtime.terminal import report, talk, turn
from pipeline.runtime.thoughts import Channel

_MAX_TOKENS = 512


def main(argv: Sequence[str] | None = None) -> int:
    """Run from the command line and return the exit code."""
    arguments = _parse(argv)

    def work() -> None:
        try:
            _open(arguments)
        except BrokenPipeError:  # whoever read the answer has enough
            sys.stdout = None  # nothing is left to flush at exit

    return guard(work, interrupted="")


def _open(arguments: argparse.Namespace) -> None:
    around = litertlm.thoughts(arguments.bundle) if arguments.bundle.is_file() else None
    channel = Channel(*around) if around else None
    with (
        LmRuntime(arguments.bundle, threads=arguments.threads, cache=arguments.cache) as runtime,
        Dialogue(runtime, arguments.max_tokens, thoughts=channel, aside=log.aside) as dialogue,
    ):
        log.line(f"{arguments.bundle.name} · loaded in {runtime.load_seconds:.1f} s")
        if arguments.prompt is None:
            talk(dialogue)
        else:
            turn(dialogue, arguments.prompt)
            report(dialogue.speed())


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


if __name__ == "__main__":
    sys.exit(main())
