"""golden: the reference that every file is held against, computed by Hugging Face transformers in fp32.

Attention is eager, position ids count attended tokens as `generate` does, and nothing of this project's own graph code
runs here. A model that does not fit into memory in fp32 is streamed from its file, with the same result. Stored are
final hidden states (after the last norm), from which `judge.reference` gets the logits.

On a GPU (`--device cuda`) the same fp32 arithmetic runs with TF32 off; a sample of windows is computed on the CPU as
well, and must agree to a normalised mean square error of 1e-8.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from pathlib import Path

from pipeline.core import manifest
from pipeline.core.manifest import Facts
from pipeline.core.recipe import PROJECT
from pipeline.core.stage import Context, Outcome, Stage, main
from pipeline.judge import corpus
from pipeline.judge.reference import Head
from pipeline.reference import golden

_SAMPLE_WINDOWS = 8


def work(context: Context) -> Outcome:
    """Load the reference, run it on corpus, shapes and prompts, and store what it says."""
    recipe, checkpoint = context.recipe, context.root / "fetch" / "checkpoint"
    text = context.arguments.eval or PROJECT / recipe.corpus.verification
    openings = corpus.read_documents(text, corpus.first_content)  # before the model is loaded, which takes minutes
    device = golden.choose_device(context.arguments.device)
    parameters = context.upstream["fetch"].integer("parameters")
    streamed = golden.is_streamed(context.arguments.weights, device, parameters)
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
    spoken: Facts = (
        {} if context.graphs == "step" else golden.make_recital(reference, documents, recipe, context.folder)
    )
    manifest.write_atomically(context.folder / "greedy.json", json.dumps(greedy, ensure_ascii=False, indent=1) + "\n")
    facts: Facts = {
        "bos": reference.bos,
        "pad": reference.pad,
        "stop": list(reference.stop),
        "final_logit_softcapping": reference.cap,
    }
    del reference  # its memory is for the same model in another precision
    return Outcome(
        facts={
            **facts,
            "dtype": "float32",
            "attention": "eager",
            "device": device,
            "weights": "streamed" if streamed else "loaded",
            "verification": text.name,
            "verification_sha256": hashlib.sha256(text.read_bytes()).hexdigest(),
            "documents": len(documents),
            "windows": len(windows),
            "window": recipe.corpus.window,
            "shape_cases": cases,
            "self_floor": {
                "threads": dict(threads),
                "bfloat16": dict(golden.NOT_MEASURED if streamed else golden.bfloat16_floor(checkpoint, sample)),
            },
            **spoken,
        }
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The device, where the weights are, and the text."""
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where the reference runs")
    parser.add_argument(
        "--weights",
        choices=("auto", "loaded", "streamed"),
        default="auto",
        help="in memory, or read from the file as they are needed (default: loaded if they fit)",
    )
    parser.add_argument(
        "--eval", type=Path, metavar="FILE", help="your own text to judge on, .txt or .jsonl (default: the recipe's)"
    )


STAGE = Stage(
    name="golden",
    summary="Compute the Hugging Face fp32 reference on the verification text and the shape grid.",
    work=work,
    add_arguments=add_arguments,
)

if __name__ == "__main__":
    sys.exit(main(STAGE))
