"""Dask's programs on this machine: a scheduler and workers, started, killed and stopped."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.core.recipe import PROJECT

HERE = Path(__file__).parent
PATIENT = {"WORKER_TTL": "180s", "ALLOWED_FAILURES": "50"}
"""Of the scheduler: how long a worker may be silent, and how many may die over one shard."""


@dataclass
class Machines:
    """A scheduler and its workers, each a program as somebody would start it, in processes of their own."""

    folder: Path
    environment: dict[str, str] = field(default_factory=dict)
    workers: list[subprocess.Popen[bytes]] = field(default_factory=list)
    scheduler: subprocess.Popen[bytes] | None = None
    address: str = ""

    def start(self, **settings: str) -> None:
        """A scheduler on a free port of the loopback."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.address = f"tcp://127.0.0.1:{port}"
        told = {f"DASK_DISTRIBUTED__SCHEDULER__{name}": value for name, value in {**PATIENT, **settings}.items()}
        self.scheduler = self._run(
            ["scheduler", "--host", "127.0.0.1", "--port", str(port), "--no-dashboard", "--no-jupyter"], **told
        )
        for _ in range(600):
            with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                return
            time.sleep(0.1)
        raise AssertionError("the scheduler does not come")

    def join(self, count: int = 1, *, project: Path = PROJECT, before: tuple[str, ...] = ()) -> None:
        """So many more workers, with the code of `project`, each started behind the words `before`."""
        preload = ["--preload", str(HERE / "counting.py")]
        options = ["--nthreads", "1", "--memory-limit", "0", "--no-dashboard", "--no-nanny", *preload]
        words = ["worker", self.address, *options, "--local-directory", str(self.folder)]
        self.workers += [self._run(words, project=project, before=before) for _ in range(count)]

    def counted(self) -> int:
        """Shards that were begun, by all workers there ever were."""
        return len(self.begun())

    def begun(self) -> list[int]:
        """The process that began each of those."""
        file = Path(self.environment["COUNTED"])
        return [int(line) for line in file.read_text(encoding="ascii").split()] if file.exists() else []

    def kill(self, place: int = 0) -> None:
        """End a worker as a machine does that loses power."""
        self.workers[place].kill()
        self.workers.pop(place).wait()

    def lose_scheduler(self) -> None:
        """The same of the scheduler."""
        assert self.scheduler
        self.scheduler.kill()
        self.scheduler.wait()

    def stop(self) -> None:
        """End all that was started."""
        for process in filter(None, (*self.workers, self.scheduler)):
            with suppress(ProcessLookupError):
                process.send_signal(signal.SIGCONT)
                process.kill()
            process.wait()
        self.workers.clear()

    def _run(
        self, words: list[str], *, project: Path = PROJECT, before: tuple[str, ...] = (), **more: str
    ) -> subprocess.Popen[bytes]:
        said = (self.folder / "said").open("ab")
        search = os.pathsep.join([str(project), os.environ.get("PYTHONPATH", "")])
        environment = {**os.environ, **self.environment, **more, "PYTHONPATH": search, "OMP_WAIT_POLICY": "PASSIVE"}
        command = [*before, sys.executable, "-m", "dask", *words]
        return subprocess.Popen(command, cwd=project, env=environment, stdout=said, stderr=said)
