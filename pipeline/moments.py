"""moments: the Hessian of each linear layer, second moments of what it reads on calibration text: what GPTQ rounds by.

Hugging Face's model in fp32 reads windows of the calibration text. Of each linear layer's inputs x, H = Σ x xᵀ / |x|²
over all tokens is kept: what Gemma's layers give is normalised per token, so an error counts by its share of the
token's own result, and the few tokens with huge activations (the first of a text) do not outweigh all others. Layers
that read the same tensor have one file; a layer wider than `hessians.SPAN` columns has the Hessian of each span alone.

Made only for precisions that round by them. The model is streamed from its file and the sums stand in mapped files, so
memory stays bounded.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.checkpoint.names import EMBEDDING, HEAD
from pipeline.checkpoint.reader import open_checkpoint
from pipeline.core import facts, log, manifest, options
from pipeline.core.recipe import PROJECT
from pipeline.core.stage import Context, Outcome, Stage, main
from pipeline.judge import corpus
from pipeline.quantize import hessians
from pipeline.reference.model import HuggingFace


@dataclass(frozen=True, kw_only=True)
class Options(options.Options):
    """The text."""

    calibration: Path | None = field(
        default=None, metadata={"metavar": "FILE", "help": "your own text: .txt or .jsonl"}
    )


class HessianSums:
    """The Hessians so far, each in a mapped file in `folder`, and which weights each is of."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files: dict[str, str] = {}
        self.mapped: dict[str, np.memmap[tuple[int, ...], np.dtype[np.float32]]] = {}
        self._last: tuple[Tensor | None, str] = (None, "")

    def observe(self, model: nn.Module) -> None:
        """Add what every linear layer of `model` reads from now on."""
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear):
                module.register_forward_pre_hook(
                    lambda _, inputs, name=name: self.add_inputs(f"{name}.weight", inputs[0])
                )

    def add_inputs(self, weight: str, inputs: Tensor) -> None:
        """Add `inputs` [..., columns] to the sum of `weight`; a tensor that several layers read is added once."""
        if self._last[0] is inputs:  # q, k and v are called one after the other, as are gate and up
            self.files[weight] = self._last[1]
            return
        file = self.files.setdefault(weight, f"{weight}.npy")
        self._last = (inputs, file)
        self.add(file, inputs.detach().reshape(-1, inputs.shape[-1]).float())

    def add(self, file: str, rows: Tensor) -> None:
        """Add Σ x xᵀ / |x|² of `rows` [tokens, columns], span by span."""
        width = hessians.span(rows.shape[1])
        count = rows.shape[1] // width
        if file not in self.mapped:
            self.mapped[file] = np.lib.format.open_memmap(
                self.folder / file, mode="w+", dtype=np.float32, shape=(count, width, width)
            )
        unit = rows / rows.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
        for place, part in enumerate(unit.split(width, dim=1)):
            self.mapped[file][place] += (part.T @ part).numpy()

    def close(self) -> None:
        """Finish all files, and write which weight reads which."""
        for mapped in self.mapped.values():
            mapped.flush()
        self.mapped.clear()
        manifest.write_atomically(self.folder / hessians.INDEX, manifest.dump_json(dict(sorted(self.files.items()))))


def work(context: Context) -> Outcome:
    """Let the reference read the calibration text, and keep the sums."""
    recipe, checkpoint = context.recipe, context.root / "fetch" / "checkpoint"
    log.step("the reference runs in fp32, a matrix at a time")
    reference = HuggingFace.load(checkpoint, "cpu", streamed=True)
    text = context.chosen(Options).calibration or PROJECT / recipe.corpus.calibration
    windows = corpus.pack_windows(
        corpus.read_documents(text, reference.render),
        reference.tokenize,
        bos=reference.bos,
        window=recipe.corpus.window,
        limit=recipe.int8.calibration_samples,
    )
    sums = HessianSums(context.folder)
    sums.observe(reference.model.model)
    with log.progress("what layers read", windows.size, "tokens") as bar:
        states = reference.hidden(windows, np.ones_like(windows), bar)
    sums.add_inputs(EMBEDDING if open_checkpoint(checkpoint).tied else HEAD, torch.from_numpy(states))
    sums.close()
    return Outcome(facts=facts.Moments(tokens=int(windows.size), files=len({*sums.files.values()})))


STAGE = Stage(
    name="moments",
    summary="Keep the Hessians of linear layers, which GPTQ rounds by.",
    work=work,
    options=Options,
)

if __name__ == "__main__":
    sys.exit(main(STAGE))
