"""The one place that prints.

Everything goes to standard error as plain lines, except what a model says: that goes to standard output. On a terminal
a progress line is redrawn in place; elsewhere it is printed at most every few seconds, so that a CI log stays readable.
"""

from __future__ import annotations

import math
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

_REDRAW_SECONDS = 0.2
_LINE_SECONDS = 5.0


def human_bytes(count: float) -> str:
    """`count` bytes as text with a decimal unit, e.g. `17.8 GB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"


def human_seconds(seconds: float) -> str:
    """`seconds` as text, e.g. `42 s`, `3 min 05 s`, `1 h 02 min`."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def line(text: str = "") -> None:
    """Print one line."""
    print(text, file=sys.stderr, flush=True)


def answer(text: str) -> None:
    """Print a piece of a model's answer to standard output, as it comes and without a line's end."""
    print(text, end="", flush=True)


def aside(text: str) -> None:
    """Print a piece of what goes along with an answer to standard error, as it comes and without a line's end."""
    print(text, end="", flush=True, file=sys.stderr)


def align(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of cells as lines of text, columns below each other."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def step(text: str) -> None:
    """Print what is done next inside a stage."""
    line(f"  · {text}")


def warn(text: str) -> None:
    """Print something the reader should know although the work goes on."""
    line(f"  ! {text}")


@dataclass
class Progress:
    """How far a piece of work is; made by `progress`. Call `advance`, from any thread, with the amount just done."""

    label: str
    total: float
    unit: str
    done: float = 0.0
    started: float = field(default_factory=time.monotonic)
    _shown: float = 0.0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def advance(self, amount: float = 1.0) -> None:
        """Count `amount` more as done and show it if enough time has passed."""
        with self._lock:
            self.done += amount
            now = time.monotonic()
            every = _REDRAW_SECONDS if sys.stderr.isatty() else _LINE_SECONDS
            if now - max(self._shown, self.started) >= every:
                self._shown = now
                _draw(self.text())

    def text(self) -> str:
        """The progress line: amount, share, rate and time left."""
        elapsed = max(time.monotonic() - self.started, 1e-9)
        rate = self.done / elapsed
        amount = f"{self._number(self.done)} of {self._amount(self.total)}"
        share = f"{self.done / self.total:.0%}" if self.total else "100%"
        left = f", {human_seconds((self.total - self.done) / rate)} left" if rate and self.done < self.total else ""
        return f"{self.label}: {amount} ({share}), {self._amount(rate)}/s{left}"

    def _number(self, value: float) -> str:
        if self.unit == "B":
            return human_bytes(value)
        return f"{value:.1f}" if value < 10 and value != int(value) else f"{value:.0f}"

    def _amount(self, value: float) -> str:
        return self._number(value) if self.unit == "B" else f"{self._number(value)} {self.unit}"

    def finish(self) -> None:
        """Clear the redrawn line; print a last one if any was printed."""
        if not self._shown:
            return
        if sys.stderr.isatty():
            print("\r\x1b[K", end="", file=sys.stderr)
        line(f"  {self.label}: {self._amount(self.done)} in {human_seconds(time.monotonic() - self.started)}")


def unshown() -> Progress:
    """The progress of work whose asker shows it, on another machine perhaps."""
    return Progress("", 0, "", _shown=math.inf)


def _draw(text: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\x1b[K  {text}", end="", file=sys.stderr, flush=True)
    else:
        line(f"  {text}")


@contextmanager
def progress(label: str, total: float, unit: str = "B") -> Iterator[Progress]:
    """Show the progress of the work inside the `with` block; `unit` is `B` for bytes, else a noun."""
    bar = Progress(label, total, unit)
    try:
        yield bar
    finally:
        bar.finish()


@contextmanager
def waiting(label: str, expected: float) -> Iterator[None]:
    """Show that the `with` block, one call that tells nothing of itself, goes on; `expected` seconds are a guess."""
    started, ended = time.monotonic(), threading.Event()

    def tell() -> None:
        while not ended.wait(_REDRAW_SECONDS if sys.stderr.isatty() else _LINE_SECONDS):
            passed = time.monotonic() - started
            left = f"about {human_seconds(expected - passed)} left" if passed < expected else "longer than expected"
            _draw(f"{label}: {human_seconds(passed)}, {left}")

    teller = threading.Thread(target=tell, daemon=True)
    teller.start()
    try:
        yield
    finally:
        ended.set()
        teller.join()
        if sys.stderr.isatty():
            print("\r\x1b[K", end="", file=sys.stderr)
        if (passed := time.monotonic() - started) >= _LINE_SECONDS:
            line(f"  {label}: {human_seconds(passed)}")
