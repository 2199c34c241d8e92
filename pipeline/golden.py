"""golden: the reference that every file is held against, computed by Hugging Face transformers in fp32.

Attention is eager, position ids count attended tokens as `generate` does, and nothing of this project's own graph code
runs here. A model that does not fit into memory in fp32 is streamed from its file, with the same result. Stored are
final hidden states (after the last norm), from which `judge.reference` gets the logits.

On a GPU (`--device cuda`) the same fp32 arithmetic runs with TF32 off; a sample of windows is computed on the CPU as
well, and must agree to a normalised mean square error of 1e-8. Verify looks again (`reference.agreement`).
"""

from __future__ import annotations

import hashlib
import sys
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

from pipeline.cluster import pool
from pipeline.core import facts, options
from pipeline.core.graph import towers_in
from pipeline.core.recipe import PROJECT
from pipeline.core.stage import Context, Outcome, Stage, main
from pipeline.judge import corpus
from pipeline.judge.reference import Head
from pipeline.reference import devices, golden, media
from pipeline.reference.shards import Model


@dataclass(frozen=True, kw_only=True)
class Options(options.Options):
    """The device, where the weights are, and the text."""

    device: devices.Device = field(default="auto", metadata={"help": "where the reference runs"})
    weights: Literal["auto", "loaded", "streamed"] = field(
        default="auto",
        metadata={"help": "in memory, or read from the file as they are needed (default: loaded if they fit)"},
    )
    eval: Path | None = field(
        default=None,
        metadata={"metavar": "FILE", "help": "your own text to judge on, .txt or .jsonl (default: the recipe's)"},
    )
    cluster: str = field(default="", metadata={"help": "whose workers compute: a scheduler's address, or local:<n>"})


def work(context: Context) -> Outcome:
    """Load the reference, run it on corpus, shapes and prompts, and store what it says."""
    parameters = context.upstream["fetch"].told(facts.Fetch).parameters
    device = devices.choose(context.chosen(Options).device, parameters)
    return devices.within_memory(device, partial(_work_on, context, parameters))


def _work_on(context: Context, parameters: int, device: str) -> Outcome:
    recipe, checkpoint, chosen = context.recipe, context.root / "fetch" / "checkpoint", context.chosen(Options)
    text = chosen.eval or PROJECT / recipe.corpus.verification
    openings = corpus.read_documents(text, corpus.first_content)  # before the model is loaded, which takes minutes
    streamed = golden.is_streamed(chosen.weights, device, parameters * pool.copies(chosen.cluster))
    model = Model(str(checkpoint.absolute()), device, streamed)
    with pool.opened(chosen.cluster, context.root, "golden", context.upstream["fetch"].outputs, "reference") as shards:
        asked = golden.ask(model, shards, parameters)
        reference = asked.reference
        documents = corpus.read_documents(text, reference.render)
        corpus.require_disjoint(documents, corpus.read_documents(PROJECT / recipe.corpus.calibration, reference.render))
        windows = corpus.pack_windows(
            documents,
            reference.tokenize,
            bos=reference.bos,
            window=recipe.corpus.window,
            limit=max(1, recipe.corpus.positions // corpus.POSITIONS_PER_WINDOW),
        )
        few, grid = windows[: golden.SAMPLE], context.folder / "shapes.safetensors"
        # All is asked for before an answer is awaited, what takes longest first; this process sees and hears meanwhile.
        traced = None if context.graphs == "step" else golden.make_cache_trace(asked, documents, recipe, context.folder)
        greedy = golden.make_greedy(asked, openings, recipe, context.graphs, context.folder / "greedy.json")
        states = golden.make_corpus(asked, windows, recipe.corpus.positions, context.folder / "corpus.safetensors")
        cases = None if context.graphs == "bundle" else golden.make_shapes(asked, recipe.shapes, grid)
        floors = {"threads": golden.threads_floor(asked, few), "bfloat16": golden.bfloat16_floor(asked, few)}
        if traced and towers_in(context.towers):
            media.make(checkpoint, reference, towers_in(context.towers), recipe.bundle, parameters, context.folder)
        bos, pad, stop, cap = reference.bos, reference.pad, reference.stop, reference.cap
        del asked, reference  # their memory is for the same model in another precision, which is asked last
        sample = golden.Sample(few, states()[: golden.SAMPLE], Head.of_checkpoint(checkpoint, cap))
        count, trace = cases() if cases else 0, traced() if traced else None
        greedy()
        floor = {name: measure(sample) for name, measure in floors.items()}
    return Outcome(
        facts=facts.Golden(
            bos=bos,
            pad=pad,
            stop=stop,
            final_logit_softcapping=cap,
            dtype="float32",
            attention="eager",
            device=device,
            weights="streamed" if streamed else "loaded",
            verification=text.name,
            verification_sha256=hashlib.sha256(text.read_bytes()).hexdigest(),
            documents=len(documents),
            windows=len(windows),
            window=recipe.corpus.window,
            shape_cases=count,
            self_floor=floor,
            sliding_window=trace.sliding_window if trace else None,
            conversation=trace.conversation if trace else None,
            texts=trace.texts if trace else None,
        )
    )


STAGE = Stage(
    name="golden",
    summary="Compute the Hugging Face fp32 reference on the verification text and the shape grid.",
    work=work,
    options=Options,
    after=lambda context: pool.forget(context.root, "golden"),
)

if __name__ == "__main__":
    sys.exit(main(STAGE))
