"""Stage fp16: graphs and tables with their weights in float16, half the bytes of fp32; arithmetic stays float32."""

from __future__ import annotations

import sys

from pipeline.bundling import tables
from pipeline.checkpoint.reader import open_checkpoint
from pipeline.core import log
from pipeline.core.facts import Contents, Precision
from pipeline.core.recipe import DECODER, STEP
from pipeline.core.stage import Context, Outcome, Stage, main
from pipeline.models import build
from pipeline.quantize import fixed, float16, readback


def work(context: Context) -> Outcome:
    """Fill the graphs, write the tables, and look into what was written."""
    checkpoint = open_checkpoint(context.root / "fetch" / "checkpoint")
    contents: dict[str, Contents] = {}
    graphs = build.graph_files(context.upstream["graph"], context.root, context.graphs)
    for name, source in graphs.items():
        graph, file = build.with_weights(checkpoint, source), context.folder / name
        float16.make_half(graph)
        graph.prune()
        graph.write(file)
        if name == STEP:
            fixed.add(file, context.recipe.step.signatures)
        found = readback.read_back(file)
        contents[name] = readback.check(found, "fp16", file)
        readback.round_trip(file)
        log.step(f"{name}: {log.human_bytes(found.size)}")
    if DECODER in graphs:
        tables.write_tables(checkpoint, context.recipe.bundle, "fp16", context.folder)
    step, decoder = contents.get(STEP), contents.get(DECODER)
    return Outcome(facts=Precision(graphs=context.graphs, step=step, decoder=decoder))


STAGE = Stage(name="fp16", summary="Write the files with float16 weights.", work=work)

if __name__ == "__main__":
    sys.exit(main(STAGE))
