"""Other programs: their output, or None when there is none to trust."""

from __future__ import annotations

import sys
from pathlib import Path

from pipeline.core import process


def test_output_is_stripped_standard_output() -> None:
    assert process.output([sys.executable, "-c", "print(' hello ')"]) == "hello"


def test_a_program_that_fails_has_no_output() -> None:
    assert process.output([sys.executable, "-c", "print('half'); raise SystemExit(3)"]) is None


def test_a_program_that_is_not_there_has_no_output(tmp_path: Path) -> None:
    assert process.output([str(tmp_path / "nothing")]) is None


def test_folder_and_environment_are_passed_on(tmp_path: Path) -> None:
    code = "import os; print(os.getcwd(), os.environ['COLOUR'])"
    found = process.output([sys.executable, "-c", code], cwd=tmp_path, env={"COLOUR": "red"})
    assert found == f"{tmp_path.resolve()} red"
