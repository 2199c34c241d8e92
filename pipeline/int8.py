"""int8: the step graph with int8 weights, by the scheme `dynamic` or `static`.

The recipe's scheme makes `int8/`; `--scheme dynamic` or `--scheme static` makes `int8-dynamic/` or `int8-static/`, so
that both can stand side by side.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from pipeline.convert import calibrate, quantize, readback
from pipeline.convert.flatbuffer import Graph
from pipeline.core import log
from pipeline.core.errors import UsageError
from pipeline.core.manifest import Facts
from pipeline.core.recipe import PROJECT, Scheme
from pipeline.core.stage import Context, Outcome, Stage, main

NAME = "step.tflite"


def work(context: Context) -> Outcome:
    """Write `step.tflite` and look into what was written."""
    settings = context.recipe.int8
    scheme: Scheme = context.arguments.scheme or settings.scheme
    source = context.root / context.upstream["fp32"].output(NAME).path
    file = context.folder / NAME
    keep = quantize.keeper(settings.keep_float)
    graph = Graph.read(source)
    more: Facts = {}
    if scheme == "dynamic":
        log.step("quantise weights; activations are quantised at run time")
        quantize.make_dynamic(graph, keep)
    else:
        samples = _samples(context)
        log.step(f"run fp32 on {len(samples)} samples of {sum(map(len, samples))} tokens for the ranges")
        plan = quantize.plan_static(graph, keep)
        seen = calibrate.collect(source, plan.wanted, samples)
        log.step("quantise weights and activations")
        quantize.make_static(graph, plan, seen, keep)
        more = {"calibration_samples": len(samples), "calibration_tokens": sum(map(len, samples))}
    graph.prune()
    graph.write(file)
    log.step("read the file back")
    found = readback.read_back(file)
    facts = readback.check(found, scheme, file)
    readback.round_trip(file)
    log.step(f"{log.human_bytes(found.size)}, {found.size / source.stat().st_size:.3f} of fp32")
    log.step(
        f"{facts['integer_share']:.1%} of multiply-adds integer, {facts['weights_int8_share']:.1%} of weights int8"
    )
    return Outcome(facts={**facts, **more})


def _samples(context: Context) -> list[calibrate.Ids]:
    """The calibration text as token windows of the corpus's window length."""
    tokenizer = _tokenizer(context.root / "fetch" / "checkpoint")
    text: Path = context.arguments.calibration or PROJECT / context.recipe.corpus.calibration

    def render(messages: Sequence[Mapping[str, str]]) -> str:
        if not tokenizer.chat_template:
            return "\n".join(message["content"] for message in messages)
        try:
            return cast(str, tokenizer.apply_chat_template(messages, tokenize=False))
        except Exception as error:  # the template is the model's own code: whatever it raises is about the messages
            raise UsageError(
                f"the model's chat template refuses a conversation in {text}: {error}",
                remedy="check the roles: usually user and model or assistant in turn",
            ) from error

    return calibrate.make_samples(
        calibrate.read_texts(text, render),
        lambda document: cast("Sequence[int]", tokenizer.encode(document, add_special_tokens=False)),
        int(tokenizer.bos_token_id),
        count=context.recipe.int8.calibration_samples,
        window=context.recipe.corpus.window,
    )


def _tokenizer(checkpoint: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(checkpoint, local_files_only=True)


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--scheme", choices=("dynamic", "static"), help="write int8-SCHEME/ instead of int8/")
    parser.add_argument(
        "--calibration", type=Path, metavar="FILE", help="your own text for the static ranges: .txt or .jsonl"
    )


def _name(arguments: argparse.Namespace) -> str:
    return f"int8-{arguments.scheme}" if arguments.scheme else "int8"


STAGE = Stage(
    name="int8",
    summary="Write the step graph with int8 weights and, if static, int8 activations.",
    work=work,
    needs=("fp32", "fetch"),
    add_arguments=_add_arguments,
    name_of=_name,
)

if __name__ == "__main__":
    sys.exit(main(STAGE))
