"""verify: hold every file against the reference and say, limit beside value, whether it is good enough.

Two gates. The fp32 file is held against Hugging Face (a fault of the conversion shows), the other files against the
fp32 file (what precision costs shows). A required file that misses a limit fails the stage with exit code 8, leaves
no manifest, and leaves the report for the reader. The int8 scheme that the recipe did not choose is judged in the same
way and may fail: it is marked as not fit to publish.

`judgement.json` is the same from run to run. `report.json` and `report.html` add timings, machine and date.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pipeline.core import log, manifest, versions
from pipeline.core.errors import UsageError, VerificationError
from pipeline.core.manifest import Fact
from pipeline.core.recipe import PROJECT
from pipeline.core.stage import Context, Outcome, Stage, main
from pipeline.judge import corpus, gates, report, runtime, verdict
from pipeline.judge.examine import Panel
from pipeline.judge.reference import Head, Reference
from pipeline.judge.verdict import BASELINE, Setting, Subject, Verdict

VARIANTS = (BASELINE, "fp16", "int8")
STEP = "step.tflite"
SEQUENCES = (1, 128, 1024)
_PER_BATCH = 8


def work(context: Context) -> Outcome:
    """Judge every variant, write judgement and report, and fail if a required check did not pass."""
    recipe, golden = context.recipe, context.upstream["golden"].facts
    corpus.require_disjoint(
        corpus.read_documents(PROJECT / recipe.corpus.verification),
        corpus.read_documents(PROJECT / recipe.corpus.calibration),
    )
    checkpoint = context.root / "fetch" / "checkpoint"
    reference = Reference(context.root / "golden", Head.of_checkpoint(checkpoint))
    panel = Panel.of(
        reference,
        count=recipe.corpus.positions,
        batch=min(_PER_BATCH, recipe.step.max_batch),
        pad=_integer(golden["pad"]),
    )
    subjects = [_subject(context, name) for name in _ordered(context.arguments.variants)]
    with tempfile.TemporaryDirectory(dir=context.folder) as scratch:
        setting = Setting(
            reference=reference,
            panel=panel,
            continuation=recipe.corpus.continuation,
            stop=_integers(golden["stop"]),
            scratch=Path(scratch),
        )
        verdicts = _judge_all(subjects, setting)
        judgement = _judgement(context, verdicts, reference, _decoder(checkpoint), len(panel.positions))
    manifest.write_atomically(context.folder / "judgement.json", manifest.dump_json(judgement))
    sequences = [length for length in SEQUENCES if length <= recipe.step.max_sequence]
    _write_report(context.folder, judgement, subjects, sequences, _integer(golden["bos"]))
    _say(verdicts, context.folder)
    return Outcome(
        facts={
            "passed": True,
            "checks": len(judgement["checks"]),
            "fit": [item.subject.name for item in verdicts if item.fit],
            "not_fit": [item.subject.name for item in verdicts if not item.fit],
        }
    )


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
        facts=made.facts,
        gate_name=key,
        gate=context.recipe.gates.get(key),
        parameters=parameters if isinstance(parameters, int) else None,
        baseline_size=context.upstream[BASELINE].output(STEP).size,
    )


def _judge_all(subjects: Sequence[Subject], setting: Setting) -> list[Verdict]:
    verdicts: list[Verdict] = []
    for subject in subjects:
        log.step(f"judging {subject.name} ({log.human_bytes(subject.record.size)})")
        verdicts.append(verdict.judge_file(subject, setting, verdicts[0] if verdicts else None))
    return verdicts


def _decoder(checkpoint: Path) -> Callable[[list[int]], str]:
    """Token ids to text, as the checkpoint's own tokenizer does it."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(checkpoint, local_files_only=True)
    return lambda ids: str(tokenizer.decode(ids, skip_special_tokens=True))


def _judgement(
    context: Context,
    verdicts: Sequence[Verdict],
    reference: Reference,
    decode: Callable[[list[int]], str],
    positions: int,
) -> dict[str, Any]:
    """Everything that was found and does not change from run to run."""
    fetch, golden = context.upstream["fetch"], context.upstream["golden"]
    required = [check for item in verdicts if not item.subject.alternative for check in item.checks]
    alternative = [check for item in verdicts if item.subject.alternative for check in item.checks]
    found = {
        "schema": report.SCHEMA,
        "model": fetch.model,
        "revision": fetch.revision,
        "recipe": context.recipe.name,
        "recipe_sha256": context.recipe.sha256,
        "tools": versions.installed(),
        "parameters": fetch.facts.get("parameters"),
        "passed": bool(required) and all(check.passed for check in required),
        "checks": [asdict(check) for check in required],
        "alternative_checks": [asdict(check) for check in alternative],
        "reference": {**golden.facts, "positions": positions},
        "continuation": context.recipe.corpus.continuation,
        "order": [item.subject.name for item in verdicts],
        "variants": {item.subject.name: item.facts() for item in verdicts},
        "greedy": verdict.greedy_rows(reference, verdicts, decode),
    }
    cleaned: dict[str, Any] = verdict.finite(found)
    return cleaned


def _write_report(
    folder: Path, judgement: Mapping[str, Any], subjects: Sequence[Subject], sequences: Sequence[int], bos: int
) -> None:
    """Time the files at `sequences` tokens and write `report.json` and `report.html`."""
    speed: dict[str, Any] = {}
    with log.progress("timing", len(subjects) * len(verdict.KERNELS), "runs") as bar:
        for subject in subjects:
            speed[subject.name] = {}
            for kernels in verdict.KERNELS:
                measured = runtime.measure_speed(subject.path, sequences, bos=bos, xnnpack=kernels == "xnnpack")
                latency = {str(sequence): seconds for sequence, seconds in measured.latency.items()}
                speed[subject.name][kernels] = {"load": measured.load, "latency": latency}
                bar.advance()
    full = {
        **judgement,
        "speed": speed,
        "sequences": list(sequences),
        "machine": {
            "system": platform.platform(),
            "processor": runtime.processor(),
            "cores": os.cpu_count(),
            "threads": runtime.default_threads(),
        },
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }
    manifest.write_atomically(folder / "report.json", manifest.dump_json(full))
    manifest.write_atomically(folder / "report.html", report.render(full))
    for row in report.table(full):
        log.line(f"  {row}")


def _say(verdicts: Sequence[Verdict], folder: Path) -> None:
    """Print what missed its limit.

    Raises:
        VerificationError: a required file did.
    """
    failed: list[str] = []
    for item in verdicts:
        missed = [check.sentence() for check in item.checks if not check.passed]
        for sentence in missed if item.subject.alternative else ():
            log.warn(f"not fit to publish: {sentence}")
        failed += [] if item.subject.alternative else missed
    if failed:
        for sentence in failed:
            log.line(f"  failed: {sentence}")
        raise VerificationError(
            f"{len(failed)} checks failed, the first: {failed[0]}",
            cause="a file is not as good as the recipe demands",
            remedy=f"read {folder / 'report.html'}; correct the stage that made the file, or the recipe's limit",
        )


def _integer(value: Fact) -> int:
    return int(value) if isinstance(value, int | float) else 0


def _integers(value: Fact) -> list[int]:
    return [_integer(item) for item in value] if isinstance(value, list) else []


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The files to judge."""
    parser.add_argument(
        "--variants", nargs="+", default=list(VARIANTS), help="folders with a step graph (default: %(default)s)"
    )


def needs_of(arguments: argparse.Namespace) -> tuple[str, ...]:
    """The reference, the checkpoint, and every variant's folder."""
    return ("fetch", "golden", *dict.fromkeys(arguments.variants))


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
