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
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

from pipeline.core import facts, log, manifest, memory, options, versions
from pipeline.core.errors import UsageError
from pipeline.core.stage import Context, Outcome, Stage, main
from pipeline.judge import tasks
from pipeline.judge.reference import Greedy
from pipeline.judge.tasks import ORIGINAL, Item
from pipeline.reference.model import HuggingFace
from pipeline.report import verification as pages
from pipeline.report.tasks import Report, summary

SCHEMA = 1
_AT_ONCE = 8
"""Prompts that Hugging Face answers together."""


@dataclass(frozen=True, kw_only=True)
class Options(options.Options):
    """The task."""

    task: Path | None = field(default=None, metadata={"metavar": "FILE", "help": "prompts and references, .jsonl"})
    tokens: int | None = field(
        default=None, metadata={"help": "the longest answer (default: bundle.continuation of the recipe)"}
    )


def work(context: Context) -> Outcome:
    """Let the original and every bundle answer, score the answers, and write report and summary."""
    chosen = context.chosen(Options)
    file = chosen.task
    if file is None:
        raise UsageError("there is no task", remedy="set TASK= to a .jsonl file of prompts and references")
    items, count = tasks.read(file), chosen.tokens or context.recipe.bundle.continuation
    original = _load(context)
    texts = {ORIGINAL: _original(original, items, count)}
    templated = bool(original.tokenizer.chat_template)
    del original  # before a bundle needs its memory
    for record in context.upstream["bundle"].outputs:
        path = context.root / record.path
        texts[f"bundle-{path.stem}"] = _bundle(path, items, count, context.folder, templated=templated)
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


def _load(context: Context) -> HuggingFace:
    """Hugging Face's model in fp32, streamed from its file if it does not fit into memory."""
    parameters = context.upstream["fetch"].told(facts.Fetch).parameters
    return HuggingFace.load(context.root / "fetch" / "checkpoint", "cpu", streamed=memory.must_stream(parameters))


def _original(reference: HuggingFace, items: Sequence[Item], count: int) -> list[str]:
    """What Hugging Face's model answers."""
    prompts = [reference.as_prompt(item.messages) for item in items]
    rows: list[Greedy] = []
    with log.progress(f"{ORIGINAL}: answers", len(prompts) * count, "tokens") as bar:
        for start in range(0, len(prompts), _AT_ONCE):
            rows += reference.continue_greedily(prompts[start : start + _AT_ONCE], count, bar)
    return [reference.without_stop(row.continuation_ids) for row in rows]


def _bundle(file: Path, items: Sequence[Item], count: int, scratch: Path, *, templated: bool) -> list[str]:
    """What the bundle answers in LiteRT-LM, by its own template if the model has one."""
    from pipeline.runtime.litert_lm import LmRuntime

    with tempfile.TemporaryDirectory(dir=scratch) as cache, LmRuntime(file, cache=Path(cache)) as runtime:
        said = []
        with log.progress(f"{file.stem}: answers in LiteRT-LM", len(items), "prompts") as bar:
            for item in items:
                prompt = runtime.render(item.messages) if templated else item.prompt
                said.append(runtime.greedy(prompt, count).text)
                bar.advance()
    return said


STAGE = Stage(
    name="evaluate",
    summary="Score the bundles and the original on your own task: exact match, chrF and BLEU.",
    work=work,
    options=Options,
)

if __name__ == "__main__":
    sys.exit(main(STAGE))
