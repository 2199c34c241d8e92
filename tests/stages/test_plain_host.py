"""Without what only Linux has, the stages make the same bytes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from line import Line, lasting
from plain_host import PROJECT

from pipeline.core import manifest

CHEAP = ("fetch", "graph", "fp32", "fp16", "int8", "bundle")
"""All that makes a file of the shipped model; what judges takes longer, and asks a host for nothing else."""


def test_a_host_without_linux_s_own_makes_the_same_bytes(built: Line, tmp_path: Path) -> None:
    words = ["--model-id", str(built.model), "--artifacts", str(tmp_path), "--recipe", str(built.recipe)]
    modules = ",".join(f"pipeline.{stage}" for stage in CHEAP)
    command = [sys.executable, str(Path(__file__).with_name("plain_host.py")), modules, *words]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for stage in CHEAP:
        here, there = (root / stage for root in (built.root, tmp_path / built.model.name))
        names = [str(Path(record.path).relative_to(stage)) for record in manifest.read(here).outputs]
        assert lasting(there, *names) == lasting(here, *names)
        assert '"peak_anonymous": 0' not in (there / "run.json").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("asks", "said"),
    [
        ("from pathlib import Path; Path('/proc/self/status').read_text()", "the pipeline opens /proc/self/status"),
        ("import os; os.sched_getaffinity(0)", "sched_getaffinity"),
        ("import mmap; mmap.mmap(-1, 4096, flags=0x4022)", "no such flag"),
    ],
)
def test_such_a_host_is_one(tmp_path: Path, asks: str, said: str) -> None:
    """What is taken away is away: a module of the pipeline that asks for it ends there."""
    program = (
        "import runpy, sys; import plain_host; plain_host.OURS = sys.argv[0]; sys.argv[1:] = ['asking']; "
        "sys.path.append(sys.argv[0]); plain_host.main()"
    )
    (tmp_path / "asking.py").write_text(asks, encoding="utf-8")
    command = [sys.executable, "-c", program.replace("sys.argv[0]", repr(str(tmp_path)))]
    done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    assert done.returncode == 1 and said in done.stderr, done.stderr
