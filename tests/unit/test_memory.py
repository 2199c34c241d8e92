"""Reading the memory limits, and refusing what does not fit."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.core import memory
from pipeline.core.errors import ResourceError


def machine(root: Path, **files: str) -> Path:
    for name, text in files.items():
        file = root / name.replace("__", "/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="ascii")
    return root


MEMINFO = {"proc__meminfo": "MemTotal:  2000 kB\nMemAvailable:   1000 kB\n"}


def test_the_machines_free_memory(tmp_path: Path) -> None:
    assert memory.available(machine(tmp_path, **MEMINFO)) == 1_024_000


def test_a_cgroup_of_version_2_is_the_limit_if_it_leaves_less(tmp_path: Path) -> None:
    root = machine(tmp_path, **MEMINFO)
    group = root / "sys/fs/cgroup"
    group.mkdir(parents=True)
    (group / "memory.max").write_text("600000\n")
    (group / "memory.current").write_text("100000\n")
    assert memory.available(root) == 500_000


def test_a_cgroup_of_version_1(tmp_path: Path) -> None:
    root = machine(tmp_path, **MEMINFO)
    group = root / "sys/fs/cgroup/memory"
    group.mkdir(parents=True)
    (group / "memory.limit_in_bytes").write_text("300000")
    (group / "memory.usage_in_bytes").write_text("400000")
    assert memory.available(root) == 0


@pytest.mark.parametrize("unlimited", ["max", "9223372036854771712"])
def test_no_limit_in_the_cgroup(tmp_path: Path, unlimited: str) -> None:
    root = machine(tmp_path, **MEMINFO)
    group = root / "sys/fs/cgroup"
    group.mkdir(parents=True)
    (group / "memory.max").write_text(unlimited)
    (group / "memory.current").write_text("5")
    assert memory.available(root) == 1_024_000


def test_unknown_memory_refuses_nothing(tmp_path: Path) -> None:
    assert memory.available(tmp_path) is None
    memory.require(1 << 60, "everything", "", tmp_path)


def test_too_little_memory_is_refused_with_both_numbers(tmp_path: Path) -> None:
    root = machine(tmp_path, **MEMINFO)
    memory.require(1_000_000, "a small model", "", root)
    with pytest.raises(ResourceError, match="a large model needs about 2.0 GB of memory, 1.0 MB are free"):
        memory.require(2_000_000_000, "a large model", "use a larger machine", root)


def test_this_machine_has_some() -> None:
    free = memory.available()
    assert free is None or free > 1 << 20
