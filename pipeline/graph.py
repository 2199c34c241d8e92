"""Stage graph: the model's computation as TFLite graphs without their matrices, which every precision then fills.

Converting takes minutes and does not depend on the precision, nor, in time and memory, on the number of parameters:
matrices are inputs here, and constants from the checkpoint in the files that later stages write.
"""

from __future__ import annotations

import sys

from pipeline.checkpoint.reader import open_checkpoint
from pipeline.core.facts import Files
from pipeline.core.recipe import DECODER, STEP
from pipeline.core.stage import Context, Outcome, Stage, main
from pipeline.models import build


def work(context: Context) -> Outcome:
    """Export the step graph and the bundle's decoder, as far as they are wanted."""
    checkpoint, recipe = open_checkpoint(context.root / "fetch" / "checkpoint"), context.recipe
    if context.graphs != "bundle":
        build.export_step(checkpoint, recipe.step, context.folder / STEP)
    if context.graphs != "step":
        build.export_decoder(checkpoint, recipe.bundle, context.folder / DECODER)
    sizes = {file.name: file.stat().st_size for file in sorted(context.folder.glob("*.tflite"))}
    return Outcome(facts=Files(graphs=context.graphs, sizes=sizes))


STAGE = Stage(name="graph", summary="Export the graphs that every precision fills with weights.", work=work)

if __name__ == "__main__":
    sys.exit(main(STAGE))
