"""What verify found: the judgement, the reports with timings, and the refusal of what missed a limit."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import cast

from pipeline.core import host, log, manifest, parallel, versions
from pipeline.core.errors import VerificationError
from pipeline.core.facts import Bundle, Fetch, Golden
from pipeline.core.judgement import Report
from pipeline.core.stage import Context
from pipeline.judge import bundles
from pipeline.judge import steps as verdict
from pipeline.judge.gates import Check, Status
from pipeline.judge.steps import Verdict
from pipeline.report import verification
from pipeline.runtime import litert

SEQUENCES = (1, 128, 1024)
_BUILTIN_SEQUENCES = (1, 128)
"""The built-in kernels take seconds for long prompts: the page shows their times for short ones."""
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


def is_required(context: Context, item: Verdict | bundles.Verdict) -> bool:
    """Whether a file has to pass: not the int8 scheme that the recipe left out, and no optional bundle that fails."""
    if isinstance(item, Verdict):
        return not item.subject.alternative
    return item.fit or item.subject.precision not in context.recipe.bundle.optional


def checks_of(verdicts: Iterable[Verdict | bundles.Verdict]) -> list[Check]:
    """All checks of some files."""
    return [check for item in verdicts for check in item.checks]


def summarise(
    context: Context, agreed: list[Check], verdicts: Sequence[Verdict], bundle_verdicts: Sequence[bundles.Verdict]
) -> dict[str, object]:
    """What was found and does not change from run to run; `agreed` are the checks on the reference itself."""
    fetch, golden = context.upstream["fetch"], context.upstream["golden"]
    judged: list[Verdict | bundles.Verdict] = [*verdicts, *bundle_verdicts]
    required = [*agreed, *checks_of(item for item in judged if is_required(context, item))]
    alternative = checks_of(item for item in judged if not is_required(context, item))
    return {
        "schema": verification.SCHEMA,
        "model": fetch.model,
        "revision": fetch.revision,
        "recipe": context.recipe.name,
        "recipe_sha256": context.recipe.sha256,
        "tools": versions.installed(),
        "parameters": fetch.told(Fetch).parameters,
        "passed": bool(required) and all(check.passed for check in required),
        "checks": [check.facts() for check in required],
        "alternative_checks": [check.facts() for check in alternative],
        "reference": dict(golden.facts),
        "order": [item.subject.name for item in verdicts],
        "variants": {item.subject.name: item.facts() for item in verdicts},
        "bundles": {item.subject.name: item.facts() | _phone(context, item) for item in bundle_verdicts},
    }


def _phone(context: Context, item: bundles.Verdict) -> dict[str, object]:
    """What a bundle asks of a phone."""
    held = context.upstream["bundle"].part(item.subject.precision, Bundle)
    sections = [section.size for section in held.sections if section.kind.startswith("TFLite")]
    asked = "".join(section.activation_type for section in held.sections)
    return {
        "phone": {
            "cache": held.cache_bytes,
            "tokens": held.max_tokens,
            "sections": sorted(sections, reverse=True),
            "activation_type": asked,
        }
    }


def write_report(context: Context, judgement: Mapping[str, object], verdicts: Sequence[Verdict]) -> None:
    """Time the step graphs and write `report.json` and `report.html`."""
    sequences = [length for length in SEQUENCES if length <= context.recipe.step.max_sequence]
    bos = context.upstream["golden"].told(Golden).bos
    speed: dict[str, dict[str, object]] = {}
    with log.progress("timing", len(verdicts) * len(verdict.KERNELS), "runs") as bar:
        for subject in (item.subject for item in verdicts):
            speed[subject.name] = {}
            for kernels in verdict.KERNELS:
                delegated = kernels == "xnnpack"
                lengths = [length for length in sequences if delegated or length in _BUILTIN_SEQUENCES]
                measured = litert.measure_speed(subject.path, lengths, bos=bos, xnnpack=delegated)
                latency = {str(sequence): seconds for sequence, seconds in measured.latency.items()}
                speed[subject.name][kernels] = {"load": measured.load, "latency": latency}
                bar.advance()
    full = {
        **judgement,
        "speed": speed,
        "sequences": sequences,
        "machine": {
            "system": platform.platform(),
            "processor": host.processor(),
            "cores": os.cpu_count(),
            "threads": parallel.threads(),
        },
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }
    manifest.write_atomically(context.folder / "report.json", manifest.dump_json(full))
    report = cast("Report", full)
    manifest.write_atomically(context.folder / "report.html", verification.render(report))
    for row in (*verification.table(report), *verification.advice(report)):
        log.line(f"  {row}")


def refuse_failed(
    context: Context, agreed: list[Check], verdicts: Sequence[Verdict | bundles.Verdict], shortfall: str
) -> None:
    """Print what missed its limit; `shortfall` is what int8's ladder says, where no rung of it was good enough.

    Raises:
        VerificationError: the reference itself, or a required file, did.
    """
    failed = [check for check in agreed if not check.passed]
    if failed:
        raise VerificationError(
            f"golden is not what the CPU says: {failed[0].sentence()}",
            cause="the GPU did not compute in full fp32, or files of golden were changed",
            remedy="run `make golden DEVICE=cpu`",
        )
    for item in verdicts:
        missed = [check for check in item.checks if not check.passed]
        required = is_required(context, item)
        for check in () if required else missed:
            log.warn(f"not fit to publish: {check.sentence()}")
        failed += missed if required else []
    if failed:
        for check in failed:
            log.line(f"  {check.status}: {check.sentence()}")
        raise VerificationError(
            f"{len(failed)} checks did not pass, the first: {failed[0].sentence()}",
            cause=shortfall or _CAUSES[failed[0].status],
            remedy=f"read {context.folder / 'report.html'}; {_REMEDIES[failed[0].status]}",
        )
