"""golden: the reference that every file is held against, computed by Hugging Face transformers in fp32.

Attention is eager, position ids count attended tokens as `generate` does, and nothing of this project's own graph code
runs here. A model that does not fit into memory in fp32 is streamed from its file, with the same result. Stored are
final hidden states (after the last norm), from which `judge.reference` gets the logits.

On a GPU (`--device cuda`) the same fp32 arithmetic runs with TF32 off; a sample of windows is computed on the CPU as
well, and must agree to a normalised mean square error of 1e-8.
"""

from __future__ import annotations

import hashlib
import json
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from pipeline.core import facts, manifest, options
from pipeline.core.graph import towers_in
from pipeline.core.recipe import PROJECT
from pipeline.core.stage import Context, Outcome, Stage, main
from pipeline.judge import corpus
from pipeline.judge.reference import Head
from pipeline.reference import golden, hearing

_SAMPLE_WINDOWS = 8


@dataclass(frozen=True, kw_only=True)
class Options(options.Options):
    """The device, where the weights are, and the text."""

    device: Literal["auto", "cpu", "cuda"] = field(default="auto", metadata={"help": "where the reference runs"})
    weights: Literal["auto", "loaded", "streamed"] = field(
        default="auto",
        metadata={"help": "in memory, or read from the file as they are needed (default: loaded if they fit)"},
    )
    eval: Path | None = field(
        default=None,
        metadata={"metavar": "FILE", "help": "your own text to judge on, .txt or .jsonl (default: the recipe's)"},
    )


def work(context: Context) -> Outcome:
    """Load the reference, run it on corpus, shapes and prompts, and store what it says."""
    recipe, checkpoint, chosen = context.recipe, context.root / "fetch" / "checkpoint", context.chosen(Options)
    text = chosen.eval or PROJECT / recipe.corpus.verification
    openings = corpus.read_documents(text, corpus.first_content)  # before the model is loaded, which takes minutes
    device = golden.choose_device(chosen.device)
    parameters = context.upstream["fetch"].told(facts.Fetch).parameters
    streamed = golden.is_streamed(chosen.weights, device, parameters)
    reference = golden.load(checkpoint, device, parameters, streamed=streamed)
    documents = corpus.read_documents(text, reference.render)
    corpus.require_disjoint(documents, corpus.read_documents(PROJECT / recipe.corpus.calibration, reference.render))
    windows = corpus.pack_windows(
        documents,
        reference.tokenize,
        bos=reference.bos,
        window=recipe.corpus.window,
        limit=max(1, recipe.corpus.positions // corpus.POSITIONS_PER_WINDOW),
    )
    hidden = golden.make_corpus(reference, windows, recipe.corpus.positions, context.folder / "corpus.safetensors")
    head = Head.of_checkpoint(checkpoint, reference.cap)
    sample = golden.Sample(windows[:_SAMPLE_WINDOWS], hidden[:_SAMPLE_WINDOWS], head)
    threads = golden.threads_floor(reference, sample)
    cases = (
        0
        if context.graphs == "bundle"
        else golden.make_shapes(reference, recipe.shapes, context.folder / "shapes.safetensors")
    )
    greedy = golden.make_greedy(reference, openings, recipe, context.graphs)
    traced = None
    if context.graphs != "step":
        traced = golden.make_cache_trace(reference, documents, recipe, context.folder)
        if towers_in(context.towers):
            hearing.make_sounds(checkpoint, reference, recipe.bundle, context.folder)
    manifest.write_atomically(
        context.folder / "greedy.json", json.dumps([asdict(row) for row in greedy], ensure_ascii=False, indent=1) + "\n"
    )
    bos, pad, stop, cap = reference.bos, reference.pad, reference.stop, reference.cap
    del reference  # its memory is for the same model in another precision
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
            shape_cases=cases,
            self_floor={
                "threads": threads,
                "bfloat16": golden.NOT_MEASURED if streamed else golden.bfloat16_floor(checkpoint, sample),
            },
            sliding_window=traced.sliding_window if traced else None,
            conversation=traced.conversation if traced else None,
            texts=traced.texts if traced else None,
        )
    )


STAGE = Stage(
    name="golden",
    summary="Compute the Hugging Face fp32 reference on the verification text and the shape grid.",
    work=work,
    options=Options,
)

if __name__ == "__main__":
    sys.exit(main(STAGE))
