"""Stage fp32: graphs and tables in float32, exact against Hugging Face; what other precisions are held against."""

from __future__ import annotations

import sys

from pipeline.bundling import tables
from pipeline.checkpoint.reader import open_checkpoint
from pipeline.core.errors import ExportError
from pipeline.core.facts import Files
from pipeline.core.recipe import DECODER, STEP
from pipeline.core.stage import Context, Outcome, Stage, main
from pipeline.models import build
from pipeline.quantize import fixed, readback


def work(context: Context) -> Outcome:
    """Fill the graphs, run each once, write the tables."""
    checkpoint = open_checkpoint(context.root / "fetch" / "checkpoint")
    graphs = build.graph_files(context.upstream["graph"], context.root, context.graphs)
    for name, source in graphs.items():
        graph = build.with_weights(checkpoint, source)
        graph.prune()
        graph.write(context.folder / name)
        if name == STEP:
            fixed.add(context.folder / name, context.recipe.step.signatures)
        readback.round_trip(context.folder / name, ExportError)
    if DECODER in graphs:
        tables.write_tables(checkpoint, context.recipe.bundle, "fp32", context.folder)
    sizes = {file.name: file.stat().st_size for file in sorted(context.folder.glob("*.tflite"))}
    return Outcome(facts=Files(graphs=context.graphs, sizes=sizes))


STAGE = Stage(name="fp32", summary="Write the files in float32.", work=work)

if __name__ == "__main__":
    sys.exit(main(STAGE))
