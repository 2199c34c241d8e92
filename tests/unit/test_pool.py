"""Shards: the same results wherever they run, finished ones kept, and what a worker refuses; without Dask."""

from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.cluster import pool, worker
from pipeline.cluster.pool import InProcess, Shards
from pipeline.cluster.worker import Terms
from pipeline.core import log, manifest, parallel
from pipeline.core.errors import IntegrityError, PipelineError, UsageError

RAN: list[int] = []


@dataclass(frozen=True)
class Squared:
    """A shard; 13 brings bad luck."""

    number: int

    @property
    def amount(self) -> int:
        return 1

    def run(self, bar: log.Progress) -> bytes:
        RAN.append(self.number)
        if self.number == 13:
            raise KeyboardInterrupt
        bar.advance(1)
        return str(self.number**2).encode()


@pytest.fixture
def terms(tmp_path: Path) -> Terms:
    """Those of this process, with one input."""
    RAN.clear()
    root = tmp_path / "model"
    (root / "fetch").mkdir(parents=True)
    (root / "fetch" / "weights").write_bytes(b"weights")
    return Terms.of(root, (manifest.FileRecord.of(root / "fetch" / "weights", root),))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "kept"
    made.mkdir()
    return made


@pytest.fixture(scope="module")
def processes() -> Iterator[Executor]:
    """Two processes that begin as a worker does, with nothing of this one."""
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as made:
        yield made


def shards(terms: Terms, folder: Path, executor: Executor | None = None) -> Shards:
    return Shards(executor or InProcess(), terms, folder, log.unshown(), remote=executor is not None)


def test_here_a_shard_runs_when_its_result_is_asked_for(terms: Terms, folder: Path) -> None:
    asked = shards(terms, folder)
    futures = [asked.submit(Squared(number)) for number in (3, 4, 5)]
    assert RAN == [] and asked.bar.total == 3
    assert futures[1].result() == b"16" and futures[1].result() == b"16" and RAN == [4]
    assert list(InProcess().map(lambda x, y: x - y, (5, 6), (1, 4))) == [4, 2]
    with pytest.raises(ZeroDivisionError):
        InProcess().submit(lambda: 1 // 0).result()


def test_other_processes_give_what_this_one_gives(terms: Terms, folder: Path, processes: Executor) -> None:
    there = shards(terms, folder, processes)
    results = [there.result(future) for future in [there.submit(Squared(number)) for number in range(9)]]
    assert results == [str(number**2).encode() for number in range(9)] and RAN == []
    assert there.bar.done == there.bar.total == 9


def test_after_an_interrupt_finished_shards_are_not_run_again(terms: Terms, folder: Path) -> None:
    first = shards(terms, folder)
    futures = [first.submit(Squared(number)) for number in (1, 2, 13, 4)]
    with pytest.raises(KeyboardInterrupt):
        [future.result() for future in futures]
    RAN.clear()
    again = shards(terms, folder)
    assert [again.submit(Squared(number)).result() for number in (1, 2, 4)] == [b"1", b"4", b"16"]
    assert RAN == [4] and again.found == 2 and again.bar.done == again.bar.total == 3


def test_a_worker_keeps_what_it_finished_whoever_waits_for_it(terms: Terms, folder: Path, processes: Executor) -> None:
    file = folder / "kept"
    assert processes.submit(worker.work, terms, Squared(6), file).result() == b"36"
    assert worker.read(file) == b"36" and [file] == list(folder.iterdir())
    worker.write(file, b"other")
    assert processes.submit(worker.work, terms, Squared(6), file).result() == b"other", "it is not run again"
    nowhere = folder / "not" / "there"
    assert processes.submit(worker.work, terms, Squared(6), nowhere).result() == b"36"


def test_what_a_worker_holds_is_let_go_once_others_are_the_terms(
    terms: Terms, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model that was fetched anew, at the same path; what is loaded of it would go on being the old one."""
    gone: list[str] = []
    monkeypatch.setattr(worker, "let_go", [lambda: gone.append("model")])
    monkeypatch.setattr(worker, "_served", [])
    weights = Path(terms.root) / "fetch" / "weights"
    worker.work(terms, Squared(1), folder / "1")
    worker.work(terms, Squared(2), folder / "2")
    assert len(gone) == 1
    weights.write_bytes(b"others")
    worker.work(
        Terms.of(Path(terms.root), (manifest.FileRecord.of(weights, Path(terms.root)),)), Squared(2), folder / "3"
    )
    assert len(gone) == 2


@pytest.mark.parametrize("damage", [lambda held: held[:-1], lambda held: held[:-1] + b"0", lambda _: b""])
def test_a_damaged_shard_is_run_again(terms: Terms, folder: Path, damage: object) -> None:
    assert shards(terms, folder).submit(Squared(7)).result() == b"49"
    (file,) = folder.iterdir()
    file.write_bytes(damage(file.read_bytes()))  # type: ignore[operator]
    assert shards(terms, folder).submit(Squared(7)).result() == b"49" and RAN == [7, 7]


def test_what_was_kept_under_other_terms_is_not_taken(terms: Terms, folder: Path) -> None:
    shards(terms, folder).submit(Squared(7)).result()
    others = (
        replace(terms, code="other"),
        replace(terms, tools=(("torch", "0.1"),)),
        replace(terms, inputs=(replace(terms.inputs[0], sha256="0" * 64),)),
    )
    for other in others:
        assert shards(other, folder).submit(Squared(7)).result() == b"49"
    assert RAN == [7, 7, 7, 7]


def test_a_shard_that_cannot_be_kept_ends_the_work(terms: Terms, folder: Path) -> None:
    asked = shards(terms, folder)
    future = asked.submit(Squared(3))
    folder.rmdir()
    with pytest.raises(OSError):
        asked.result(future)


def test_a_finished_stage_leaves_no_shards(terms: Terms) -> None:
    root = Path(terms.root)
    with pool.opened("", root, "golden", terms.inputs, "reference") as asked:
        asked.submit(Squared(3)).result()
        assert len(list((root / ".shards" / "golden").iterdir())) == 1
    pool.forget(root, "golden")
    assert {file.name for file in root.iterdir()} == {"fetch"}


def test_a_worker_refuses_what_would_give_other_bytes(terms: Terms, folder: Path, processes: Executor) -> None:
    def said(other: Terms) -> PipelineError:
        with pytest.raises(PipelineError) as raised:
            processes.submit(worker.work, other, Squared(2), folder / "kept").result()
        return raised.value

    assert "has other code" in str(said(replace(terms, code="0" * 64)))
    changed = tuple((name, "0.1" if name == "numpy" else version) for name, version in terms.tools)
    assert "numpy" in str(said(replace(terms, tools=changed))) and said(replace(terms, tools=changed)).remedy
    elsewhere = said(replace(terms, root=f"{terms.root}-elsewhere"))
    assert isinstance(elsewhere, UsageError) and "does not see" in str(elsewhere) and "shared" in elsewhere.cause
    file = Path(terms.root) / terms.inputs[0].path
    file.write_bytes(b"weightz")
    assert isinstance(said(replace(terms, code=terms.code)), IntegrityError)


def test_a_cluster_without_dask_is_refused_with_the_way_to_it(terms: Terms, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "distributed", None)
    with (
        pytest.raises(UsageError, match="not installed") as raised,
        pool.opened("local:2", Path(terms.root), "golden", terms.inputs, "reference"),
    ):
        pass
    assert "locks/cluster.txt" in raised.value.remedy


@given(st.integers(1, 10_000))
def test_local_workers_are_counted(count: int) -> None:
    assert parallel.local_workers(f"local:{count}") == pool.copies(f"local:{count}") == count


@pytest.mark.parametrize("word", ["local:0", "local:", "local:-1", "local:two", "host:8786", "4", "tcp://a b"])
def test_what_is_no_cluster_is_refused(word: str) -> None:
    with pytest.raises(UsageError, match="neither a scheduler's address nor local workers"):
        parallel.local_workers(word)


def test_a_schedulers_address_is_no_local_worker() -> None:
    assert parallel.local_workers("tcp://host:8786") is None and parallel.local_workers("tls://[::1]:8786") is None
    assert pool.copies("") == pool.copies("tcp://host:8786") == 1
