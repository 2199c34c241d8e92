"""Stages on Dask's own schedulers and workers: the same bytes whatever becomes of them, or one sentence."""

from __future__ import annotations

import dataclasses
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from line import Line
from machines import Machines
from works import Another, Work, copied, one_thread

from pipeline import evaluate, golden, graph, moments, verify
from pipeline.cluster import dask
from pipeline.core.recipe import PROJECT
from pipeline.core.stage import Stage

# In a folder beside the environment, which `nox -s cluster` makes.
pytest.importorskip("distributed")
SEED = int(os.environ.get("CLUSTER_SEED", "21"))
KILLS = 20


Make = Callable[[str], Work]


@pytest.fixture(scope="session")
def alone() -> dict[str, dict[str, bytes]]:
    """What each stage gives without a cluster."""
    return {}


@pytest.fixture
def make(fetched: Line, bundled: Line, task: Path, alone: dict[str, dict[str, bytes]], tmp_path: Path) -> Make:
    """The stage of a name."""
    before = ("fetch", "golden", "graph", "fp32", "int8", "bundle")
    given: dict[str, tuple[Stage, tuple[str, ...], Another]] = {
        "golden": (golden.STAGE, ("--device", "cpu"), lambda: copied(fetched, tmp_path, "fetch")),
        "verify": (verify.STAGE, ("--graphs", "bundle"), lambda: copied(bundled, tmp_path, *before)),
        "evaluate": (evaluate.STAGE, ("--task", str(task)), lambda: copied(bundled, tmp_path, *before)),
    }

    def made(name: str) -> Work:
        stage, options, another = given[name]
        if name not in alone:
            with one_thread():
                alone[name] = Work(stage, options, another, {}).made(another())
        return Work(stage, options, another, alone[name])

    return made


@contextmanager
def meanwhile(what: Callable[[threading.Event], None]) -> Iterator[None]:
    """Do something in a thread while the block runs; it is told when the block ends."""
    over, failed = threading.Event(), list[BaseException]()

    def run() -> None:
        try:
            what(over)
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
    assert not failed, failed


@pytest.mark.parametrize("workers", [1, 2, 4])
@pytest.mark.parametrize("name", ["golden", "verify", "evaluate"])
def test_any_number_of_workers_gives_the_same_bytes(make: Make, name: str, workers: int) -> None:
    work = make(name)
    assert work.made(work.another(), f"local:{workers}") == work.expected


@pytest.mark.parametrize("name", ["golden", "verify"])
def test_workers_are_killed_at_random_moments_and_the_bytes_are_the_same(
    make: Make, name: str, machines: Machines, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = make(name)
    draw, killed = random.Random(SEED), 0
    monkeypatch.setattr("pipeline.cluster.dask._WORKERS", 900.0)  # a slow machine may start none for long
    machines.start()
    machines.join(3)
    assert work.made(work.another(), machines.address) == work.expected
    whole = machines.counted()

    def kill(over: threading.Event) -> None:
        nonlocal killed
        seen = machines.counted()
        while killed < KILLS and not over.wait(0.01):
            if machines.counted() > seen:  # one has a shard in hand, or had it a moment ago
                over.wait(draw.uniform(0.0, 0.3))
                busy = [place for place, one in enumerate(machines.workers) if one.pid == machines.begun()[-1]]
                machines.kill(busy[0] if busy else draw.randrange(len(machines.workers)))
                killed += 1
                machines.join()
                seen = machines.counted()

    rounds = 0
    while killed < KILLS:
        rounds += 1
        with meanwhile(kill):
            assert work.made(work.another(), machines.address) == work.expected, f"after {killed} kills (seed {SEED})"
    again = machines.counted() - whole * (1 + rounds)
    print(f"{killed} workers were killed in {rounds} runs of {whole} shards; {again} shards were done again")
    assert again <= killed


@pytest.mark.parametrize("name", ["golden", "verify"])
def test_after_a_lost_scheduler_at_most_a_shard_per_worker_is_done_again(
    make: Make, name: str, machines: Machines, capsys: pytest.CaptureFixture[str]
) -> None:
    work = make(name)
    line = work.another()
    machines.start()
    machines.join(2)

    def lose(over: threading.Event) -> None:
        while machines.counted() < 12 and not over.wait(0.01):
            pass
        machines.lose_scheduler()

    capsys.readouterr()
    with meanwhile(lose):
        assert work.run(line, machines.address) == 10
    said = capsys.readouterr().err
    assert "error: the scheduler at" in said and "is lost" in said and "Traceback" not in said
    begun = machines.counted()
    assert work.kept(line) >= begun - 2 and begun >= 12
    machines.stop()
    machines.start()
    machines.join(2)
    assert work.made(line, machines.address) == work.expected
    total = machines.counted()
    assert work.made(work.another(), machines.address) == work.expected
    whole = machines.counted() - total
    print(f"the scheduler was lost after {begun} of {whole} shards; {total - whole} were done again")
    assert total <= whole + 2


def test_an_interrupt_keeps_finished_shards(make: Make, another: Another, machines: Machines, tmp_path: Path) -> None:
    line = another()
    machines.start()
    machines.join(2)
    words = ["--model-id", str(line.model), "--artifacts", str(line.artifacts), "--recipe", str(line.recipe)]
    command = [sys.executable, "-m", "pipeline.golden", *words, "--device", "cpu", "--cluster", machines.address]
    with (tmp_path / "said").open("wb") as said:
        running = subprocess.Popen(command, cwd=PROJECT, stderr=said)
        while machines.counted() < 8 and running.poll() is None:
            time.sleep(0.02)
        running.send_signal(signal.SIGINT)
        assert running.wait(timeout=120) == 130
    text = (tmp_path / "said").read_text()
    assert "interrupted: nothing finished is lost" in text and "Traceback" not in text
    assert make("golden").kept(line) >= machines.counted() - 2


def test_what_ends_is_told_in_sentences_alone(machines: Machines) -> None:
    """A connection that ends while something is sent is logged with a traceback, now and then also after Ctrl-C."""
    machines.start()
    machines.join()
    with dask.connect(machines.address):
        for name in ("distributed.batched", "distributed.client", "distributed.comm.tcp"):
            assert not logging.getLogger(name).isEnabledFor(logging.ERROR), name


@pytest.mark.parametrize("name", ["golden", "verify"])
def test_a_worker_that_stands_still_loses_its_shard_to_another(make: Make, name: str, machines: Machines) -> None:
    work = make(name)
    machines.start(WORKER_TTL="45s")
    machines.join(2)

    def stop(over: threading.Event) -> None:
        while machines.counted() < 6 and not over.wait(0.01):
            pass
        machines.workers[0].send_signal(signal.SIGSTOP)

    with meanwhile(stop):
        assert work.made(work.another(), machines.address) == work.expected


def test_a_scheduler_that_reads_nothing_for_a_while_is_not_lost(machines: Machines) -> None:
    """As on a machine that is short of memory or time, while more is sent to it than the connection holds."""
    machines.start()
    machines.join()
    assert machines.scheduler
    with dask.connect(machines.address) as workers:
        machines.scheduler.send_signal(signal.SIGSTOP)
        answer = workers.submit(len, bytes(32 << 20))
        time.sleep(40)  # Dask's own patience is 30 s
        machines.scheduler.send_signal(signal.SIGCONT)
        assert answer.result(60) == 32 << 20


def measured(line: Line, *options: str) -> dict[str, bytes]:
    """What a tune of two minutes found out, by the names of its records; how fast candidates are says nothing here."""
    common = ["--model-id", str(line.model), "--artifacts", str(line.artifacts), "--recipe", str(line.recipe)]
    words = [*common, "--parts", "1", "--minutes", "2", *options]
    done = subprocess.run(
        [sys.executable, "-m", "pipeline.tune", *words], cwd=PROJECT, stderr=subprocess.PIPE, text=True
    )
    assert done.returncode == 0 and not (line.root / ".shards").exists(), done.stderr
    found = {file.name: file.read_bytes() for file in (line.root / ".tune").glob("*.json")}
    return {name: held for name, held in found.items() if b'"kld"' in held}


def test_candidates_are_measured_by_workers_as_here_though_one_is_killed(
    fetched: Line, machines: Machines, tmp_path: Path
) -> None:
    line = copied(fetched, tmp_path, "fetch")
    assert line.run(graph.STAGE) == line.run(moments.STAGE) == 0
    shutil.copytree(line.artifacts, tmp_path / "here", symlinks=True)
    here = measured(dataclasses.replace(line, artifacts=tmp_path / "here"))
    machines.start()
    machines.join(3)

    def kill(over: threading.Event) -> None:
        while machines.counted() < 3 and not over.wait(0.01):
            pass
        machines.kill()

    with meanwhile(kill):
        there = measured(line, "--cluster", machines.address)
    both = here.keys() & there.keys()
    print(f"{len(here)} records here, {len(there)} there, {len(both)} of the same")
    assert len(both) >= 10 and all(here[name] == there[name] for name in both)


def refused(line: Line, address: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """The exit code, and what is said; nothing is left half-done."""
    code = line.run(golden.STAGE, "--device", "cpu", "--cluster", address)
    said = capsys.readouterr().err
    assert said.count("error: ") == 1 and "Traceback" not in said, said
    assert not (line.root / "golden" / "manifest.json").exists()
    return code, said


def test_no_such_scheduler_is_told(another: Another, capsys: pytest.CaptureFixture[str]) -> None:
    code, said = refused(another(), "tcp://127.0.0.1:9", capsys)
    assert code == 2 and "no Dask scheduler answers at tcp://127.0.0.1:9" in said


def test_a_scheduler_without_workers_is_told(
    another: Another, machines: Machines, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.cluster.dask._WORKERS", 4.0)
    machines.start()
    code, said = refused(another(), machines.address, capsys)
    assert code == 10 and "has no worker" in said


def test_workers_that_all_end_are_told(
    another: Another, machines: Machines, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    machines.start()
    machines.join()

    def end(over: threading.Event) -> None:
        while machines.counted() < 3 and not over.wait(0.01):
            pass
        monkeypatch.setattr("pipeline.cluster.dask._WORKERS", 4.0)
        machines.kill()

    line = another()
    with meanwhile(end):
        code, said = refused(line, machines.address, capsys)
    assert code == 10 and "has no worker" in said
    assert [file for file in (line.root / ".shards" / "golden").iterdir() if not file.suffix], "it is kept"


def test_a_worker_with_other_code_is_refused(
    another: Another, machines: Machines, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("pipeline", "examples", "locks"):
        shutil.copytree(PROJECT / name, tmp_path / "other" / name)
    with (tmp_path / "other" / "pipeline" / "golden.py").open("a", encoding="utf-8") as stream:
        stream.write("# another commit\n")
    machines.start()
    machines.join(project=tmp_path / "other")
    code, said = refused(another(), machines.address, capsys)
    assert code == 2 and "has other code of this project" in said


def test_a_folder_that_is_not_shared_is_told(
    another: Another, machines: Machines, capsys: pytest.CaptureFixture[str]
) -> None:
    if subprocess.run(["unshare", "--mount", "true"], check=False, capture_output=True).returncode:
        pytest.skip("no right to mount here")
    line = another()
    hidden = f'mount -t tmpfs none "{line.artifacts}" && exec "$@"'
    machines.start()
    machines.join(before=("unshare", "--mount", "sh", "-c", hidden, "sh"))
    code, said = refused(line, machines.address, capsys)
    assert code == 2 and "does not see" in said and "not shared" in said


def test_a_full_disk_ends_it_with_a_sentence(
    another: Another, machines: Machines, capsys: pytest.CaptureFixture[str]
) -> None:
    line = another()
    folder = line.root / ".shards" / "golden"
    folder.mkdir(parents=True)
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "none", folder], check=False).returncode:
        pytest.skip("no right to mount here")
    try:
        code, said = refused(line, "local:1", capsys)
    finally:
        subprocess.run(["umount", folder], check=True)
    assert code == 10 and "the disk is full" in said
