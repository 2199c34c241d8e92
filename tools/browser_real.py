"""Gemma 3 270M in a browser: what web/test/real.mjs holds it against, and the table of what it measured.

python -m tools.browser_real ROOT FOLDER                    expected.json: the interpreter's logits, the questions
python -m tools.browser_real ROOT FOLDER --answer QUESTION  LiteRT-LM's greedy answer and its speed, in JSON
python -m tools.browser_real ROOT FOLDER --record VERSION   bench/browser_gemma3.json, of Chromium of that version

`nox -s browser_gemma3` calls all three, the second in turns with the page: what else the machine does falls on both.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from pipeline.bundling.web import require_libraries
from pipeline.core import parallel
from pipeline.core.host import processor
from pipeline.judge import recorded
from pipeline.runtime.litert_lm import LmRuntime
from pipeline.runtime.sections import Sections
from tools import tables
from tools.browser import CORPUS, PROMPTS, conversations
from tools.tables import Column, Measured, Row, Table, Value

ANSWER, TEXTS, STRIDE = 48, 8, 500
"""Tokens of an answer; texts of which a few places each are judged, and tokens between their beginnings."""


def expected(root: Path) -> dict[str, object]:
    """Questions, and what the interpreter says at 64 places."""
    talks = [talk for talk in conversations(CORPUS / "chat-verification.jsonl") if len(talk) == 1]
    with LmRuntime(root / "bundle" / "int8.litertlm") as runtime:
        tokens, start = runtime.tokenize((CORPUS / "verification.txt").read_text(encoding="utf-8")), runtime.start or 0
    sections = Sections(root / "int8")
    count = recorded.needed(sections) - 1
    texts = [[start, *tokens[STRIDE * place :][:count]] for place in range(TEXTS)]
    questions = list(dict.fromkeys(talk[0]["content"] for talk in talks))[:PROMPTS]
    return {"answer": ANSWER, "questions": questions, "recorded": [recorded.record(sections, ids) for ids in texts]}


def answer(root: Path, question: str) -> dict[str, object]:
    """What LiteRT-LM says greedily, and tokens per second."""
    with LmRuntime(root / "bundle" / "int8.litertlm") as runtime:
        prompt = runtime.render([{"role": "user", "content": question}])
        with runtime.session(ANSWER, greedy=True) as session:
            session.prefill(prompt)
            text = "".join(session.decode())
            speed = session.speed()
    return {"text": text, "prefill": speed.prefill_per_second, "decode": speed.decode_per_second}


def table(measured: Mapping[str, Any], chromium: str) -> Table:
    """What the session measured."""
    theirs, ours = measured["litert_lm"], measured["page"]
    ratio = median(one["decode"] / other["decode"] for one, other in zip(ours, theirs, strict=True))
    alike = sum(one["text"] == other["text"] for one, other in zip(ours, theirs, strict=True))

    def speeds(found: Sequence[Mapping[str, float]]) -> dict[str, Value]:
        return {name: Value(value=median(one[name] for one in found)) for name in ("prefill", "decode")}

    figures = {
        "decode / LiteRT-LM": Value(value=ratio),
        "answers alike": Value(value=alike),
        "positions": Value(value=measured["positions"]),
        "largest difference": Value(value=measured["most"]),
        "KLD": Value(value=measured["kld"]),
        "top-1": Value(value=100 * measured["top1"]),
        "sections": Value(value=measured["bytes"] / 1e6),
        "memory": Value(value=measured["memory"] / 1e6),
        "opening": Value(value=measured["opening"]),
    }
    return Table(
        title="Gemma 3 270M in a browser",
        about=f"The page's int8 sections against LiteRT-LM's bundle of these files, {len(ours)} greedy answers of up "
        f"to {ANSWER} tokens in turns: medians, and of the ratio too. Logits against the LiteRT interpreter's, over "
        f"the {recorded.LIKELIEST} likeliest tokens of each position, differences in log-probability. Memory: that of "
        "the page's WebAssembly program; opening, from a click to a model that can answer, without the download.",
        place=10,
        columns={
            "prefill": Column(unit="tok/s", digits=".0f"),
            "decode": Column(unit="tok/s", digits=".1f"),
            "decode / LiteRT-LM": Column(digits=".2f"),
            "answers alike": Column(digits=".0f"),
            "positions": Column(digits=".0f"),
            "largest difference": Column(digits=".2f"),
            "KLD": Column(unit="nats", digits=".1e"),
            "top-1": Column(unit="%", digits=".1f"),
            "sections": Column(unit="MB", digits=".0f"),
            "memory": Column(unit="MB", digits=".0f"),
            "opening": Column(unit="s", digits=".0f"),
        },
        measured=Measured(
            date=time.strftime("%Y-%m-%d"),
            command="`nox -s browser_gemma3`",
            machine=f"{parallel.threads()} threads ({processor()})",
            versions=f"Chromium {chromium}, LiteRT.js {require_libraries()['@litertjs/core']}",
        ),
        rows=(
            Row(name="Chromium", values={**speeds(ours), **figures}),
            Row(name="LiteRT-LM", values=speeds(theirs)),
        ),
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Do one of the three."""
    parser = argparse.ArgumentParser(prog="python -m tools.browser_real")
    parser.add_argument("root", type=Path, help="the model's artefact folder, with page finished")
    parser.add_argument("out", type=Path, help="the folder for expected.json and measured.json")
    parser.add_argument("--answer", metavar="QUESTION", help="print what LiteRT-LM says")
    parser.add_argument("--record", metavar="VERSION", help="of Chromium: keep what it measured")
    arguments = parser.parse_args(argv)
    if arguments.answer:
        sys.stdout.write(json.dumps(answer(arguments.root, arguments.answer)))
    elif arguments.record:
        measured = json.loads((arguments.out / "measured.json").read_text(encoding="utf-8"))
        tables.write_all({"browser_gemma3": table(measured, arguments.record)})
    else:
        (arguments.out / "expected.json").write_text(json.dumps(expected(arguments.root)), encoding="utf-8")


if __name__ == "__main__":
    main()
