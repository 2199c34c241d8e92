"""`plain_host.py MODULE,… WORD…`: modules of the pipeline as on a host that has nothing of what only Linux has.

What the pipeline asks for all the same is an error: a call that is gone, a refused flag, a file of /proc or /sys
that its code opens. Libraries may open them; they have ways of their own elsewhere.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import runpy
import sys
from pathlib import Path
from types import FrameType

PROJECT = Path(__file__).resolve().parents[2]
OURS = f"{PROJECT}/pipeline/"
NO_RESERVE = 0x4000


def asker(frame: FrameType | None) -> str:
    """The file whose code asked, past the standard library's own ways to open one."""
    while frame and (frame.f_code.co_filename == __file__ or "/pathlib" in frame.f_code.co_filename):
        frame = frame.f_back
    return frame.f_code.co_filename if frame else ""


def refuse(event: str, told: tuple[object, ...]) -> None:
    """An audit hook: no file of the kernel's for the pipeline."""
    kernel = event == "open" and str(told[0]).startswith(("/proc/", "/sys/"))
    if kernel and asker(sys._getframe(1)).startswith(OURS):
        raise RuntimeError(f"the pipeline opens {told[0]}")


class Mapping(mmap.mmap):
    """A mapping that knows no flag of Linux's."""

    def __new__(cls, *words: int, **options: int) -> Mapping:
        if options.get("flags", 0) & NO_RESERVE:
            raise OSError("no such flag")
        return super().__new__(cls, *words, **options)


def allocator(*_words: object, **_options: object) -> object:
    """A C library without glibc's calls."""
    raise RuntimeError("the pipeline opens the C library")


def main() -> None:
    """Take away, then run."""
    sys.path[:0] = [str(PROJECT)]
    from pipeline.core import host  # noqa: PLC0415 - this module alone knows where it runs

    host.LINUX = False
    host.mmap.mmap = Mapping  # type: ignore[misc]
    host.ctypes = type("ctypes", (), {**vars(ctypes), "CDLL": staticmethod(allocator)})  # type: ignore[assignment]
    del os.sched_getaffinity, os.O_DIRECT
    sys.addaudithook(refuse)
    sys.argv = sys.argv[1:]
    for module in sys.argv[0].split(","):
        try:
            runpy.run_module(module, run_name="__main__")
        except SystemExit as ended:
            if ended.code:
                raise


if __name__ == "__main__":
    main()
