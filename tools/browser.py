"""What web/test holds a browser against: the interpreter's logits, LiteRT-LM's prompts and words, and the reports.

python -m tools.browser artifacts/tiny-gemma3n FOLDER                    (nox -s browser)
python -m tools.browser artifacts/tiny-gemma3n FOLDER --quick            (`nox -s browser -- quick`)
python -m tools.browser artifacts/tiny-gemma3n FOLDER --record VERSION   (`nox -s browser -- record`)
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.bundling.web import require_libraries
from pipeline.core.host import processor
from pipeline.core.recipe import DECODER, PROJECT, STEP
from pipeline.judge.metrics import compare
from pipeline.judge.pictures import pictures
from pipeline.judge.sounds import sounds
from pipeline.quantize import fixed
from pipeline.report import tuning, verification
from pipeline.runtime.interface import Array
from pipeline.runtime.litert import FixedStep
from pipeline.runtime.litert_lm import LmRuntime
from pipeline.runtime.sections import Conversation, Sections, Token
from pipeline.tflite.graph import Graph
from tools import tables
from tools.tables import Column, Measured, Row, Table, Value

CORPUS = PROJECT / "examples" / "tiny-gemma3n" / "corpus"
PREFILLED, DECODED = (3, 20, 100, 200), 24
"""Tokens in the cache by prefill, in one call and in two, before the judged positions; and how many of those."""
PROMPTS, ANSWER = 8, 48
PART = "part.tflite"
"""The decoder of which WebGPU runs a part alone."""
DRAWS, ALIKE = 4, 1e-5
"""Runs with another last bit; logits that differ by no more are those of kernels that rounded each activation alike."""
FIXED, SHAPE, TEXTS = "serving_1x128", (1, 128), 24
"""The signature of fixed shape that LiteRT.js runs, and how many texts of growing length."""


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


class Unsettled(Sections):
    """Sections that get embeddings whose last bit may be another one: each times 1 ± 6e-8, drawn."""

    def __init__(self, folder: Path, seed: int) -> None:
        super().__init__(folder)
        self._random = np.random.default_rng(seed)

    def _embed(self, tokens: Sequence[Token], shapes: dict[str, tuple[int, ...]]) -> dict[str, Array]:
        given = super()._embed(tokens, shapes)
        return {
            name: (rows * (1 + 2**-24 * self._random.uniform(-1, 1, rows.shape))).astype(np.float32)
            for name, rows in given.items()
        }


def logits(sections: Sections, case: Case) -> NDArray[np.float32]:
    """The logits [n, V] after each id that is not prefilled."""
    conversation, place = Conversation(sections), 0
    for length in _plan(case.prefilled, sections.prefills):
        conversation.prefill(case.ids[place : place + length])
        place += length
    return np.stack([conversation.decode(token) for token in case.ids[case.prefilled :]])


def against(theirs: NDArray[np.float32], ours: Sequence[NDArray[np.float32]]) -> dict[str, float]:
    """`ours`, put together, against logits [n, V]: as web/test/page.test.mjs tells it of Chromium's."""
    other = np.concatenate(ours)
    apart = np.abs(theirs - other).max(axis=1)
    return {
        "positions": len(other),
        "most": float(apart.max()),
        "alike": float((apart <= ALIKE).mean()),
        "kld": float(compare(theirs, other).kld.mean()),
        "top1": float((theirs.argmax(axis=1) == other.argmax(axis=1)).mean()),
    }


def fixed_shape(step: Path, texts: Sequence[Sequence[int]], folder: Path) -> dict[str, object]:
    """A copy of a step graph with a signature of fixed shape, its name in `folder`, and its logits after each text."""
    file = Path(shutil.copyfile(step, folder / f"step-{step.parent.name}.tflite"))
    fixed.add(file, {FIXED: SHAPE})
    model, rows = FixedStep(file, FIXED, 2), []
    for text in texts:
        ids = np.array([text], np.int32)
        padded = np.pad(ids, ((0, 0), (0, SHAPE[1] - len(text))))
        mask = (np.arange(SHAPE[1]) < len(text)).astype(np.int32)
        row = model.logits(ids, np.ones_like(ids))[0]
        rows.append({"ids": padded[0].tolist(), "mask": mask.tolist(), "rows": [row.tolist()]})
    return {"file": file.name, "cases": rows}


def in_part(decoder: Path, out: Path) -> str:
    """The decoder with an operator that LiteRT.js 2.5.3 has not for WebGPU: GATHER_ND, which gives the mask as is."""
    graph = Graph.read(decoder)
    for view in graph.views():
        mask = next(int(port.tensorIndex) for port in view.ports() if str(port.name) == "mask")
        taken = view.add_tensor("mask;taken", "FLOAT32", view.shape(mask))
        first = view.add_constant(np.zeros((1, 1), np.int32), "mask;first")
        for operator in view.operators():
            operator.inputs = [taken if tensor == mask else tensor for tensor in operator.inputs]
        view.main.operators = [view.operator("GATHER_ND", [mask, first], [taken]), *view.operators()]
    graph.write(out)
    return str(out)


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
    parser.add_argument("--quick", action="store_true", help="of stages page and verify alone")
    parser.add_argument("--record", metavar="VERSION", help="of Chromium: keep what it measured in bench/browser.json")
    arguments = parser.parse_args(argv)
    if arguments.record:
        measured = json.loads((arguments.out / "measured.json").read_text(encoding="utf-8"))
        tables.write_all({"browser": table(measured, arguments.record)})
        return
    talks = [*conversations(CORPUS / "chat-verification.jsonl"), *conversations(CORPUS / "chat-calibration.jsonl")]
    with LmRuntime(arguments.root / "bundle" / "int8.litertlm") as runtime:
        rendered = [_rendered(runtime, talk) for talk in talks]
        questions = list({talk[0]["content"]: talk for talk in talks if len(talk) == 1}.values())[:PROMPTS]
        words = [
            {"question": talk[0]["content"], "text": runtime.greedy(runtime.render(talk), ANSWER).text}
            for talk in questions
        ]
        text = (CORPUS / "verification.txt").read_text(encoding="utf-8")
        tokens, start = runtime.tokenize(text[:20000]), runtime.start or 0
    judged = cases(tokens, start)
    said = {"prompts": rendered, "words": words, "answer": ANSWER}
    for precision in ("fp32", "int8"):
        found = [logits(sections, case) for sections in [Sections(arguments.root / precision)] for case in judged]
        said[precision] = [
            {"ids": case.ids, "from": case.prefilled, "rows": rows.tolist()}
            for case, rows in zip(judged, found, strict=True)
        ]
    theirs = np.concatenate(found)
    builtin = Sections(arguments.root / "int8", xnnpack=False)
    said["kernels"] = against(theirs, [logits(builtin, case) for case in judged])
    # An activation near the middle between two steps rounds the other way for the last bit of a float, and moves all
    # that follows. So no kernels can be held to more than what the interpreter itself makes of such a bit.
    unsettled = [Unsettled(arguments.root / "int8", seed) for seed in range(DRAWS)]
    said["unsettled"] = [against(theirs, [logits(each, case) for case in judged]) for each in unsettled]
    texts = [[start, *tokens[150 * place :][: 19 + 4 * place]] for place in range(TEXTS)]
    said["fixed"] = {
        "signature": FIXED,
        **{name: fixed_shape(arguments.root / name / STEP, texts, arguments.out) for name in ("fp32", "int8")},
    }
    if not arguments.quick:
        said["part"] = in_part(arguments.root / "int8" / DECODER, arguments.out / PART)
    (arguments.out / "expected.json").write_text(json.dumps(said), encoding="utf-8")
    pages: dict[str, Callable[[Any], str]] = {"verify": verification.render}
    if not arguments.quick:
        pages |= {"evaluate": verification.render_task, "tune": tuning.render}
    for stage, render in pages.items():
        report = json.loads((arguments.root / stage / "report.json").read_text(encoding="utf-8"))
        (arguments.out / f"{stage}.html").write_text(render(report), encoding="utf-8")
        if stage == "verify":
            (arguments.out / "senses.html").write_text(render(with_senses(report)), encoding="utf-8")


def with_senses(report: dict[str, Any]) -> dict[str, Any]:
    """verify's report as if its bundles saw and heard, so that the page has pictures and waves."""
    errors = {"vision-fp32": dict.fromkeys(pictures(), 1e-12), "audio-fp32": dict.fromkeys(sounds(), 1e-10)}
    media = [("image", "photograph"), ("image", "face"), ("audio", "chord")]
    text = {"question": "What is this?", "expected": "A face.", "text": "A face.", "same": True, "tie": False}
    senses = {"resized": 1e-4, "errors": errors, "said": [{"tower": "vision", "media": media, **text}]}
    return {**report, "bundles": {name: {**held, "senses": senses} for name, held in report["bundles"].items()}}


def farthest(draws: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The worst of each figure."""
    worse = {"most": max, "alike": min, "kld": max, "top1": min}
    return {**draws[0], **{name: pick(draw[name] for draw in draws) for name, pick in worse.items()}}


def table(measured: Mapping[str, Any], chromium: str) -> Table:
    """What the browser session measured of the shipped model."""

    def logits(found: Mapping[str, float]) -> dict[str, Value]:
        return {
            "positions": Value(value=found["positions"]),
            "largest difference": Value(value=found["most"]),
            "alike": Value(value=100 * found["alike"]),
            "KLD": Value(value=max(0.0, found["kld"])),
            "top-1": Value(value=100 * found["top1"]),
        }

    said = {
        "prompts alike": Value(value=measured["prompts"]),
        "answers alike": Value(value=measured["words"]),
        "page": Value(value=measured["page_bytes"] / 1e3),
        "click to first token": Value(value=measured["first_token_seconds"]),
    }
    return Table(
        title="The page in a browser, shipped model",
        about="Logits against the LiteRT interpreter's with XNNPACK, alike where they differ by 1e-5 at most; with "
        "another last bit: that interpreter's own, each number of the embeddings times 1 ± 6e-8, the farthest of "
        f"{DRAWS} draws. WebGPU is Chromium's in software. Prompts and greedy answers against LiteRT-LM's: all that "
        "were tried are alike. The page is told without model and runtime, as it lies in the folder; from a click on "
        "Send, the model kept but not loaded, to the first token: median of 5. No serious finding of axe, no console "
        "error.",
        place=10,
        columns={
            "positions": Column(digits=".0f"),
            "largest difference": Column(digits=".1e"),
            "alike": Column(unit="%", digits=".0f"),
            "KLD": Column(unit="nats", digits=".1e"),
            "top-1": Column(unit="%", digits=".1f"),
            "prompts alike": Column(digits=".0f"),
            "answers alike": Column(digits=".0f"),
            "page": Column(unit="kB", digits=".0f"),
            "click to first token": Column(unit="s", digits=".2f"),
        },
        measured=Measured(
            date=time.strftime("%Y-%m-%d"),
            command="`nox -s browser -- record`",
            machine=f"2 threads ({processor()})",
            versions=f"Chromium {chromium}, LiteRT.js {require_libraries()['@litertjs/core']}",
        ),
        rows=(
            Row(name="Chromium, fp32 sections", values=logits(measured["logits_fp32"])),
            Row(name="Chromium, int8 sections", values={**logits(measured["logits_int8"]), **said}),
            Row(name=f"Chromium, fp32 step graph, `{FIXED}`", values=logits(measured["fixed_fp32"])),
            Row(name=f"Chromium, int8 step graph, `{FIXED}`", values=logits(measured["fixed_int8"])),
            Row(name="Chromium, WebGPU, int8 sections", values=logits(measured["webgpu"])),
            Row(name="interpreter, int8 sections, another last bit", values=logits(farthest(measured["unsettled"]))),
            Row(name="interpreter, int8 sections, built-in kernels", values=logits(measured["kernels"])),
        ),
    )


def _rendered(runtime: LmRuntime, talk: Sequence[Mapping[str, str]]) -> dict[str, object]:
    prompt = runtime.render(talk)
    return {"messages": talk, "prompt": prompt, "ids": runtime.tokenize(prompt)}


if __name__ == "__main__":
    main()
