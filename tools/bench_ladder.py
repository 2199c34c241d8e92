"""Climb int8's ladder with stressed variants of a checkpoint, or with whole models, and judge what it takes.

    python -m tools.bench_ladder                                   # the shipped model, all of tools.stress
    python -m tools.bench_ladder --variants outliers all
    python -m tools.bench_ladder CHECKPOINT … --variants           # these as they are

Each gets its shipped recipe as it stands. The step graph of the rung that is taken is judged on the recipe's
verification text, against Hugging Face in fp32 and the limits of `gates.int8-dynamic`; the exit code is 1 if one misses
them. Where the recipe has `gptq`, stage moments must be finished below ARTIFACTS. Rows join those in bench/ladder.json.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

from pipeline.checkpoint.reader import open_checkpoint
from pipeline.core import log, parallel
from pipeline.core.host import processor
from pipeline.core.recipe import PROJECT, STEP, Recipe, chosen, load
from pipeline.core.stage import DEFAULT_MODEL
from pipeline.judge import corpus, gates
from pipeline.judge.metrics import Estimate
from pipeline.models import build
from pipeline.quantize import gptq
from pipeline.reference.model import HuggingFace
from pipeline.search import ladder
from tools import stress, tables
from tools.tables import Column, Measured, Row, Table, Value

FILE = "ladder"
COLUMNS = {
    "rung": Column(digits=".0f"),
    "KLD of the recipe alone": Column(digits=".1e"),
    "KLD": Column(digits=".1e"),
    "top-1": Column(digits=".1f", unit="%"),
    "perplexity ratio": Column(digits=".4f"),
    "misses its limits": Column(digits=".0f"),
}


def climbed(source: Path, recipe: Recipe, artifacts: Path, folder: Path) -> tuple[dict[str, Value], bool]:
    """A row's values for a checkpoint, and whether its int8 step graph keeps the limits.

    Args:
        source: the checkpoint.
        recipe: what it is made by.
        artifacts: where its stage moments is, as the recipe's GPTQ wants it.
        folder: for files.
    """
    checkpoint, reference = open_checkpoint(source), HuggingFace.load(source, "cpu", streamed=True)
    moments = artifacts / source.name / "moments"
    hessians = gptq.Hessians(moments) if moments.is_dir() else None
    exported = folder / "exported.tflite"
    build.export_step(checkpoint, recipe.step, exported)
    maker = ladder.Maker(checkpoint, exported, folder / STEP, hessians)
    texts, window = recipe.corpus, recipe.corpus.window
    parameters = sum(math.prod(tensor.shape) for tensor in checkpoint.tensors.values())
    text = ladder.Text.of(PROJECT / texts.calibration, window, reference, checkpoint, parameters)
    hidden = text.hidden  # which the text lets go once it is known
    with hessians or nullcontext():
        section, told = ladder.climb(ladder.rungs(recipe.int8), ladder.limits(recipe, "all"), maker, text)
        every = maker.make(section, folder, window, text.head.cap)
    limit = max(1, texts.positions // corpus.POSITIONS_PER_WINDOW)
    windows = corpus.calibration_windows(PROJECT / texts.verification, reference.tokenizer, window, limit)
    unseen = replace(text, windows=windows, lots=(limit,), hidden=hidden, known={})
    judged, _ = unseen.judge(every, ladder.limits(recipe, "all"))
    quality = replace(recipe.gates["int8-dynamic"], size_ratio=None)
    missed = [check for check in gates.judge(source.name, quality, _measured(judged)) if not check.passed]
    for check in missed:
        log.warn(check.sentence())
    log.line(f"{source.name}: {told.rung}, KLD {judged.kld.value:.2g} on {judged.positions} positions")
    return _values(told.rung, told.judged[0].kld, judged, len(missed)), not missed


def _measured(judged: ladder.Figures) -> list[gates.Measurement]:
    ratio = judged.perplexity_ratio
    named = {"kld": judged.kld, "top1": judged.top1, "perplexity_ratio_min": ratio, "perplexity_ratio_max": ratio}
    return [
        gates.Measurement.estimated(name, name, of, judged.positions, against="Hugging Face")
        for name, of in named.items()
    ]


def _values(rung: str, first: float | None, judged: ladder.Figures, missed: int) -> dict[str, Value]:
    def estimated(of: Estimate, factor: float = 1.0) -> Value:
        return Value(value=factor * of.value, low=factor * of.low, high=factor * of.high)

    return {
        "rung": Value(value=float(ladder.NAMES.index(rung))),
        **({} if first is None else {"KLD of the recipe alone": Value(value=first)}),
        "KLD": estimated(judged.kld),
        "top-1": estimated(judged.top1, 100),
        "perplexity ratio": estimated(judged.perplexity_ratio),
        "misses its limits": Value(value=float(missed)),
    }


def keep(name: str, values: dict[str, Value], command: str) -> None:
    """Let the row `name` join the table, or take the place of the one of that name."""
    measured = Measured(
        date=time.strftime("%Y-%m-%d"), command=command, machine=f"{parallel.threads()} threads ({processor()})"
    )
    file = tables.BENCH / f"{FILE}.json"
    old = tables.read(file).rows if file.is_file() else ()
    rows = (*(row for row in old if row.name != name), Row(name=name, values=values, measured=measured))
    table = Table(
        title="int8 that chooses itself",
        about="The rung of int8's ladder that the shipped recipe alone takes "
        f"({', '.join(f'{place} {rung}' for place, rung in enumerate(ladder.NAMES))}), and its step graph on "
        "verification text against Hugging Face in fp32. The recipe alone is on calibration text. Stressed variants "
        "of the shipped model are by `tools.stress`; their fp32 logits are the shipped model's.",
        place=11,
        columns=COLUMNS,
        measured=measured,
        rows=rows,
    )
    tables.write_all({FILE: table})


def main() -> int:
    """Run from the command line; 1 if a file misses its limits."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", nargs="*", type=Path, default=[PROJECT / DEFAULT_MODEL])
    parser.add_argument("--variants", nargs="*", choices=stress.VARIANTS, default=[*stress.VARIANTS])
    parser.add_argument("--artifacts", type=Path, default=PROJECT / "artifacts", help="where stage moments is")
    arguments = parser.parse_args()
    fit = []
    for source in arguments.checkpoints:
        recipe = load(chosen(None, str(source), arguments.artifacts))
        for variant in arguments.variants or [""]:
            with tempfile.TemporaryDirectory() as folder:
                made = source
                if variant:
                    made = stress.write(source, Path(folder) / variant, stress.VARIANTS[variant])
                values, kept = climbed(made, recipe, arguments.artifacts, Path(folder))
            name = f"{source.name}, {variant}" if variant else source.name
            keep(name, values, f"`python -m tools.bench_ladder{' … --variants' if not variant else ''}`")
            fit.append(kept)
    return 0 if all(fit) else 1


if __name__ == "__main__":
    sys.exit(main())
