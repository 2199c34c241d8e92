"""What people see: sizes, times, progress on a terminal and in a CI log."""

from __future__ import annotations

import io
import sys
import threading
import time

import pytest

from pipeline.core import log


class _Terminal(io.StringIO):
    """A text stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (17_800_000_000, "17.8 GB"), (2_500_000_000_000, "2.50 TB")],
)
def test_human_bytes(count: int, text: str) -> None:
    assert log.human_bytes(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (-1, "0 s"),
        (0.4, "0 s"),
        (42, "42 s"),
        (59.6, "1 min 00 s"),
        (185, "3 min 05 s"),
        (3720, "1 h 02 min"),
        (7199.7, "2 h 00 min"),
    ],
)
def test_human_seconds(seconds: float, text: str) -> None:
    assert log.human_seconds(seconds) == text


def test_everything_goes_to_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    log.line("a")
    log.step("b")
    log.warn("c")
    out, err = capsys.readouterr()
    assert out == ""
    assert err == "a\n  · b\n  ! c\n"


def test_progress_text_has_amount_share_rate_and_time_left() -> None:
    bar = log.Progress("weights", total=4_000_000, unit="B", done=1_000_000, started=time.monotonic() - 10)
    text = bar.text()
    assert text.startswith("weights: 1.0 MB of 4.0 MB (25%), ")
    assert text.endswith("kB/s, 30 s left")


def test_progress_text_counts_things() -> None:
    bar = log.Progress("windows", total=8, unit="windows", done=8, started=time.monotonic() - 4)
    assert bar.text() == "windows: 8 of 8 windows (100%), 2.0 windows/s"


@pytest.mark.parametrize("total", [0, 5])
def test_progress_text_before_anything_is_done(total: float) -> None:
    assert "left" not in log.Progress("empty", total=total, unit="B").text()


def test_progress_is_redrawn_in_place_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = _Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with log.progress("hashing", total=100) as bar:
        bar.started -= 1
        bar.advance(50)
        bar.advance(50)  # within the redraw interval: not drawn
    shown = terminal.getvalue()
    assert shown.count("50 B of 100 B (50%)") == 1
    assert shown.startswith("\r\x1b[K  hashing: ")
    assert "\n" not in shown[: shown.index("50%")]
    assert shown.endswith("\r\x1b[K  hashing: 100 B in 1 s\n")


def test_progress_is_plain_lines_elsewhere(capsys: pytest.CaptureFixture[str]) -> None:
    with log.progress("hashing", total=100) as bar:
        bar.started -= 10
        for _ in range(100):
            bar.advance(1)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert "\r" not in "".join(lines) and "\x1b" not in "".join(lines)
    assert lines[0].startswith("  hashing: 1 B of 100 B (1%)")
    assert lines[1] == "  hashing: 100 B in 10 s"


def test_quick_work_shows_no_progress(capsys: pytest.CaptureFixture[str]) -> None:
    with log.progress("quick", total=1) as bar:
        bar.advance(1)
    assert capsys.readouterr().err == ""


def test_progress_ends_its_line_when_the_work_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = _Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with pytest.raises(ValueError, match="no"), log.progress("hashing", total=100) as bar:
        bar.started -= 1
        bar.advance(50)
        raise ValueError("no")
    assert terminal.getvalue().endswith("\n")


def test_waiting_says_how_long_it_has_been_and_may_be(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(log, "_LINE_SECONDS", 0.05)
    with log.waiting("exporting", expected=100):
        time.sleep(0.2)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "  exporting: 0 s, about 1 min 40 s left"
    assert lines[-1] == "  exporting: 0 s"
    with log.waiting("exporting", expected=0):
        time.sleep(0.12)
    assert "longer than expected" in capsys.readouterr().err


def test_waiting_is_silent_if_it_is_short_and_ends_with_the_work(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="no"), log.waiting("exporting", expected=100):
        raise ValueError("no")
    assert capsys.readouterr().err == ""


def test_advances_from_many_threads_are_all_counted() -> None:
    bar = log.Progress("hashing", total=40_000, unit="B")
    threads = [threading.Thread(target=lambda: [bar.advance() for _ in range(10_000)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert bar.done == 40_000
