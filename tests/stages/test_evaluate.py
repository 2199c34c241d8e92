"""The shipped model's bundles on a task, beside the original: Tifinagh in and out, and a model that answers itself."""

from __future__ import annotations

import html
import json
from pathlib import Path
from typing import Any

import pytest
from line import Line
from transformers import AutoTokenizer

from pipeline import evaluate
from pipeline.core import manifest
from pipeline.runtime.litert_lm import LmRuntime

PROMPTS = ["ⴰⵣⵓⵍ", "ⵎⴰⵏⵣⴰⴽⵉⵏ ⴰⵢⴰ ⵉⵎⴷⴷⵓⴽⴰⵍ?", "What is the sea?", "ⵣ ☕ the sun"]
TIFINAGH = "ⵜⴰⵎⴰⵣⵉⵖⵜ"


def task(file: Path, references: list[str]) -> Path:
    rows = [{"prompt": prompt, "reference": right} for prompt, right in zip(PROMPTS, references, strict=True)]
    file.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    return file


def report(line: Line) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((line.root / "evaluate" / "report.json").read_text(encoding="utf-8"))
    return found


@pytest.fixture(scope="module")
def answered(built: Line, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The report on references that no model gives."""
    file = task(tmp_path_factory.mktemp("task") / "t.jsonl", [TIFINAGH] * len(PROMPTS))
    assert built.run(evaluate.STAGE, "--task", str(file), "--tokens", "24") == 0
    return report(built)


def test_tifinagh_goes_in_and_comes_back(answered: dict[str, Any]) -> None:
    assert [row["messages"][0]["content"] for row in answered["rows"]] == PROMPTS
    assert {row["references"][0] for row in answered["rows"]} == {TIFINAGH}
    assert set(answered["scores"]) == {"original", "bundle-fp32", "bundle-int8"}
    assert answered["against_original"]["bundle-fp32"]["identical"] == 1.0
    assert answered["scores"]["original"]["exact"]["value"] == 0


def test_a_reference_that_answers_itself_has_every_point(
    built: Line, answered: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = [row["answers"]["original"] for row in answered["rows"]]
    assert all(own)
    file = task(tmp_path / "own.jsonl", own)
    assert built.run(evaluate.STAGE, "--task", str(file), "--tokens", "24") == 0
    found = report(built)
    for name in ("original", "bundle-fp32"):
        assert all(found["scores"][name][metric]["low"] == pytest.approx(100) for metric in ("exact", "chrf"))
    assert found["against_original"]["bundle-fp32"]["exact"]["within"] == 0
    summary = (built.root / "evaluate" / "summary.txt").read_text(encoding="utf-8")
    assert "bundle-int8 is within" in summary and "BLEU of the original (95 %)" in summary
    assert "Only 4 prompts" in summary
    assert summary.splitlines()[0] in capsys.readouterr().err
    made = manifest.read(built.root / "evaluate")
    assert {record.path for record in made.outputs} == {
        f"evaluate/{file}" for file in ("report.json", "report.html", "summary.txt")
    }
    page = (built.root / "evaluate" / "report.html").read_text(encoding="utf-8")
    assert "bundle-int8: within" in page and "4 prompts are few" in page
    for row in found["rows"]:
        assert html.escape(row["messages"][0]["content"]) in page


def test_what_the_tokenizer_spells_in_bytes_comes_out_whole(built: Line) -> None:
    tokenizer = AutoTokenizer.from_pretrained(built.root / "fetch" / "checkpoint")
    with LmRuntime(built.root / "bundle" / "int8.litertlm") as runtime:
        for text in (TIFINAGH, *PROMPTS):
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            assert runtime.tokenize(text) == ids and runtime.detokenize(ids) == tokenizer.decode(ids) == text
            assert text in runtime.render([{"role": "user", "content": text}])


def test_without_a_task_there_is_nothing_to_do(built: Line, capsys: pytest.CaptureFixture[str]) -> None:
    assert built.run(evaluate.STAGE) == 2
    assert "set TASK= to a .jsonl file" in capsys.readouterr().err
