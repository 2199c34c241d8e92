"""How near decoding is to what memory gives, by precision, and what a long context costs.

    python -m tools.bench_decode gemma3 CHECKPOINT --work FOLDER --contexts 4096 32768
    python -m tools.bench_decode gemma3-1b CHECKPOINT --work FOLDER --contexts 4096     # random weights

A token reads every weight of the decoder once, and all of a static cache, however little of it is filled: so a short
prompt shows what a long context costs. Tokens per second times these bytes, over what the machine's memory gives to as
many threads, says what is left to gain. Bundles of all precisions have the first context, int8 alone has the others;
their weights are rounded plainly, for GPTQ does nothing for time. Each measurement is a process of its own, in turns,
and memory is measured before each. Figures are medians over the rounds. The table goes to `bench/`, which `python -m
tools.figures` writes into the documents.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.core import log, manifest, parallel
from pipeline.core.facts import Bundle
from pipeline.core.host import processor
from pipeline.core.recipe import DECODER
from pipeline.quantize import readback
from tools import bench_bundle, bench_stages, figures, real_models, tables
from tools.bench_bundle import Work, measure_apart, medians
from tools.bench_stock import UNJUDGED
from tools.real_models import TIMED

CONTEXTS = (4096, 32768)
TOKENS = 128
"""Of the prompt, which a prefill takes whole, and of the answer."""
_READ, _TRIES = 1 << 28, 5
"""Bytes that each thread reads to measure memory, more than caches hold, and how often."""


@dataclass(frozen=True, kw_only=True)
class Made:
    """A bundle: its precision and context, and the bytes of weights and of cache that a token reads."""

    precision: str
    context: int
    file: Path
    weights: int
    cache: int

    @property
    def name(self) -> str:
        """What rows call it."""
        return f"{self.precision}, {self.context}"


def build(name: str, checkpoint: Path, folder: Path, context: int, precisions: Sequence[str]) -> list[Made]:
    """Bundles of a real model with one cache, in the empty `folder`."""
    changes = UNJUDGED | {
        'precisions = ["fp32", "int8"]': f"precisions = {json.dumps(list(precisions))}",
        'optional = ["int4"]': "optional = []",
        "prefill = [32, 128]": f"prefill = [{TOKENS}]",
        "cache_length = 4096": f"cache_length = {context}",
        "gptq = true": "gptq = false",
    }
    recipe = bench_stages.changed_recipe(TIMED[name].recipe, folder, changes)
    bench_stages.measure(("fetch", "graph", *precisions, "bundle"), checkpoint, folder, recipe, "bundle")
    root = folder / checkpoint.name
    told = manifest.read(root / "bundle")
    return [
        Made(
            precision=precision,
            context=context,
            file=root / "bundle" / f"{precision}.litertlm",
            weights=readback.stored_weights([root / precision / DECODER])[1],
            cache=told.part(precision, Bundle).cache_bytes,
        )
        for precision in precisions
    ]


def bandwidth(threads: int) -> float:
    """Bytes a second that so many threads read from memory, the best of some tries."""
    parts = [np.ones(_READ // 8, np.int64) for _ in range(threads)]
    least = float("inf")
    for _ in range(_TRIES):
        started = time.perf_counter()
        for _ in parallel.ordered(np.bitwise_or.reduce, parts):  # reads faster than a product or a sum of floats
            pass
        least = min(least, time.perf_counter() - started)
    return threads * _READ / least


def measure(
    name: str, checkpoint: Path, folder: Path, contexts: Sequence[int] = CONTEXTS, rounds: int = 3
) -> dict[str, Any]:
    """Everything: bundles of a real model, in the empty `folder`, and what each decodes."""
    busy, threads, made = os.getloadavg()[0], parallel.threads(), dict[str, Made]()
    for context in contexts:
        own = folder / str(context)
        own.mkdir()
        precisions = ("fp32", "int8", "int4") if context == contexts[0] else ("int8",)
        made |= {each.name: each for each in build(name, checkpoint, own, context, precisions)}
    work = Work(prompt_tokens=TOKENS, decode_tokens=TOKENS, threads=threads)

    def run(file: Path, cache: Path, _: int) -> dict[str, float]:
        given = bandwidth(threads)
        return measure_apart(file, cache, work) | {"bandwidth": given}

    taken = bench_bundle.in_turns({name: each.file for name, each in made.items()}, rounds, run)
    rows = {
        name: {
            "precision": each.precision,
            "context": each.context,
            "size": each.file.stat().st_size,
            "weights": each.weights,
            "cache": each.cache,
            **medians(taken[name][1:]),
        }
        for name, each in made.items()
    }
    return {
        "model": name,
        "decoded": TOKENS,
        "rows": rows,
        "rounds": rounds,
        "threads": threads,
        "cpu": processor(),
        "load_average": busy,
        "runtime": version("litert-lm-api"),
        "date": time.strftime("%Y-%m-%d"),
    }


def table(found: dict[str, Any]) -> list[str]:
    """Tokens and bytes a second as aligned lines."""
    lines = [["precision, context", "tok/s", "weights GB/s", "with cache GB/s", "memory GB/s"]]
    for name, row in found["rows"].items():
        rate, weights = row["decode_tokens_per_s"], row["weights"]
        numbers = (rate, rate * weights / 1e9, rate * (weights + row["cache"]) / 1e9, row["bandwidth"] / 1e9)
        lines.append([name, *(f"{number:.1f}" for number in numbers)])
    return log.align(lines)


def main() -> int:
    """Build, measure, write the table; the exit code."""
    parser = real_models.command_line(__doc__, rounds=3, models=TIMED)
    parser.add_argument("--contexts", nargs="+", type=int, default=CONTEXTS, help="in tokens (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="the JSON file to write (default: in bench/raw/)")
    arguments = parser.parse_args()
    checkpoint, rounds = arguments.checkpoint.resolve(), arguments.rounds
    found = real_models.measured(
        parser, arguments.work, lambda work: measure(arguments.model, checkpoint, work, arguments.contexts, rounds)
    )
    ((table_name, made),) = figures.decode(found, f"python -m tools.bench_decode {arguments.model} CHECKPOINT").items()
    out = arguments.out or tables.RAW / f"{table_name}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    tables.write_all({table_name: made})
    for line in table(found):
        log.line(line)
    return 0


if __name__ == "__main__":
    sys.exit(main())
