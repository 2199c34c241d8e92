"""Stage fp32: the step graph in float32, exact against Hugging Face; every other precision is made from it."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from pipeline.convert import export, intake, weights
from pipeline.convert.checkpoint import Checkpoint, open_checkpoint
from pipeline.core import log
from pipeline.core.errors import ExportError
from pipeline.core.recipe import StepLimits
from pipeline.core.stage import Context, Outcome, Stage, main
from pipeline.judge.runtime import StepModel
from pipeline.models import architecture_for

STEP = "step.tflite"


def work(context: Context) -> Outcome:
    """Map the weights, export the step graph, run it once."""
    checkpoint = open_checkpoint(context.root / "fetch" / "checkpoint")
    names = tensor_names(checkpoint)
    out = context.folder / STEP
    with weights.mapped(checkpoint, names, context.folder / "weights.scratch") as tensors:
        log.step("exporting the graph (torch.export with symbolic shapes; about a minute per ten layers)")
        export_step(checkpoint, tensors, context.recipe.step, out)
    log.step("reopening the file and running it once")
    try_step(out)
    parameters = sum(tensor.numel() for tensor in tensors.values())
    return Outcome(facts={"parameters": parameters, "size": out.stat().st_size})


def tensor_names(checkpoint: Checkpoint) -> dict[str, str]:
    """Canonical → checkpoint name of every tensor of the text model."""
    architecture, config = architecture_for(checkpoint.config), checkpoint.config
    return intake.match(
        checkpoint.tensors,
        architecture.tensors(config),
        lambda name: architecture.canonical(name, config),
        str(checkpoint.folder),
    )


def export_step(checkpoint: Checkpoint, tensors: Mapping[str, torch.Tensor], limits: StepLimits, out: Path) -> None:
    """Write the step graph with the weights `tensors` (canonical names) to `out`."""
    with torch.device("meta"):
        module = architecture_for(checkpoint.config).step(checkpoint.config)
    export.assign(module.model, tensors)
    shape = {0: ("batch", 1, limits.max_batch), 1: ("sequence", 1, limits.max_sequence)}
    inputs = {name: torch.ones((2, 128), dtype=torch.int32) for name in ("input_ids", "attention_mask")}
    export.export(module, inputs, {name: shape for name in inputs}, out)


def try_step(file: Path) -> None:
    """Run `file` on two rows of three tokens.

    Raises:
        ExportError: the logits are not finite.
    """
    ids = np.array([[2, 3, 4], [2, 3, 5]], dtype=np.int32)
    logits = StepModel(file).logits(ids, np.ones_like(ids))
    if not np.isfinite(logits).all():
        raise ExportError(f"{file} computes logits that are not finite", remedy="report it with the checkpoint's name")


STAGE = Stage(name="fp32", summary="Export the step graph in float32.", work=work, needs=("fetch",))

if __name__ == "__main__":
    sys.exit(main(STAGE))
