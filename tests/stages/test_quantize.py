"""fp16 and int8 files of the shipped model: made by the stages, looked into, run; and defects that must be refused."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from line import Line, small_recipe
from small_graph import bytes_by_type

from pipeline import int8
from pipeline.core import manifest
from pipeline.core.errors import QuantiseError, UsageError
from pipeline.core.recipe import PROJECT
from pipeline.core.recipe import load as load_recipe
from pipeline.core.stage import DEFAULT_MODEL, DEFAULT_RECIPE
from pipeline.quantize import readback
from pipeline.quantize import rows as quantize
from pipeline.tflite.graph import Graph

CORPUS = PROJECT / DEFAULT_MODEL / "corpus"
RECIPE = PROJECT / DEFAULT_RECIPE
VARIANTS = {"fp16": "fp16", "int8-dynamic": "dynamic", "int8-static": "static", "int8-static16": "static16"}


@pytest.fixture(scope="module")
def line(built: Line, tmp_path_factory: pytest.TempPathFactory) -> Line:
    """A copy of the built line, with every int8 scheme."""
    copy = Line(artifacts=tmp_path_factory.mktemp("quantised"), recipe=built.recipe)
    shutil.copytree(built.root, copy.root, symlinks=True)
    for scheme in ("dynamic", "static", "static16"):
        assert copy.run(int8.STAGE, "--scheme", scheme) == 0
    return copy


@pytest.fixture(scope="module")
def root(line: Line) -> Path:
    return line.root


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe that calibrates on few samples."""
    return small_recipe(
        tmp_path_factory.mktemp("recipe") / "r.toml", **{"calibration_samples = 128": "calibration_samples = 24"}
    )


@pytest.fixture(scope="module")
def windows(root: Path) -> np.ndarray[Any, Any]:
    """Held-out text: 40 rows of 64 tokens."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(root / "fetch" / "checkpoint", local_files_only=True)
    text = (CORPUS / "verification.txt").read_text(encoding="utf-8")
    ids = tokenizer.encode(text, add_special_tokens=False)
    rows = np.array(ids[: 40 * 63], np.int32).reshape(40, 63)
    return np.concatenate([np.full((40, 1), tokenizer.bos_token_id, np.int32), rows], axis=1)


def logits(file: Path, rows: np.ndarray[Any, Any], *, plain: bool = False) -> np.ndarray[Any, Any]:
    from ai_edge_litert.interpreter import Interpreter, OpResolverType

    resolver = OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES if plain else OpResolverType.AUTO
    step = Interpreter(model_path=str(file), experimental_op_resolver_type=resolver).get_signature_runner()
    batches = [rows[i : i + 8] for i in range(0, len(rows), 8)]
    parts = [step(input_ids=ids, attention_mask=np.ones_like(ids))["logits"] for ids in batches]
    return np.concatenate(parts).astype(np.float64)


def divergence(reference: np.ndarray[Any, Any], other: np.ndarray[Any, Any]) -> float:
    """Mean KL(reference || other) in nats."""

    def log_softmax(x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        shifted = x - x.max(-1, keepdims=True)
        return np.asarray(shifted - np.log(np.exp(shifted).sum(-1, keepdims=True)))

    p, q = log_softmax(reference), log_softmax(other)
    return float((np.exp(p) * (p - q)).sum(-1).mean())


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("plain", [False, True], ids=["xnnpack", "plain"])
def test_a_file_computes_what_fp32_computes(
    root: Path, windows: np.ndarray[Any, Any], variant: str, plain: bool
) -> None:
    gate = load_recipe(RECIPE).gates[variant]
    assert gate.kld is not None and gate.top1 is not None
    reference = logits(root / "fp32" / "step.tflite", windows)
    other = logits(root / variant / "step.tflite", windows, plain=plain)
    assert divergence(reference, other) <= gate.kld
    # 40 positions give one or two disagreements at the gate: this tells a broken file, verify judges a good one.
    assert (reference.argmax(-1) == other.argmax(-1)).mean() >= gate.top1 - 0.05


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_file_has_the_size_of_its_type(root: Path, variant: str) -> None:
    limit = load_recipe(RECIPE).gates[variant].size_ratio
    assert limit is not None
    sizes = [(root / name / "step.tflite").stat().st_size for name in (variant, "fp32")]
    assert sizes[0] / sizes[1] <= limit


def test_every_table_and_matrix_is_stored_once_and_as_int8(root: Path) -> None:
    for variant in ("int8-dynamic", "int8-static", "int8-static16"):
        graph = Graph.read(root / variant / "step.tflite")
        parameters = manifest.read(root / "fetch").facts["parameters"]
        stored = bytes_by_type(graph)
        assert isinstance(parameters, int) and 0.99 * parameters < stored["INT8"] <= parameters
        assert stored["FLOAT32"] < 0.01 * 4 * parameters
        tables = [int(o.inputs[1]) for o in graph.operators() if graph.code(o) == "EMBEDDING_LOOKUP"]
        heads = [o for o in graph.operators() if graph.code(o) == "FULLY_CONNECTED" and int(o.inputs[1]) in tables]
        assert len(tables) == 2 and len(heads) == 1


def test_the_manifest_says_what_is_in_the_file(root: Path) -> None:
    made = [manifest.read(root / f"int8-{scheme}").facts for scheme in ("static", "dynamic")]
    assert [facts["scheme"] for facts in made] == ["static", "dynamic"]
    static, dynamic = (step(facts) for facts in made)
    assert static["scheme"] == "static" and dynamic["scheme"] == "dynamic"
    assert isinstance(static["integer_share"], float) and static["integer_share"] >= 0.97
    assert isinstance(dynamic["integer_share"], float) and 0.5 < dynamic["integer_share"] < 1
    assert (
        isinstance(static["float_operators"], dict) and {"SOFTMAX", "RSQRT", "TANH"} <= static["float_operators"].keys()
    )
    assert "FULLY_CONNECTED" not in static["float_operators"]
    assert static["float_operators"]["BATCH_MATMUL"] == 1, "what picks each row's last token"
    assert made[0]["calibration_samples"] == load_recipe(RECIPE).int8.calibration_samples
    assert step(manifest.read(root / "fp16").facts)["weights_float16_share"] == pytest.approx(1, abs=0.01)


def step(facts: manifest.Facts) -> dict[str, manifest.Fact]:
    """What a manifest says of the step graph."""
    found = facts["step"]
    assert isinstance(found, dict)
    return found


def test_int8_without_a_scheme_is_the_recipes_and_the_same_bytes(root: Path) -> None:
    scheme = load_recipe(RECIPE).int8.scheme
    made = [manifest.read(root / name).output("step.tflite").sha256 for name in ("int8", f"int8-{scheme}")]
    assert made[0] == made[1]
    assert [record.path for record in manifest.read(root / f"int8-{scheme}").outputs] == [f"int8-{scheme}/step.tflite"]


def test_static_is_the_same_bytes_twice(line: Line, tmp_path: Path, quick: Path) -> None:
    """The second time in a process of its own, with another order of sets."""
    copy = Line(artifacts=tmp_path, recipe=quick)
    for name in ("fetch", "graph", "fp32"):
        shutil.copytree(line.root / name, copy.root / name, symlinks=True)
    assert copy.run(int8.STAGE, "--scheme", "static") == 0
    first = manifest.read(copy.root / "int8-static").outputs
    command = [sys.executable, "-m", "pipeline.int8", "--scheme", "static", "--recipe", str(quick)]
    command += ["--model-id", str(PROJECT / DEFAULT_MODEL), "--artifacts", str(tmp_path)]
    subprocess.run(command, cwd=PROJECT, env={**os.environ, "PYTHONHASHSEED": "4"}, check=True)
    assert manifest.read(copy.root / "int8-static").outputs == first


# --- defects that must be refused


def untouched(graph: Graph) -> None:
    """An int8 file that is really fp32."""


def tables_in_float(graph: Graph) -> None:
    quantize.quantise_weights(graph, keep=lambda name: "layers" not in name)


def layers_in_float(graph: Graph) -> None:
    quantize.quantise_weights(graph, keep=lambda name: "layers" in name)


@pytest.mark.parametrize("defect", [untouched, tables_in_float, layers_in_float])
@pytest.mark.parametrize("target", ["fp16", "dynamic", "static"])
def test_a_file_that_is_not_what_its_name_says_is_refused(
    root: Path, tmp_path: Path, defect: Callable[[Graph], None], target: readback.Target
) -> None:
    file = tmp_path / "step.tflite"
    graph = Graph.read(root / "fp32" / "step.tflite")
    defect(graph)
    graph.prune()
    graph.write(file)
    with pytest.raises(QuantiseError, match=f"is not a {target} file"):
        readback.check(readback.read_back(file), target, file)


def test_a_dynamic_file_is_not_a_static_one(root: Path) -> None:
    file = root / "int8-dynamic" / "step.tflite"
    with pytest.raises(QuantiseError, match=r"only 0\.0% of the multiply-adds with its weights are integer"):
        readback.check(readback.read_back(file), "static", file)


def test_the_stage_refuses_an_unquantised_file(line: Line, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantize, "quantise_weights", lambda graph, keep, rounding: None)
    copy = Line(artifacts=tmp_path, recipe=line.recipe)
    for name in ("fetch", "graph"):
        shutil.copytree(line.root / name, copy.root / name, symlinks=True)
    assert copy.run(int8.STAGE, "--scheme", "dynamic") == QuantiseError.exit_code
    assert not (copy.root / "int8-dynamic" / manifest.NAME).exists()


CONSTANT = {
    "one token": "the the the the the the the the",
    "one sentence": "In the beginning God created the heaven and the earth.",
}


@pytest.mark.parametrize("text", CONSTANT.values(), ids=CONSTANT.keys())
def test_constant_calibration_text_is_refused(
    line: Line, tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "constant.txt"
    file.write_text(f"{text}\n" * 200, encoding="utf-8")
    assert line.run(int8.STAGE, "--scheme", "static", "--calibration", str(file)) == QuantiseError.exit_code
    assert "constant or nearly so" in capsys.readouterr().err


def test_too_little_calibration_text_is_refused(line: Line, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "short.txt"
    file.write_text("Only this.\n", encoding="utf-8")
    assert line.run(int8.STAGE, "--scheme", "static", "--calibration", str(file)) == QuantiseError.exit_code
    assert "gives 1 samples, the recipe wants 128" in capsys.readouterr().err


def test_an_unreadable_calibration_file_is_a_usage_error(
    line: Line, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = tmp_path / "missing.txt"
    assert line.run(int8.STAGE, "--scheme", "static", "--calibration", str(missing)) == UsageError.exit_code
    assert f"can't read calibration file {missing}" in capsys.readouterr().err


def test_conversations_calibrate_through_the_chat_template(line: Line, tmp_path: Path, quick: Path) -> None:
    lines = (CORPUS / "calibration.txt").read_text(encoding="utf-8").splitlines()
    chats = [
        [{"role": "user", "content": first}, {"role": "assistant", "content": second}]
        for first, second in zip(lines[0::2], lines[1::2], strict=False)
    ]
    file = tmp_path / "own.jsonl"
    file.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats), encoding="utf-8")
    options = ("--scheme", "static", "--calibration", str(file))
    assert line.run(int8.STAGE, *options, recipe=quick) == 0
    assert manifest.read(line.root / "int8-static").facts["calibration_samples"] == 24


def test_a_conversation_that_the_template_refuses_is_a_usage_error(
    line: Line, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chat = [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]
    file = tmp_path / "own.jsonl"
    file.write_text(json.dumps({"messages": chat}) + "\n", encoding="utf-8")
    assert line.run(int8.STAGE, "--scheme", "static", "--calibration", str(file)) == UsageError.exit_code
    assert "chat template refuses" in capsys.readouterr().err
