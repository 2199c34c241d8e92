"""verify: hold every file against the reference and say, limit beside value, whether it is good enough.

Two gates. The fp32 files are held against Hugging Face (a fault of the conversion shows), the other step graphs against
that of fp32 (what precision costs shows), on whole prompts. Bundles are all held against Hugging Face, whose equal the
fp32 one has to be: through the cache, section by section, and whole in LiteRT-LM, whose text must be Hugging Face's. A
required file that misses a limit fails the stage with exit code 8, leaves no manifest, and leaves the report for the
reader. The int8 scheme that the recipe did not choose is judged in the same way and may fail: it is marked as not fit
to publish.

`judgement.json` is the same from run to run, and so is `tensors.json`: where each tensor of a judged file stands, and
its sha256. `report.json` and `report.html` add timings, machine and date.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

from pipeline.convert import constants, noise
from pipeline.convert.template import CONVERSATIONS
from pipeline.core import chat, log, manifest, versions
from pipeline.core.errors import UsageError, VerificationError
from pipeline.core.manifest import Fact, Facts
from pipeline.core.recipe import PROJECT, Recipe
from pipeline.core.stage import Context, Outcome, Stage, main
from pipeline.judge import bundles, cache, corpus, gates, report, runtime, verdict
from pipeline.judge.cache import Recital
from pipeline.judge.examine import Panel
from pipeline.judge.gates import Check, Status
from pipeline.judge.reference import Head, Reference
from pipeline.judge.verdict import BASELINE, Setting, Subject, Verdict

VARIANTS = (BASELINE, "fp16", "int8")
STEP = "step.tflite"
SEQUENCES = (1, 128, 1024)
_CAUSES: Mapping[Status, str] = {
    "fail": "a file is not as good as the recipe demands",
    "inconclusive": "too few positions were judged to know whether the limit is kept",
    "not measured": "a figure that the recipe limits could not be had, or the recipe has no limits for this file",
}
_REMEDIES: Mapping[Status, str] = {
    "fail": "correct the stage that made the file, or the recipe's limit",
    "inconclusive": "judge more positions: raise corpus.positions (bundles: bundle.positions), or more text: EVAL=",
    "not measured": "complete the recipe's limits, or run the stage that made the file again",
}
_PER_BATCH = 8
_TRACED = 4
"""Windows that are run operator by operator to find where a file loses quality."""


def work(context: Context) -> Outcome:
    """Judge every file, write judgement and report, and fail if a required check did not pass."""
    checkpoint = context.root / "fetch" / "checkpoint"
    cap = cast("float | None", context.upstream["golden"].facts["final_logit_softcapping"])
    reference = Reference(context.root / "golden", Head.of_checkpoint(checkpoint, cap))
    tokenizer = _tokenizer(checkpoint)
    _check_texts(context, tokenizer)
    verdicts: list[Verdict] = []
    heard: list[bundles.Verdict] = []
    judgement: dict[str, Any] = {}
    if context.graphs != "bundle":
        verdicts, judgement = _judge_steps(context, reference, tokenizer)
    if context.graphs != "step":
        heard = _judge_bundles(context, reference, tokenizer)
    judgement = verdict.finite(judgement | _judgement(context, verdicts, heard))
    manifest.write_atomically(context.folder / "judgement.json", manifest.dump_json(judgement))
    _write_report(context, judgement, verdicts)
    tensors = constants.digests(_files(context))
    manifest.write_atomically(context.folder / "tensors.json", manifest.dump_json(tensors))
    _say([*verdicts, *heard], context.folder)
    return Outcome(
        facts={
            "passed": True,
            "checks": len(judgement["checks"]),
            "fit": [_name(item) for item in (*verdicts, *heard) if item.fit],
            "not_fit": [_name(item) for item in (*verdicts, *heard) if not item.fit],
        }
    )


def _check_texts(context: Context, tokenizer: Any) -> None:
    """Make sure that the reference speaks of the text to judge on, and that no file was calibrated on it.

    Raises:
        UsageError: it does not, or one was.
    """
    arguments, texts = context.arguments, context.recipe.corpus
    judged: Path = arguments.eval or PROJECT / texts.verification
    if hashlib.sha256(judged.read_bytes()).hexdigest() != context.upstream["golden"].facts["verification_sha256"]:
        raise UsageError(
            f"the reference was computed on another text than {judged}",
            cause="the text was changed, or EVAL= was not the same for golden and verify",
            remedy="run `make golden` with this EVAL=",
        )
    render = partial(chat.render, tokenizer)
    calibration = arguments.calibration or PROJECT / texts.calibration
    corpus.require_disjoint(corpus.read_documents(judged, render), corpus.read_documents(calibration, render))


def _judge_steps(context: Context, reference: Reference, tokenizer: Any) -> tuple[list[Verdict], dict[str, Any]]:
    """The verdicts on the step graphs, and what of the judgement is theirs alone."""
    recipe, golden = context.recipe, context.upstream["golden"].facts
    panel = Panel.of(
        reference,
        batch=min(_PER_BATCH, recipe.step.max_batch),
        pad=_integer(golden["pad"]),
    )
    subjects = [_subject(context, name) for name in _ordered(context.arguments.variants)]
    with tempfile.TemporaryDirectory(dir=context.folder) as scratch:
        setting = Setting(
            reference=reference,
            panel=panel,
            prompts=recipe.corpus.prompts,
            continuation=recipe.corpus.continuation,
            stop=_integers(golden["stop"]),
            scratch=Path(scratch),
        )
        verdicts = verdict.judge_files(subjects, setting)
    decode: Callable[[list[int]], str] = lambda ids: str(tokenizer.decode(ids, skip_special_tokens=True))  # noqa: E731
    rows = verdict.greedy_rows(reference, verdicts, setting, decode)
    return verdicts, {
        "greedy": rows,
        "continuation": recipe.corpus.continuation,
        "positions": len(panel.positions),
        "losses": _losses(verdicts, reference),
    }


def _losses(verdicts: Sequence[Verdict], reference: Reference) -> dict[str, Any]:
    """Where each file that is not close enough to the fp32 file leaves it, operator by operator."""
    found: dict[str, Any] = {}
    for item in (item for item in verdicts[1:] if _leaves(item)):
        samples = list(reference.corpus()[0][:_TRACED])
        trace = noise.trace(item.subject.path, verdicts[0].subject.path, samples)
        log.step(f"{item.subject.name}: {trace.sentence()}")
        found[item.subject.name] = trace.facts()
    return found


def _leaves(item: Verdict) -> bool:
    """Whether a figure that was estimated against the fp32 file did not pass."""
    return any(check.status != "pass" and check.against == BASELINE and check.low is not None for check in item.checks)


def _judge_bundles(context: Context, reference: Reference, tokenizer: Any) -> list[bundles.Verdict]:
    recipe, golden = context.recipe, context.upstream["golden"].facts
    with tempfile.TemporaryDirectory(dir=context.folder) as scratch:
        setting = bundles.Setting(
            recital=Recital(
                scripts=cache.scripts(recipe.bundle, _integer(golden["sliding_window"])), **reference.cache()
            ),
            head=reference.head,
            tokenizer=tokenizer,
            conversations=CONVERSATIONS,
            greedy=reference.greedy()[: recipe.bundle.prompts],
            stop=set(_integers(golden["stop"])),
            scratch=Path(scratch),
        )
        verdicts: list[bundles.Verdict] = []
        for precision in sorted(recipe.bundle.precisions, key=lambda name: name != BASELINE):
            subject = _bundle(context, precision)
            log.step(f"judging {subject.name} ({log.human_bytes(subject.record.size)})")
            verdicts.append(bundles.judge(subject, setting))
    return verdicts


def _bundle(context: Context, precision: str) -> bundles.Subject:
    made = context.upstream["bundle"]
    held = cast(Mapping[str, Any], made.facts[precision])
    record = made.output(f"{precision}.litertlm")
    return bundles.Subject(
        precision=precision,
        path=context.root / record.path,
        record=record,
        sections=context.root / precision,
        gate=context.recipe.gates.get(f"bundle-{precision}"),
        parameters=_integer(context.upstream["fetch"].facts["parameters"]),
        stored=held["stored"],
        weight_bytes=held["weight_bytes"],
    )


def _files(context: Context) -> dict[str, Path]:
    """Every judged file by its path in the model's folder."""
    steps = [f"{name}/{STEP}" for name in context.arguments.variants] if context.graphs != "bundle" else []
    spoken = context.recipe.bundle.precisions if context.graphs != "step" else ()
    return {path: context.root / path for path in (*steps, *(f"bundle/{name}.litertlm" for name in spoken))}


def _name(item: Verdict | bundles.Verdict) -> str:
    return item.subject.name


def _ordered(variants: Sequence[str]) -> list[str]:
    """The variants, fp32 first: it is what the others are held against."""
    if BASELINE not in variants:
        raise UsageError(
            f"--variants {' '.join(variants)} lacks {BASELINE}",
            cause="the other files are held against it",
            remedy=f"add {BASELINE}",
        )
    return [BASELINE, *(name for name in dict.fromkeys(variants) if name != BASELINE)]


def _subject(context: Context, name: str) -> Subject:
    made = context.upstream[name]
    parameters = context.upstream["fetch"].facts.get("parameters")
    key = gates.gate_name(name, made.facts)
    return Subject(
        name=name,
        path=context.root / name / STEP,
        record=made.output(STEP),
        facts=cast(Facts, made.facts.get("step", {})),
        gate_name=key,
        gate=context.recipe.gates.get(key),
        parameters=parameters if isinstance(parameters, int) else None,
        baseline_size=context.upstream[BASELINE].output(STEP).size,
    )


def _tokenizer(checkpoint: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(checkpoint, local_files_only=True)


def _judgement(context: Context, verdicts: Sequence[Verdict], heard: Sequence[bundles.Verdict]) -> dict[str, Any]:
    """What was found and does not change from run to run."""
    fetch, golden = context.upstream["fetch"], context.upstream["golden"]
    required = [check for item in verdicts if not item.subject.alternative for check in item.checks]
    required += [check for item in heard for check in item.checks]
    alternative = [check for item in verdicts if item.subject.alternative for check in item.checks]
    return {
        "schema": report.SCHEMA,
        "model": fetch.model,
        "revision": fetch.revision,
        "recipe": context.recipe.name,
        "recipe_sha256": context.recipe.sha256,
        "tools": versions.installed(),
        "parameters": fetch.facts.get("parameters"),
        "passed": bool(required) and all(check.passed for check in required),
        "checks": [check.facts() for check in required],
        "alternative_checks": [check.facts() for check in alternative],
        "reference": dict(golden.facts),
        "order": [item.subject.name for item in verdicts],
        "variants": {item.subject.name: item.facts() for item in verdicts},
        "bundles": {item.subject.name: item.facts() for item in heard},
    }


def _write_report(context: Context, judgement: Mapping[str, Any], verdicts: Sequence[Verdict]) -> None:
    """Time the step graphs and write `report.json` and `report.html`."""
    sequences = [length for length in SEQUENCES if length <= context.recipe.step.max_sequence]
    bos = _integer(context.upstream["golden"].facts["bos"])
    speed: dict[str, Any] = {}
    with log.progress("timing", len(verdicts) * len(verdict.KERNELS), "runs") as bar:
        for subject in (item.subject for item in verdicts):
            speed[subject.name] = {}
            for kernels in verdict.KERNELS:
                measured = runtime.measure_speed(subject.path, sequences, bos=bos, xnnpack=kernels == "xnnpack")
                latency = {str(sequence): seconds for sequence, seconds in measured.latency.items()}
                speed[subject.name][kernels] = {"load": measured.load, "latency": latency}
                bar.advance()
    full = {
        **judgement,
        "speed": speed,
        "sequences": sequences,
        "machine": {
            "system": platform.platform(),
            "processor": runtime.processor(),
            "cores": os.cpu_count(),
            "threads": runtime.default_threads(),
        },
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }
    manifest.write_atomically(context.folder / "report.json", manifest.dump_json(full))
    manifest.write_atomically(context.folder / "report.html", report.render(full))
    for row in (*report.table(full), *report.advice(full)):
        log.line(f"  {row}")


def _say(verdicts: Sequence[Verdict | bundles.Verdict], folder: Path) -> None:
    """Print what missed its limit.

    Raises:
        VerificationError: a required file did.
    """
    failed: list[Check] = []
    for item in verdicts:
        missed = [check for check in item.checks if not check.passed]
        optional = isinstance(item, Verdict) and item.subject.alternative
        for check in missed if optional else ():
            log.warn(f"not fit to publish: {check.sentence()}")
        failed += [] if optional else missed
    if failed:
        for check in failed:
            log.line(f"  {check.status}: {check.sentence()}")
        raise VerificationError(
            f"{len(failed)} checks did not pass, the first: {failed[0].sentence()}",
            cause=_CAUSES[failed[0].status],
            remedy=f"read {folder / 'report.html'}; {_REMEDIES[failed[0].status]}",
        )


def _integer(value: Fact) -> int:
    return int(value) if isinstance(value, int | float) else 0


def _integers(value: Fact) -> list[int]:
    return [_integer(item) for item in value] if isinstance(value, list) else []


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The files to judge, and the texts that they were and were not calibrated on."""
    parser.add_argument(
        "--variants", nargs="*", default=list(VARIANTS), help="folders with a step graph (default: %(default)s)"
    )
    parser.add_argument("--eval", type=Path, metavar="FILE", help="the text that golden's --eval named")
    parser.add_argument("--calibration", type=Path, metavar="FILE", help="the text that int8's --calibration named")


def needs_of(arguments: argparse.Namespace, recipe: Recipe) -> tuple[str, ...]:
    """The checkpoint, the reference, and the folders of all files."""
    steps = arguments.variants if arguments.graphs != "bundle" else ()
    spoken = ("bundle", *recipe.bundle.precisions) if arguments.graphs != "step" else ()
    return ("fetch", "golden", *dict.fromkeys((*steps, *spoken)))


STAGE = Stage(
    name="verify",
    summary="Judge every file against Hugging Face and fp32; write report.json and report.html.",
    work=work,
    add_arguments=add_arguments,
    needs_of=needs_of,
    measured=("report.json", "report.html"),
)

if __name__ == "__main__":
    sys.exit(main(STAGE))
