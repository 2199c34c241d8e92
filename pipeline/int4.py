"""int4: the graphs and tables with 4-bit weights, and 8-bit ones where the recipe says so; activations are dynamic.

Only made for a recipe that has an `[int4]` section, when it is asked for or the recipe bundles it. Where it is optional
there and can't be made of a model, as where too few weights can have 4 bits, it is left out and the build goes on.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping
from pathlib import Path

from threadpoolctl import threadpool_limits

from pipeline.bundling import tables
from pipeline.checkpoint.reader import Checkpoint, open_checkpoint
from pipeline.core import log
from pipeline.core.errors import TooFewBitsError
from pipeline.core.facts import Contents, Precision
from pipeline.core.recipe import DECODER, STEP, Int4
from pipeline.core.stage import Context, Outcome, Stage, main
from pipeline.models import build
from pipeline.quantize import fixed, given, gptq, int4, readback, rows


def work(context: Context) -> Outcome:
    """Fill the graphs, write the tables, and look into what was written; leave nothing of what can't be made."""
    try:
        return Outcome(facts=_made(context))
    except TooFewBitsError as error:
        if "int4" not in context.recipe.bundle.optional:
            raise
        reason = str(error).replace(f"{context.folder}/", "")  # a manifest is the same wherever it is made
        log.warn(f"int4 is left out: {reason}")
        for file in context.folder.iterdir():
            file.unlink()
        return Outcome(facts=Precision(graphs=context.graphs, left_out=reason))


def _made(context: Context) -> Precision:
    settings = context.recipe.int4
    assert settings is not None  # core/graph.py refuses
    checkpoint = open_checkpoint(context.root / "fetch" / "checkpoint")
    graphs = build.graph_files(context.upstream["graph"], context.root, context.graphs)
    contents: dict[str, Contents] = {}
    room = context.folder if len(graphs) > 1 else None
    hessians = gptq.Hessians(context.root / "moments", room) if "moments" in context.upstream else None
    with hessians or threadpool_limits(1, "blas"):  # rows are made in a thread per core already
        for name, file in graphs.items():
            shapes = context.recipe.step.signatures if name == STEP else {}
            contents[name] = _write(checkpoint, file, context.folder / name, settings, hessians, shapes)
    if DECODER in graphs:
        tables.write_tables(checkpoint, context.recipe.bundle, "int4", context.folder, _kept(settings))
    step, decoder = contents.get(STEP), contents.get(DECODER)
    return Precision(graphs=context.graphs, device=context.moments_device, step=step, decoder=decoder)


def _kept(settings: Int4) -> tables.Choice:
    """Which tables have no 4 bits."""
    eight, whole = rows.keeper(settings.keep_int8), rows.keeper(settings.keep_float)
    return lambda name: "fp32" if whole(name) else "int8" if eight(name) else None


def _write(
    checkpoint: Checkpoint,
    source: Path,
    file: Path,
    settings: Int4,
    hessians: gptq.Hessians | None,
    shapes: Mapping[str, tuple[int, int]],
) -> Contents:
    """Write `file`, the graph `source` with its weights and fixed `shapes`, and find out what stands in it."""
    log.step(f"{file.name}: 4-bit weights")
    graph = build.with_weights(checkpoint, source)
    int4.make_int4(graph, settings, hessians)
    graph.prune()
    graph.write(file)
    fixed.add(file, shapes)
    kept = given.check(checkpoint, build.tensor_names(checkpoint), file)
    found = readback.read_back(file)
    facts = readback.check(found, "int4", file, floats=bool(settings.keep_float))
    readback.round_trip(file)
    as_stored = f"; {kept} matrices with the checkpoint's integers and scales" if kept else ""
    log.step(f"{file.name}: {log.human_bytes(found.size)}; {found.bits_per_weight:.2f} bits per weight{as_stored}")
    return dataclasses.replace(facts, weights_as_stored=kept or None)


STAGE = Stage(
    name="int4",
    summary="Write the files with 4-bit weights, and 8-bit ones where the recipe says so.",
    work=work,
)

if __name__ == "__main__":
    sys.exit(main(STAGE))
