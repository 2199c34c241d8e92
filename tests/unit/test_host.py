"""What only Linux has is asked for in one file, which has a plain way for elsewhere."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.core import host, memory
from pipeline.core.recipe import PROJECT

LINUX_ONLY = re.compile(
    r"/proc/|/sys/|\bcgroup|O_DIRECT|NO_?RESERVE|malloc_trim|mallopt|prctl|sched_|fadvise|fallocate|memfd|sys\.platform|\bCDLL\("
)


def test_one_file_knows_what_linux_is() -> None:
    files = (PROJECT / "pipeline").rglob("*.py")
    found = [file.name for file in files if LINUX_ONLY.search(file.read_text(encoding="utf-8"))]
    assert found == ["host.py"]


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "LINUX", False)
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.delattr(os, "O_DIRECT", raising=False)


@pytest.mark.usefixtures("elsewhere")
def test_elsewhere_all_cores_and_the_whole_machine_s_memory_count() -> None:
    assert host.cores() == os.cpu_count()
    assert memory.available() == os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert host.processor() == platform.machine()


@pytest.mark.usefixtures("elsewhere")
def test_elsewhere_the_most_that_was_resident_stands_for_what_is_held() -> None:
    resident, anonymous = host.memory_held()
    assert resident == anonymous > 10 << 20


@pytest.mark.usefixtures("elsewhere")
def test_elsewhere_files_are_written_through_the_page_cache_and_room_is_room(tmp_path: Path) -> None:
    descriptor = host.open_direct(tmp_path / "file", os.O_WRONLY | os.O_CREAT)
    assert os.write(descriptor, b"odd") == 3  # not a multiple of what a direct write must be
    os.close(descriptor)
    room = host.unreserved(1 << 20)
    room[-1:] = b"x"
    assert len(room) == 1 << 20
    host.trim()


ARENAS = """
import ctypes, sys
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

from pipeline.core import host

if sys.argv[1:]:
    host.one_arena()
library, together = ctypes.CDLL(None), Barrier(4)
library.malloc.restype = ctypes.c_void_p


def take(_: int) -> None:
    together.wait()
    for _ in range(1000):
        library.malloc(1000)


with ThreadPoolExecutor(4) as pool:
    list(pool.map(take, range(4)))
library.malloc_info(0, ctypes.c_void_p.in_dll(library, "stdout"))
library.fflush(None)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc gives threads arenas of their own")
def test_threads_share_the_allocators_room() -> None:
    def arenas(*asked: str) -> int:
        ran = subprocess.run([sys.executable, "-c", ARENAS, *asked], capture_output=True, text=True, check=True)
        return ran.stdout.count("<heap nr=")

    assert arenas() > 1
    assert arenas("one") == 1


KEPT = """
import ctypes, resource, sys

from pipeline.core import host

if sys.argv[1:]:
    host.keep_freed()
for _ in range(100):
    bytearray(8 << 20)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="others have other ways")
def test_a_worker_of_dask_keeps_memory_for_its_next_tensor() -> None:
    def faults(*asked: str) -> int:
        environment = {**os.environ, "MALLOC_TRIM_THRESHOLD_": "65536"}  # as Dask starts workers
        ran = subprocess.run([sys.executable, "-c", KEPT, *asked], env=environment, capture_output=True, check=True)
        return int(ran.stdout)

    assert faults("kept") < faults() / 5
