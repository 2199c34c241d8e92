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


@pytest.mark.parametrize(
    ("line", "folder", "limit", "used", "prefix"),
    [
        ("0::/jobs/one", "sys/fs/cgroup", "memory.max", "memory.current", ""),
        ("4:memory:/jobs/one", "sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
    ],
)
def test_the_group_that_holds_this_process_counts_and_so_do_those_around_it(
    tmp_path: Path, line: str, folder: str, limit: str, used: str, prefix: str
) -> None:
    root = machine(tmp_path, **MEMINFO, proc__self__cgroup=f"7:pids:/\n{line}\n")
    outer, inner = root / folder / "jobs", root / folder / "jobs" / "one"
    inner.mkdir(parents=True)
    for group, most in ((outer, 900_000), (inner, 700_000)):
        (group / limit).write_text(f"{most}\n")
        (group / used).write_text("100000\n")
    assert memory.available(root) == 600_000
    (inner / "memory.stat").write_text(f"{prefix}active_file 50000\n{prefix}inactive_file 20000\nother 7\n")
    assert memory.available(root) == 670_000  # files in the page cache are given up when memory runs short
    (outer / limit).write_text("400000\n")
    assert memory.available(root) == 300_000


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
