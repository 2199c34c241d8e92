"""int8: the graphs and tables with int8 weights; the step graph by the scheme `dynamic`, `static` or `static16`.

The recipe's scheme makes `int8/`; `--scheme static` makes `int8-static/`, and so on, so that all can stand side by
side.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import cast, get_args

from pipeline.bundling import tables
from pipeline.checkpoint import chat
from pipeline.checkpoint.reader import open_checkpoint
from pipeline.core import log
from pipeline.core.manifest import Fact, Facts
from pipeline.core.recipe import PROJECT, Recipe, Scheme
from pipeline.core.stage import Context, Outcome, Stage, main
from pipeline.judge import corpus
from pipeline.models import build
from pipeline.quantize import calibrate, gptq, int8, readback
from pipeline.runtime import litert
from pipeline.tflite.graph import Graph


def work(context: Context) -> Outcome:
    """Fill the graphs, write the tables, and look into what was written.

    The scheme is the step graph's. The bundle's decoder is always dynamic, and stands in `int8/` alone.
    """
    checkpoint = open_checkpoint(context.root / "fetch" / "checkpoint")
    graphs = build.graph_files(context.upstream["graph"], context.root, context.graphs)
    scheme = _scheme(context.arguments, context.recipe)
    facts: dict[str, Fact] = {"graphs": context.graphs, "scheme": scheme}
    hessians = gptq.Hessians(context.root / "moments") if "moments" in context.upstream else None
    with hessians or nullcontext():
        if build.STEP in graphs:
            graph = build.with_weights(checkpoint, graphs[build.STEP])
            if scheme != "dynamic":
                samples, fp32 = _samples(context), context.root / context.upstream["fp32"].output(build.STEP).path
                int8.make_static(graph, context.recipe.int8, scheme, fp32, samples)
                facts |= {"calibration_samples": len(samples), "calibration_tokens": sum(map(len, samples))}
            else:
                int8.make_int8(graph, context.recipe.int8, hessians)
            facts["step"] = dict(_write(graph, context.folder / build.STEP, scheme))
        if build.DECODER in graphs and not context.arguments.scheme:
            graph = build.with_weights(checkpoint, graphs[build.DECODER])
            int8.make_int8(graph, context.recipe.int8, hessians)
            facts["decoder"] = dict(_write(graph, context.folder / build.DECODER, "dynamic"))
            tables.write_tables(checkpoint, "int8", context.folder)
    return Outcome(facts=facts)


def _write(graph: Graph, file: Path, scheme: Scheme) -> Facts:
    """Write `file`, and find out what stands in it."""
    log.step(f"{file.name}: int8 weights, {scheme}")
    graph.prune()
    graph.write(file)
    found = readback.read_back(file)
    facts = readback.check(found, scheme, file)
    readback.round_trip(file)
    log.step(
        f"{file.name}: {log.human_bytes(found.size)}; {facts['integer_share']:.1%} of multiply-adds integer, "
        f"{facts['weights_int8_share']:.1%} of weights int8"
    )
    return facts


def _samples(context: Context) -> list[litert.Tokens]:
    """The calibration text as token windows of the corpus's window length."""
    tokenizer = chat.open_tokenizer(context.root / "fetch" / "checkpoint")
    text: Path = context.arguments.calibration or PROJECT / context.recipe.corpus.calibration
    return calibrate.make_samples(
        corpus.read_texts(text, partial(chat.render, tokenizer, where=str(text))),
        lambda document: cast("Sequence[int]", tokenizer.encode(document, add_special_tokens=False)),
        chat.first_token(tokenizer),
        count=context.recipe.int8.calibration_samples,
        window=context.recipe.corpus.window,
    )


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--scheme", choices=get_args(Scheme), help="write int8-SCHEME/ instead of int8/")
    parser.add_argument(
        "--calibration", type=Path, metavar="FILE", help="your own text for the static ranges: .txt or .jsonl"
    )


def _scheme(arguments: argparse.Namespace, recipe: Recipe) -> Scheme:
    scheme: Scheme = arguments.scheme or recipe.int8.scheme
    return scheme


STAGE = Stage(
    name="int8",
    summary="Write the files with int8 weights and, if the scheme is static, int8 activations.",
    work=work,
    add_arguments=_add_arguments,
)

if __name__ == "__main__":
    sys.exit(main(STAGE))
