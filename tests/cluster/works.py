"""A stage that is made of shards, ready to run again and again."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from line import Line

from pipeline.core.stage import Stage

Another = Callable[[], Line]


@dataclass(frozen=True)
class Work:
    """A stage that is made of shards, on a line that is ready for it, and what it gave in one process of one thread."""

    stage: Stage
    options: tuple[str, ...]
    another: Another
    expected: dict[str, bytes]

    def run(self, line: Line, cluster: str) -> int:
        """Its exit code."""
        return line.run(self.stage, *self.options, *(["--cluster", cluster] if cluster else []))

    def made(self, line: Line, cluster: str = "") -> dict[str, bytes]:
        """What it leaves, without how long it took, and in which state the sources were."""
        assert self.run(line, cluster) == 0
        folder = line.root / self.stage.name
        assert not (line.root / ".shards").exists()
        names = [file.name for file in folder.iterdir() if file.name not in ("run.json", *self.stage.measured)]
        return {name: (folder / name).read_bytes() for name in names if name != "manifest.json"} | {
            "facts": json.dumps(json.loads((folder / "manifest.json").read_text())["facts"]).encode()
        }

    def kept(self, line: Line) -> int:
        """Finished shards, while it is not finished."""
        folder = line.root / ".shards" / self.stage.name
        return len([file for file in folder.iterdir() if file.is_file() and not file.suffix])


def copied(line: Line, folder: Path, *stages: str) -> Line:
    """A copy in `folder`, in place of the last one."""
    place = folder / "artifacts"
    shutil.rmtree(place, ignore_errors=True)
    return line.copy(place, *stages)


@contextmanager
def one_thread() -> Iterator[None]:
    """This process computes in one thread."""
    import torch

    before = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(before)
