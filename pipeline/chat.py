"""chat: talk to a bundle in the terminal, or ask it one thing.

What the model says goes to standard output, everything else, its thoughts too, to standard error, so that an answer can
be piped on.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.bundling import litertlm
from pipeline.core import log, options
from pipeline.core.stage import guard
from pipeline.runtime.litert_lm import Dialogue, Kind, LmRuntime
from pipeline.runtime.terminal import Senses, report, talk, turn
from pipeline.runtime.thoughts import Channel


@dataclass(frozen=True, kw_only=True)
class Options:
    """Which bundle, and how it may answer."""

    bundle: Path = field(metadata={"help": "the .litertlm file"})
    prompt: str | None = field(default=None, metadata={"help": "ask this and leave"})
    image: Path | None = field(default=None, metadata={"metavar": "FILE", "help": "a picture that goes with it"})
    audio: Path | None = field(default=None, metadata={"metavar": "FILE", "help": "a WAV file that goes with it"})
    max_tokens: int = field(default=512, metadata={"help": "longest answer, in tokens (default: %(default)s)"})
    threads: int | None = field(
        default=None, metadata={"help": "threads of the kernels (default: OMP_NUM_THREADS, else one per core)"}
    )
    cache: Path | None = field(default=None, metadata={"help": "folder for repacked weights: later starts are quicker"})


def main(argv: Sequence[str] | None = None) -> int:
    """Run from the command line and return the exit code."""
    given = options.read("chat", "Talk to a bundle in the terminal.", Options, argv)

    def work() -> None:
        try:
            _open(given)
        except BrokenPipeError:  # whoever read the answer has enough
            sys.stdout = None  # nothing is left to flush at exit

    return guard(work, interrupted="")


def _open(given: Options) -> None:
    there = given.bundle.is_file()
    around = litertlm.thoughts(given.bundle) if there else None
    channel = Channel(*around) if around else None
    senses = Senses(litertlm.sees(given.bundle), litertlm.hears(given.bundle)) if there else Senses()
    asked: dict[Kind, Path | None] = {"image": given.image, "audio": given.audio}
    # Before a model is loaded.
    media = [senses.read(kind, file) for kind, file in asked.items() if file]
    needed = senses.kinds if given.prompt is None else {medium.kind for medium in media}
    with (
        LmRuntime(given.bundle, threads=given.threads, cache=given.cache, senses=needed) as runtime,
        Dialogue(runtime, given.max_tokens, thoughts=channel, aside=log.aside) as dialogue,
    ):
        log.line(f"{given.bundle.name} · loaded in {runtime.load_seconds:.1f} s")
        if given.prompt is None:
            talk(dialogue, senses, media)
        else:
            turn(dialogue, given.prompt, media)
            report(dialogue.speed())


if __name__ == "__main__":
    sys.exit(main())
