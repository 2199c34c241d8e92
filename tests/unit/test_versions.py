"""The toolchain that is installed is the one that is locked."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.core import versions
from pipeline.core.errors import UsageError

LOCK = """\
# made by nox -s lock
numpy==2.3.5 \\
    --hash=sha256:aa \\
    --hash=sha256:bb
torch==2.13.0 ; sys_platform == "linux" \\
    --hash=sha256:cc
    # via transformers==9.9.9
ai-edge-litert==2.3.0
"""


@pytest.fixture
def lock(tmp_path: Path) -> Path:
    file = tmp_path / "cpu.txt"
    file.write_text(LOCK, encoding="utf-8")
    return file


def test_locked_reads_pins_and_nothing_else(lock: Path) -> None:
    assert versions.locked(lock) == {"numpy": "2.3.5", "torch": "2.13.0", "ai-edge-litert": "2.3.0"}


def test_check_accepts_the_locked_versions_with_any_local_build_tag(lock: Path) -> None:
    versions.check({"python": "3.11.7", "torch": "2.13.0+cpu", "numpy": "2.3.5", "unlocked": "1"}, lock)


def test_check_names_every_package_that_differs(lock: Path) -> None:
    with pytest.raises(UsageError) as caught:
        versions.check({"torch": "2.12.1+cpu", "numpy": "2.3.4", "ai-edge-litert": "2.3.0"}, lock)
    assert caught.value.what == "torch is 2.12.1, the lock says 2.13.0; numpy is 2.3.4, the lock says 2.3.5"
    assert "make" in caught.value.remedy


def test_without_a_lock_a_warning_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    versions.check({"torch": "0.0.1"}, tmp_path / "absent.txt")
    assert "absent.txt does not exist" in capsys.readouterr().err


def test_installed_knows_this_python_and_leaves_out_what_is_absent() -> None:
    found = versions.installed(("pytest", "no-such-package-at-all"))
    assert sorted(found) == ["pytest", "python"]
    assert found["pytest"] == pytest.__version__


def test_line_shows_the_tools_that_matter_in_a_fixed_order() -> None:
    text = versions.line({"numpy": "2.3.5", "torch": "2.13.0", "python": "3.11.7", "ai-edge-litert": "2.3.0"})
    assert text == "python 3.11.7, torch 2.13.0, ai-edge-litert 2.3.0"
