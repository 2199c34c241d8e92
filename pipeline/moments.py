"""moments: the Hessian of each linear layer, second moments of what it reads on calibration text: what GPTQ rounds by.

Hugging Face's model in fp32 reads windows of the calibration text. Of each linear layer's inputs x, H = Σ x xᵀ / |x|²
over all tokens is kept: what Gemma's layers give is normalised per token, so an error counts by its share of the
token's own result, and the few tokens with huge activations (the first of a text) do not outweigh all others. Layers
that read the same tensor have one file; a layer wider than `hessians.SPAN` columns has the Hessian of each span alone.
What the model makes of the text is kept as well: int8's ladder judges by it.

Made only for precisions that round by them. The model is streamed from its file and the sums stand in mapped files, so
memory stays bounded; on a GPU (`--device cuda`) both are in its memory, in the same fp32 arithmetic with TF32 off, and
a window is computed on the CPU as well.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
from threadpoolctl import threadpool_limits

from pipeline.checkpoint.names import EMBEDDING, HEAD
from pipeline.checkpoint.reader import open_checkpoint
from pipeline.core import facts, log, options
from pipeline.core.recipe import PROJECT
from pipeline.core.stage import Context, Outcome, Stage, main
from pipeline.judge import corpus
from pipeline.quantize import hessians
from pipeline.quantize.hessian_sums import HessianSums
from pipeline.reference import activations, devices

_WATCHED = 2
"""Windows."""


@dataclass(frozen=True, kw_only=True)
class Options(options.Options):
    """The device, and the text."""

    device: devices.Device = field(default="auto", metadata={"help": "where the reference runs"})
    calibration: Path | None = field(
        default=None, metadata={"metavar": "FILE", "help": "your own text: .txt or .jsonl"}
    )


def work(context: Context) -> Outcome:
    """Let the reference read the calibration text, and keep the sums."""
    device = devices.choose(context.chosen(Options).device, context.upstream["fetch"].told(facts.Fetch).parameters)
    return devices.within_memory(device, partial(_work_on, context))


def _work_on(context: Context, device: str) -> Outcome:
    recipe, checkpoint = context.recipe, context.root / "fetch" / "checkpoint"
    reference = devices.opened(checkpoint, device)
    text = context.chosen(Options).calibration or PROJECT / recipe.corpus.calibration
    windows = corpus.pack_windows(
        corpus.read_documents(text, reference.render),
        reference.tokenize,
        bos=reference.bos,
        window=recipe.corpus.window,
        limit=recipe.corpus.hessian_windows,
    )
    first = windows[:_WATCHED]
    largest = activations.largest(reference, lambda: reference.hidden(first, np.ones_like(first)))
    sums = HessianSums(context.folder, held=device != "cpu")
    sums.observe(reference.model.model)
    # BLAS's threads would wait in the way of torch's.
    with threadpool_limits(1, "blas"), log.progress("what layers read", windows.size, "tokens") as bar:
        states = reference.hidden(windows, np.ones_like(windows), bar)
    sums.add_inputs(EMBEDDING if open_checkpoint(checkpoint).tied else HEAD, torch.from_numpy(states))
    sums.close()
    if device != "cpu":
        again = devices.opened(checkpoint, "cpu").hidden(first, np.ones_like(first))
        devices.require_same(again, states[:_WATCHED], device, "moments")
    for name, kept in ((hessians.WINDOWS, windows), (hessians.STATES, states)):
        np.save(context.folder / name, kept)
    told = facts.Moments(
        tokens=int(windows.size),
        files=len({*sums.files.values()}),
        largest_activation=largest,
        final_logit_softcapping=reference.cap,
        device=device,
    )
    return Outcome(facts=told)


STAGE = Stage(
    name="moments",
    summary="Keep the Hessians of linear layers, which GPTQ rounds by.",
    work=work,
    options=Options,
)

if __name__ == "__main__":
    sys.exit(main(STAGE))
