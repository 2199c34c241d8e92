"""What the reference is asked, as shards: a batch of rows each, a pass through the cache, the greedy continuations.

A shard says which model, in how many threads, and which tokens: all that its result depends on. Batches are those of
`HuggingFace.hidden`, so the same numbers come out as from one call of it.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TypeAlias, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.cluster.pool import Shards
from pipeline.cluster.worker import let_go
from pipeline.core import log
from pipeline.judge.corpus import Tokens
from pipeline.judge.reference import Greedy
from pipeline.reference import devices
from pipeline.reference.model import HuggingFace

Floats = NDArray[np.float32]
Rows = tuple[tuple[int, ...], ...]
T = TypeVar("T")
Later: TypeAlias = Callable[[], T]
"""What was asked for: the call waits for the answer."""


@dataclass(frozen=True)
class Model:
    """A checkpoint as the reference loads it."""

    checkpoint: str
    device: str
    streamed: bool
    bfloat16: bool = False


_loaded: dict[Model, HuggingFace] = {}
"""The model of this process; one at a time, since a second one would need its memory."""


def loaded(model: Model) -> HuggingFace:
    """The reference, loaded by the first who asks."""
    if model not in _loaded:
        unload()
        kind = torch.bfloat16 if model.bfloat16 else torch.float32
        device = devices.choose(model.device)
        _loaded[model] = HuggingFace.load(Path(model.checkpoint), device, streamed=model.streamed, dtype=kind)
    return _loaded[model]


def unload() -> None:
    """Give the model's memory back."""
    _loaded.clear()


let_go.append(unload)


@dataclass(frozen=True)
class Batch:
    """Final hidden states of `ids` and `mask` [B, S]: float32 [B, S, H], or [B, H] of each row's `last` attended token.

    Computed on `device`, which may be another one than the model's.
    """

    model: Model
    threads: int
    device: str
    ids: Rows
    mask: Rows
    last: bool

    @property
    def amount(self) -> int:
        """Tokens."""
        return len(self.ids) * len(self.ids[0])

    def run(self, bar: log.Progress) -> bytes:
        """The states as a `.npy` file."""
        ids, mask = np.array(self.ids, np.int32), np.array(self.mask, np.int32)
        with _placed(self.model, self.device, self.threads) as reference:
            hidden = reference.hidden(ids, mask, bar)
        if self.last:
            places = ids.shape[1] - 1 - mask[:, ::-1].argmax(axis=1)
            hidden = hidden[np.arange(len(ids)), places]
        return packed(hidden)


@dataclass(frozen=True)
class Cached:
    """Final hidden states float32 [B, count, H] of the last `count` tokens of `ids` [B, S], through the cache."""

    model: Model
    threads: int
    ids: Rows
    count: int

    @property
    def amount(self) -> int:
        """Tokens."""
        return len(self.ids) * len(self.ids[0])

    def run(self, bar: log.Progress) -> bytes:
        """The states as a `.npy` file."""
        with _placed(self.model, self.model.device, self.threads) as reference:
            return packed(reference.hidden_cached(np.array(self.ids, np.int32), self.count, bar))


@dataclass(frozen=True)
class Continued:
    """At most `count` greedy tokens after each of `prompts`: one shard, since all go through the model together."""

    model: Model
    threads: int
    prompts: tuple[str, ...]
    count: int

    @property
    def amount(self) -> int:
        """Tokens."""
        return len(self.prompts) * self.count

    def run(self, bar: log.Progress) -> bytes:
        """The continuations as JSON, which keeps every digit of a double."""
        with _placed(self.model, self.model.device, self.threads) as reference:
            rows = reference.continue_greedily(self.prompts, self.count, bar)
        return json.dumps([asdict(row) for row in rows]).encode()


@contextmanager
def _placed(model: Model, device: str, threads: int) -> Iterator[HuggingFace]:
    """The reference on `device`, computing in so many threads."""
    reference, before = loaded(model), torch.get_num_threads()
    if threads != before:
        torch.set_num_threads(threads)
    if device != model.device:
        reference.model.to(device)
    try:
        yield replace(reference, device=device)
    finally:
        if threads != before:
            torch.set_num_threads(before)
        if device != model.device:
            reference.model.to(model.device)


def packed(array: Floats) -> bytes:
    """`array` as a `.npy` file."""
    head, array = io.BytesIO(), np.ascontiguousarray(array)
    np.lib.format.write_array_header_1_0(head, np.lib.format.header_data_from_array_1_0(array))
    return b"".join((head.getvalue(), array.data))  # one copy, of three that `np.save` makes


def unpacked(result: bytes) -> Floats:
    """The array in a `.npy` file."""
    array: Floats = np.load(io.BytesIO(result), allow_pickle=False)
    return array


def _rows(array: Tokens) -> Rows:
    return tuple(map(tuple, array.tolist()))


@dataclass(frozen=True)
class Asked:
    """The reference, asked in shards, which compute in `threads`.

    `reference` is here for its tokenizer and configuration; where shards run elsewhere its weights stay in their file.
    """

    shards: Shards
    model: Model
    threads: int
    reference: HuggingFace

    def hidden(
        self,
        ids: Tokens,
        mask: Tokens,
        *,
        last: bool = False,
        model: Model | None = None,
        device: str | None = None,
        threads: int | None = None,
    ) -> Later[Floats]:
        """Final hidden states of `ids` and `mask` [B, S] as `Batch` gives them; also by another model or elsewhere."""
        model = model or self.model
        batches = [
            Batch(model, threads or self.threads, device or model.device, _rows(ids[rows]), _rows(mask[rows]), last)
            for rows in self.reference.batches(ids)
        ]
        shards = self.shards  # and nothing that holds the model
        futures = [shards.submit(batch) for batch in batches]
        return lambda: np.concatenate([unpacked(shards.result(future)) for future in futures])

    def cached(self, ids: Tokens, count: int) -> Later[Floats]:
        """As `HuggingFace.hidden_cached`."""
        shards = self.shards
        future = shards.submit(Cached(self.model, self.threads, _rows(ids), count))
        return lambda: unpacked(shards.result(future))

    def greedy(self, prompts: Sequence[str], count: int) -> Later[list[Greedy]]:
        """As `HuggingFace.continue_greedily`."""
        shards = self.shards
        future = shards.submit(Continued(self.model, self.threads, tuple(prompts), count))
        return lambda: [Greedy(**row) for row in json.loads(shards.result(future))]
