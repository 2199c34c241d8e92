"""golden on Dask's own schedulers and workers: the same bytes whatever becomes of them, or one sentence."""

from __future__ import annotations

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

from pipeline import golden
from pipeline.core.recipe import PROJECT

# In a folder beside the environment, which `nox -s cluster` makes.
pytest.importorskip("distributed")
Another = Callable[[], Line]
SEED = int(os.environ.get("CLUSTER_SEED", "21"))
KILLS = 20


def kept(line: Line) -> int:
    """Finished shards of a golden that is not finished."""
    return len([file for file in (line.root / ".shards" / "golden").iterdir() if not file.suffix])


def made(line: Line, cluster: str = "") -> dict[str, bytes]:
    """What golden leaves, without how long it took."""
    assert line.run(golden.STAGE, "--device", "cpu", *(["--cluster", cluster] if cluster else [])) == 0
    files = sorted((line.root / "golden").iterdir())
    assert not (line.root / ".shards").exists()
    return {file.name: file.read_bytes() for file in files if file.name != "run.json"}


@pytest.fixture(scope="module")
def expected(fetched: Line, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, bytes]]:
    """What one process of one thread gives, and the setting under which it does."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        import torch

        before = torch.get_num_threads()
        torch.set_num_threads(1)
        yield made(fetched.copy(tmp_path_factory.mktemp("expected"), "fetch"))
        torch.set_num_threads(before)


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
def test_any_number_of_workers_gives_the_same_bytes(another: Another, expected: dict[str, bytes], workers: int) -> None:
    assert made(another(), f"local:{workers}") == expected


def test_workers_are_killed_at_random_moments_and_the_bytes_are_the_same(
    another: Another, expected: dict[str, bytes], machines: Machines, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw, killed = random.Random(SEED), 0
    monkeypatch.setattr("pipeline.cluster.dask._WORKERS", 900.0)  # a slow machine may start none for long
    machines.start()
    machines.join(3)
    assert made(another(), machines.address) == expected
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
            assert made(another(), machines.address) == expected, f"after {killed} kills (seed {SEED})"
    again = machines.counted() - whole * (1 + rounds)
    print(f"{killed} workers were killed in {rounds} runs of {whole} shards; {again} shards were done again")
    assert again <= killed


def test_after_a_lost_scheduler_at_most_a_shard_per_worker_is_done_again(
    another: Another, expected: dict[str, bytes], machines: Machines, capsys: pytest.CaptureFixture[str]
) -> None:
    line = another()
    machines.start()
    machines.join(2)

    def lose(over: threading.Event) -> None:
        while machines.counted() < 12 and not over.wait(0.01):
            pass
        machines.lose_scheduler()

    with meanwhile(lose):
        assert line.run(golden.STAGE, "--device", "cpu", "--cluster", machines.address) == 10
    said = capsys.readouterr().err
    assert "error: the scheduler at" in said and "is lost" in said and "Traceback" not in said
    begun = machines.counted()
    assert kept(line) >= begun - 2 and begun >= 12
    machines.stop()
    machines.start()
    machines.join(2)
    assert made(line, machines.address) == expected
    total = machines.counted()
    another_line = another()
    assert made(another_line, machines.address) == expected
    whole = machines.counted() - total
    print(f"the scheduler was lost after {begun} of {whole} shards; {total - whole} were done again")
    assert total <= whole + 2


def test_an_interrupt_keeps_finished_shards(another: Another, machines: Machines, tmp_path: Path) -> None:
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
    assert kept(line) >= machines.counted() - 2


def test_a_worker_that_stands_still_loses_its_shard_to_another(
    another: Another, expected: dict[str, bytes], machines: Machines
) -> None:
    machines.start(WORKER_TTL="45s")
    machines.join(2)

    def stop(over: threading.Event) -> None:
        while machines.counted() < 6 and not over.wait(0.01):
            pass
        machines.workers[0].send_signal(signal.SIGSTOP)

    with meanwhile(stop):
        assert made(another(), machines.address) == expected


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
    assert kept(line), "what was finished is kept"


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
