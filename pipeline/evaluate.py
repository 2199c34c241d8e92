"""evaluate: the bundles on your own task, beside the original: "int8 is within x points of the original".

    make evaluate TASK=file.jsonl

Each line of the file has a `prompt` (or `messages`) and a `reference` (or `references`). The prompts go through the
chat template into LiteRT-LM and into Hugging Face's model in fp32, and both answer greedily. Judged are exact match,
chrF and BLEU, with paired bootstrap. `report.json` holds all figures and every answer, `report.html` the same for
people, `summary.txt` the figures alone.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pipeline.core import log, manifest, memory, versions
from pipeline.core.errors import UsageError
from pipeline.core.stage import Context, Outcome, Stage, main
from pipeline.judge import tasks
from pipeline.judge.tasks import ORIGINAL, TITLES, Answers, Item
from pipeline.reference.model import HuggingFace
from pipeline.report import verification as pages

SCHEMA = 1
_AT_ONCE = 8
"""Prompts that Hugging Face answers together."""


def work(context: Context) -> Outcome:
    """Let the original and every bundle answer, score the answers, and write report and summary."""
    file: Path | None = context.arguments.task
    if file is None:
        raise UsageError("there is no task", remedy="set TASK= to a .jsonl file of prompts and references")
    items, count = tasks.read(file), context.arguments.tokens or context.recipe.bundle.continuation
    original = _load(context)
    texts = {ORIGINAL: _original(original, items, count)}
    templated = bool(original.tokenizer.chat_template)
    del original  # before a bundle needs its memory
    for record in context.upstream["bundle"].outputs:
        path = context.root / record.path
        texts[f"bundle-{path.stem}"] = _bundle(path, items, count, context.folder, templated=templated)
    report = {
        "schema": SCHEMA,
        "model": context.upstream["fetch"].model,
        "revision": context.upstream["fetch"].revision,
        "tools": versions.installed(),
        "task": {"file": file.name, "sha256": hashlib.sha256(file.read_bytes()).hexdigest(), "prompts": len(items)},
        "tokens": count,
        "sacrebleu": tasks.signatures(),
        **_figures(texts, items),
        "rows": _rows(texts, items),
    }
    manifest.write_atomically(context.folder / "report.json", manifest.dump_json(report))
    manifest.write_atomically(context.folder / "report.html", pages.render_task(report))
    rows = summary(report)
    manifest.write_atomically(context.folder / "summary.txt", "\n".join(rows) + "\n")
    for row in rows:
        log.line(f"  {row}")
    return Outcome(facts={"prompts": len(items), "tokens": count, "task_sha256": report["task"]["sha256"]})


def _load(context: Context) -> HuggingFace:
    """Hugging Face's model in fp32, streamed from its file if it does not fit into memory."""
    parameters = context.upstream["fetch"].facts["parameters"]
    assert isinstance(parameters, int)
    return HuggingFace.load(context.root / "fetch" / "checkpoint", "cpu", streamed=memory.must_stream(parameters))


def _original(reference: HuggingFace, items: Sequence[Item], count: int) -> list[str]:
    """What Hugging Face's model answers."""
    prompts = [reference.as_prompt(item.messages) for item in items]
    rows: list[dict[str, Any]] = []
    with log.progress(f"{ORIGINAL}: answers", len(prompts) * count, "tokens") as bar:
        for start in range(0, len(prompts), _AT_ONCE):
            rows += reference.continue_greedily(prompts[start : start + _AT_ONCE], count, bar)
    return [reference.without_stop(row["continuation_ids"]) for row in rows]


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


def _figures(texts: Mapping[str, Sequence[str]], items: Sequence[Item]) -> dict[str, Any]:
    """Scores of every model, and each bundle's beside the original's."""
    found: dict[str, Answers] = {name: tasks.answers(said, items) for name, said in texts.items()}
    original = found[ORIGINAL]
    return {
        "scores": {
            name: {metric: asdict(value) for metric, value in tasks.scored(each).items()}
            for name, each in found.items()
        },
        "against_original": {
            name: {
                **{metric: asdict(value) for metric, value in tasks.compared(each, original).items()},
                "identical": sum(map(str.__eq__, texts[name], texts[ORIGINAL])) / len(items),
            }
            for name, each in found.items()
            if name != ORIGINAL
        },
    }


def _rows(texts: Mapping[str, Sequence[str]], items: Sequence[Item]) -> list[dict[str, Any]]:
    return [
        {
            "messages": [dict(message) for message in item.messages],
            "references": list(item.references),
            "answers": {name: said[place] for name, said in texts.items()},
        }
        for place, item in enumerate(items)
    ]


def summary(report: Mapping[str, Any]) -> list[str]:
    """The figures for people: a table, and a sentence for each bundle."""
    prompts = report["task"]["prompts"]
    rows = [["", *TITLES.values()]]
    for name, scores in report["scores"].items():
        cells = [f"{one['value']:.1f} ({one['low']:.1f} to {one['high']:.1f})" for one in _ordered(scores)]
        rows.append([name, *cells])
    lines = [f"{report['model']} on {report['task']['file']}: {prompts} prompts, points of 100 (95 % interval)", ""]
    lines += [*log.align(rows), ""]
    for name, found in report["against_original"].items():
        titles = zip(_ordered(found), TITLES.values(), strict=True)
        within = ", ".join(f"{one['within']:.1f} points in {title}" for one, title in titles)
        lines.append(f"{name} is within {within} of the original (95 %).")
        lines.append(f"  {found['identical']:.0%} of its answers are the original's to the last character.")
    if prompts < tasks.FEWEST:
        lines.append(f"Only {prompts} prompts: take the intervals as rough, and give at least {tasks.FEWEST}.")
    return lines


def _ordered(figures: Mapping[str, Any]) -> list[Any]:
    """The figures of each metric in the order of the table."""
    return [figures[metric] for metric in TITLES]


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--task", type=Path, metavar="FILE", help="prompts and references, .jsonl")
    parser.add_argument("--tokens", type=int, help="the longest answer (default: bundle.continuation of the recipe)")


STAGE = Stage(
    name="evaluate",
    summary="Score the bundles and the original on your own task: exact match, chrF and BLEU.",
    work=work,
    add_arguments=_add_arguments,
)

if __name__ == "__main__":
    sys.exit(main(STAGE))
