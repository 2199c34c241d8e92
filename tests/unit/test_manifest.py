"""A manifest says what a stage made, the same in every run, and finds every byte that has changed since."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import re
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.core import manifest
from pipeline.core.errors import IntegrityError
from pipeline.core.manifest import FileRecord, Manifest, Source
from pipeline.core.recipe import PROJECT

facts = st.dictionaries(
    st.text(min_size=1).filter(str.isprintable),
    st.recursive(
        st.none()
        | st.booleans()
        | st.integers()
        | st.floats(allow_nan=False, allow_infinity=False)
        | st.text("añⵣ🙂 "),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("ab", min_size=1), inner, max_size=3),
        max_leaves=8,
    ),
    max_size=4,
)
in_any_folder = settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)


def example(outputs: tuple[FileRecord, ...] = (), **changes: object) -> Manifest:
    made = Manifest(
        stage="int8",
        model="tiny",
        revision="0" * 40,
        recipe_sha256="1" * 64,
        inputs=(FileRecord(path="fp32/step.tflite", size=3, sha256="2" * 64),),
        outputs=outputs,
        facts={"scheme": "dynamic"},
        tools={"python": "3.11.7"},
        image_digest="",
        source=Source(commit="", dirty=False),
    )
    return dataclasses.replace(made, **changes)  # type: ignore[arg-type]


def made_file(folder: Path, data: bytes = b"some bytes", name: str = "int8/step.tflite") -> Path:
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(data)
    return file


def test_a_record_is_relative_path_size_and_sha256(tmp_path: Path) -> None:
    file = made_file(tmp_path, b"abc")
    assert FileRecord.of(file, tmp_path) == FileRecord(
        path="int8/step.tflite", size=3, sha256=hashlib.sha256(b"abc").hexdigest()
    )


@in_any_folder
@given(facts=facts)
def test_what_is_written_is_read_back(tmp_path: Path, facts: dict[str, manifest.Fact]) -> None:
    made = example(outputs=(FileRecord.of(made_file(tmp_path), tmp_path),), facts=facts)
    manifest.write(made, tmp_path / "int8")
    assert manifest.read(tmp_path / "int8") == made


def test_the_text_does_not_depend_on_the_order_of_facts(tmp_path: Path) -> None:
    first = manifest.write(example(facts={"b": 1, "a": {"d": 1, "c": 2}}), tmp_path).read_bytes()
    second = manifest.write(example(facts={"a": {"c": 2, "d": 1}, "b": 1}), tmp_path).read_bytes()
    assert first == second
    assert first.endswith(b"}\n")


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_json_without_a_number_for_it_is_refused(value: float) -> None:
    with pytest.raises(ValueError):
        manifest.dump_json({"value": value})


def test_a_failed_write_leaves_the_old_file_whole(tmp_path: Path) -> None:
    file = tmp_path / "manifest.json"
    manifest.write_atomically(file, "old")
    with pytest.raises(UnicodeEncodeError):
        manifest.write_atomically(file, "new \ud800")
    assert file.read_text(encoding="utf-8") == "old"
    assert os.listdir(tmp_path) == ["manifest.json"]


def test_two_writers_of_a_file_do_not_take_each_other_s_part_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stages of a model that two runs of make build share the note of hashes."""
    file, synced = tmp_path / "hashed.json", os.fsync

    def interrupted(descriptor: int) -> None:
        monkeypatch.setattr(os, "fsync", synced)
        manifest.write_atomically(file, "other")
        synced(descriptor)

    monkeypatch.setattr(os, "fsync", interrupted)
    manifest.write_atomically(file, "one")
    assert file.read_text(encoding="utf-8") == "one"
    assert os.listdir(tmp_path) == ["hashed.json"]


def test_the_file_appears_by_rename_and_nothing_else_stays(tmp_path: Path) -> None:
    file = tmp_path / "manifest.json"
    manifest.write_atomically(file, "old")
    with file.open(encoding="utf-8") as still_open:
        manifest.write_atomically(file, "new")
        assert still_open.read() == "old"
    assert file.read_text(encoding="utf-8") == "new"
    assert os.listdir(tmp_path) == ["manifest.json"]


def test_reading_a_missing_manifest_says_which_stage_to_run(tmp_path: Path) -> None:
    with pytest.raises(IntegrityError) as caught:
        manifest.read(tmp_path / "golden")
    assert "golden is not finished" in caught.value.cause
    assert "make golden" in caught.value.remedy


def _without(key: str) -> str:
    raw = dataclasses.asdict(example())
    del raw[key]
    return json.dumps(raw)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        "\x00",
        json.dumps({**dataclasses.asdict(example()), "schema": 99}),
        json.dumps({**dataclasses.asdict(example()), "unknown": 1}),
        json.dumps({**dataclasses.asdict(example()), "outputs": [{"path": "a"}]}),
        json.dumps({**dataclasses.asdict(example()), "outputs": 3}),
        *(
            json.dumps({**dataclasses.asdict(example()), "outputs": [{"path": path, "size": 1, "sha256": ""}]})
            for path in (3, "/etc/passwd", "int8/../../secret")
        ),
        *(_without(field.name) for field in dataclasses.fields(Manifest)),
    ],
)
def test_a_spoilt_manifest_is_an_integrity_error(tmp_path: Path, text: str) -> None:
    (tmp_path / "manifest.json").write_text(text, encoding="utf-8")
    with pytest.raises(IntegrityError, match="can't be read"):
        manifest.read(tmp_path)


@in_any_folder
@given(st.data())
def test_a_spoilt_byte_of_a_manifest_raises_nothing_but_integrity_errors(tmp_path: Path, data: st.DataObject) -> None:
    record = FileRecord.of(made_file(tmp_path), tmp_path)
    file = manifest.write(example(outputs=(record,)), tmp_path / "int8")
    raw = bytearray(file.read_bytes())
    raw[data.draw(st.integers(0, len(raw) - 1), label="place")] = data.draw(st.integers(0, 255), label="byte")
    file.write_bytes(raw)
    try:
        manifest.check(manifest.read(file.parent).outputs, tmp_path)
    except IntegrityError as error:
        assert error.remedy


def test_output_is_found_by_the_end_of_its_path() -> None:
    step = FileRecord(path="int8/step.tflite", size=1, sha256="")
    made = example(outputs=(FileRecord(path="int8/other-step.tflite", size=2, sha256=""), step))
    assert made.output("step.tflite") is step
    assert made.output("int8/step.tflite") is step
    with pytest.raises(IntegrityError, match=r"stage int8 lists no file bundle\.litertlm"):
        made.output("bundle.litertlm")


def test_check_accepts_what_is_unchanged(tmp_path: Path) -> None:
    records = [FileRecord.of(made_file(tmp_path, data, name), tmp_path) for data, name in [(b"", "a"), (b"x", "b/c")]]
    manifest.check(records, tmp_path)


def test_check_finds_a_missing_file(tmp_path: Path) -> None:
    file = made_file(tmp_path)
    record = FileRecord.of(file, tmp_path)
    file.unlink()
    with pytest.raises(IntegrityError, match="is missing") as caught:
        manifest.check([record], tmp_path)
    assert str(tmp_path / "int8") in caught.value.remedy


def test_check_finds_a_folder_in_a_files_place(tmp_path: Path) -> None:
    file = made_file(tmp_path)
    record = FileRecord.of(file, tmp_path)
    file.unlink()
    file.mkdir()
    with pytest.raises(IntegrityError, match="is missing"):
        manifest.check([record], tmp_path)


@in_any_folder
@given(data=st.binary(min_size=1, max_size=200), keep=st.integers(0, 199))
def test_check_finds_a_truncated_file(tmp_path: Path, data: bytes, keep: int) -> None:
    file = made_file(tmp_path, data)
    record = FileRecord.of(file, tmp_path)
    file.write_bytes(data[: min(keep, len(data) - 1)])
    with pytest.raises(IntegrityError, match="its manifest says"):
        manifest.check([record], tmp_path)


@in_any_folder
@given(data=st.binary(min_size=1, max_size=200), place=st.integers(0, 199), flip=st.integers(1, 255))
def test_check_finds_any_single_changed_byte(tmp_path: Path, data: bytes, place: int, flip: int) -> None:
    file = made_file(tmp_path, data)
    record = FileRecord.of(file, tmp_path)
    changed = bytearray(data)
    changed[place % len(data)] ^= flip
    file.write_bytes(changed)
    with pytest.raises(IntegrityError, match="sha256"):
        manifest.check([record], tmp_path)


def test_check_follows_links(tmp_path: Path) -> None:
    target = made_file(tmp_path, name="elsewhere")
    link = tmp_path / "fetch" / "model.safetensors"
    link.parent.mkdir()
    link.symlink_to(target)
    record = FileRecord.of(link, tmp_path)
    manifest.check([record], tmp_path)
    target.write_bytes(b"other")
    with pytest.raises(IntegrityError):
        manifest.check([record], tmp_path)


# ---- hashes that are known


class Reads:
    """Counts the files that are read to be hashed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count, right = 0, FileRecord.of

        def of(*arguments: object) -> FileRecord:
            self.count += 1
            return right(*arguments)  # type: ignore[arg-type]

        monkeypatch.setattr(FileRecord, "of", of)


def old_file(folder: Path, data: bytes = b"some bytes") -> Path:
    """A file that nobody touched for longer than a tick of the file system's clock."""
    file = made_file(folder, data)
    time.sleep(0.15)
    return file


def test_a_file_that_is_what_it_was_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    records = manifest.describe([old_file(tmp_path)], tmp_path)
    reads = Reads(monkeypatch)
    for _ in range(3):  # as one process after the other
        known = manifest.Known(tmp_path)
        manifest.check(records, tmp_path, known)
        assert manifest.describe([tmp_path / records[0].path], tmp_path, known) == records
        known.keep()
    assert reads.count == 1


@pytest.mark.parametrize("how", ["in place", "by rename", "with its old time"])
def test_a_known_file_that_was_changed_is_found(tmp_path: Path, how: str) -> None:
    file = old_file(tmp_path)
    known = manifest.Known(tmp_path)
    records = manifest.describe([file], tmp_path, known)
    known.keep()
    before = file.stat()
    if how == "by rename":
        other = file.with_name("other")
        other.write_bytes(b"some bytez")
        other.replace(file)
    else:
        with file.open("r+b") as stream:
            stream.seek(-1, os.SEEK_END)
            stream.write(b"z")
    if how == "with its old time":
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(IntegrityError, match="does not have the sha256"):
        manifest.check(records, tmp_path, manifest.Known(tmp_path))


def test_a_file_of_this_very_moment_is_not_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another change within the clock's tick would leave no trace."""
    monkeypatch.setattr(manifest.Known, "_TICK", 60_000_000_000)
    known = manifest.Known(tmp_path)
    file = made_file(tmp_path)
    records = manifest.describe([file], tmp_path, known)
    known.keep()
    file.write_bytes(b"some bytez")
    with pytest.raises(IntegrityError):
        manifest.check(records, tmp_path, manifest.Known(tmp_path))


@pytest.mark.parametrize("note", ["", "[]", "{", "[" * 100_000, '{"FILE": 5}', '{"FILE": {"a": 1}}', '{"FILE": []}'])
def test_a_damaged_note_costs_time_alone(tmp_path: Path, note: str) -> None:
    (tmp_path / ".inputs").mkdir()
    file = made_file(tmp_path)
    (tmp_path / ".inputs" / "hashed.json").write_text(note.replace("FILE", str(file)))
    records = manifest.describe([file], tmp_path)
    manifest.check(records, tmp_path, manifest.Known(tmp_path))


# ---- facts


READ = {
    "integer": (7, [None, 7.0, True, "7", [7]]),
    "integers": ([1, 106], [None, 1, [1, None], [1.5], [True], "1"]),
    "number": (30.0, ["30", True, [30.0]]),
    "text": ("cpu", [None, 7, ["cpu"]]),
    "table": ({"a": 1}, [None, [1], "a"]),
    "tables": ([{"a": 1}], [None, {"a": 1}, [1]]),
}


@pytest.mark.parametrize("kind", READ)
def test_a_fact_is_read_as_it_stands(kind: str) -> None:
    value, _ = READ[kind]
    assert getattr(example(facts={"bos": value}), kind)("bos") == value


def test_a_number_that_a_model_does_not_have_is_none() -> None:
    assert example(facts={"cap": None}).number("cap") is None


@pytest.mark.parametrize(("kind", "wrong"), [(kind, wrong) for kind, (_, wrongs) in READ.items() for wrong in wrongs])
def test_a_wrong_fact_is_no_zero_but_said_with_its_stage(kind: str, wrong: object) -> None:
    with pytest.raises(IntegrityError, match="the manifest of stage int8 has .* as its fact bos, which is not a "):
        getattr(example(facts={"bos": wrong}), kind)("bos")


@pytest.mark.parametrize("kind", READ)
def test_a_missing_fact_is_said_with_its_stage(kind: str) -> None:
    with pytest.raises(IntegrityError, match="the manifest of stage int8 has no fact bos"):
        getattr(example(facts={}), kind)("bos")


def test_no_stage_reads_facts_by_an_assertion_or_a_cast() -> None:
    for file in sorted((PROJECT / "pipeline").rglob("*.py")):
        found = re.findall(r"cast\([^\n]*\bfacts\b.*|\bfacts\[\"parameters\"\]\n *assert.*", file.read_text("utf-8"))
        assert not found, (file, found)
