"""The verdicts on all files of a model: what is judged against what, and where a file leaves the fp32 one."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

from pipeline.checkpoint import chat
from pipeline.checkpoint.reader import open_checkpoint
from pipeline.cluster import pool
from pipeline.cluster.pool import Shards
from pipeline.core import log, parallel
from pipeline.core.errors import UsageError
from pipeline.core.facts import Bundle, Fetch, Golden, Precision, Tower
from pipeline.core.graph import tower_precision, towers_in
from pipeline.core.manifest import FileRecord
from pipeline.core.recipe import BASELINE, STEP
from pipeline.core.stage import Context
from pipeline.judge import bundles, gates, handed, hearing, kv_cache, media, mixed, seeing, sqnr, steps
from pipeline.judge.gates import Check, Measurement
from pipeline.judge.handed import Handed
from pipeline.judge.kv_cache import Trace
from pipeline.judge.reference import Head, Reference
from pipeline.judge.sensing import Reference as Senses
from pipeline.judge.sensing import Said, Sensed, Soft, is_large, judge_words
from pipeline.judge.shards import Asked, Place
from pipeline.judge.step_runs import JudgedPositions
from pipeline.judge.steps import Setting, Subject, Verdict
from pipeline.runtime.litert_lm import Message
from pipeline.runtime.picture import Sight
from pipeline.runtime.sections import Sections
from pipeline.runtime.sound import Hearing

Replaced = Callable[[Path, Path, int, Path], None]
"""Writes a bundle with another decoder: the bundle, the decoder, tokens of a conversation, the file to write."""
_PER_BATCH = 8
_TRACED = 4
"""Windows that are run operator by operator to find where a file loses quality."""


def judge_all(
    context: Context,
    variants: Sequence[str],
    reference: Reference,
    tokenizer: chat.Tokenizer,
    conversations: Sequence[Sequence[Message]],
    replaced: Replaced,
    cluster: str,
) -> tuple[list[Verdict], list[bundles.Verdict], dict[str, object]]:
    """The verdicts on step graphs and bundles, if there are any, and what of the judgement is the former's alone.

    Bundles are judged by the workers of `cluster`, if there is one, and step graphs in this process meanwhile.
    `conversations` are rendered by template and runtime; `replaced` writes bundles with other decoders.
    """
    none: tuple[list[Verdict], dict[str, object]] = [], {}
    if context.graphs == "step":
        verdicts, judgement = judge_steps(context, variants, reference, tokenizer)
        return verdicts, [], judgement
    with pool.opened(cluster, context.root, "verify", _read_by_bundles(context), "bundles") as shards:
        asked = _ask_bundles(context, reference, tokenizer, conversations, replaced, shards)
        verdicts, judgement = (
            none if context.graphs == "bundle" else judge_steps(context, variants, reference, tokenizer)
        )
        return verdicts, asked(), judgement


def _read_by_bundles(context: Context) -> tuple[FileRecord, ...]:
    """The files that workers read: the checkpoint's, the reference, the bundles and their sections."""
    named = {"fetch", "golden", "bundle", *context.recipe.bundle.built}
    made = (record for name in context.upstream if name in named for record in context.upstream[name].outputs)
    return tuple(record for record in made if Path(record.path).name != STEP)


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


def _ask_bundles(
    context: Context,
    reference: Reference,
    tokenizer: chat.Tokenizer,
    conversations: Sequence[Sequence[Message]],
    replaced: Replaced,
    shards: Shards,
) -> Callable[[], list[bundles.Verdict]]:
    """Ask the bundles; the call that is returned waits, and gives the verdicts on them, fp32 first.

    What a model hears is judged in this process.
    """
    recipe, golden = context.recipe, context.upstream["golden"].told(Golden)
    if golden.sliding_window is None:
        raise context.upstream["golden"].lacks("sliding_window")
    # As many workers as cores are faster with one thread each, and bytes must not depend on how many there are.
    threads = parallel.threads(1) if shards.remote else parallel.threads()
    setting = bundles.Setting(
        asked=Asked(shards, Place(str(context.root.absolute()), reference.head.cap, threads)),
        trace=Trace(schedules=kv_cache.schedules(recipe.bundle, golden.sliding_window), **reference.cache()),
        tokenizer=tokenizer,
        conversations=conversations,
        greedy=reference.greedy()[: recipe.bundle.prompts],
        stop=set(golden.stop),
        scripts=recipe.corpus.scripts,
    )
    subjects = [_bundle(context, name) for name in sorted(context.bundled, key=lambda name: name != BASELINE)]
    asked = [(subject, bundles.ask(subject, setting)) for subject in subjects]

    def finish() -> list[bundles.Verdict]:
        verdicts, known = list[bundles.Verdict](), dict[str, Soft]()
        with tempfile.TemporaryDirectory(dir=context.folder) as scratch:
            for subject, verdict in asked:
                log.step(f"judging {subject.name} ({log.human_bytes(subject.record.size)})")
                found = verdict()
                sensed = _sensed(context, subject, known, reference.head, Path(scratch))
                handed_over = _handed(context, subject, tokenizer, reference.head.vocabulary, replaced, Path(scratch))
                checks = [*found.checks, *sensed.checks, *handed_over.checks]
                sensed = replace(sensed, resized=handed_over.resized)
                verdicts.append(replace(found, checks=checks, sensed=sensed))
        return verdicts

    return finish


def _sensed(context: Context, subject: bundles.Subject, known: dict[str, Soft], head: Head, scratch: Path) -> Sensed:
    """What is found of a bundle's towers, if it has any: of their sections, and of the fp32 one of logits and words.

    `known` is what was found of sections that another bundle has too. Towers in float16 are in no bundle, and go with
    fp32's.
    """
    sight, ears = _senses(context, subject)
    towers = {tower: Senses.stored(context.root / "golden", tower) for tower in towers_in(context.towers)}
    first, soft, said = subject.precision == BASELINE, dict[str, Soft](), list[Said]()
    for tower, told in towers.items():
        for name, made in _of_tower(context, tower):
            if made.precision == tower_precision(subject.precision) or (first and made.precision == "fp16"):
                if name not in known:
                    known[name] = _judge_tower(context, name, made, sight, ears, told, head, scratch)
                soft[name] = known[name]
    checks = [check for one in soft.values() for check in one.checks]
    if first and towers:
        checks += _judge_logits(context, towers, sight, ears, head, scratch)
        with media.given(sight, ears, scratch) as given:
            for name, told in towers.items():
                check, rows = judge_words(subject.path, given, told.answers, scratch, name)
                checks, said = [*checks, check], [*said, *rows]
    return Sensed(checks=checks, soft=soft, said=said)


def _handed(
    context: Context,
    subject: bundles.Subject,
    tokenizer: chat.Tokenizer,
    tokens: int,
    replaced: Replaced,
    scratch: Path,
) -> Handed:
    """What LiteRT-LM hands to the decoder, of the fp32 bundle if it sees or hears."""
    if subject.precision != BASELINE or not towers_in(context.towers):
        return Handed(checks=[])
    towers = {tower: Senses.stored(context.root / "golden", tower) for tower in towers_in(context.towers)}
    sight, ears = _senses(context, subject)
    seen = context.upstream["bundle"].part(subject.precision, Bundle).sees
    with tempfile.TemporaryDirectory(dir=scratch) as folder, media.given(sight, ears, scratch) as given:
        setting = handed.Setting(
            towers=towers,
            medium=given,
            tokenizer=tokenizer,
            vocabulary=tokens,
            per_layer=handed.per_layer_inputs(open_checkpoint(context.root / "fetch" / "checkpoint")),
            large=is_large(context.upstream["fetch"].told(Fetch).parameters),
            whole=context.recipe.bundle.prefill if seen and seen.whole else (),
        )
        return handed.judge_handed(subject.name, setting, partial(replaced, subject.path), Path(folder))


def _senses(context: Context, subject: bundles.Subject) -> tuple[Sight | None, Hearing | None]:
    """How a bundle sees and hears."""
    held = context.upstream["bundle"].part(subject.precision, Bundle)
    seen = held.sees
    sight = Sight(size=seen.size, patches=seen.patches) if seen else None
    return sight, Hearing(**vars(held.hears)) if held.hears else None


def _of_tower(context: Context, tower: str) -> list[tuple[str, Tower]]:
    """What stage towers made of one, by name in checks."""
    made = context.upstream["towers"]
    return [(name, made.part(name, Tower)) for name in made.facts if name.startswith(f"{tower}-")]


def _judge_tower(
    context: Context,
    name: str,
    made: Tower,
    sight: Sight | None,
    ears: Hearing | None,
    told: Senses,
    head: Head,
    scratch: Path,
) -> Soft:
    """What is found of the sections of a tower in one precision."""
    sections, gate = context.root / "towers" / made.precision, context.recipe.gates.get(name)
    figures = [Measurement(metric="bytes_per_weight", name="bytes per weight", value=made.weight_bytes / made.stored)]
    if gate and gate.kld is not None and BASELINE in context.bundled:
        with _logits(context, made.precision, sight, ears, scratch) as (vectors, text, longest):
            figures.append(mixed.divergence(name, text, vectors, told, head, longest))
    elif gate:  # without the text model in fp32 nothing is the towers' alone
        gate = replace(gate, kld=None)
    if name.startswith("vision") and sight:
        return seeing.judge_tower(name, sections, sight, told, gate, scratch, figures)
    assert ears
    return hearing.judge_tower(name, sections, ears, told, gate, scratch, figures)


@contextmanager
def _logits(
    context: Context, precision: str, sight: Sight | None, ears: Hearing | None, scratch: Path
) -> Iterator[tuple[mixed.Vectors, Sections, int]]:
    """What logits behind media are made with: towers of a precision, the text model in fp32, its longest prefill."""
    with tempfile.TemporaryDirectory(dir=scratch) as folder, media.given(sight, ears, scratch) as given:
        vectors = mixed.vectors(context.root / "towers" / precision, given, Path(folder))
        seen = context.upstream["bundle"].part(BASELINE, Bundle).sees
        whole = seen is not None and seen.whole
        text = Sections(context.root / BASELINE, weights=Path(folder) / "decoder", whole=whole)
        yield vectors, text, max(context.recipe.bundle.prefill)


def _judge_logits(
    context: Context,
    towers: Mapping[str, Senses],
    sight: Sight | None,
    ears: Hearing | None,
    head: Head,
    scratch: Path,
) -> list[Check]:
    """The checks on what follows pictures or sounds, in float32 and through the cache."""
    gates, checks = context.recipe.gates, list[Check]()
    with _logits(context, BASELINE, sight, ears, scratch) as (vectors, text, longest):
        for name, told in ((f"{tower}-{BASELINE}", told) for tower, told in towers.items()):
            checks += mixed.judge_logits(name, text, vectors, told, head, longest, gates.get(name))
    return checks


def _bundle(context: Context, precision: str) -> bundles.Subject:
    made = context.upstream["bundle"]
    held = made.part(precision, Bundle)
    record = made.output(f"{precision}.litertlm")
    return bundles.Subject(
        precision=precision,
        path=context.root / record.path,
        record=record,
        gate=context.recipe.gates.get(f"bundle-{precision}"),
        parameters=context.upstream["fetch"].told(Fetch).parameters,
        stored=held.stored,
        weight_bytes=held.weight_bytes,
    )


def judged_files(context: Context, variants: Sequence[str]) -> dict[str, Path]:
    """Every judged file, the step graphs of `variants` first, by its path in the model's folder."""
    step_files = [f"{name}/{STEP}" for name in variants] if context.graphs != "bundle" else []
    bundled = context.bundled if context.graphs != "step" else ()
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
