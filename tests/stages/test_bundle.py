"""Bundles of the shipped model: made, read back, judged; bad input, and bundles that verify must refuse."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from line import CAP, Line, changed_model, small_recipe
from litert_lm_builder import litertlm_peek
from safetensors.torch import load_file, save_file
from small_graph import bytes_by_type
from transformers import AutoTokenizer

from pipeline import bundle, fetch, fp32, golden, graph, int8, verify
from pipeline.bundling import metadata
from pipeline.core import manifest
from pipeline.core.recipe import PROJECT
from pipeline.core.recipe import load as load_recipe
from pipeline.core.stage import DEFAULT_MODEL
from pipeline.judge import parity
from pipeline.judge.reference import Greedy, Head, Reference
from pipeline.models.gemma3n import TextConfig
from pipeline.runtime.litert_lm import LmRuntime
from pipeline.tflite.graph import Graph

SHIPPED = PROJECT / DEFAULT_MODEL
BUNDLES = ("fp32.litertlm", "int8.litertlm")
ALONE = ("fetch", "golden", "fp32", "int8")


def sums(line: Line) -> dict[str, str]:
    return {Path(record.path).name: record.sha256 for record in manifest.read(line.root / "bundle").outputs}


# --- what is made


def test_two_runs_give_the_same_bytes(built: Line, tmp_path: Path) -> None:
    """The second in a process of its own, with another order of sets."""
    line = built.copy(tmp_path, "fetch", "fp32", "int8")
    command = [sys.executable, "-m", "pipeline.bundle", "--recipe", str(line.recipe)]
    command += ["--model-id", str(line.model), "--artifacts", str(line.artifacts)]
    subprocess.run(command, cwd=PROJECT, env={**os.environ, "PYTHONHASHSEED": "7"}, check=True)
    assert tuple(sums(line)) == BUNDLES
    assert sums(line) == sums(built)


@pytest.mark.parametrize("name", BUNDLES)
def test_every_section_is_readable_and_is_the_one_that_was_made(built: Line, tmp_path: Path, name: str) -> None:
    text = StringIO()
    litertlm_peek.peek_litertlm_file(str(built.root / "bundle" / name), str(tmp_path), text)
    said = text.getvalue()
    for part in ("LlmMetadataProto", "HF_Tokenizer_Zlib", "tf_lite_prefill_decode", "gemma3n"):
        assert part in said
    dumped = {file.read_bytes() for file in tmp_path.rglob("*.tflite")}
    made = built.root / name.removesuffix(".litertlm")
    assert dumped == {(made / f"{each}.tflite").read_bytes() for each in ("decoder", "embedder", "per_layer_embedder")}


def test_a_text_checkpoint_is_gemma3n_and_has_its_per_layer_embedder(built: Line) -> None:
    """FINDINGS F4: `gemma3n_text` became a `generic_model` without one."""
    assert json.loads((SHIPPED / "config.json").read_text())["model_type"] == "gemma3n_text"
    for precision in ("fp32", "int8"):
        held: Any = manifest.read(built.root / "bundle").facts[precision]
        assert held["model_type"] == "gemma3n"
        kinds = [section["model_type"] for section in held["sections"]]
        assert kinds[2:] == ["tf_lite_prefill_decode", "tf_lite_embedder", "tf_lite_per_layer_embedder"]


def test_the_manifest_says_what_the_runtime_finds(built: Line) -> None:
    held: Any = manifest.read(built.root / "bundle").facts["int8"]
    recipe = load_recipe(built.recipe)
    assert held["max_tokens"] == recipe.bundle.max_tokens == 512 - 31
    # Keys and values of five layers, which the other three share, two heads of 32 float32 each: 512 positions, of the
    # four that slide their window of 16 and the longest prefill.
    assert held["cache_bytes"] == 2 * (512 + 4 * (16 + 32)) * 2 * 32 * 4
    with LmRuntime(built.root / "bundle" / "int8.litertlm", threads=2) as runtime:
        assert runtime.start == held["start_token"] and runtime.stop == tuple((t,) for t in held["stop_tokens"])


def test_an_int8_bundle_has_a_byte_per_weight_and_its_scales(built: Line) -> None:
    facts: Any = manifest.read(built.root / "bundle").facts
    assert facts["fp32"]["stored"] == facts["int8"]["stored"]
    assert facts["fp32"]["weight_bytes"] == 4 * facts["fp32"]["stored"]
    assert 1 < facts["int8"]["weight_bytes"] / facts["int8"]["stored"] <= 1.06
    parameters = manifest.read(built.root / "fetch").facts["parameters"]
    assert isinstance(parameters, int)
    table = 2048 * 128  # the head is the token table, which the embedder holds as well
    assert facts["int8"]["stored"] == pytest.approx(parameters + table, rel=0.01)
    for name in ("decoder", "embedder", "per_layer_embedder"):
        kinds = bytes_by_type(Graph.read(built.root / "int8" / f"{name}.tflite"))
        assert kinds["INT8"] > 9 * kinds.get("FLOAT32", 0)


# --- bad input: one sentence, exit code, nothing half-written


def refused(built: Line, folder: Path, capsys: pytest.CaptureFixture[str], model: Path, code: int = 7) -> str:
    """Making bundles of a changed checkpoint ends with `code` and leaves nothing; gives what was said."""
    line = built.copy(folder / "artifacts", "fp32", "int8", model=model)
    assert line.run(fetch.STAGE) == 0
    capsys.readouterr()
    assert line.run(bundle.STAGE) == code
    assert not list((line.root / "bundle").iterdir())
    said = capsys.readouterr().err
    assert said.count("error: ") == 1 and "Traceback" not in said
    return said.partition("error: ")[2]


def test_a_tokenizer_of_another_model(built: Line, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = json.loads((SHIPPED / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = table["model"]["vocab"]
    more = 2048 - max([*vocabulary.values(), *(token["id"] for token in table["added_tokens"])])
    for number in range(more + 10):
        vocabulary[f"ⵣⵣ{number}"] = max(vocabulary.values()) + 1
    said = refused(built, tmp_path, capsys, changed_model(tmp_path, tokenizer=json.dumps(table)))
    assert said.startswith("the tokenizer has ") and "the model's vocabulary only 2048" in said


@pytest.mark.parametrize("source", ["{% for %}", "{{ raise_exception('no') }}", "{{ messages[9].content }}"])
def test_a_template_that_fails_to_render(
    built: Line, tmp_path: Path, capsys: pytest.CaptureFixture[str], source: str
) -> None:
    model = changed_model(tmp_path, **{"chat_template.jinja": source})
    assert refused(built, tmp_path, capsys, model).startswith("the chat template fails to render a conversation")


@pytest.mark.parametrize("token", [2048, 999_999, -1])
def test_a_stop_token_outside_the_vocabulary(
    built: Line, tmp_path: Path, capsys: pytest.CaptureFixture[str], token: int
) -> None:
    config = json.loads((SHIPPED / "generation_config.json").read_text(encoding="utf-8"))
    model = changed_model(tmp_path, generation_config=json.dumps({**config, "eos_token_id": [1, token]}))
    said = refused(built, tmp_path, capsys, model)
    assert said.startswith(f"stop token {token} is not in the model's vocabulary of 2048 tokens")


def test_a_section_that_is_damaged(built: Line, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = built.copy(tmp_path, "fetch", "fp32", "int8")
    file = line.root / "int8" / "embedder.tflite"
    file.write_bytes(file.read_bytes()[:-1])
    assert line.run(bundle.STAGE) == 4
    assert "embedder.tflite" in capsys.readouterr().err
    assert not (line.root / "bundle").exists()


def test_step_graphs_make_no_bundle(built: Line, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = built.copy(tmp_path, "fetch", "fp32", "int8")
    assert line.run(bundle.STAGE, "--graphs", "step") == 2
    assert "GRAPHS=step builds no bundle" in capsys.readouterr().err
    assert not (line.root / "bundle").exists()


def test_a_cache_shorter_than_a_prefill(tmp_path: Path, built: Line, capsys: pytest.CaptureFixture[str]) -> None:
    short = small_recipe(tmp_path / "r.toml")
    short.write_text(short.read_text().replace("cache_length = 512", "cache_length = 31"))
    for stage in (graph.STAGE, bundle.STAGE):
        line = replace(built, artifacts=tmp_path / "artifacts")
        assert line.run(stage, recipe=short) == 2
        assert "`bundle.cache_length` is 31, shorter than a prefill of 32" in capsys.readouterr().err
    assert not (tmp_path / "artifacts").exists()


def test_a_verification_text_too_short_for_two_conversations(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "short.txt"
    text.write_text("".join(f"The captain of ship {i} said a word.\n" for i in range(10)), encoding="utf-8")
    name = 'verification = "examples/tiny-gemma3n/corpus/verification.txt"'
    recipe = small_recipe(tmp_path / "r.toml", **{name: f'verification = "{text}"'})
    line = Line(artifacts=tmp_path / "artifacts", recipe=recipe)
    assert line.run(fetch.STAGE) == 0
    assert line.run(golden.STAGE, "--device", "cpu", "--graphs", "bundle") == 2
    assert "too short for two conversations of 97 tokens" in capsys.readouterr().err


# --- the judge of the whole bundle, on answers that are not the model's


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(SHIPPED, local_files_only=True)


@pytest.fixture(scope="module")
def rows(built: Line) -> list[Greedy]:
    return Reference(built.root / "golden", Head.of_checkpoint(built.root / "fetch" / "checkpoint", CAP)).greedy()


def compare(built: Line, tokenizer: Any, rows: list[Greedy], stop: set[int]) -> parity.Parity:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parity, "_TEXTS", 2)
        return parity.compare(built.root / "bundle" / "fp32.litertlm", tokenizer, [], rows, stop)


def test_text_that_parts_is_told_from_text_that_parts_at_a_tie(built: Line, tokenizer: Any, rows: list[Greedy]) -> None:
    row = next(row for row in rows if row.prompt_ids and len(row.continuation_ids) == 12)
    other = next(token for token in range(100, 200) if token != row.continuation_ids[5])
    changed = replace(row, continuation_ids=[*row.continuation_ids[:5], other, *row.continuation_ids[6:]])
    even = replace(changed, margins=[0.0 if i == 5 else margin for i, margin in enumerate(row.margins)])
    same, parted, tied = compare(built, tokenizer, [row, changed, even], {1, 6}).greedy
    assert same.same and same.agree == 12 and not same.tie
    assert not parted.same and parted.agree == 5 and not parted.tie
    assert not tied.same and tied.agree == 5 and tied.tie


def test_scores_that_are_off_are_seen(built: Line, tokenizer: Any, rows: list[Greedy]) -> None:
    right = compare(built, tokenizer, rows, {1, 6})
    assert right.scored > 0 and right.score_error is not None and right.score_error < 1e-3
    shifted = [replace(row, log_likelihoods=[value - 0.01 for value in row.log_likelihoods]) for row in rows]
    wrong = compare(built, tokenizer, shifted, {1, 6}).score_error
    assert wrong == pytest.approx(0.01, abs=1e-3)


def test_a_stop_token_that_the_bundle_does_not_name_is_seen(built: Line, tokenizer: Any, rows: list[Greedy]) -> None:
    assert compare(built, tokenizer, rows[:1], {1, 6}).stop.wrong == 0
    found = compare(built, tokenizer, rows[:1], {1, 6, 9}).stop
    assert (found.total, found.wrong, found.examples) == (3, 1, ("9",))


# --- bundles that verify must refuse


def judged(line: Line, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, dict[str, Any]]:
    """Exit code of verify on the bundles alone, what it said, and its judgement."""
    capsys.readouterr()
    code = line.run(verify.STAGE, "--graphs", "bundle")
    folder = line.root / "verify"
    judgement = json.loads((folder / "judgement.json").read_text(encoding="utf-8"))
    assert (folder / "report.json").is_file() and (folder / "report.html").is_file()
    assert (folder / manifest.NAME).exists() == (code == 0)
    return code, capsys.readouterr().err, judgement


def failing(judgement: dict[str, Any]) -> set[tuple[str, str]]:
    return {(check["variant"], check["name"]) for check in judgement["checks"] if not check["passed"]}


def test_a_missing_soft_cap(
    built: Line, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """FINDINGS F3, put back where it was: the graph is exported without it, and everything after that is as always."""
    recipe = small_recipe(tmp_path / "r.toml", **{"prefill = [32, 128]": "prefill = [32]"})
    line = replace(built.copy(tmp_path / "artifacts", "fetch", "golden"), recipe=recipe)
    right = TextConfig.from_config
    monkeypatch.setattr(TextConfig, "from_config", lambda config: replace(right(config), final_logit_softcapping=None))
    assert line.run(graph.STAGE, "--graphs", "bundle") == 0
    monkeypatch.undo()
    for stage in (fp32.STAGE, int8.STAGE, bundle.STAGE):
        assert line.run(stage, "--graphs", "bundle") == 0
    code, said, judgement = judged(line, capsys)
    assert code == 8 and "bundle-fp32: worst logits NMSE through the cache" in said
    assert failing(judgement) >= {
        ("bundle-fp32", "worst logits NMSE through the cache, without a cache"),
        ("bundle-fp32", "worst logits NMSE through the cache, with its cache"),
        ("bundle-fp32", "KLD through the cache, without a cache"),
        ("bundle-fp32", "scores of LiteRT-LM that are off"),
    }
    assert "Verification failed" in (line.root / "verify" / "report.html").read_text(encoding="utf-8")


@pytest.fixture
def alone(built: Line, tmp_path: Path) -> Line:
    """A copy of what the bundles are made from and held against."""
    return built.copy(tmp_path / "artifacts", *ALONE)


@pytest.mark.parametrize("stop", [(1,), (6,), (1, 9)])
def test_a_wrong_set_of_stop_tokens(
    alone: Line, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, stop: tuple[int, ...]
) -> None:
    right = metadata.describe
    monkeypatch.setattr(metadata, "describe", lambda *rest, **more: replace(right(*rest, **more), stop=stop))
    assert alone.run(bundle.STAGE) == 0
    monkeypatch.undo()
    code, said, judgement = judged(alone, capsys)
    assert code == 8 and "stop tokens that LiteRT-LM does not know is 1, the limit is <= 0" in said
    names = {(f"bundle-{name}", "stop tokens that LiteRT-LM does not know") for name in ("fp32", "int8")}
    assert failing(judgement) >= names


def other_weights(folder: Path, name: str) -> Path:
    """The shipped model with every other row of one tensor a fifth larger (a norm takes a common factor out)."""
    model = changed_model(folder)
    tensors = load_file(model / "model.safetensors")
    tensors[name][::2] *= 1.2
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    return model


@pytest.mark.parametrize(
    ("tensor", "section"),
    [
        ("model.layers.2.mlp.up_proj.weight", "decoder"),
        ("model.embed_tokens.weight", "embedder"),
        ("model.embed_tokens_per_layer.weight", "per_layer_embedder"),
    ],
)
def test_a_section_of_other_weights(
    built: Line, alone: Line, tmp_path: Path, capsys: pytest.CaptureFixture[str], tensor: str, section: str
) -> None:
    """One section of the fp32 folder, and so of the bundle, is another model's."""
    other = built.copy(tmp_path / "other", "graph", model=other_weights(tmp_path, tensor))
    assert other.run(fetch.STAGE) == 0 and other.run(fp32.STAGE, "--graphs", "bundle") == 0
    swap(alone, "fp32", f"{section}.tflite", other.root / "fp32" / f"{section}.tflite")
    assert alone.run(bundle.STAGE) == 0
    code, said, judgement = judged(alone, capsys)
    assert code == 8 and "bundle-fp32: worst logits NMSE through the cache" in said
    assert ("bundle-fp32", "scores of LiteRT-LM that are off") in failing(judgement), "the runtime shows it as well"


def swap(line: Line, stage: str, name: str, other: Path) -> None:
    """Put `other` in the place of a stage's file, as if the stage had made it."""
    folder = line.root / stage
    made = manifest.read(folder)
    (folder / name).write_bytes(other.read_bytes())
    records = tuple(manifest.FileRecord.of(line.root / record.path, line.root) for record in made.outputs)
    manifest.write(replace(made, outputs=records), folder)


def test_a_bundle_of_other_sections_than_those_that_were_judged(
    built: Line, alone: Line, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The sections in fp32/ are right, the bundle was packed with others: text and scores in the runtime show it."""
    other = built.copy(
        tmp_path / "other", "graph", "int8", model=other_weights(tmp_path, "model.embed_tokens_per_layer.weight")
    )
    assert other.run(fetch.STAGE) == 0 and other.run(fp32.STAGE, "--graphs", "bundle") == 0
    assert other.run(bundle.STAGE) == 0
    (other.root / "bundle").rename(alone.root / "bundle")
    code, _, judgement = judged(alone, capsys)
    assert code == 8
    assert ("bundle-fp32", "scores of LiteRT-LM that are off") in failing(judgement)
    assert ("bundle-fp32", "worst logits NMSE through the cache, without a cache") not in failing(judgement)


def test_a_prompt_that_the_runtime_renders_differently(
    alone: Line, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checkpoint's own template, unprepared: LiteRT-LM keeps the newline at its end, and trims less."""
    right = metadata.describe
    source = (SHIPPED / "chat_template.jinja").read_text(encoding="utf-8") + "\n"
    monkeypatch.setattr(metadata, "describe", lambda *rest, **more: replace(right(*rest, **more), chat_template=source))
    assert alone.run(bundle.STAGE) == 0
    monkeypatch.undo()
    code, _, judgement = judged(alone, capsys)
    assert code == 8
    assert ("bundle-int8", "conversations rendered differently by LiteRT-LM") in failing(judgement)
