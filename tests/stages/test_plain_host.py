"""Without what only Linux has, and with the kernels of another processor, the stages make the same bytes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from line import Line

from pipeline.core import manifest
from pipeline.core.recipe import PROJECT

CHEAP = ("fetch", "graph", "fp32", "fp16", "int8", "bundle")
"""All that makes a file of the shipped model; what judges takes longer, and asks a host for nothing else."""
KERNELS = {
    "ATEN_CPU_CAPABILITY": "default",
    "MKL_CBWR": "COMPATIBLE",
    "NPY_DISABLE_CPU_FEATURES": "X86_V3 X86_V4",
    "OMP_NUM_THREADS": "1",
    "ONEDNN_MAX_CPU_ISA": "SSE41",
    "OPENBLAS_CORETYPE": "Nehalem",
}
"""What libraries take for one core without AVX: products, exponentials and sums end in other digits."""


def python(*words: str, beside: Path = PROJECT) -> subprocess.CompletedProcess[str]:
    """Run Python with what lies here and in the folder `beside`."""
    environment = {**os.environ, **KERNELS, "PYTHONPATH": f"{Path(__file__).parent}:{PROJECT}:{beside}"}
    return subprocess.run([sys.executable, *words], cwd=PROJECT, env=environment, capture_output=True, text=True)


def test_another_host_makes_the_same_bytes(built: Line, tmp_path: Path) -> None:
    words = ["--model-id", str(built.model), "--artifacts", str(tmp_path), "--recipe", str(built.recipe)]
    modules = ",".join(f"pipeline.{stage}" for stage in CHEAP)
    done = python("-m", "plain_host", modules, *words)
    assert done.returncode == 0, done.stderr
    for stage in CHEAP:
        here, there = (root / stage for root in (built.root, tmp_path / built.model.name))
        # The hashes alone: int8's manifest has what its ladder measured, which ends in other digits.
        assert manifest.read(there).outputs == manifest.read(here).outputs
        assert '"peak_anonymous": 0' not in (there / "run.json").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("asks", "said"),
    [
        ("from pathlib import Path; Path('/proc/self/status').read_text()", "the pipeline opens /proc/self/status"),
        ("import os; os.sched_getaffinity(0)", "sched_getaffinity"),
        ("import torch; raise SystemExit(torch.backends.cpu.get_cpu_capability())", "DEFAULT"),
        ("import numpy, threadpoolctl as t; raise SystemExit(str(t.threadpool_info()))", "Nehalem"),
        ("import mmap; mmap.mmap(-1, 4096, flags=0x4022)", "no such flag"),
    ],
)
def test_such_a_host_is_one(tmp_path: Path, asks: str, said: str) -> None:
    """What is taken away is away: a module of the pipeline that asks for it ends there. Kernels are the other ones."""
    (tmp_path / "asking.py").write_text(asks, encoding="utf-8")
    program = f"import plain_host; plain_host.OURS = {str(tmp_path)!r}; plain_host.main()"
    done = python("-c", program, "asking", beside=tmp_path)
    assert done.returncode == 1 and said in done.stderr, done.stderr
