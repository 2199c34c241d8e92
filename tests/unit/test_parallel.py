"""Parts in threads: results in order, and nothing more begins once nobody waits for them."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.core import parallel


@settings(max_examples=20)
@given(st.lists(st.floats(0, 0.003), max_size=12))
def test_results_are_in_order_whatever_takes_long(seconds: list[float]) -> None:
    def work(place: int) -> int:
        time.sleep(seconds[place])
        return place

    assert list(parallel.ordered(work, range(len(seconds)))) == list(range(len(seconds)))


def test_an_error_reaches_whoever_waits() -> None:
    with pytest.raises(ZeroDivisionError):
        list(parallel.ordered(lambda part: 1 // part, [1, 0, 1]))


@pytest.mark.parametrize("why", [KeyboardInterrupt, ZeroDivisionError])
def test_parts_of_parts_end_when_the_whole_is_given_up(why: type[BaseException]) -> None:
    done, begun = [], threading.Event()

    def small(part: int) -> None:
        begun.set()
        time.sleep(0.01)
        done.append(part)

    def parts() -> Iterator[range]:
        yield range(1000)
        begun.wait()
        raise why

    with pytest.raises(why):
        list(parallel.ordered(lambda part: list(parallel.ordered(small, part)), parts()))
    assert 0 < len(done) < 100


def test_no_more_parts_are_taken_than_are_worked_on_and_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "threads", lambda: 2)
    taken: list[int] = []

    def parts() -> Iterator[int]:
        for part in range(20):
            taken.append(part)
            yield part

    for done, _ in enumerate(parallel.ordered(lambda part: part, parts()), 1):
        assert len(taken) <= done + 2


def test_a_long_part_ends_where_it_asks() -> None:
    done, begun = [], threading.Event()

    def long(part: int) -> None:
        for step in range(1000):
            parallel.check()
            begun.set()
            time.sleep(0.01)
            done.append((part, step))

    def parts() -> Iterator[int]:
        yield 0
        begun.wait()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(parallel.ordered(long, parts()))
    assert len(done) < 100
