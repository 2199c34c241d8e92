"""Loaded by every worker (`--preload`): a line in the file COUNTED for each shard that is begun, with its process."""

from __future__ import annotations

import os
from collections.abc import Callable

from pipeline.core import log


def counting(own: Callable[[], log.Progress]) -> Callable[[], log.Progress]:
    """`own`, which a worker calls when it begins a shard, with a line in the file."""

    def counted() -> log.Progress:
        with open(os.environ["COUNTED"], "a", encoding="ascii") as stream:
            stream.write(f"{os.getpid()}\n")
        return own()

    return counted


if log.unshown.__module__ == log.__name__:  # Dask loads this file more than once
    log.unshown = counting(log.unshown)
