"""What the comparison of two sources says of processor seconds."""

from __future__ import annotations

import subprocess
import sys
from hashlib import sha256
from pathlib import Path

import pytest

from tools import tables, turns


def test_each_target_and_all_together_stand_beside_what_they_were(tmp_path: Path) -> None:
    made = turns.table("abc1234", {"graph": (20.0, 5.0), "verify": (60.0, 15.0)}, *turns.TABLE)
    found = {row.name: {key: value.value for key, value in row.values.items()} for row in made.rows}
    assert found["verify"] == {"before": 60, "now": 15, "now / before": 0.25}
    assert found["together"] == {"before": 80, "now": 20, "now / before": 0.25}
    tables.write_all({"turns": made}, tmp_path)
    assert tables.read(tmp_path / "turns.json").title == made.title


def test_processes_of_processes_count(tmp_path: Path) -> None:
    work = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'sum(range(10**7))'])"
    (tmp_path / "Makefile").write_text(f'work:\n\t@{sys.executable} -c "{work}"\nfail:\n\t@false\n', encoding="utf-8")
    assert turns.make(tmp_path, "work", tmp_path) > 0.05
    with pytest.raises(subprocess.CalledProcessError):
        turns.make(tmp_path, "fail", tmp_path)


def test_a_source_with_other_locks_gets_an_environment_of_its_own(tmp_path: Path) -> None:
    """A stage refuses packages that its lock does not name, so ours is of no use to it."""
    ours, lock = tmp_path / "ours", "torch==2\n"
    ours.mkdir()
    digest = sha256(lock.encode()).hexdigest()
    (ours / ".ready").write_text(f"lock cpu\n{digest}  locks/cpu.txt\n{'0' * 64}  locks/dev.txt\n", encoding="utf-8")
    for name, held in (("same", lock), ("other", "torch==1\n")):
        source = tmp_path / name
        for folder in (source / "locks", source / "tools"):
            folder.mkdir(parents=True)
        (source / "locks" / "cpu.txt").write_text(held, encoding="utf-8")
        setup = source / "tools" / "setup.sh"
        setup.write_text('#!/bin/sh\nmkdir "$1" && echo "lock $2" >"$1/.ready"\n', encoding="utf-8")
        setup.chmod(0o755)
        turns.give_environment(source, ours)
    assert (tmp_path / "same" / ".venv").resolve() == ours
    other = tmp_path / "other" / ".venv"
    assert not other.is_symlink()
    assert (other / ".ready").read_text(encoding="utf-8") == "lock cpu\n"
