"""int8: the graphs and tables with int8 weights; the step graph by the scheme `dynamic`, `static` or `static16`.

The recipe's scheme makes `int8/`; `--scheme static` makes `int8-static/`, and so on, so that all can stand side by
side.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import cast

from pipeline.bundling import tables
from pipeline.checkpoint import chat
from pipeline.checkpoint.reader import open_checkpoint
from pipeline.core import log, options
from pipeline.core.facts import Contents, Precision
from pipeline.core.recipe import DECODER, PROJECT, STEP, Scheme
from pipeline.core.stage import Context, Outcome, Stage, main
from pipeline.judge import corpus
from pipeline.models import build
from pipeline.quantize import calibrate, gptq, int8, readback
from pipeline.runtime import litert
from pipeline.tflite.graph import Graph


@dataclass(frozen=True, kw_only=True)
class Options(options.Options):
    """The scheme of the step graph, where it is not the recipe's, and the text."""

    scheme: Scheme | None = field(default=None, metadata={"help": "write int8-SCHEME/ instead of int8/"})
    calibration: Path | None = field(
        default=None, metadata={"metavar": "FILE", "help": "your own text for the static ranges: .txt or .jsonl"}
    )

    def folder(self, stage: str) -> str:
        """A scheme that was asked for has a folder of its own."""
        return f"{stage}-{self.scheme}" if self.scheme else stage


def work(context: Context) -> Outcome:
    """Fill the graphs, write the tables, and look into what was written.

    The scheme is the step graph's. The bundle's decoder is always dynamic, and stands in `int8/` alone.
    """
    checkpoint = open_checkpoint(context.root / "fetch" / "checkpoint")
    graphs = build.graph_files(context.upstream["graph"], context.root, context.graphs)
    asked = context.chosen(Options).scheme
    scheme = asked or context.recipe.int8.scheme
    facts = Precision(graphs=context.graphs, scheme=scheme)
    room = context.folder if len(graphs) > 1 and not asked else None
    hessians = gptq.Hessians(context.root / "moments", room) if "moments" in context.upstream else None
    with hessians or nullcontext():
        if STEP in graphs:
            graph = build.with_weights(checkpoint, graphs[STEP])
            if scheme != "dynamic":
                samples, fp32 = _samples(context), context.root / context.upstream["fp32"].output(STEP).path
                int8.make_static(graph, context.recipe.int8, scheme, fp32, samples)
                facts = replace(facts, calibration_samples=len(samples), calibration_tokens=sum(map(len, samples)))
            else:
                int8.make_int8(graph, context.recipe.int8, hessians)
            facts = replace(facts, step=_write(graph, context.folder / STEP, scheme))
        if DECODER in graphs and not asked:
            graph = build.with_weights(checkpoint, graphs[DECODER])
            int8.make_int8(graph, context.recipe.int8, hessians)
            facts = replace(facts, decoder=_write(graph, context.folder / DECODER, "dynamic"))
            tables.write_tables(checkpoint, "int8", context.folder)
    return Outcome(facts=facts)


def _write(graph: Graph, file: Path, scheme: Scheme) -> Contents:
    """Write `file`, and find out what stands in it."""
    log.step(f"{file.name}: int8 weights, {scheme}")
    graph.prune()
    graph.write(file)
    found = readback.read_back(file)
    facts = readback.check(found, scheme, file)
    readback.round_trip(file)
    log.step(
        f"{file.name}: {log.human_bytes(found.size)}; {facts.integer_share:.1%} of multiply-adds integer, "
        f"{facts.weights_int8_share:.1%} of weights int8"
    )
    return replace(facts, scheme=scheme)


def _samples(context: Context) -> list[litert.Tokens]:
    """The calibration text as token windows of the corpus's window length."""
    tokenizer = chat.open_tokenizer(context.root / "fetch" / "checkpoint")
    text = context.chosen(Options).calibration or PROJECT / context.recipe.corpus.calibration
    return calibrate.make_samples(
        corpus.read_texts(text, partial(chat.render, tokenizer, where=str(text))),
        lambda document: cast("Sequence[int]", tokenizer.encode(document, add_special_tokens=False)),
        chat.first_token(tokenizer),
        count=context.recipe.int8.calibration_samples,
        window=context.recipe.corpus.window,
    )


STAGE = Stage(
    name="int8",
    summary="Write the files with int8 weights and, if the scheme is static, int8 activations.",
    work=work,
    options=Options,
)

if __name__ == "__main__":
    sys.exit(main(STAGE))
