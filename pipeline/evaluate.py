"""evaluate: the bundles on your own task, beside the original: "int8 is within x points of the original".

    make evaluate TASK=file.jsonl

Each line of the file has a `prompt` (or `messages`) and a `reference` (or `references`). The prompts go through the
chat template into LiteRT-LM and into Hugging Face's model in fp32, and both answer greedily. Judged are exact match,
chrF and BLEU, with paired bootstrap. `report.json` holds all figures and every answer, `report.html` the same for
people, `summary.txt` the figures alone.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

from pipeline.cluster import pool
from pipeline.core import facts, log, manifest, memory, options, versions
from pipeline.core.errors import UsageError
from pipeline.core.stage import Context, Outcome, Stage, main
from pipeline.judge import answers, tasks
from pipeline.judge.answers import AT_ONCE
from pipeline.judge.tasks import ORIGINAL, Item
from pipeline.reference import golden
from pipeline.reference.shards import Model, unload
from pipeline.report import verification as pages
from pipeline.report.tasks import Report, summary

SCHEMA = 1


@dataclass(frozen=True, kw_only=True)
class Options(options.Options):
    """The task."""

    task: Path | None = field(default=None, metadata={"metavar": "FILE", "help": "prompts and references, .jsonl"})
    tokens: int | None = field(
        default=None, metadata={"help": "the longest answer (default: bundle.continuation of the recipe)"}
    )
    cluster: str = field(default="", metadata={"help": "whose workers answer: a scheduler's address, or local:<n>"})


def work(context: Context) -> Outcome:
    """Let the original and every bundle answer, score the answers, and write report and summary."""
    chosen = context.chosen(Options)
    file = chosen.task
    if file is None:
        raise UsageError("there is no task", remedy="set TASK= to a .jsonl file of prompts and references")
    items, count = tasks.read(file), chosen.tokens or context.recipe.bundle.continuation
    inputs = tuple(record for name in ("fetch", "bundle") for record in context.upstream[name].outputs)
    with pool.opened(chosen.cluster, context.root, "evaluate", inputs, "answers") as shards:
        try:
            texts = _answers(context, shards, items, count, chosen.cluster)
        finally:
            answers.unload()
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    report = {
        "schema": SCHEMA,
        "model": context.upstream["fetch"].model,
        "revision": context.upstream["fetch"].revision,
        "tools": versions.installed(),
        "task": {"file": file.name, "sha256": digest, "prompts": len(items)},
        "tokens": count,
        "sacrebleu": tasks.signatures(),
        **tasks.figures(texts, items),
        "rows": tasks.rows(texts, items),
    }
    manifest.write_atomically(context.folder / "report.json", manifest.dump_json(report))
    manifest.write_atomically(context.folder / "report.html", pages.render_task(report))
    rows = summary(cast("Report", report))
    manifest.write_atomically(context.folder / "summary.txt", "\n".join(rows) + "\n")
    for row in rows:
        log.line(f"  {row}")
    return Outcome(facts=facts.Evaluate(prompts=len(items), tokens=count, task_sha256=digest))


def _answers(
    context: Context, shards: pool.Shards, items: Sequence[Item], count: int, cluster: str
) -> dict[str, list[str]]:
    """What Hugging Face's model in fp32 answers, and every bundle by its own template if the model has one."""
    parameters, checkpoint = (
        context.upstream["fetch"].told(facts.Fetch).parameters,
        context.root / "fetch" / "checkpoint",
    )
    streamed = memory.must_stream(parameters * pool.copies(cluster))
    asked = golden.ask(Model(str(checkpoint.absolute()), "cpu", streamed), shards, parameters)
    tokenizer, prompts = asked.reference.tokenizer, [asked.reference.as_prompt(item.messages) for item in items]
    ends = asked.reference.without_stop
    rows = [asked.greedy(prompts[start : start + AT_ONCE], count) for start in range(0, len(prompts), AT_ONCE)]
    later = {}
    for record in context.upstream["bundle"].outputs:
        file, templated = context.root / record.path, bool(tokenizer.chat_template)
        later[f"bundle-{file.stem}"] = answers.ask(shards, file, items, count, asked.threads, templated=templated)
    texts = {ORIGINAL: [ends(row.continuation_ids) for lot in rows for row in lot()]}
    del asked, ends
    unload()  # before a bundle needs its memory
    return texts | {name: said() for name, said in later.items()}


STAGE = Stage(
    name="evaluate",
    summary="Score the bundles and the original on your own task: exact match, chrF and BLEU.",
    work=work,
    options=Options,
    after=lambda context: pool.forget(context.root, "evaluate"),
)

if __name__ == "__main__":
    sys.exit(main(STAGE))
