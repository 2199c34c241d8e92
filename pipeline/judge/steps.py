"""Judging a step graph: whether it may be used, its figures, its checks, its entry in the report."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline.core import log, parallel
from pipeline.core.facts import Contents
from pipeline.core.manifest import FileRecord
from pipeline.core.recipe import BASELINE, Gate
from pipeline.judge import gates, metrics, step_runs
from pipeline.judge.gates import REFERENCE, Check, Measurement
from pipeline.judge.metrics import Divergence, Scores, Summary
from pipeline.judge.reference import Reference
from pipeline.judge.step_runs import GridResult, JudgedPositions, Logits
from pipeline.runtime.litert import FixedStep, StepModel

KERNELS = {"xnnpack": "XNNPACK", "builtin": "built-in kernels"}
_BUILTIN_PART, _ALTERNATIVE_PART, _LEAST = 4, 2, 512
"""Every which pair of batches is judged without XNNPACK, whose built-in kernels are slow, and of a file that is not
needed at all, whose interval says so; of a small corpus `_LEAST` positions in any case."""
_FLOAT, _FLOAT_PART, _FLOAT_LEAST = "fp16", 16, 128
"""The same of a file that the built-in kernels compute in float32 like fp32: what its weights lose XNNPACK's kernels
show on all positions, and a kernel that is wrong is wrong at each, so few tell."""
_GRID_LIMITS = {"xnnpack": math.inf, "builtin": 2**20}
"""Largest batch × sequence² on the shape grid. Attention in the built-in kernels takes ten times XNNPACK's time (one
row of 2048 tokens of the shipped model: 6.6 s against 0.5 s of processor time), so there 1024 tokens run at batch 1
only, 300 at all. More tokens run where the window is that long: beyond it a longer row is the same operators' work once
more, which XNNPACK's kernels are met with."""
_CORNER_LIMITS = {"xnnpack": math.inf, "builtin": 2**17}
"""The same for files that need no more than run at all: 300 tokens at batch 1, 128 at batch 8."""


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A file to judge. `parameters` of the checkpoint and `baseline_size` in bytes are None where unknown.

    `contents` is what its stage read back of it, None of the fp32 file.
    """

    name: str
    path: Path
    record: FileRecord
    contents: Contents | None
    gate_name: str
    gate: Gate | None
    parameters: int | None
    baseline_size: int | None

    @property
    def alternative(self) -> bool:
        """Whether it is the int8 scheme that the recipe did not choose: judged, but not needed."""
        return self.name.startswith("int8-")


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What every file of one run is held against; `window` is the model's sliding window.

    `fixed`: batch and sequence of the signatures of fixed shape that each file has, by name.
    """

    reference: Reference
    judged: JudgedPositions
    window: int
    prompts: int
    continuation: int
    stop: Sequence[int]
    scratch: Path
    fixed: Mapping[str, tuple[int, int]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What was found about one file. `against_baseline` and `builtin` of the fp32 file itself are None."""

    subject: Subject
    checks: list[Check]
    logits: Logits
    against_reference: Summary
    against_baseline: Summary | None
    kld: metrics.Doubles
    grids: Mapping[str, GridResult]
    continuations: list[list[int]]
    divergence: Divergence | None

    @property
    def fit(self) -> bool:
        """Whether every check passed, and there was one."""
        return bool(self.checks) and all(check.passed for check in self.checks)

    def facts(self) -> dict[str, object]:
        """The entry in the report."""
        subject, contents = self.subject, self.subject.contents
        return {
            "file": subject.record.path,
            "sha256": subject.record.sha256,
            "size": subject.record.size,
            "size_ratio": _ratio(subject.record.size, subject.baseline_size),
            "size_per_parameter": _ratio(subject.record.size, subject.parameters),
            "gate": subject.gate_name,
            "limits": {name: limit for name, limit in asdict(subject.gate or Gate()).items() if limit is not None},
            "alternative": subject.alternative,
            "fit": self.fit,
            "against_reference": asdict(self.against_reference),
            "against_fp32": asdict(self.against_baseline) if self.against_baseline else None,
            "divergence": asdict(self.divergence) if self.divergence else None,
            "grid": {kernels: asdict(grid) for kernels, grid in self.grids.items()},
            "integer_share": contents.integer_share if contents else None,
            "float_operators": contents.float_operators if contents else None,
            "float_products": contents.float_products if contents else None,
            "kld_histogram": metrics.histogram(self.kld, metrics.kld_edges()),
        }


@dataclass(frozen=True, kw_only=True)
class KernelRun:
    """What a file gave with one kind of kernels: logits [n, V] of `part`, the positions `chosen` [n] of all judged.

    The fp32 file is held against the whole shape `grid`, the others run at its corners: `unsound`. None is what was not
    asked for; the fp32 file has no logits of the built-in kernels. `continuations` are XNNPACK's alone.
    """

    part: JudgedPositions
    chosen: NDArray[np.int64]
    logits: Logits
    continuations: list[list[int]]
    grid: GridResult | None
    unsound: Check | None


@dataclass(frozen=True, kw_only=True)
class FixedRun:
    """What the signature `name` of fixed shape gave, with XNNPACK: `part`, `chosen`, `logits` as in `KernelRun`."""

    name: str
    part: JudgedPositions
    chosen: NDArray[np.int64]
    logits: Logits


def judge_files(subjects: Sequence[Subject], setting: Setting) -> list[Verdict]:
    """Run each file on everything that its limits need, and judge it; the first is the fp32 file, the others' measure.

    All are scored at the end together, for which the reference's logits are computed once.
    """
    runs = [_run(subject, setting) for subject in subjects]
    shaped = [_run_fixed(subject, setting) for subject in subjects]
    delegated = [each["xnnpack"] for each in runs]
    scores = step_runs.against_reference(
        [each.logits for each in delegated], setting.judged, [each.chosen for each in delegated]
    )
    verdicts: list[Verdict] = []
    for subject, found, fixed, exact in zip(subjects, runs, shaped, scores, strict=True):
        verdicts.append(_judge(subject, setting, found, fixed, exact, verdicts[0] if verdicts else None))
    return verdicts


def _run(subject: Subject, setting: Setting) -> Mapping[str, KernelRun]:
    """Both kinds of kernels side by side, which share the cores.

    The graph has long stretches that one core alone can run, and threads that wait for each other take processor time
    as well.
    """
    log.step(f"judging {subject.name} ({log.human_bytes(subject.record.size)})")
    return dict(zip(KERNELS, parallel.ordered(partial(_run_kernels, subject, setting), KERNELS), strict=True))


def _run_fixed(subject: Subject, setting: Setting) -> list[FixedRun]:
    """Each signature of fixed shape on as many positions as the built-in kernels, as far as they are short enough."""
    every, runs = every_which(subject, "builtin", len(setting.judged.positions)), []
    for name, (_, sequence) in setting.fixed.items():
        model = FixedStep(subject.path, name, parallel.threads())
        part, chosen = setting.judged.part(every, sequence)
        label = f"{subject.name}, {name}"
        logits = step_runs.run_positions(model, part, label, setting.scratch / f"{subject.name}-{name}")
        runs.append(FixedRun(name=name, part=part, chosen=chosen, logits=logits))
    return runs


def _judge(
    subject: Subject,
    setting: Setting,
    runs: Mapping[str, KernelRun],
    fixed: Sequence[FixedRun],
    scores: Scores,
    baseline: Verdict | None,
) -> Verdict:
    """What follows from the runs and the `scores` against the reference; `baseline` is None for the fp32 file."""
    logits, continuations = runs["xnnpack"].logits, runs["xnnpack"].continuations
    summary = metrics.summarise(scores, runs["xnnpack"].part.positions.window)
    grids = {kernels: each.grid for kernels, each in runs.items() if each.grid}
    if baseline is None:
        figures, own = _converter_figures(summary, grids), None
    else:
        scores, own = _against_baseline(runs["xnnpack"], baseline)
        figures = _quantiser_figures(own, _against_baseline(runs["builtin"], baseline)[1])
    figures += [figure for each in fixed for figure in _fixed_figures(each, baseline)]
    holds = [each.unsound for each in runs.values() if each.unsound]
    checks = gates.judge(subject.name, subject.gate, [*figures, *_file_figures(subject)]) + holds
    return Verdict(
        subject=subject,
        checks=checks,
        logits=logits,
        against_reference=summary,
        against_baseline=own,
        kld=scores.kld,
        grids=grids,
        continuations=continuations,
        divergence=_divergence(continuations, setting),
    )


def _run_kernels(subject: Subject, setting: Setting, kernels: str) -> KernelRun:
    """Run the file with one kind of kernels, on all or a part of the positions; of fp32 the slow ones on none."""
    exact, delegated = subject.name == BASELINE, kernels == "xnnpack"
    # Half of the threads each: both kinds of kernels run at once.
    model = StepModel(subject.path, xnnpack=delegated, threads=max(1, parallel.threads() // len(KERNELS)))
    label, reference, judged = f"{subject.name}, {KERNELS[kernels]}", setting.reference, setting.judged
    part, chosen = judged.part(every_which(subject, kernels, len(judged.positions)))
    continuations = list[list[int]]()
    logits: Logits = np.empty((0, judged.head.vocabulary), np.float32)
    if delegated or not exact:
        logits = step_runs.run_positions(model, part, label, setting.scratch / f"{subject.name}-{kernels}")
    if delegated:
        continuations = step_runs.greedy(model, reference, setting.prompts, setting.continuation, setting.stop)
    return KernelRun(
        part=part,
        chosen=chosen,
        logits=logits,
        continuations=continuations,
        grid=step_runs.run_grid(model, reference, label, _GRID_LIMITS[kernels], setting.window) if exact else None,
        unsound=None if exact else _soundness(subject, model, reference, kernels, setting.window),
    )


def every_which(subject: Subject, kernels: str, positions: int) -> int:
    """Every which pair of a corpus of so many positions the file is judged on with one kind of kernels."""
    part, least = _ALTERNATIVE_PART if subject.alternative else 1, _LEAST
    if kernels == "builtin":
        part, least = (_FLOAT_PART, _FLOAT_LEAST) if subject.name == _FLOAT else (_BUILTIN_PART, _LEAST)
    return max(1, min(part, positions // least))


def _against_baseline(run: KernelRun | FixedRun, baseline: Verdict) -> tuple[Scores, Summary]:
    """The file with one kind of kernels against the fp32 file with XNNPACK."""
    scores = step_runs.against_file(run.logits, baseline.logits, run.part, run.chosen)
    return scores, metrics.summarise(scores, run.part.positions.window)


def _divergence(continuations: Sequence[Sequence[int]], setting: Setting) -> Divergence | None:
    """How long the file's greedy texts are Hugging Face's."""
    rows = setting.reference.greedy()[: setting.prompts]
    expected = [row.continuation_ids[: setting.continuation] for row in rows]
    agree = [step_runs.agreement(ours, theirs) for ours, theirs in zip(continuations, expected, strict=True)]
    return metrics.divergence(agree, [len(ids) for ids in expected])


def _converter_figures(summary: Summary, grids: Mapping[str, GridResult]) -> list[Measurement]:
    """fp32 against Hugging Face, on the corpus and on the shape grid."""
    text = _positions(summary)
    figures = [
        Measurement(
            metric="nmse", name="worst logits NMSE on text", value=summary.nmse_max, against=REFERENCE, detail=text
        ),
        *_quality("on text", summary, REFERENCE),
    ]
    for kernels, grid in grids.items():
        where = f"on the shape grid, {KERNELS[kernels]}"
        text = f"{grid.cases} of {grid.all_cases} shapes, {grid.rows} rows"
        worst = f"{text}; worst in {grid.where}"
        figures += [
            Measurement(
                metric="nmse", name=f"worst logits NMSE {where}", value=grid.nmse, against=REFERENCE, detail=worst
            ),
            Measurement(metric="kld", name=f"KLD {where}", value=grid.kld, against=REFERENCE, detail=text),
            Measurement(
                metric="top1", name=f"top-1 agreement {where}", value=grid.top1, against=REFERENCE, detail=text
            ),
        ]
    return figures


def _quantiser_figures(own: Summary, builtin: Summary) -> list[Measurement]:
    """A smaller file against the fp32 file, on the corpus."""
    return [
        figure
        for kernels, summary in (("xnnpack", own), ("builtin", builtin))
        for figure in _quality(f"on text, {KERNELS[kernels]}", summary, BASELINE)
    ]


def _fixed_figures(run: FixedRun, baseline: Verdict | None) -> list[Measurement]:
    """A signature of fixed shape, by the limits of its file: the fp32 one's against Hugging Face."""
    where = f"on text, by {run.name}"
    if baseline:
        return _quality(where, _against_baseline(run, baseline)[1], BASELINE)
    (scores,) = step_runs.against_reference([run.logits], run.part)
    summary = metrics.summarise(scores, run.part.positions.window)
    text, worst = _positions(summary), summary.nmse_max
    return [
        Measurement(metric="nmse", name=f"worst logits NMSE {where}", value=worst, against=REFERENCE, detail=text),
        *_quality(where, summary, REFERENCE),
    ]


def _quality(where: str, summary: Summary, against: str) -> list[Measurement]:
    return gates.quality(where, summary, against=against, detail=_positions(summary))


def _positions(summary: Summary) -> str:
    return f"{summary.positions} positions in {summary.blocks} windows"


def _file_figures(subject: Subject) -> list[Measurement]:
    """What needs no run: sizes, and the share of integer arithmetic that the quantiser read from the file."""
    size = subject.record.size
    return [
        Measurement(
            metric="size_ratio",
            name="size / size of fp32",
            value=_ratio(size, subject.baseline_size),
            against=BASELINE,
            detail=f"{size} bytes",
        ),
        Measurement(
            metric="size_per_parameter",
            name="bytes per parameter",
            value=_ratio(size, subject.parameters),
            detail=f"{size} bytes",
        ),
        Measurement(
            metric="integer_share",
            name="share of multiply-adds in integer kernels",
            value=subject.contents.integer_share if subject.contents else None,
        ),
    ]


def _soundness(subject: Subject, model: StepModel, reference: Reference, kernels: str, window: int) -> Check:
    """The file runs at the corners of the shape grid and gives finite numbers there."""
    bad, names = step_runs.count_unsound(model, reference, _CORNER_LIMITS[kernels], window)
    name = f"shapes with logits that are not finite, {KERNELS[kernels]}"
    detail = f"{len(names)} shapes, the corners of the grid: {', '.join(names)}"
    return gates.must_hold(subject.name, name, bad, len(names), detail)


def greedy_rows(
    reference: Reference, verdicts: Sequence[Verdict], setting: Setting, decode: Callable[[list[int]], str]
) -> list[object]:
    """The continuations side by side: per prompt the reference's text and each file's, with how far they agree."""
    rows: list[object] = []
    for index, row in enumerate(reference.greedy()[: setting.prompts]):
        expected = row.continuation_ids[: setting.continuation]
        files = {}
        for verdict in verdicts:
            ids = verdict.continuations[index]
            files[verdict.subject.name] = {
                "ids": ids,
                "text": decode(ids),
                "agree": step_runs.agreement(ids, expected),
                "same": ids == expected,
            }
        rows.append({"prompt": row.prompt, "reference": decode(expected), "tokens": len(expected), "files": files})
    return rows


def finite(table: Mapping[str, object]) -> dict[str, object]:
    """`table` with every number that JSON can't hold (NaN, infinity) as None."""
    return {key: _finite(item) for key, item in table.items()}


def _finite(value: object) -> object:
    if isinstance(value, dict):
        return finite(value)
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _ratio(size: int, other: int | None) -> float | None:
    return size / other if other else None
