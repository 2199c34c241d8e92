"""SHA256SUMS is what coreutils reads, and finds what has changed."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from pipeline.core.errors import IntegrityError, PublishError
from pipeline.release import provenance


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


@pytest.mark.parametrize("text", [None, "abc  file\n", "0" * 64 + "\n", ("0" * 64 + "  a\n") * 2])
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
