"""int8: the graphs and tables with int8 weights; the step graph by the scheme `dynamic`, `static` or `static16`.

The recipe's scheme makes `int8/`; `--scheme static` makes `int8-static/`, and so on, so that all can stand side by
side.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

from threadpoolctl import threadpool_limits

from pipeline.bundling import tables
from pipeline.checkpoint import chat
from pipeline.checkpoint.reader import Checkpoint, open_checkpoint
from pipeline.core import options
from pipeline.core.facts import Fetch, Ladder, Moments, Precision
from pipeline.core.recipe import DECODER, PROJECT, STEP, Int8, Scheme
from pipeline.core.stage import Context, Outcome, Stage, main
from pipeline.judge import corpus
from pipeline.models import build
from pipeline.quantize import calibrate, fixed, gptq, int8, readback
from pipeline.runtime import litert
from pipeline.search import ladder


@dataclass(frozen=True, kw_only=True)
class Options(options.Options):
    """The scheme of the step graph, where it is not the recipe's, the rung of an earlier build, and the text."""

    scheme: Scheme | None = field(default=None, metadata={"help": "write int8-SCHEME/ instead of int8/"})
    rung: str = field(
        default="", metadata={"metavar": "NAME", "help": "the ladder's rung that an earlier build's manifest names"}
    )
    calibration: Path | None = field(
        default=None, metadata={"metavar": "FILE", "help": "your own text for ranges and the ladder: .txt, .jsonl"}
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
    asked, section = context.chosen(Options).scheme, context.recipe.int8
    scheme = asked or section.scheme
    facts, step = Precision(graphs=context.graphs, scheme=scheme, device=context.moments_device), context.folder / STEP
    room = context.folder if not asked and (section.climbs or len(graphs) > 1) else None
    hessians = gptq.Hessians(context.root / "moments", room) if "moments" in context.upstream else None
    with hessians or threadpool_limits(1, "blas"):  # rows are made in a thread per core already
        if scheme == "dynamic" and not asked:
            section, facts = _choose(context, facts, ladder.Maker(checkpoint, graphs.get(STEP), step, hessians))
        if STEP in graphs and scheme != "dynamic":
            graph, samples = build.with_weights(checkpoint, graphs[STEP]), _samples(context)
            fp32 = context.root / context.upstream["fp32"].output(STEP).path
            int8.make_static(graph, section, scheme, fp32, samples)
            graph.prune()
            graph.write(step)
            facts = replace(facts, calibration_samples=len(samples), calibration_tokens=sum(map(len, samples)))
        elif STEP in graphs and not step.is_file():  # the ladder has left what it took
            ladder.write(checkpoint, graphs[STEP], step, section, hessians)
        if STEP in graphs:
            fixed.add(step, context.recipe.step.signatures)
            facts = replace(facts, step=readback.contents(step, scheme))
        if DECODER in graphs and not asked:
            ladder.write(checkpoint, graphs[DECODER], context.folder / DECODER, section, hessians)
            facts = replace(facts, decoder=readback.contents(context.folder / DECODER, "dynamic"))
            tables.write_tables(checkpoint, context.recipe.bundle, "int8", context.folder)
    return Outcome(facts=facts)


def _choose(context: Context, facts: Precision, maker: ladder.Maker) -> tuple[Int8, Precision]:
    """The section that files are made by, and `facts` with how it was found and the largest activation."""
    recipe, rung, limits = context.recipe, context.chosen(Options).rung, ladder.limits(context.recipe, context.graphs)
    section, told = (ladder.named(recipe.int8, rung), Ladder(rung=rung)) if rung else (recipe.int8, None)
    if recipe.int8.climbs and limits:
        text, largest = _read(context, maker.checkpoint)
        facts = replace(facts, largest_activation=largest)
        if not rung:
            section, told = ladder.climb(ladder.rungs(recipe.int8), limits, maker, text)
    return section, replace(facts, climbed=told)


def _read(context: Context, checkpoint: Checkpoint) -> tuple[ladder.Text, float]:
    """The text that rungs are judged on, and the reference's largest activation on some of it."""
    parameters, made = context.upstream["fetch"].told(Fetch).parameters, context.upstream.get("moments")
    if made:  # the reference has read it
        told = made.told(Moments)
        return ladder.Text.kept(context.root / "moments", told, checkpoint, parameters), told.largest_activation
    from pipeline.reference import activations, model  # transformers takes seconds, which nothing else here needs

    reference = model.HuggingFace.load(checkpoint.folder, "cpu", streamed=True)
    read = ladder.Text.of(_text(context), context.recipe.corpus.window, reference, checkpoint, parameters)
    return read, activations.largest(reference, read.begin)


def _samples(context: Context) -> list[litert.Tokens]:
    """The calibration text as token windows of the corpus's window length."""
    tokenizer = chat.open_tokenizer(context.root / "fetch" / "checkpoint")
    documents, first = corpus.calibration_documents(_text(context), tokenizer), chat.first_token(tokenizer)
    count, window = context.recipe.int8.calibration_samples, context.recipe.corpus.window
    return calibrate.make_samples(documents, first, count=count, window=window)


def _text(context: Context) -> Path:
    return context.chosen(Options).calibration or PROJECT / context.recipe.corpus.calibration


STAGE = Stage(name="int8", summary="Write the files with int8 weights.", work=work, options=Options)

if __name__ == "__main__":
    sys.exit(main(STAGE))
