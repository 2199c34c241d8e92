"""Stage towers: what a model sees and hears by, as the sections that its bundles hold beside the text, in float32."""

from __future__ import annotations

import sys

from pipeline.checkpoint.reader import open_checkpoint
from pipeline.core import log
from pipeline.core.errors import ExportError
from pipeline.core.facts import Files
from pipeline.core.graph import towers_in
from pipeline.core.stage import Context, Outcome, Stage, main
from pipeline.models import towers
from pipeline.quantize import readback


def work(context: Context) -> Outcome:
    """Write the sections and run each once."""
    checkpoint = open_checkpoint(context.root / "fetch" / "checkpoint")
    for tower in towers_in(context.towers):
        towers.write(tower, checkpoint, context.folder)
    files = sorted(context.folder.glob("*.tflite"))
    for file in files:
        readback.round_trip(file, ExportError)
        log.step(f"{file.name}: {log.human_bytes(file.stat().st_size)}")
    return Outcome(facts=Files(graphs=context.graphs, sizes={file.name: file.stat().st_size for file in files}))


STAGE = Stage(name="towers", summary="Write the sections of the towers that TOWERS= names.", work=work)

if __name__ == "__main__":
    sys.exit(main(STAGE))
