"""SHA256SUMS is what coreutils reads, and finds what has changed."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.core import host
from pipeline.core.errors import IntegrityError, PublishError
from pipeline.release import papers, provenance


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "manifests").mkdir()
    for name, data in {"b model ⵣ.tflite": b"abc", "a.md": b"", "manifests/fp32.json": b"{}"}.items():
        (tmp_path / name).write_bytes(data)
    provenance.write_sums(tmp_path, [file for file in tmp_path.rglob("*") if file.is_file()])
    return tmp_path


def test_sums_are_sorted_and_in_the_format_of_coreutils(folder: Path) -> None:
    lines = (folder / "SHA256SUMS").read_text(encoding="utf-8").splitlines()
    assert lines[0] == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855  a.md"
    assert [line[66:] for line in lines] == ["a.md", "b model ⵣ.tflite", "manifests/fp32.json"]
    assert provenance.check_sums(folder) == 3


@pytest.mark.skipif(shutil.which("sha256sum") is None, reason="coreutils is not installed")
@pytest.mark.parametrize(("damage", "status"), [(False, 0), (True, 1)])
def test_sha256sum_agrees(folder: Path, damage: bool, status: int) -> None:
    if damage:
        (folder / "b model ⵣ.tflite").write_bytes(b"abd")
    done = subprocess.run(
        ["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=folder, capture_output=True, check=False
    )
    assert done.returncode == status


@pytest.mark.parametrize(("data", "said"), [(b"abd", "does not have the sha256"), (None, "is missing")])
def test_a_changed_or_missing_file_is_found(folder: Path, data: bytes | None, said: str) -> None:
    file = folder / "b model ⵣ.tflite"
    file.unlink() if data is None else file.write_bytes(data)
    with pytest.raises(IntegrityError, match=said):
        provenance.check_sums(folder)


@pytest.mark.parametrize(
    "text",
    [
        None,
        "",
        "\n",
        "0" * 64 + "  a",
        "0" * 64 + "  a\n\n",
        "Z" * 64 + "  a\n",
        "abc  file\n",
        "0" * 64 + "\n",
        ("0" * 64 + "  a\n") * 2,
    ],
)
def test_spoilt_sums_are_refused(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "SHA256SUMS").write_text(text, encoding="utf-8")
    with pytest.raises(IntegrityError):
        provenance.read_sums(tmp_path)


@pytest.mark.parametrize("name", ["back\\slash", "line\nbreak"])
def test_names_that_coreutils_escapes_are_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(PublishError, match="can't stand in SHA256SUMS"):
        provenance.write_sums(tmp_path, [tmp_path / name])


@given(st.data())
def test_any_other_byte_in_the_sums_is_found(data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        for name in ("a.md", "b ⵣ", "c"):
            (Path(scratch) / name).write_text(name, encoding="utf-8")
        file = provenance.write_sums(Path(scratch), list(Path(scratch).iterdir()))
        whole = file.read_bytes()
        at, bits = data.draw(st.integers(0, len(whole) - 1)), data.draw(st.integers(1, 255))
        file.write_bytes(whole[:at] + bytes([whole[at] ^ bits]) + whole[at + 1 :])
        with pytest.raises(IntegrityError):
            provenance.check_sums(Path(scratch))


def tensors(folder: Path, **changes: object) -> None:
    data = (folder / "b model ⵣ.tflite").read_bytes()
    row = {"name": "w", "offset": 1, "size": 2, "sha256": hashlib.sha256(data[1:3]).hexdigest(), **changes}
    (folder / "tensors.json").write_text(json.dumps({"b model ⵣ.tflite": [row]}), encoding="utf-8")


def test_tensors_are_held_against_their_bytes(folder: Path) -> None:
    tensors(folder)
    assert provenance.check_tensors(folder, ["b model ⵣ.tflite"]) == 1
    with pytest.raises(IntegrityError, match="other files"):
        provenance.check_tensors(folder, ["another.tflite"])
    for changes in ({"offset": 0}, {"size": 1}, {"size": 3}, {"sha256": "0" * 64}, {"offset": -1}, {"size": "2"}):
        tensors(folder, **changes)
        with pytest.raises(IntegrityError):
            provenance.check_tensors(folder, ["b model ⵣ.tflite"])


def test_tensors_get_the_published_names_or_verify_has_to_run_again(tmp_path: Path) -> None:
    listed = tmp_path / "tensors.json"
    listed.write_text('{"int8/step.tflite": [1], "int8-static/step.tflite": [2]}', encoding="utf-8")
    assert provenance.tensors(listed, {"int8/step.tflite": "m_int8.tflite"}) == {"m_int8.tflite": [1]}
    for file, names in ((listed, {"fp32/step.tflite": "m"}), (tmp_path / "not there", {})):
        with pytest.raises(PublishError, match="does not list every file"):
            provenance.tensors(file, names)


@pytest.mark.parametrize(
    ("torch", "linux", "lock"), [("2.13.0+cpu", True, "cpu"), ("2.13.0", True, "cuda"), ("2.13.0", False, "macos")]
)
def test_the_bill_is_of_the_lock_that_has_the_torch_that_was_seen(
    monkeypatch: pytest.MonkeyPatch, torch: str, linux: bool, lock: str
) -> None:
    monkeypatch.setattr(host, "LINUX", linux)
    file = papers._lock_of(torch)
    assert file.stem == lock and f"\ntorch=={torch} " in file.read_text(encoding="utf-8")


def test_the_locks_of_the_environment_are_named_and_no_other_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "locks").mkdir()
    for name in ("cpu", "cuda", "macos", "client", "dev"):
        (tmp_path / "locks" / f"{name}.txt").write_text(name)
    monkeypatch.setattr(papers, "PROJECT", tmp_path)
    assert papers._locks() == {
        f"locks/{name}.txt": hashlib.sha256(name.encode()).hexdigest() for name in ("cpu", "cuda", "macos")
    }
