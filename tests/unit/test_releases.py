"""A release description is right or is refused with the key's name; nothing is uploaded that names no commit."""

from __future__ import annotations

import hashlib
import json
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.core import manifest
from pipeline.core.errors import IntegrityError, UsageError
from pipeline.core.manifest import FileRecord, Manifest, Source
from pipeline.core.recipe import PROJECT
from pipeline.release import description
from tools import rebuilt
from tools import release as command

DESCRIPTIONS = sorted((PROJECT / "releases").glob("*.toml"))
COMMIT = "0123456789abcdef0123456789abcdef01234567"
GOOD = {"model": "org/name", "revision": COMMIT, "recipe": "gemma3n", "target": "org/name-litert", "tag": "v1"}


def write(folder: Path, table: dict[str, str], schema: str = "schema = 1\n") -> Path:
    file = folder / "release.toml"
    file.write_text(schema + "".join(f"{key} = {json.dumps(value)}\n" for key, value in table.items()))
    return file


def refused(file: Path | None, given: dict[str, str]) -> str:
    with pytest.raises(UsageError) as caught:
        description.describe(file, given)
    assert caught.value.remedy
    return caught.value.what


@pytest.mark.parametrize("file", DESCRIPTIONS, ids=lambda file: file.stem)
def test_every_description_loads_and_its_recipe_too(file: Path) -> None:
    release = description.describe(file, {})
    assert (PROJECT / release.settings()["RECIPE"]).is_file()


def test_there_is_one_and_it_is_the_example() -> None:
    assert (PROJECT / description.KIND.example) in DESCRIPTIONS


def test_a_description_and_the_same_words_given_are_one_release(tmp_path: Path) -> None:
    read = description.describe(write(tmp_path, GOOD), {})
    assert read == description.describe(None, GOOD) == description.describe(write(tmp_path, GOOD), GOOD)
    assert read.settings() == {
        "MODEL_ID": "org/name",
        "REVISION": COMMIT,
        "RECIPE": "pipeline/recipes/gemma3n.toml",
        "GRAPHS": "",
        "RUNG": "",
        "HF_REPO": "org/name-litert",
        "TAG": "v1",
    }


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model", "name"),
        ("model", "org/name/more"),
        ("model", "org/name\nHF_TOKEN=x"),
        ("model", "../name"),
        ("target", "org/name"),
        ("target", "https://hub/org"),
        ("recipe", "absent"),
        ("recipe", "../gemma3n"),
        ("tag", "main"),
        ("tag", "latest"),
        ("tag", "v 1"),
        ("tag", COMMIT),
        ("revision", "v1"),
        ("revision", COMMIT[:-1]),
        ("revision", COMMIT.upper()),
        ("revision", ""),
        ("graphs", "decoder"),
        ("extra", "x"),
    ],
)
def test_a_value_that_no_release_can_have_is_refused(tmp_path: Path, key: str, value: str) -> None:
    assert key in refused(write(tmp_path, {**GOOD, key: value}), {})


@pytest.mark.parametrize("key", GOOD)
def test_a_missing_key_is_named(tmp_path: Path, key: str) -> None:
    assert f"release.{key}" in refused(write(tmp_path, {k: v for k, v in GOOD.items() if k != key}), {})


def test_what_is_no_description_is_refused(tmp_path: Path) -> None:
    assert "schema = 1" in refused(write(tmp_path, GOOD, schema=""), {})
    assert "No such file" in refused(tmp_path / "absent.toml", {})


def test_an_open_revision_can_be_given_but_nothing_else_changed(tmp_path: Path) -> None:
    file = write(tmp_path, {**GOOD, "revision": "main"})
    assert not description.describe(file, {}).is_pinned
    assert description.describe(file, {"revision": COMMIT}).revision == COMMIT
    assert "tag" in refused(file, {"tag": "v2"})
    assert "revision" in refused(write(tmp_path, GOOD), {"revision": COMMIT[::-1]})


def test_an_upload_needs_a_commit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = str(write(tmp_path, {**GOOD, "revision": "main"}))
    assert command.main([file]) == 0
    assert "REVISION=main" in capsys.readouterr().out
    assert command.main([file, "--upload"]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and "moves" in printed.err
    assert command.main([file, "--upload", "--revision", COMMIT]) == 0


@given(st.text(max_size=45))
def test_only_forty_digits_are_a_commit(text: str) -> None:
    try:
        release = description.describe(None, {**GOOD, "revision": text})
    except UsageError:
        return
    assert release.is_pinned == (len(text) == 40 and set(text) <= set("0123456789abcdef"))
    assert release.is_pinned or text == "main"


def make(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = ["make", "--no-print-directory", *arguments]
    return subprocess.run(command, cwd=PROJECT, capture_output=True, text=True)


def test_make_release_runs_publish_with_the_descriptions_settings(tmp_path: Path) -> None:
    # GNU make runs lines that name $(MAKE) under -n as well, and the inner make is told -n too.
    done = make("-n", "release", f"RELEASE={write(tmp_path, GOOD)}", f"ARTIFACTS={tmp_path}")
    assert done.returncode == 0, done.stderr
    assert f"-m pipeline.fetch --model-id org/name --artifacts {tmp_path}" in done.stdout
    assert f"--revision {COMMIT}" in done.stdout and "-m pipeline.publish" in done.stdout


def test_make_release_stops_at_a_revision_that_moves(tmp_path: Path) -> None:
    file = write(tmp_path, {**GOOD, "revision": "main"})
    done = make("-n", "release", f"RELEASE={file}", f"ARTIFACTS={tmp_path}", "CONFIRM=yes")
    assert done.returncode == 2 and "which moves" in done.stderr
    assert "pipeline.publish" not in done.stdout


# --- a release that is built again ------------------------------------------------------------------------------------


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """A published folder, and one with the same files and a manifest."""
    published, again = tmp_path / "published", tmp_path / "model" / "publish"
    for folder in (published, again):
        (folder / "manifests").mkdir(parents=True)
        (folder / "m.tflite").write_bytes(b"weights")
        (folder / "README.md").write_text("card")
        (folder / "manifests" / "verify.json").write_text(folder.name)
        (folder / "report.json").write_text(f"timings of {folder.name}")
    records = tuple(
        FileRecord(path=f"publish/{name}", size=1, sha256=hashlib.sha256(name.encode()).hexdigest())
        for name in ("README.md", "m.tflite", "manifests/verify.json")
    )
    made = Manifest(
        stage="publish",
        model="org/name",
        revision=COMMIT,
        recipe_sha256="0" * 64,
        inputs=(),
        outputs=records,
        facts={},
        tools={},
        image_digest="",
        source=Source(commit="", dirty=False),
    )
    manifest.write(made, again)
    return published, again


def test_a_rebuilt_release_is_held_against_what_was_published(folders: tuple[Path, Path]) -> None:
    assert sorted(rebuilt.compare(*folders)) == ["README.md", "m.tflite"]


@pytest.mark.parametrize("name", ["README.md", "m.tflite"])
@pytest.mark.parametrize("data", [None, b"", b"weightz", b"weights and more"])
def test_any_other_byte_is_found(folders: tuple[Path, Path], name: str, data: bytes | None) -> None:
    (folders[0] / name).unlink()
    if data is not None:
        (folders[0] / name).write_bytes(data)
    with pytest.raises(IntegrityError, match=name):
        rebuilt.compare(*folders)


CHECK = "| KLD on text | Hugging Face | 8.697e-13 | ≤ 1e-06 | 2048 positions; 95 % interval 8.33e-13 to 9.08e-13 |"
INT8 = "| top-1 | fp32 | 0.9863 | ≥ 0.96 | 84 of 84 shapes, 294 rows; worst in b2_s128_none, row 1; 98.09% to 99.12% |"
SCORES = "| scores that are off |  | 0 | ≤ 0 | 4 texts scored; largest error 1.06e-05 nats, limit 0.005 |"


@pytest.mark.parametrize(
    ("line", "old", "new", "same"),
    [
        (CHECK, "8.697e-13", "8.691e-13", True),  # another processor's last digits
        (CHECK, "8.33e-13 to 9.08e-13", "5e-13 to 2.1e-12", True),  # rounding, and nothing else
        (CHECK, "8.697e-13", "8.7e-06", False),
        (CHECK, "≤ 1e-06", "≤ 1.01e-06", False),  # a limit is not measured
        (CHECK, "2048", "2047", False),
        (CHECK, "8.697e-13", "not known", False),
        (CHECK, "KLD on text", "KLD on a text", False),
        (INT8, "0.9863", "0.9858", True),
        (INT8, "0.9863", "1", True),
        (INT8, "0.9863", "0.93", False),
        (INT8, "98.09%", "97.60%", True),
        (INT8, "98.09%", "58.09%", False),
        (INT8, "b2_s128_none, row 1", "b3_s17_left, row 2", True),
        (INT8, "294 rows", "293 rows", False),
        (SCORES, "1.06e-05", "3.1e-06", True),
        (SCORES, "| 0 |", "| 1 |", False),
        (SCORES, "limit 0.005", "limit 0.5", False),
        ("numpy 2.4.6, python 3.11.7", "2.4.6", "2.4.7", False),  # no figure
        ("| `m.tflite` | float32, step graph | 1.6 kB |", "1.6", "1.61", False),
    ],
)
def test_a_card_is_the_same_if_its_figures_are_within_five_percent(
    folders: tuple[Path, Path], line: str, old: str, new: str, same: bool
) -> None:
    """float32's last digits differ between kinds of processors: the weekly rebuild would be red by itself."""
    published, again = folders
    assert old in line
    (published / "README.md").write_text(f"# m\n{line}\nend\n", encoding="utf-8")
    (again / "README.md").write_text(f"# m\n{line.replace(old, new)}\nend\n", encoding="utf-8")
    if same:
        assert "README.md" in rebuilt.compare(published, again)
    else:
        with pytest.raises(IntegrityError, match=r"README.md differs: line 2 is "):
            rebuilt.compare(published, again)
    (published / "m.tflite").write_text(line)
    (again / "m.tflite").write_text(line.replace(old, new))
    with pytest.raises(IntegrityError, match="differs"):
        rebuilt.compare(published, again)  # a model file has its bytes or is another one


def test_nothing_is_not_the_same(folders: tuple[Path, Path]) -> None:
    made = manifest.read(folders[1])
    object.__setattr__(made, "outputs", made.outputs[:1])
    manifest.write(made, folders[1])
    with pytest.raises(IntegrityError, match="no model file"):
        rebuilt.compare(*folders)
