"""verify: hold every file against the reference and say, limit beside value, whether it is good enough.

A reference that a GPU computed is held against the CPU at a few positions. Then two gates. The fp32 files are held
against Hugging Face (a fault of the conversion shows), the other step graphs against that of fp32 (what precision costs
shows), on whole prompts. Bundles are all held against Hugging Face, whose equal the fp32 one has to be: through the
cache, section by section, and whole in LiteRT-LM, whose text must be Hugging Face's. A required file that misses a
limit fails the stage with exit code 8, leaves no manifest, and leaves the report for the reader. The int8 scheme that
the recipe did not choose is judged in the same way and may fail, as may precisions that the recipe calls optional: they
are marked as not fit to publish.

`judgement.json` is the same from run to run, and so is `tensors.json`: where each tensor of a judged file stands, and
its sha256. `report.json` and `report.html` add timings, machine and date.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.bundling import constants, replaced
from pipeline.bundling.template import CONVERSATIONS
from pipeline.checkpoint import chat
from pipeline.cluster import pool
from pipeline.core import facts, manifest, options
from pipeline.core.graph import Choice
from pipeline.core.recipe import PROJECT
from pipeline.core.stage import Context, Outcome, Stage, main
from pipeline.judge import bundles, corpus, steps
from pipeline.judge.gates import Check
from pipeline.judge.reference import Head, Reference
from pipeline.judge.steps import Verdict
from pipeline.judge.verdicts import judge_all, judged_files
from pipeline.report.judgement import checks_of, is_required, refuse_failed, summarise, write_report


@dataclass(frozen=True, kw_only=True)
class Options(options.Options):
    """The files to judge, and the texts that they were and were not calibrated on."""

    variants: tuple[str, ...] | None = field(
        default=None, metadata={"help": "folders with a step graph (default: those that the recipe makes)"}
    )
    eval: Path | None = field(default=None, metadata={"metavar": "FILE", "help": "the text that golden's --eval named"})
    calibration: Path | None = field(
        default=None, metadata={"metavar": "FILE", "help": "the text that int8's --calibration named"}
    )

    cluster: str = field(
        default="", metadata={"help": "whose workers judge bundles: a scheduler's address, or local:<n>"}
    )

    def judged(self) -> tuple[str, ...] | None:
        """The variants, None: the recipe's."""
        return self.variants


def work(context: Context) -> Outcome:
    """Judge every file, write judgement and report, and fail if a required check did not pass."""
    checkpoint, chosen, texts = context.root / "fetch" / "checkpoint", context.chosen(Options), context.recipe.corpus
    variants = Choice(recipe=context.recipe, graphs=context.graphs, variants=chosen.variants).judged
    told = context.upstream["golden"].told(facts.Golden)
    reference = Reference(context.root / "golden", Head.of_checkpoint(checkpoint, told.final_logit_softcapping))
    tokenizer = chat.open_tokenizer(checkpoint)
    corpus.require_held_out(
        chosen.eval or PROJECT / texts.verification,
        told.verification_sha256,
        chosen.calibration or PROJECT / texts.calibration,
        tokenizer,
    )
    agreed, judges = _on_the_cpu(context, reference, told.device), (CONVERSATIONS, replaced.with_decoder)
    verdicts, bundle_verdicts, judgement = judge_all(context, variants, reference, tokenizer, *judges, chosen.cluster)
    judgement = steps.finite(judgement | summarise(context, agreed, verdicts, bundle_verdicts))
    manifest.write_atomically(context.folder / "judgement.json", manifest.dump_json(judgement))
    write_report(context, judgement, verdicts)
    tensors = constants.digests(judged_files(context, variants))
    manifest.write_atomically(context.folder / "tensors.json", manifest.dump_json(tensors))
    made = context.upstream["int8"].told(facts.Precision).climbed if "int8" in context.upstream else None
    judged: list[Verdict | bundles.Verdict] = [*verdicts, *bundle_verdicts]
    refuse_failed(context, agreed, judged, made.shortfall if made else "")
    return Outcome(
        facts=facts.Verify(
            passed=True,
            checks=len(agreed) + len(checks_of(item for item in judged if is_required(context, item))),
            fit=tuple(item.subject.name for item in judged if item.fit),
            not_fit=tuple(item.subject.name for item in judged if not item.fit),
            device=told.device,
        )
    )


def _on_the_cpu(context: Context, reference: Reference, device: str) -> list[Check]:
    """The checks on a reference that a GPU computed; none where the CPU did."""
    if device == "cpu":
        return []
    from pipeline.reference import agreement  # transformers takes seconds, which nothing else here needs

    return agreement.checks(
        reference, context.root / "fetch" / "checkpoint", device, context.recipe.gates.get(agreement.NAME)
    )


STAGE = Stage(
    name="verify",
    summary="Judge every file against Hugging Face and fp32; write report.json and report.html.",
    work=work,
    options=Options,
    after=lambda context: pool.forget(context.root, "verify"),
    measured=("report.json", "report.html"),
)

if __name__ == "__main__":
    sys.exit(main(STAGE))
