"""What int8 and int4 cost in each script: KL(Hugging Face || file) of step graphs on text in it, beside Latin's.

    python -m tools.bench_scripts                                  # the shipped model, from artifacts/
    python -m tools.bench_scripts CHECKPOINT … --artifacts FOLDER  # others, whose files stand there

Text is what the project has but for the calibration text: its corpora, most of which the shipped model was trained on
(which a comparison with its own fp32 does not mind), and for code its sources. Of each script up to 16 windows of 128
tokens, made of documents in it alone, are judged at up to 16 positions each, at tokens in that script.
Writes bench/scripts.json.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline.core import log, parallel
from pipeline.core.host import processor
from pipeline.core.recipe import PROJECT, STEP
from pipeline.core.stage import DEFAULT_MODEL
from pipeline.judge import corpus, metrics, screening, scripts
from pipeline.judge.corpus import Positions, Tokens
from pipeline.judge.metrics import Estimate
from pipeline.judge.reference import Floats, Head
from pipeline.reference.model import HuggingFace
from pipeline.search import ladder
from pipeline.tflite.graph import Graph
from tools import tables
from tools.tables import Column, Measured, Row, Table, Value

FILE = "scripts"
SCRIPTS = (scripts.BASIS, "Tifinagh", "Arabic", "CJK", "Cyrillic", scripts.EMOJI, scripts.CODE)
CORPORA = ("verification.txt", "train.txt")
_WINDOW, _WINDOWS, _POSITIONS, _FEW, _TOGETHER = 128, 16, 16, 4, 8
COLUMNS = {name: Column(digits=".1e") for name in SCRIPTS} | {
    f"{name} / {scripts.BASIS}": Column(digits=".2f") for name in SCRIPTS[1:]
}


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Windows [N, L] in a script, `count` judged positions of each, and the reference's hidden states [n, H] there."""

    windows: Tokens
    count: int
    positions: Positions
    hidden: Floats


def documents(script: str) -> Iterator[str]:
    """Documents in a script."""
    if script == scripts.CODE:
        yield from (file.read_text(encoding="utf-8") for file in sorted((PROJECT / "pipeline").rglob("*.py")))
        return
    for name in CORPORA:
        for document in corpus.read_documents(PROJECT / DEFAULT_MODEL / "corpus" / name):
            emoji = any(scripts.of_character(character) == scripts.EMOJI for character in document)
            if (script == scripts.EMOJI and emoji) or (scripts.of_text(document) == script and not emoji):
                yield document


def sample(script: str, reference: HuggingFace) -> Sample | None:
    """As much text in a script as there is, up to a limit; None where there is no window of it."""
    tokenizer, count = reference.tokenizer, _FEW if script == scripts.EMOJI else _POSITIONS
    stream = [
        token
        for document in list(documents(script))[: 40 * _WINDOWS]
        for token in corpus.without_start(reference.tokenize(document + "\n"), reference.bos)
    ]
    rows, lengths = list[list[int]](), list[NDArray[np.int64]]()
    for start in range(0, len(stream) - _WINDOW + 2, _WINDOW - 1):
        ids = [reference.bos, *stream[start : start + _WINDOW - 1]]
        own = np.flatnonzero([name == script for name in scripts.of_tokens(ids, tokenizer.decode)][1:]) + 1
        if len(own) >= count and len(rows) < _WINDOWS:
            rows.append(ids)
            lengths.append(own[np.arange(count) * len(own) // count])
    if not rows:
        return None
    windows = np.array(rows, np.int32)
    positions = Positions(window=np.repeat(np.arange(len(rows)), count), length=np.concatenate(lengths))
    parts = (windows[start : start + _TOGETHER] for start in range(0, len(windows), _TOGETHER))
    states = np.concatenate([reference.hidden(part, np.ones_like(part)) for part in parts])
    hidden = states[positions.window, positions.length - 1]
    return Sample(windows=windows, count=count, positions=positions, hidden=hidden)


def judged(file: Path, samples: Mapping[str, Sample], head: Head, cap: float | None, folder: Path) -> dict[str, Value]:
    """A row's values of the step graph `file`."""
    scored = {name: _score(file, each, head, cap, folder) for name, each in samples.items()}
    found = dict[str, Value]()
    for name, part in scored.items():
        draws = metrics.Draws.of(samples[name].positions.window)
        found[name] = _value(metrics.bootstrap(lambda means: means[..., 0], [part.kld], draws))
        if name != scripts.BASIS:
            both = (scored[scripts.BASIS], part)
            kld = np.concatenate([each.kld for each in both])
            of = np.repeat([scripts.BASIS, name], [len(each.kld) for each in both])
            blocks = np.concatenate([-1 - samples[scripts.BASIS].positions.window, samples[name].positions.window])
            found[f"{name} / {scripts.BASIS}"] = _value(scripts.ratio(kld, blocks, of, name))
    return found


def _score(file: Path, given: Sample, head: Head, cap: float | None, folder: Path) -> screening.Sample:
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        out, factor = Path(scratch) / "few.tflite", 1 / cap if cap else 1.0
        few = ladder.at_positions(Graph.read(file), out, _WINDOW, given.count, factor)
        return ladder.score(few, given.windows, given.positions, given.hidden, head)


def _value(found: Estimate) -> Value:
    return Value(value=found.value, low=found.low, high=found.high)


def keep(rows: Sequence[Row]) -> None:
    """Let `rows` join the table, or take the place of those of their names."""
    measured = Measured(
        date=time.strftime("%Y-%m-%d"),
        command="`python -m tools.bench_scripts`",
        machine=f"{parallel.threads()} threads ({processor()})",
    )
    file, names = tables.BENCH / f"{FILE}.json", {row.name for row in rows}
    old = tables.read(file).rows if file.is_file() else ()
    table = Table(
        title="Loss by script",
        about="KL(Hugging Face || step graph) in nats at tokens in each script, in text of it alone, and over that of "
        "Latin in the same file, with 95 % intervals. Text: the project's corpora but for the calibration text, of "
        "which the shipped model has seen most, and its sources.",
        place=12,
        columns=COLUMNS,
        measured=measured,
        rows=(*(row for row in old if row.name not in names), *rows),
    )
    tables.write_all({FILE: table})


def main() -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", nargs="*", type=Path, default=[PROJECT / DEFAULT_MODEL])
    parser.add_argument("--precisions", nargs="+", default=["int8", "int4"], help="those that stand below ARTIFACTS")
    parser.add_argument("--artifacts", type=Path, default=PROJECT / "artifacts")
    arguments = parser.parse_args()
    for source in arguments.checkpoints:
        reference = HuggingFace.load(source, "cpu", streamed=True)
        found = {name: sample(name, reference) for name in SCRIPTS}
        samples = {name: each for name, each in found.items() if each}
        head = Head.of_checkpoint(source, reference.cap)
        log.line(f"{source.name}: {', '.join(f'{name} {len(each.positions)}' for name, each in samples.items())}")
        rows = []
        for precision in arguments.precisions:
            file = arguments.artifacts / source.name / precision / STEP
            if file.is_file():
                values = judged(file, samples, head, reference.cap, arguments.artifacts)
                rows.append(Row(name=f"{source.name}, {precision}", values=values))
                log.line(f"{rows[-1].name}: {', '.join(f'{name} {each.value:.2g}' for name, each in values.items())}")
        keep(rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
