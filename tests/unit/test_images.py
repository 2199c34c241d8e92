"""Published images: the list in releases/, README's line of it, and what a job is given."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.core.errors import UsageError
from pipeline.release import images
from tools import images as command

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
    monkeypatch.setattr(images, "published", lambda lock: {"cpu": SECOND, "cuda": ""}[lock])
    assert images.pulled("", "cpu") == SECOND and images.pulled(FIRST, "cpu") == FIRST
    for given, lock, said in (
        ("it", "cpu", "IMAGE=it is none that"),
        ("", "cuda", "no image of the project is published"),
    ):
        with pytest.raises(UsageError) as caught:
            images.pulled(given, lock)
        assert said in caught.value.what
        assert "ghcr.io/owner/name@sha256" in str(caught.value.remedy)


def test_the_image_has_no_list_and_does_not_say_that_none_is_published(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(images, "FILE", tmp_path / "images.txt")
    monkeypatch.setattr(images, "published", lambda lock: "")
    with pytest.raises(UsageError, match="in a clone alone"):
        images.pulled("", "cpu")
