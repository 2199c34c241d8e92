"""A manifest says what a stage made, the same in every run, and finds every byte that has changed since."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import re
import time
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.core import facts as stage_facts
from pipeline.core import manifest, records
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
in_any_folder = settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])


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


def test_a_link_is_the_file_that_it_leads_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A local checkpoint is hashed for its revision, and as fetch's results: links."""
    file, known, reads = old_file(tmp_path), manifest.Known(tmp_path), Reads(monkeypatch)
    (tmp_path / "link").symlink_to(file)
    (record,) = manifest.describe([file], tmp_path, known)
    (linked,) = manifest.describe([tmp_path / "link"], tmp_path, known)
    assert reads.count == 1 and linked.sha256 == record.sha256 and linked.path == "link"


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
    assert known.sha256(file) is None
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


def test_a_name_that_is_no_text_is_known_as_well(tmp_path: Path) -> None:
    """Linux takes any bytes as a file's name."""
    file = tmp_path / os.fsdecode(b"LICENSE-\xff")
    file.write_bytes(b"some bytes")
    os.utime(file, ns=(1, 1))
    known = manifest.Known(tmp_path)
    known.sums[str(file)] = [*manifest.Known._identity(file), "a" * 64]
    known.keep()
    assert manifest.Known(tmp_path).sha256(file) == "a" * 64


# ---- facts


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layer:
    name: str
    rows: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Facts:
    bos: int
    share: float
    device: Literal["cpu", "cuda"]
    passed: bool
    cap: float | None
    stop: tuple[int, ...]
    sizes: Mapping[str, int]
    layers: tuple[Layer, ...]
    noted: Mapping[str, object]
    head: Layer | None = None
    texts: int | None = None


FACTS = Facts(
    bos=2,
    share=1.0,
    device="cpu",
    passed=True,
    cap=None,
    stop=(1, 106),
    sizes={"step.tflite": 7},
    layers=(Layer(name="q", rows=3),),
    noted={"any": [1, None, {"x": "y"}]},
    head=Layer(name="head", rows=4),
)


def test_facts_are_read_as_they_were_written(tmp_path: Path) -> None:
    manifest.write(example(facts=records.table(FACTS)), tmp_path)
    assert manifest.read(tmp_path).told(Facts) == FACTS


def test_a_fact_is_left_out_where_it_has_its_default_and_only_there() -> None:
    told = records.table(FACTS)
    assert "texts" not in told and told["cap"] is None and told["head"] == {"name": "head", "rows": 4}
    assert told["stop"] == [1, 106] and told["layers"] == [{"name": "q", "rows": 3}]


def test_whole_numbers_are_numbers_too() -> None:
    read = example(facts={**records.table(FACTS), "share": 1, "cap": 30}).told(Facts)
    assert (read.share, read.cap) == (1.0, 30.0) and type(read.share) is float


WRONG: dict[str, list[object]] = {
    "bos": [None, 7.0, True, "7", [7]],
    "share": [None, "1", True, [1.0]],
    "device": ["tpu", None, 1],
    "passed": [1, 0, None, "true"],
    "cap": ["30", True, [30.0]],
    "stop": [None, [1, None], [1.5], [True], "1", 1],
    "sizes": [None, [7], {"step.tflite": "7"}],
    "layers": [{}, [{"name": "q"}], [{"name": "q", "rows": 3, "bits": 4}], [3]],
    "noted": [None, [], 3],
    "head": [{}, [], "head"],
    "texts": ["3", 3.0],
}


@pytest.mark.parametrize(("fact", "value"), [(fact, value) for fact, values in WRONG.items() for value in values])
def test_a_wrong_fact_is_no_zero_but_said_with_its_stage(fact: str, value: object) -> None:
    with pytest.raises(IntegrityError, match=rf"the manifest of stage int8 are wrong: `{fact}\b.*` is "):
        example(facts={**records.table(FACTS), fact: value}).told(Facts)


@pytest.mark.parametrize("fact", sorted(records.table(FACTS).keys() - {"head"}))
def test_a_missing_fact_is_said_with_its_stage(fact: str) -> None:
    told = {name: value for name, value in records.table(FACTS).items() if name != fact}
    with pytest.raises(IntegrityError, match=f"in the manifest of stage int8 are wrong: `{fact}` is missing"):
        example(facts=told).told(Facts)


def test_an_unknown_fact_is_said_with_its_stage() -> None:
    with pytest.raises(IntegrityError, match="in the manifest of stage int8 are wrong: `txts` is unknown"):
        example(facts={**records.table(FACTS), "txts": 3}).told(Facts)


def test_facts_by_names_of_a_stages_own_choice_are_read_one_by_one() -> None:
    made = example(facts=records.table({"fp32": Layer(name="q", rows=3), "int8": Layer(name="q", rows=4)}))
    assert made.part("int8", Layer).rows == 4
    with pytest.raises(IntegrityError, match="in the manifest of stage int8 are wrong: `int4` is missing"):
        made.part("int4", Layer)
    with pytest.raises(IntegrityError, match="of stage int8 are wrong: `int8.rows` is '4', not a whole"):
        example(facts={"int8": {"name": "q", "rows": "4"}}).part("int8", Layer)


STAGES = [kind for kind in vars(stage_facts).values() if isinstance(kind, type) and dataclasses.is_dataclass(kind)]


@pytest.mark.parametrize("kind", STAGES)
def test_every_stages_facts_are_of_kinds_that_can_be_read(kind: type) -> None:
    """By an example of each: a kind that the reader does not know would stop the stage after its work."""
    drawn = st.builds(kind, **{field: known(hint) for field, hint in typing.get_type_hints(kind).items()})

    @given(drawn)
    @settings(max_examples=20)
    def check(made: Any) -> None:
        assert records.build(kind, json.loads(manifest.dump_json(records.table(made)))) == made

    check()


def known(hint: Any) -> st.SearchStrategy[Any]:
    """Examples of a type hint; of `object` a text, and no number that JSON can't hold."""
    if hint is object:
        return st.text("añⵣ")
    if hint is float:
        return st.floats(allow_nan=False, allow_infinity=False)
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is tuple:
        return st.lists(known(arguments[0]), max_size=2).map(tuple)
    if origin is Mapping:
        return st.dictionaries(st.text("ab"), known(arguments[1]), max_size=2)
    if origin is Literal:
        return st.sampled_from(arguments)
    if arguments:
        return st.none() | known(arguments[0])
    if dataclasses.is_dataclass(hint):
        return st.builds(hint, **{name: known(kind) for name, kind in typing.get_type_hints(hint).items()})
    return st.from_type(hint)


def test_facts_are_read_by_the_one_reader() -> None:
    for file in sorted((PROJECT / "pipeline").rglob("*.py")):
        found = re.findall(r"\.facts(?:\[|\.get\()", file.read_text("utf-8"))
        assert not found or file.name == "manifest.py", (file, found)
