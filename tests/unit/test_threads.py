"""THREADS= (OMP_NUM_THREADS) reaches everything that runs in threads, and nobody keeps the process's BLAS to one."""

from __future__ import annotations

import ast
import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from threadpoolctl import threadpool_info, threadpool_limits

from pipeline.core import parallel
from pipeline.core.recipe import PROJECT
from pipeline.quantize import gptq, hessians
from pipeline.runtime import litert, litert_lm, sections


class Opened(Exception):
    """Stands for a file that was opened with so many threads."""

    def __init__(self, threads: int) -> None:
        super().__init__()
        self.threads = threads


def opening(*_place: object, threads: int = 0, num_threads: int = 0, **_options: object) -> Any:
    raise Opened(threads or num_threads)


@pytest.mark.parametrize("wanted", [1, 3, 9])
def test_litert_and_litert_lm_run_in_as_many_threads_as_are_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wanted: int
) -> None:
    from ai_edge_litert import interpreter

    monkeypatch.setenv("OMP_NUM_THREADS", str(wanted))
    monkeypatch.setattr(interpreter, "Interpreter", opening)
    monkeypatch.setattr(litert_lm, "_open", lambda _path, threads, *_more: opening(threads=threads))
    for name in ("decoder.tflite", "x.litertlm"):
        (tmp_path / name).touch()
    ways = {
        "a step graph": lambda: litert.StepModel(tmp_path / "x.tflite"),
        "a traced graph": lambda: litert.open_traced(tmp_path / "x.tflite"),
        "a bundle's sections": lambda: sections.Sections(tmp_path),
        "a bundle": lambda: litert_lm.LmRuntime(tmp_path / "x.litertlm"),
    }
    found = {}
    for name, way in ways.items():
        with pytest.raises(Opened) as caught:
            way()
        found[name] = caught.value.threads
    assert found == dict.fromkeys(ways, wanted)


def counters(text: str) -> list[str]:
    """Calls by which a file counts the machine's processors itself."""
    calls = [node.func for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call)]
    return [name for call in calls if re.search(r"cpu_count|sched_getaffinity", name := ast.unparse(call))]


def test_threads_are_counted_in_one_place() -> None:
    """`cores` in what is written about a machine is no count of threads."""
    files = sorted((PROJECT / "pipeline").rglob("*.py"))
    found = {file.relative_to(PROJECT / "pipeline").as_posix(): counters(file.read_text("utf-8")) for file in files}
    assert {name: calls for name, calls in found.items() if calls} == {
        "core/host.py": ["os.sched_getaffinity", "os.cpu_count"],
        "core/stage.py": ["os.cpu_count"],
        "report/judgement.py": ["os.cpu_count"],
    }


def blas() -> set[int]:
    return {pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"}


def test_blas_has_one_thread_while_rows_are_rounded_and_as_many_as_before_afterwards(tmp_path: Path) -> None:
    np.save(tmp_path / "q.npy", np.eye(4)[None])
    (tmp_path / hessians.INDEX).write_text(json.dumps({"q.weight": "q.npy"}))
    with threadpool_limits(2, "blas"):
        moments = gptq.Hessians(tmp_path)
        assert blas() == {2}
        with pytest.raises(KeyError), moments:
            assert blas() == {1}
            raise KeyError
        assert blas() == {2}


def test_one_thread_per_core_if_nobody_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _process: set(range(12)))
    assert parallel.threads() == 12
