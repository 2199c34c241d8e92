"""What tests/clients holds the runtime's own command line and server against: the words of the judged int8 bundle.

python -m tools.clients artifacts/tiny-gemma3n FILE                     (nox -s clients)
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from pipeline.runtime.litert_lm import LmRuntime
from tools.browser import CORPUS, conversations

TALKS, ANSWER = 8, 400


def main(argv: Sequence[str] | None = None) -> None:
    """Write the file: texts that verify heard after bare prompts, and answers to conversations, by LiteRT-LM's API."""
    parser = argparse.ArgumentParser(prog="python -m tools.clients")
    parser.add_argument("root", type=Path, help="the model's artefact folder, with verify finished")
    parser.add_argument("out", type=Path, help="the file")
    arguments = parser.parse_args(argv)
    judged = json.loads((arguments.root / "verify" / "judgement.json").read_text(encoding="utf-8"))
    rows = judged["bundles"]["bundle-int8"]["greedy"]["rows"]
    talks = conversations(CORPUS / "chat-verification.jsonl")
    chosen = [*[talk for talk in talks if len(talk) == 1][:TALKS], *[talk for talk in talks if len(talk) > 1][:TALKS]]
    with LmRuntime(arguments.root / "bundle" / "int8.litertlm") as runtime:
        answers = [runtime.greedy(runtime.render(talk), ANSWER) for talk in chosen]
        # A session begins with the start token by itself, and would with a second one.
        prompts = [row["prompt"].removeprefix(runtime.start_text) for row in rows]
    said = {
        "continued": [{"prompt": prompt, "text": row["text"]} for prompt, row in zip(prompts, rows, strict=True)],
        "answered": [
            {"messages": talk, "text": answer.text, "ended": answer.tokens < ANSWER}
            for talk, answer in zip(chosen, answers, strict=True)
        ],
    }
    arguments.out.write_text(json.dumps(said), encoding="utf-8")


if __name__ == "__main__":
    main()
