"""Libraries without their symbol tables load and work as before."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tools import strip_libraries


def library(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    assert spec and spec.origin
    return Path(spec.origin)


def test_a_library_works_without_its_symbols(tmp_path: Path) -> None:
    own = library("yaml._yaml")
    file = shutil.copy(own, tmp_path / own.name)
    saved = strip_libraries.cut(file)
    assert saved > 0 and file.stat().st_size == own.stat().st_size - saved
    code = f"""
import importlib.machinery, importlib.util
loader = importlib.machinery.ExtensionFileLoader("_yaml", {str(file)!r})
made = importlib.util.module_from_spec(importlib.util.spec_from_loader("_yaml", loader))
loader.exec_module(made)
assert {str(file)!r} in open("/proc/self/maps").read()
print(made.get_version_string())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip(), done.stderr
    assert strip_libraries.cut(file) == 0  # nothing is left to cut


@pytest.mark.parametrize("content", [b"", b"\x7fELF", b"not a library" * 100, b"\x7fELF\x02\x01" + bytes(200)])
def test_what_is_no_library_stays(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "x.so"
    file.write_bytes(content)
    assert strip_libraries.main([str(tmp_path)]) == 0
    assert file.read_bytes() == content
