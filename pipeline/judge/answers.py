"""What bundles answer in LiteRT-LM, as shards: a few prompts of a task each."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.cluster.pool import Shards
from pipeline.cluster.worker import KEPT, let_go
from pipeline.core import log
from pipeline.judge.tasks import Item
from pipeline.runtime.litert_lm import LmRuntime

AT_ONCE = 8
"""Prompts of a shard."""
_open_now: dict[tuple[str, int], tuple[LmRuntime, tempfile.TemporaryDirectory[str]]] = {}
"""The bundle of this process, with the folder of its repacked weights: another one would need as much memory again."""


def _open(file: Path, threads: int, scratch: Path) -> LmRuntime:
    if (str(file), threads) not in _open_now:
        unload()
        cache = tempfile.TemporaryDirectory(dir=scratch, ignore_cleanup_errors=True)
        _open_now[str(file), threads] = LmRuntime(file, threads=threads, cache=Path(cache.name)), cache
    return _open_now[str(file), threads][0]


def unload() -> None:
    """Close the bundle."""
    while _open_now:
        _, (runtime, cache) = _open_now.popitem()
        runtime.close()
        cache.cleanup()


let_go.append(unload)


@dataclass(frozen=True)
class Answered:
    """The answers of the bundle `name` below `root`, of at most `count` tokens, in `threads`.

    `conversations` are JSON; `templated`: the bundle's own template renders them, else it reads what was said last.
    """

    root: str
    name: str
    threads: int
    conversations: str
    count: int
    templated: bool
    amount: int

    def run(self, bar: log.Progress) -> bytes:
        """The answers as JSON."""
        runtime = _open(Path(self.root) / "bundle" / self.name, self.threads, Path(self.root) / KEPT / "evaluate")
        said = []
        for messages in json.loads(self.conversations):
            prompt = runtime.render(messages) if self.templated else messages[-1]["content"]
            said.append(runtime.greedy(prompt, self.count).text)
            bar.advance(self.count)
        return json.dumps(said).encode()


def ask(
    shards: Shards, file: Path, items: Sequence[Item], count: int, threads: int, *, templated: bool
) -> Callable[[], list[str]]:
    """Ask a bundle all items; the call that is returned waits for the answers."""
    futures = []
    for start in range(0, len(items), AT_ONCE):
        few = [item.messages for item in items[start : start + AT_ONCE]]
        root, told = str(file.parents[1].absolute()), json.dumps(few)
        futures.append(shards.submit(Answered(root, file.name, threads, told, count, templated, len(few) * count)))
    return lambda: [text for future in futures for text in json.loads(shards.result(future))]
