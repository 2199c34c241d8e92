"""`-m plain_host STAGE,… WORD…`: stages as on a host that has nothing of what only Linux has.

What the pipeline asks for all the same is an error: a call that is gone, a refused flag, a file of /proc or /sys
that its code opens. Libraries may open them; they have ways of their own elsewhere.
"""

from __future__ import annotations

import ctypes
import importlib
import mmap
import os
import sys
from types import FrameType

from pipeline.core import host, stage
from pipeline.core.recipe import PROJECT

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
    host.LINUX = False
    host.mmap.mmap = Mapping  # type: ignore[misc]
    host.ctypes = type("ctypes", (), {**vars(ctypes), "CDLL": staticmethod(allocator)})  # type: ignore[assignment]
    del os.sched_getaffinity, os.O_DIRECT
    sys.addaudithook(refuse)
    for name in sys.argv[1].split(","):
        if code := stage.main(importlib.import_module(name).STAGE, sys.argv[2:]):
            sys.exit(code)


if __name__ == "__main__":
    main()
