"""A system of its own for README's commands leaves nothing behind when a signal ends it."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from pipeline.core.recipe import PROJECT

PROGRAM = "import sys, fresh_host; sys.exit(fresh_host.alone(sys.argv[1:]))"


def processes(word: str) -> list[str]:
    """Processes of this machine with `word` among theirs."""
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):  # it ended meanwhile
            found += [str(file)] if word in file.read_bytes().decode(errors="replace").split("\0") else []
    return found


@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("mount"), reason="mounting takes root, and a program")
@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_signal_leaves_no_mount_and_no_process(tmp_path: Path, sent: signal.Signals) -> None:
    mounted, marker = tmp_path / "mounted", f"{87_000_000 + os.getpid()}"
    mounted.mkdir()
    script = f"mount -t tmpfs none {mounted} && touch {mounted}/inside && sleep {marker}; :"
    command = [sys.executable, "-c", PROGRAM, "sh", "-c", script]
    with subprocess.Popen(command, cwd=PROJECT / "tools", start_new_session=True) as process:
        while not processes(marker) and process.poll() is None:
            time.sleep(0.02)
        process.send_signal(sent)
    assert process.returncode == -sent
    deadline = time.monotonic() + 10
    while processes(marker) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not processes(marker)
    assert str(mounted) not in Path("/proc/mounts").read_text(encoding="utf-8")
    mounted.rmdir()  # empty, and nobody's mount point: what was written went with the namespace
