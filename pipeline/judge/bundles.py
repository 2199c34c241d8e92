"""Examining one bundle and saying whether it may be used: its sections through the cache, the whole in LiteRT-LM."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from pipeline.checkpoint.chat import Tokenizer
from pipeline.core.errors import UsageError
from pipeline.core.manifest import FileRecord
from pipeline.core.recipe import BASELINE, Gate
from pipeline.judge import gates, metrics, parity, scripts
from pipeline.judge.gates import REFERENCE, Check, Measurement
from pipeline.judge.kv_cache import Trace
from pipeline.judge.metrics import Divergence, Summary
from pipeline.judge.parity import Parity
from pipeline.judge.reference import Greedy
from pipeline.judge.scripts import ScriptFigures
from pipeline.judge.sensing import Sensed
from pipeline.judge.shards import Asked, Replayed
from pipeline.runtime.litert_lm import Message

SCORE_ERROR = 5e-3
"""Nats by which a log-likelihood in LiteRT-LM may be off Hugging Face's for fp32.

It sums over the vocabulary in float32: with 262,144 tokens and logits that are off by 0.0002 at most, 0.0007 were seen.
"""


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A bundle to judge: its file, and what the stages know of it.

    `stored` is the number of parameters in the sections (a tied table counts where it is stored), `weight_bytes` what
    they take there, scales included.
    """

    precision: str
    path: Path
    record: FileRecord
    gate: Gate | None
    parameters: int
    stored: int
    weight_bytes: int

    @property
    def name(self) -> str:
        """What it is called in checks and reports."""
        return f"bundle-{self.precision}"


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What every bundle of one run is held against, and who is `asked` for them.

    `scripts` are those that have a limit of their own.
    """

    asked: Asked
    trace: Trace
    tokenizer: Tokenizer
    conversations: Sequence[Sequence[Message]]
    greedy: Sequence[Greedy]
    stop: set[int]
    scripts: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What was found about one bundle.

    `against_cached`, Hugging Face with its own cache, is for the fp32 bundle alone, where exactness counts. `sensed` is
    of one that sees or hears; its checks are among the others.
    """

    subject: Subject
    checks: list[Check]
    against_reference: Summary
    against_cached: Summary | None
    parity: Parity
    scripts: Mapping[str, ScriptFigures]
    sensed: Sensed | None = None

    @property
    def divergence(self) -> Divergence | None:
        """How long its greedy texts in LiteRT-LM are Hugging Face's."""
        rows = self.parity.greedy
        return metrics.divergence([row.agree for row in rows], [row.tokens for row in rows])

    @property
    def fit(self) -> bool:
        """Whether every check passed, and there was one."""
        return bool(self.checks) and all(check.passed for check in self.checks)

    def facts(self) -> dict[str, object]:
        """The entry in the report."""
        subject, result = self.subject, self.parity
        return {
            "file": subject.record.path,
            "sha256": subject.record.sha256,
            "size": subject.record.size,
            "size_per_parameter": subject.record.size / subject.parameters,
            "bytes_per_weight": subject.weight_bytes / subject.stored,
            "fit": self.fit,
            "positions": self.against_reference.positions,
            "against_reference": asdict(self.against_reference),
            "against_cached": _facts(self.against_cached),
            "scripts": {name: asdict(figures) for name, figures in self.scripts.items()},
            "divergence": _facts(self.divergence),
            "token_ids": asdict(result.ids),
            "prompts": asdict(result.prompts) if result.prompts else None,
            "turns": asdict(result.turns) if result.turns else None,
            "greedy": {
                "same": sum(row.same for row in result.greedy),
                "ties": sum(row.tie for row in result.greedy),
                "rows": [asdict(row) for row in result.greedy],
            },
            "stop": asdict(result.stop),
            "stopped_at": result.stopped_at,
            "scored": result.scored,
            "score_error": result.score_error,
            **(self.sensed.facts() if self.sensed else {}),
        }


def ask(subject: Subject, setting: Setting) -> Callable[[], Verdict]:
    """Ask the bundle all that its limits need; the call that is returned waits for the answers and judges them.

    Every bundle is held against Hugging Face. Whether fp32 is exact few positions tell, so it does not read the texts.

    Raises:
        UsageError: the bundle is fp32, and golden did not ask the reference through its own cache.
    """
    exact = subject.precision == BASELINE
    if exact and not setting.trace.cached.shape[1]:
        raise UsageError(
            "the reference was not asked through its own cache, which an fp32 bundle is held against",
            cause="golden ran with a recipe that has no fp32 bundle",
            remedy="run `make golden` with this recipe",
        )
    # What precision costs is a mean, which takes thousands of positions; a fault of a conversion shows in each.
    trace = setting.trace.conversations() if exact else setting.trace
    tokens = sum(len(row.continuation_ids) for row in setting.greedy)
    # The longest shard first: begun last, it would leave the other workers idle.
    spoken = setting.asked.speak(subject.precision, setting.conversations, len(setting.greedy), tokens, setting.stop)
    replayed = setting.asked.replay(subject.precision, trace, exact=exact)
    return lambda: _judge(subject, setting, trace, replayed(), spoken())


def _judge(subject: Subject, setting: Setting, trace: Trace, replayed: Replayed, result: Parity) -> Verdict:
    """What follows from the answers."""
    plain = metrics.summarise(replayed.scores, trace.blocks)
    told = replayed.cached
    cached = metrics.summarise(told, trace.blocks[: len(told.kld)]) if told else None
    # Where arithmetic is the same nothing differs by script.
    by_script = (
        {} if cached else scripts.figures(replayed.scores, trace.blocks, trace.scripts(setting.tokenizer.decode))
    )
    figures = (
        _exactness(plain, cached, trace)
        if cached
        else gates.quality("through the cache", plain, against=REFERENCE, detail=trace.described)
        + _by_script(by_script, setting.scripts)
    )
    exact = cached is not None
    holds = [*_parity_checks(subject, result, exact=exact), _finite(subject, replayed.unsound, plain.positions)]
    gate = subject.gate
    if gate and not setting.scripts:  # a limit for a language that no release names is none
        gate = replace(gate, script_kld_ratio=None)
    return Verdict(
        subject=subject,
        checks=gates.judge(subject.name, gate, [*figures, *_sizes(subject)]) + holds,
        against_reference=plain,
        against_cached=cached,
        parity=result,
        scripts=by_script,
    )


def _by_script(found: Mapping[str, ScriptFigures], wanted: Sequence[str]) -> list[Measurement]:
    """The KLD of each script that the bundle is for, over Latin's; of what was not met there is nothing to measure."""
    return [_of_script(name, found.get(name), found.get(scripts.BASIS)) for name in wanted]


def _of_script(script: str, own: ScriptFigures | None, basis: ScriptFigures | None) -> Measurement:
    metric, name = "script_kld_ratio", f"KLD on {script} / on {scripts.BASIS}"
    if not own or not basis or not own.kld_ratio:
        detail = "no position in one of the two"
        return Measurement(metric=metric, name=name, value=None, against=REFERENCE, detail=detail)
    fewest, detail = min(own.positions, basis.positions), f"{own.positions} positions beside {basis.positions}"
    return Measurement.estimated(metric, name, own.kld_ratio, fewest, against=REFERENCE, detail=detail)


def _exactness(plain: Summary, cached: Summary, trace: Trace) -> list[Measurement]:
    """fp32 against Hugging Face, without and with its own cache."""
    figures = []
    for summary, way, where in (
        (plain, "without a cache", trace.described),
        (cached, "with its cache", trace.conversation_positions),
    ):
        detail = f"{where}; against {REFERENCE} {way}"
        name = f"worst logits NMSE through the cache, {way}"
        figures += [
            Measurement(metric="nmse", name=name, value=summary.nmse_max, against=REFERENCE, detail=detail),
            *gates.quality(f"through the cache, {way}", summary, against=REFERENCE, detail=detail),
        ]
    return figures


def _sizes(subject: Subject) -> list[Measurement]:
    size = subject.record.size
    return [
        Measurement(
            metric="size_per_parameter",
            name="bytes per parameter",
            value=size / subject.parameters,
            detail=f"{size} bytes",
        ),
        Measurement(
            metric="bytes_per_weight",
            name="bytes per stored weight, scales included",
            value=subject.weight_bytes / subject.stored,
            detail=f"{subject.stored} weights; one that two sections need is stored twice",
        ),
    ]


def _finite(subject: Subject, unsound: int, positions: int) -> Check:
    name, detail = "positions with logits that are not finite", f"{positions} positions"
    return gates.must_hold(subject.name, name, unsound, positions, detail)


def _parity_checks(subject: Subject, result: Parity, *, exact: bool) -> list[Check]:
    """What must hold in LiteRT-LM; text and scores equal Hugging Face's only if arithmetic does."""
    name = subject.name
    checks = [
        _all_hold(name, "texts with other token ids in LiteRT-LM", result.ids, _examples(result.ids)),
        _all_hold(name, "stop tokens that LiteRT-LM does not know", result.stop, _stops(result)),
    ]
    if result.prompts is not None:
        rendered = _all_hold(
            name, "conversations rendered differently by LiteRT-LM", result.prompts, _examples(result.prompts)
        )
        checks.insert(1, rendered)
    if result.turns is not None:
        checks.append(
            _all_hold(name, "turns of a conversation that LiteRT-LM gave up", result.turns, _examples(result.turns))
        )
    if exact:
        different = [row for row in result.greedy if not row.same and not row.tie]
        ties = sum(row.tie for row in result.greedy)
        detail = (
            f"{len(result.greedy)} prompts, {sum(row.tokens for row in result.greedy)} tokens; {ties} part at a tie"
        )
        checks.append(
            gates.must_hold(name, "greedy texts of LiteRT-LM that differ", len(different), len(result.greedy), detail)
        )
        off = 0 if result.score_error is not None and result.score_error <= SCORE_ERROR else 1  # NaN is off
        detail = f"{result.scored} texts scored; largest error {result.score_error} nats, limit {SCORE_ERROR}"
        checks.append(gates.must_hold(name, "scores of LiteRT-LM that are off", off, result.scored, detail))
    return checks


def _all_hold(variant: str, name: str, tally: parity.Tally, detail: str) -> Check:
    return gates.must_hold(variant, name, tally.wrong, tally.total, detail)


def _stops(result: Parity) -> str:
    reached = ", ".join(map(str, result.stopped_at)) or "none"
    return f"{result.stop.total} stop tokens; text ended where the reference's did at: {reached}"


def _examples(tally: parity.Tally) -> str:
    return f"{tally.total} in all" + (f"; e.g. {'; '.join(tally.examples)}" if tally.examples else "")


def _facts(summary: Summary | Divergence | None) -> Mapping[str, object] | None:
    return asdict(summary) if summary else None
