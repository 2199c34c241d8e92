"""Stage towers: what a model sees and hears by, as the sections that its bundles hold beside the text, by precision."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from pipeline.checkpoint.reader import Checkpoint, open_checkpoint
from pipeline.core import log
from pipeline.core.errors import ExportError
from pipeline.core.facts import Tower
from pipeline.core.graph import Choice, towers_in
from pipeline.core.stage import Context, Outcome, Stage, main
from pipeline.models import towers
from pipeline.quantize import readback, senses


def work(context: Context) -> Outcome:
    """Export each tower once, fill it with the weights of every precision, and run each section once."""
    checkpoint = open_checkpoint(context.root / "fetch" / "checkpoint")
    choice, made = Choice(recipe=context.recipe, graphs=context.graphs), dict[str, Tower]()
    for tower in towers_in(context.towers):
        with tempfile.TemporaryDirectory(dir=context.folder) as folder:
            graphs = towers.export_tower(tower, checkpoint, Path(folder))
            for precision in choice.tower_precisions:
                made[f"{tower}-{precision}"] = _write(context, tower, checkpoint, graphs, precision)
    return Outcome(facts=made)


def _write(context: Context, tower: str, checkpoint: Checkpoint, graphs: list[Path], precision: str) -> Tower:
    folder = context.folder / precision
    folder.mkdir(exist_ok=True)
    stored = weight_bytes = 0
    for source in graphs:
        graph, file = towers.with_weights(tower, checkpoint, source), folder / source.name
        senses.narrow(graph, precision, context.recipe.towers)
        graph.prune()
        count, size = senses.weights(graph)
        stored, weight_bytes = stored + count, weight_bytes + size
        graph.write(file)
        _run_once(file)
        log.step(f"{precision}/{file.name}: {log.human_bytes(file.stat().st_size)}")
    sizes = {source.stem: (folder / source.name).stat().st_size for source in graphs}
    return Tower(precision=precision, sizes=sizes, stored=stored, weight_bytes=weight_bytes)


def _run_once(file: Path) -> None:
    """An encoder, which may take 10¹² operations and more a run, in XNNPACK."""
    with tempfile.TemporaryDirectory(dir=file.parent) as folder:
        readback.round_trip(file, ExportError, Path(folder) / "packed" if file.stem.endswith("_encoder") else None)


STAGE = Stage(name="towers", summary="Write the sections of the towers that TOWERS= names.", work=work)

if __name__ == "__main__":
    sys.exit(main(STAGE))
