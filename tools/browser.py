"""What web/test holds a browser against: the interpreter's logits, LiteRT-LM's prompts and words, and the reports.

python -m tools.browser artifacts/tiny-gemma3n FOLDER        (nox -s browser)
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline.core.recipe import PROJECT
from pipeline.judge.metrics import compare
from pipeline.report import tuning, verification
from pipeline.runtime.litert_lm import LmRuntime
from pipeline.runtime.sections import Conversation, Sections

CORPUS = PROJECT / "examples" / "tiny-gemma3n" / "corpus"
PREFILLED, DECODED = (3, 20, 100, 200), 24
"""Tokens in the cache by prefill, in one call and in two, before the judged positions; and how many of those."""
PROMPTS, ANSWER = 8, 48


def conversations(file: Path) -> list[list[dict[str, str]]]:
    """The questions in `file`, a line each, alone and behind the two turns before them."""
    turns = [
        [{"role": "user", "content": said["user"]}, {"role": "assistant", "content": said["model"]}]
        for said in map(json.loads, file.read_text(encoding="utf-8").splitlines())
    ]
    alone = [turn[:1] for turn in turns]
    return alone + [[*turns[place - 2], *turns[place - 1], turns[place][0]] for place in range(2, len(turns))]


@dataclass(frozen=True)
class Case:
    """`ids`, of which the first `prefilled` are put into the cache before the judged positions."""

    ids: Sequence[int]
    prefilled: int


def cases(tokens: Sequence[int], start: int) -> list[Case]:
    """Windows of a text that each begin with token `start`."""
    return [
        Case([start, *tokens[500 * place : 500 * place + count + DECODED - 1]], count)
        for place, count in enumerate(PREFILLED)
    ]


def logits(sections: Sections, case: Case) -> NDArray[np.float32]:
    """The logits [`DECODED`, V] after each id that is not prefilled."""
    conversation, place = Conversation(sections), 0
    for length in _plan(case.prefilled, sections.prefills):
        conversation.prefill(case.ids[place : place + length])
        place += length
    return np.stack([conversation.decode(token) for token in case.ids[case.prefilled :]])


def _plan(count: int, prefills: Sequence[int]) -> Iterator[int]:
    while count:
        step = min(count, max(prefills))
        yield step
        count -= step


def main(argv: Sequence[str] | None = None) -> None:
    """Write the files."""
    parser = argparse.ArgumentParser(prog="python -m tools.browser")
    parser.add_argument("root", type=Path, help="the model's artefact folder, with int8 and bundle finished")
    parser.add_argument("out", type=Path, help="the folder for expected.json and the three pages")
    arguments = parser.parse_args(argv)
    talks = [*conversations(CORPUS / "chat-verification.jsonl"), *conversations(CORPUS / "chat-calibration.jsonl")]
    with LmRuntime(arguments.root / "bundle" / "int8.litertlm") as runtime:
        rendered = [_rendered(runtime, talk) for talk in talks]
        questions = list({talk[0]["content"]: talk for talk in talks if len(talk) == 1}.values())[:PROMPTS]
        words = [
            {"question": talk[0]["content"], "text": runtime.greedy(runtime.render(talk), ANSWER).text}
            for talk in questions
        ]
        text = (CORPUS / "verification.txt").read_text(encoding="utf-8")
        judged = cases(runtime.tokenize(text[:20000]), runtime.start or 0)
    said = {"prompts": rendered, "words": words, "answer": ANSWER}
    for precision in ("fp32", "int8"):
        found = [logits(sections, case) for sections in [Sections(arguments.root / precision)] for case in judged]
        said[precision] = [
            {"ids": case.ids, "from": case.prefilled, "rows": rows.tolist()}
            for case, rows in zip(judged, found, strict=True)
        ]
    # Rounding an activation the other way moves all that follows: what kernels may differ in is what LiteRT's own do.
    builtin = Sections(arguments.root / "int8", xnnpack=False)
    other = np.concatenate([logits(builtin, case) for case in judged])
    said["noise"] = float(compare(np.concatenate(found), other).kld.mean())
    (arguments.out / "expected.json").write_text(json.dumps(said), encoding="utf-8")
    pages = {"verify": verification.render, "evaluate": verification.render_task, "tune": tuning.render}
    for stage, render in pages.items():
        report = json.loads((arguments.root / stage / "report.json").read_text(encoding="utf-8"))
        (arguments.out / f"{stage}.html").write_text(render(report), encoding="utf-8")


def _rendered(runtime: LmRuntime, talk: Sequence[Mapping[str, str]]) -> dict[str, object]:
    prompt = runtime.render(talk)
    return {"messages": talk, "prompt": prompt, "ids": runtime.tokenize(prompt)}


if __name__ == "__main__":
    main()
