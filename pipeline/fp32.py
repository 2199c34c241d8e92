"""Stage fp32: graphs and tables in float32, exact against Hugging Face; what other precisions are held against."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from pipeline.convert.checkpoint import open_checkpoint
from pipeline.core import log
from pipeline.core.errors import ExportError
from pipeline.core.manifest import Fact
from pipeline.core.stage import Context, Outcome, Stage, main
from pipeline.judge.runtime import StepModel
from pipeline.judge.sections import Sections
from pipeline.models import build


def work(context: Context) -> Outcome:
    """Fill the graphs, write the tables, run each once."""
    checkpoint = open_checkpoint(context.root / "fetch" / "checkpoint")
    graphs = build.graph_files(context.upstream["graph"], context.root, context.graphs)
    for name, source in graphs.items():
        graph = build.with_weights(checkpoint, source)
        graph.prune()
        graph.write(context.folder / name)
    if build.DECODER in graphs:
        build.write_tables(checkpoint, "fp32", context.folder)
    log.step("reopening the files and running them once")
    _try(context.folder)
    sizes: dict[str, Fact] = {file.name: file.stat().st_size for file in sorted(context.folder.glob("*.tflite"))}
    return Outcome(facts={"graphs": context.graphs, "sizes": sizes})


def _try(folder: Path) -> None:
    """Run one step of the graphs in `folder`, with the built-in kernels: XNNPACK would repack all weights into memory.

    Raises:
        ExportError: logits are not finite.
    """
    results = {}
    if (folder / build.STEP).exists():
        ids = np.array([[2, 3, 4], [2, 3, 5]], dtype=np.int32)
        results[build.STEP] = StepModel(folder / build.STEP, xnnpack=False).logits(ids, np.ones_like(ids))
    if (folder / build.DECODER).exists():
        results[build.DECODER] = Sections(folder, xnnpack=False).try_once()
    for name, logits in results.items():
        if not np.isfinite(logits).all():
            raise ExportError(
                f"{name} computes logits that are not finite", remedy="report it with the checkpoint's name"
            )


STAGE = Stage(name="fp32", summary="Write the files in float32.", work=work, needs=("fetch", "graph"))

if __name__ == "__main__":
    sys.exit(main(STAGE))
