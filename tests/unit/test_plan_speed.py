"""How fast a machine is: measured once, kept, measured anew on another one; and what a plan makes of it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from pipeline.planning import speed
from pipeline.planning.needs import Need, Work
from pipeline.planning.speed import FILE, REFERENCE, Speed, of_this_machine
from tools import plan_fit
from tools.tables import Column, Measured, Row, Table, Value


def test_a_machine_is_measured_once_and_what_it_is_like_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = of_this_machine(tmp_path)
    assert all(value > 0 for value in dataclasses.asdict(first).values())
    assert [file.name for file in tmp_path.iterdir()] == [FILE], "what was written to measure the disk is gone"
    monkeypatch.setattr(speed, "measure", lambda _: pytest.fail("measured again"))
    assert of_this_machine(tmp_path) == first


@pytest.mark.parametrize("said", ["", "{", "[]", '{"cores": 1}', "another machine"])
def test_what_says_nothing_of_this_machine_is_measured_anew(
    said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = {"processor": "another", "cores": 1, **dataclasses.asdict(REFERENCE)}
    (tmp_path / FILE).write_text(json.dumps(other) if said == "another machine" else said, encoding="utf-8")
    own = Speed(products=1.0, copies=2.0, writes=3.0, calls=4.0)
    monkeypatch.setattr(speed, "measure", lambda _: own)
    assert of_this_machine(tmp_path) == own == of_this_machine(tmp_path)
    kept = json.loads((tmp_path / FILE).read_text(encoding="utf-8"))
    assert kept["copies"] == 2.0 and kept["processor"] == speed.processor()


def test_a_plan_makes_no_folder(tmp_path: Path) -> None:
    assert of_this_machine(tmp_path / "not" / "there").products > 0
    assert not list(tmp_path.iterdir())


def test_where_nothing_can_be_written_the_disk_is_taken_for_the_references(tmp_path: Path) -> None:
    assert speed._writes(tmp_path / "no folder", memoryview(bytes(8))) == REFERENCE.writes
    assert 0 < speed._writes(tmp_path, memoryview(bytes(8))) < REFERENCE.writes, "fsync takes longer than 8 bytes"


def test_seconds_grow_on_a_slower_machine_by_what_they_are_spent_on() -> None:
    need = Need(what="", size=1, memory=4.0, work=Work(products=1.0, copies=2.0, writes=4.0, calls=8.0, waits=16.0))
    assert need.on(REFERENCE) == need and need.seconds == 31
    slower = dataclasses.replace(REFERENCE, copies=REFERENCE.copies / 3)
    assert need.on(slower).seconds == pytest.approx(31 + 4)
    half = Speed(**{name: value / 2 for name, value in dataclasses.asdict(REFERENCE).items()})
    assert need.on(half).seconds == pytest.approx(2 * 15 + 16), "the network is no quicker for the machine"
    assert need.times(2, 3).seconds == 62 and need.times(2, 3).memory == 12


def test_what_is_added_to_a_table_of_plans_stands_with_its_model_and_changes_no_row() -> None:
    def table(day: str, *names: str) -> Table:
        measured = Measured(date=day, command="`x`", machine="m")
        rows = tuple(Row(name=name, values={"took": Value(value=float(len(day)))}) for name in names)
        return Table(title="t", about="a", place=1, columns={"took": Column()}, measured=measured, rows=rows)

    before = table("2026-11-29", "one, fetch", "two, fetch")
    joined = plan_fit.joined(before, table("2026-11-30", "one, fetch", "one, int8", "three, fetch"))
    assert [row.name for row in joined.rows] == ["one, fetch", "one, int8", "two, fetch", "three, fetch"]
    assert (joined.rows[0], joined.rows[2]) == before.rows
    assert joined.rows[1].measured and joined.rows[1].measured.date == "2026-11-30"
