"""What the comparison of two sources says of processor seconds."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tools import tables, turns


def test_each_target_and_all_together_stand_beside_what_they_were(tmp_path: Path) -> None:
    made = turns.table("abc1234", {"graph": (20.0, 5.0), "verify": (60.0, 15.0)})
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
