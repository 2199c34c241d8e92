"""Published images: the list in releases/, README's line of it, and what a job is given."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from pipeline.core.errors import UsageError
from pipeline.release import images
from tools import images as command

IDENTITY = ("-c", "user.name=me", "-c", "user.email=me@here")
FIRST, SECOND, CUDA = (f"ghcr.io/me/it@sha256:{digit * 64}" for digit in "123")


@pytest.fixture
def listed(tmp_path: Path) -> Path:
    file = tmp_path / "images.txt"
    rows = [f"{'a' * 40} cpu {FIRST}", f"{'a' * 40} cuda {CUDA}", f"{'b' * 40} cpu {SECOND}"]
    file.write_text("\n".join(["# cpu of all", *rows]) + "\n")
    return file


def test_readme_names_what_is_published() -> None:
    for file, text in command.documents().items():
        assert file.read_text(encoding="utf-8") == text, "run `python -m tools.images`"


def test_the_newest_of_each_lock_is_taken(listed: Path) -> None:
    assert (images.published("cpu", listed), images.published("cuda", listed)) == (SECOND, CUDA)
    assert command.paragraph(listed) == f"IMAGE is `{SECOND}`, for GPUs (`--gpus all`) `{CUDA}`."
    assert images.published("cpu", listed.with_name("absent")) == ""


def test_another_machine_gets_an_image_that_it_can_pull(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "_of_this_clone", lambda lock: {"cpu": SECOND, "cuda": ""}[lock])
    assert images.pulled("", "cpu") == SECOND and images.pulled(FIRST, "cpu") == FIRST
    for given, lock, said in (
        ("it", "cpu", "IMAGE=it is none that"),
        ("", "cuda", "no image of the project is published"),
    ):
        with pytest.raises(UsageError) as caught:
            images.pulled(given, lock)
        assert said in caught.value.what
        assert "ghcr.io/owner/name@sha256" in str(caught.value.remedy)


def test_a_job_gets_the_image_of_the_sources_as_they_are_here(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not the newest, if an older one holds them; the newest with a sentence, if none does."""
    monkeypatch.setattr(images, "PROJECT", tmp_path)
    monkeypatch.setattr(images, "FILE", tmp_path / "images.txt")
    monkeypatch.setattr(images, "HELD", tmp_path / "held.txt")
    images.HELD.write_text("pipeline\n")
    source = tmp_path / "pipeline"

    def commit(text: str) -> str:
        source.write_text(text)
        (tmp_path / "README.md").write_text(f"not in it: {text}")
        for words in (["add", "pipeline", "README.md"], ["commit", "--quiet", "--message", text]):
            subprocess.run(["git", *IDENTITY, *words], cwd=tmp_path, check=True)
        said = subprocess.run(["git", "rev-parse", "HEAD"], cwd=tmp_path, capture_output=True, text=True, check=True)
        return said.stdout.strip()

    subprocess.run(["git", "init", "--quiet"], cwd=tmp_path, check=True)
    first, second = commit("first"), commit("second")
    images.FILE.write_text(f"{first} cpu {FIRST}\n{second} cpu {SECOND}\n")
    assert images.pulled("", "cpu") == SECOND
    source.write_text("first")
    assert images.pulled("", "cpu") == FIRST and not capsys.readouterr().err
    source.write_text("third")
    assert images.pulled("", "cpu") == SECOND
    assert f"has those of commit {second[:12]}" in capsys.readouterr().err
    source.write_text("second")
    images.HELD.write_text("pipeline\nrecipes\n")
    (tmp_path / "recipes").mkdir()
    assert images.pulled("", "cpu") == SECOND and not capsys.readouterr().err
    (tmp_path / "recipes" / "own.toml").touch()
    assert images.pulled("", "cpu") == SECOND and "no published image holds the sources" in capsys.readouterr().err


def test_the_image_has_no_list_and_does_not_say_that_none_is_published(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(images, "FILE", tmp_path / "images.txt")
    with pytest.raises(UsageError, match="in a clone alone"):
        images.pulled("", "cpu")
