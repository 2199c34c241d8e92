"""The reference on another device than the CPU: the whole way, by a second name of the CPU, where no GPU is.

torch takes `cpu:0` for a device of its own: models, tokens and sums are put there and fetched, as with `cuda`, and no
branch for the CPU is taken. What a driver and its memory do is not in it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from line import CAP, Line
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from pipeline import golden, moments, tune, verify
from pipeline.core import facts, manifest
from pipeline.core.errors import VerificationError
from pipeline.core.recipe import PROJECT, Gate
from pipeline.core.stage import DEFAULT_MODEL
from pipeline.judge.gates import Check
from pipeline.judge.reference import Head, Reference
from pipeline.quantize import hessians
from pipeline.reference import agreement, devices
from pipeline.reference.model import HuggingFace
from pipeline.search.study import Study

OTHER = "cpu:0"
SHIPPED = PROJECT / DEFAULT_MODEL
Floats = NDArray[np.float32]


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """The other device is what there is of a GPU."""
    monkeypatch.setattr(devices, "choose", lambda wanted, *_: "cpu" if wanted == "cpu" else OTHER)


@pytest.fixture
def there(judged: Line, tmp_path: Path, elsewhere: None) -> Line:
    """The line with a golden that was computed on the other device."""
    line = judged.copy(tmp_path / "artifacts", "fetch")
    assert line.run(golden.STAGE) == 0
    assert manifest.read(line.root / "golden").facts["device"] == OTHER
    return line


def rewritten(line: Line, name: str, change: Callable[[Path], None]) -> None:
    """Change a file of golden, and let the manifest speak of what it is now."""
    change(line.root / "golden" / name)
    made = manifest.read(line.root / "golden")
    records = tuple(manifest.FileRecord.of(line.root / record.path, line.root) for record in made.outputs)
    manifest.write(replace(made, outputs=records), line.root / "golden")


def louder(file: Path) -> None:
    """Hidden states that are off by a thousandth, as products with TF32 are."""
    tensors = load_file(file)
    noise = np.random.default_rng(3).standard_normal(tensors["hidden"].shape).astype(np.float32)
    save_file({**tensors, "hidden": tensors["hidden"] * (1 + 1e-3 * noise)}, file)


def less_likely(file: Path) -> None:
    rows = json.loads(file.read_text(encoding="utf-8"))
    rows[0]["log_likelihoods"][1] -= 0.01
    file.write_text(json.dumps(rows), encoding="utf-8")


def another(file: Path) -> None:
    rows = json.loads(file.read_text(encoding="utf-8"))
    rows[0]["continuation_ids"][2] += 1
    file.write_text(json.dumps(rows), encoding="utf-8")


def agreed(line: Line, gate: Gate | None = None) -> list[Check]:
    stored = Reference(line.root / "golden", Head.of_checkpoint(SHIPPED, CAP))
    return agreement.checks(stored, line.root / "fetch" / "checkpoint", OTHER, gate)


def test_golden_is_the_same_within_tolerance_and_the_check_says_so(there: Line, judged: Line) -> None:
    mine, other = (load_file(line.root / "golden" / "corpus.safetensors") for line in (there, judged))
    assert np.array_equal(mine["input_ids"], other["input_ids"])
    assert devices.require_same(mine["hidden"], other["hidden"], OTHER, "golden") < 1e-9
    floor: Any = manifest.read(there.root / "golden").facts["self_floor"]
    assert floor["threads"]["against"] == "CPU" and floor["threads"]["nmse"] < 1e-9
    text, tokens = agreed(there)
    assert text.passed and text.value is not None and text.value < 1e-10 and text.limit == devices.NMSE
    assert tokens.passed and tokens.detail.startswith("the first ")
    assert not agreed(there, Gate(nmse=text.value / 2))[0].passed, "the recipe's own limit"


@pytest.mark.parametrize(
    ("name", "change", "failed"),
    [
        ("corpus.safetensors", louder, [0]),
        ("greedy.json", less_likely, [1]),
        ("greedy.json", another, [1]),
    ],
)
def test_what_the_cpu_does_not_say_fails(
    judged: Line, tmp_path: Path, name: str, change: Callable[[Path], None], failed: list[int]
) -> None:
    line = judged.copy(tmp_path / "artifacts", "fetch", "golden")
    rewritten(line, name, change)
    assert [place for place, check in enumerate(agreed(line)) if not check.passed] == failed


@pytest.mark.parametrize("wrong", [False, True])
def test_verify_holds_a_golden_of_a_gpu_against_the_cpu(
    built: Line, tmp_path: Path, wrong: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    line = built.copy(tmp_path / "artifacts", "fetch", "golden", "fp32")
    made = manifest.read(line.root / "golden")
    manifest.write(replace(made, facts={**made.facts, "device": "cuda"}), line.root / "golden")
    if wrong:
        rewritten(line, "greedy.json", less_likely)
    code = line.run(verify.STAGE, "--graphs", "step", "--variants", "fp32")
    judgement = json.loads((line.root / "verify" / "judgement.json").read_text(encoding="utf-8"))
    rows = [check for check in judgement["checks"] if check["variant"] == agreement.NAME]
    assert [row["passed"] for row in rows] == [True, not wrong] and judgement["passed"] is not wrong
    assert "decoded tokens that the CPU does not say" in (line.root / "verify" / "report.html").read_text()
    assert code == (VerificationError.exit_code if wrong else 0)
    assert wrong or manifest.read(line.root / "verify").told(facts.Verify).device == "cuda"
    said = capsys.readouterr().err
    assert "a few positions again on the CPU" in said
    assert ("run `make golden DEVICE=cpu`" in said and "golden is not what the CPU says" in said) is wrong


def test_a_golden_of_the_cpu_costs_nothing(built: Line, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agreement, "checks", lambda *_: pytest.fail("it was asked"))
    line = built.copy(tmp_path / "artifacts", "fetch", "golden", "fp32")
    assert line.run(verify.STAGE, "--graphs", "step", "--variants", "fp32") == 0
    assert "device" not in manifest.read(line.root / "verify").facts


def sums(line: Line) -> dict[str, Floats]:
    folder = line.root / "moments"
    index = json.loads((folder / hessians.INDEX).read_text(encoding="utf-8"))
    return {name: np.load(folder / file) for name, file in index.items()}


def test_moments_are_the_same_within_tolerance(judged: Line, tmp_path: Path, elsewhere: None) -> None:
    lines = [judged.copy(tmp_path / device, "fetch") for device in ("cpu", "cuda")]
    for line, device in zip(lines, ("cpu", "cuda"), strict=True):
        assert line.run(moments.STAGE, "--device", device) == 0
    here, there = (manifest.read(line.root / "moments").facts for line in lines)
    assert (here["device"], there["device"]) == ("cpu", OTHER)
    assert {**here, "device": OTHER, "largest_activation": 0} == {**there, "largest_activation": 0}
    plain, other = map(sums, lines)
    assert plain.keys() == other.keys()
    for name, expected in plain.items():
        assert np.array_equal(other[name], other[name].transpose(0, 2, 1)), name
        assert np.allclose(other[name], expected, atol=1e-4 * float(np.abs(expected).max())), name


@pytest.mark.parametrize("stage", [golden.STAGE, moments.STAGE], ids=lambda stage: stage.name)
def test_what_a_gpu_can_not_hold_the_cpu_computes_with_its_bytes(
    judged: Line,
    tmp_path: Path,
    elsewhere: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    stage: Any,
) -> None:
    """Its memory ends in the middle."""
    lines, own, asked = [judged.copy(tmp_path / word, "fetch") for word in "ab"], HuggingFace.hidden, list[str]()
    assert lines[0].run(stage, "--device", "cpu") == 0

    def full(self: HuggingFace, *more: Any) -> Floats:
        asked.append(self.device)
        if self.device == OTHER and len(asked) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")
        return own(self, *more)

    monkeypatch.setattr(HuggingFace, "hidden", full)
    capsys.readouterr()
    assert lines[1].run(stage) == 0
    said = capsys.readouterr().err
    assert "CUDA out of memory. Tried to allocate 2.00 GiB.; the CPU computes, from the start" in said
    assert asked[:2] == [OTHER, OTHER] and {*asked[2:]} == {"cpu"}
    first, second = (manifest.read(line.root / stage.name) for line in lines)
    assert first.facts["device"] == second.facts["device"] == "cpu" and first.outputs == second.outputs


@pytest.mark.parametrize(
    ("said", "full"),
    [
        ("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported", True),
        ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", True),
        ("cuDNN error: CUDNN_STATUS_ALLOC_FAILED", True),
        ("CUDA error: device-side assert triggered", False),
    ],
)
def test_memory_that_a_library_of_a_gpu_lacks_is_told_from_other_errors(said: str, full: bool) -> None:
    def compute(device: str) -> str:
        if device != "cpu":
            raise RuntimeError(said)
        return device

    if full:
        assert devices.within_memory(OTHER, compute) == "cpu"
    else:
        with pytest.raises(RuntimeError, match="device-side"):
            devices.within_memory(OTHER, compute)


def test_memory_that_the_cpu_lacks_is_no_reason_to_begin_again() -> None:
    def full(_: str) -> None:
        raise torch.OutOfMemoryError

    with pytest.raises(torch.OutOfMemoryError):
        devices.within_memory("cpu", full)


def test_tune_s_reference_is_what_the_fp32_file_says(
    built: Line, tmp_path: Path, elsewhere: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    line, found = built.copy(tmp_path / "artifacts", "fetch", "graph"), list[tuple[str, list[Floats]]]()
    assert line.run(moments.STAGE, "--device", "cpu") == 0
    monkeypatch.setattr(
        Study, "run", lambda self: found.append((self.bench.identity, [*map(np.load, self.bench.references)]))
    )
    for device in ("cpu", "cuda"):
        tune.work(
            tune.Options(
                model_id=str(line.model),
                artifacts=line.artifacts,
                recipe=line.recipe,
                device=device,  # type: ignore[arg-type]
            )
        )
    (name, file), (other, reference) = found
    assert name != other, "what was measured against one is not what was measured against the other"
    assert len(file) == len(reference) and file[0].shape == reference[0].shape
    for mine, theirs in zip(reference, file, strict=True):
        assert float(((mine - theirs) ** 2).sum() / (theirs**2).sum()) < 1e-8


@pytest.mark.parametrize("value", [1.001, np.nan])
def test_states_that_are_not_the_cpu_s_are_refused(value: float) -> None:
    states = np.ones((2, 3), np.float32)
    with pytest.raises(VerificationError, match=r"NMSE .* limit 1e-08") as caught:
        devices.require_same(states, states * np.float32(value), OTHER, "moments")
    assert caught.value.remedy == "run `make moments DEVICE=cpu`"
