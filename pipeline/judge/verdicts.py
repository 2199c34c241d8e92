"""The verdicts on all files of a model: what is judged against what, and where a file leaves the fp32 one."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from pipeline.checkpoint import chat
from pipeline.core import log
from pipeline.core.errors import UsageError
from pipeline.core.facts import Bundle, Fetch, Golden, Precision
from pipeline.core.recipe import BASELINE, STEP
from pipeline.core.stage import Context
from pipeline.judge import bundles, gates, hearing, kv_cache, sqnr, steps
from pipeline.judge.gates import Check
from pipeline.judge.kv_cache import Trace
from pipeline.judge.reference import Reference
from pipeline.judge.step_runs import JudgedPositions
from pipeline.judge.steps import Setting, Subject, Verdict
from pipeline.runtime.litert_lm import Message
from pipeline.runtime.sound import Hearing

_PER_BATCH = 8
_TRACED = 4
"""Windows that are run operator by operator to find where a file loses quality."""


def judge_steps(
    context: Context, variants: Sequence[str], reference: Reference, tokenizer: chat.Tokenizer
) -> tuple[list[Verdict], dict[str, object]]:
    """The verdicts on the step graphs of `variants`, and what of the judgement is theirs alone."""
    recipe, golden = context.recipe, context.upstream["golden"].told(Golden)
    judged = JudgedPositions.of(
        reference,
        batch=min(_PER_BATCH, recipe.step.max_batch),
        pad=golden.pad,
    )
    subjects = [_subject(context, name) for name in _ordered(variants)]
    with tempfile.TemporaryDirectory(dir=context.folder) as scratch:
        setting = Setting(
            reference=reference,
            judged=judged,
            # Golden states it where there are bundles; else the longest row is beyond it for sure.
            window=recipe.step.max_sequence if golden.sliding_window is None else golden.sliding_window,
            prompts=recipe.corpus.prompts,
            continuation=recipe.corpus.continuation,
            stop=golden.stop,
            scratch=Path(scratch),
            fixed=recipe.step.signatures,
        )
        verdicts = steps.judge_files(subjects, setting)
    decode: Callable[[list[int]], str] = lambda ids: str(tokenizer.decode(ids, skip_special_tokens=True))  # noqa: E731
    rows = steps.greedy_rows(reference, verdicts, setting, decode)
    return verdicts, {
        "greedy": rows,
        "continuation": recipe.corpus.continuation,
        "fixed": [*recipe.step.fixed],
        "positions": len(judged.positions),
        "losses": _losses(verdicts, reference),
    }


def _losses(verdicts: Sequence[Verdict], reference: Reference) -> dict[str, object]:
    """Where each file that is not close enough to the fp32 file leaves it, operator by operator."""
    found: dict[str, object] = {}
    for item in (item for item in verdicts[1:] if _leaves(item)):
        samples = list(reference.corpus()[0][:_TRACED])
        trace = sqnr.trace(item.subject.path, verdicts[0].subject.path, samples)
        log.step(f"{item.subject.name}: {trace.sentence()}")
        found[item.subject.name] = trace.facts()
    return found


def _leaves(item: Verdict) -> bool:
    """Whether a figure that was estimated against the fp32 file did not pass."""
    return any(check.status != "pass" and check.against == BASELINE and check.low is not None for check in item.checks)


def judge_bundles(
    context: Context, reference: Reference, tokenizer: chat.Tokenizer, conversations: Sequence[Sequence[Message]]
) -> list[bundles.Verdict]:
    """The verdicts on the bundles, fp32 first; `conversations` are rendered by template and runtime."""
    recipe, golden = context.recipe, context.upstream["golden"].told(Golden)
    if golden.sliding_window is None:
        raise context.upstream["golden"].lacks("sliding_window")
    with tempfile.TemporaryDirectory(dir=context.folder) as scratch:
        setting = bundles.Setting(
            trace=Trace(schedules=kv_cache.schedules(recipe.bundle, golden.sliding_window), **reference.cache()),
            head=reference.head,
            tokenizer=tokenizer,
            conversations=conversations,
            greedy=reference.greedy()[: recipe.bundle.prompts],
            stop=set(golden.stop),
            scratch=Path(scratch),
            scripts=recipe.corpus.scripts,
        )
        verdicts: list[bundles.Verdict] = []
        for precision in sorted(recipe.bundle.built, key=lambda name: name != BASELINE):
            subject = _bundle(context, precision)
            log.step(f"judging {subject.name} ({log.human_bytes(subject.record.size)})")
            verdict = bundles.judge(subject, setting)
            heard = _heard(context, subject, first=not verdicts, scratch=Path(scratch))
            verdicts.append(replace(verdict, checks=[*verdict.checks, *heard]))
    return verdicts


def _heard(context: Context, subject: bundles.Subject, *, first: bool, scratch: Path) -> list[Check]:
    """The checks on a bundle's ears, if it has any: on the sections, which all share, and on the fp32 one's words."""
    hears = context.upstream["bundle"].part(subject.precision, Bundle).hears
    if not hears:
        return []
    told, how = hearing.Reference.stored(context.root / "golden"), Hearing(**vars(hears))
    gate = context.recipe.gates.get(hearing.TOWER)
    checks = hearing.judge_tower(context.root / "towers", how, told, gate, scratch) if first else []
    words = subject.precision == BASELINE
    return [*checks, *([hearing.judge_words(subject.path, how, told.answers, scratch)] if words else [])]


def _bundle(context: Context, precision: str) -> bundles.Subject:
    made = context.upstream["bundle"]
    held = made.part(precision, Bundle)
    record = made.output(f"{precision}.litertlm")
    return bundles.Subject(
        precision=precision,
        path=context.root / record.path,
        record=record,
        sections=context.root / precision,
        gate=context.recipe.gates.get(f"bundle-{precision}"),
        parameters=context.upstream["fetch"].told(Fetch).parameters,
        stored=held.stored,
        weight_bytes=held.weight_bytes,
    )


def judged_files(context: Context, variants: Sequence[str]) -> dict[str, Path]:
    """Every judged file, the step graphs of `variants` first, by its path in the model's folder."""
    step_files = [f"{name}/{STEP}" for name in variants] if context.graphs != "bundle" else []
    bundled = context.recipe.bundle.built if context.graphs != "step" else ()
    return {path: context.root / path for path in (*step_files, *(f"bundle/{name}.litertlm" for name in bundled))}


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
    found = None if name == BASELINE else made.told(Precision)
    key = gates.gate_name(name, found.scheme if found else None)
    return Subject(
        name=name,
        path=context.root / name / STEP,
        record=made.output(STEP),
        contents=found.step if found else None,
        gate_name=key,
        gate=context.recipe.gates.get(key),
        parameters=context.upstream["fetch"].told(Fetch).parameters,
        baseline_size=context.upstream[BASELINE].output(STEP).size,
    )
