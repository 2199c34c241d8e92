"""The reference that files are held against: hidden states of Hugging Face in fp32, stored by the golden stage.

Hidden states and not logits are stored: they are V / H times smaller (128 times for Gemma 3n E2B), and the logits
follow exactly as `softcap(hidden @ head.T)`, here in float64.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from pipeline.checkpoint.reader import open_checkpoint
from pipeline.core.errors import IntegrityError
from pipeline.judge import metrics
from pipeline.judge.corpus import Positions, Tokens
from pipeline.judge.metrics import Reals, Scores
from pipeline.runtime.interface import Array

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]
Weight = NDArray[np.uint16] | NDArray[np.float16] | NDArray[np.float32]
Wide = TypeVar("Wide", np.float32, np.float64)

_BLOCK = 1 << 24
"""Head elements that are widened to float64 at a time (128 MiB)."""
_LOGITS = 1 << 25
"""Reference logits that are there at a time (256 MiB): the head is widened anew for each lot of them."""


@dataclass(frozen=True)
class Head:
    """The output projection: stored `weight` [V, H] (bf16 as uint16 bit patterns, else float) and the soft-cap."""

    weight: Weight
    cap: float | None

    @classmethod
    def of_checkpoint(cls, folder: Path, cap: float | None) -> Head:
        """The head of the checkpoint in `folder`, memory-mapped: its own if it has one, else the token embedding.

        `cap` as the golden stage found it in the model: where config.json says nothing, Gemma 3n has one all the same.

        Raises:
            IntegrityError: the checkpoint has neither tensor.
        """
        checkpoint = open_checkpoint(folder)
        return cls(weight=checkpoint.stored(checkpoint.head), cap=cap)

    @property
    def vocabulary(self) -> int:
        """The number of tokens, V."""
        return int(self.weight.shape[0])

    def logits(self, hidden: Reals) -> Doubles:
        """`cap · tanh(hidden @ weight.T / cap)` in float64: [n, H] → [n, V]; without a cap just the product."""
        rows, size = self.weight.shape
        step = max(1, _BLOCK // size)
        wide = np.asarray(hidden, dtype=np.float64)
        logits = np.empty((len(wide), rows))
        for start in range(0, rows, step):
            logits[:, start : start + step] = wide @ widened(self.weight[start : start + step], np.float64).T
        if self.cap is not None:  # in place: logits of a large vocabulary are large
            logits /= self.cap
            np.tanh(logits, out=logits)
            logits *= self.cap
        return logits

    @property
    def rows(self) -> int:
        """How many positions are scored together."""
        return max(1, _LOGITS // self.vocabulary)

    def score(self, logits: Reals, hidden: Reals, targets: Tokens | None = None) -> Scores:
        """`logits` [n, V] of a file scored against those of the reference's hidden states [n, H], lot by lot."""
        return self.score_each([logits], hidden, targets)[0]

    def score_each(
        self,
        files: Sequence[Reals],
        hidden: Reals,
        targets: Tokens | None = None,
        chosen: Sequence[NDArray[np.int64]] | None = None,
    ) -> list[Scores]:
        """The same of several files: the reference's logits are computed once for all of them.

        `chosen` says of each file which of the positions its logits are, where it has not all of them in order.
        """
        chosen = chosen or [np.arange(len(hidden))] * len(files)
        parts: list[list[Scores]] = [[] for _ in files]
        for start in range(0, len(hidden), self.rows):
            expected = self.logits(hidden[start : start + self.rows])
            for part, logits, places in zip(parts, files, chosen, strict=True):
                rows = np.flatnonzero((places >= start) & (places < start + self.rows))
                if len(rows):
                    next_tokens = None if targets is None else targets[places[rows]]
                    part.append(metrics.compare(expected[places[rows] - start], logits[rows], next_tokens))
        # Lot by lot, so in the order of the lots; the files' own order is that of `chosen`.
        orders = [np.argsort(np.argsort(places // self.rows, kind="stable"), kind="stable") for places in chosen]
        return [metrics.join(part).take(order) for part, order in zip(parts, orders, strict=True)]


def widened(weight: Weight, dtype: type[Wide]) -> NDArray[Wide]:
    """Stored weights in float32 or float64."""
    if weight.dtype == np.uint16:  # bf16 is the upper half of a float32
        weight = (weight.astype(np.uint32) << 16).view(np.float32)
    return weight.astype(dtype, copy=False)


@dataclass(frozen=True)
class Greedy:
    """One greedy continuation of the reference, ids and texts; per token the lead in logits, and log p."""

    prompt: str
    prompt_ids: list[int]
    continuation_ids: list[int]
    text: str
    margins: list[float]
    log_likelihoods: list[float]


ShapeData: TypeAlias = tuple[str, Tokens, Tokens, Floats]
"""A shape case: name, input_ids and attention_mask int32 [B, S], hidden float32 [B, H]."""


@dataclass(frozen=True)
class Reference:
    """What the golden stage stored in `folder`, and the head that turns its hidden states into logits."""

    folder: Path
    head: Head

    def corpus(self) -> tuple[Tokens, Positions, Floats]:
        """The windows int32 [N, L], the n judged positions, and the hidden states float32 [n, H] there."""
        tensors = _load(self.folder / "corpus.safetensors")
        return tensors["input_ids"], Positions(tensors["window"], tensors["length"]), tensors["hidden"]

    def shapes(self) -> Iterator[ShapeData]:
        """The shape cases, those of one shape one after another, short ones first."""
        file = self.folder / "shapes.safetensors"
        with _open(file) as tensors:
            names = {key.rsplit(".", 1)[0] for key in tensors.keys()}  # noqa: SIM118 - not a mapping
            for name in sorted(names, key=_case_order):
                ids, mask, hidden = (tensors.get_tensor(f"{name}.{part}") for part in _CASE_PARTS)
                yield name, ids, mask, hidden

    def cache(self) -> dict[str, Array]:
        """What goes through the cache, as `judge.kv_cache.Trace` calls it.

        Of the conversations `tokens` [2, L + 1], `hidden` [2, L, H] and `cached` [2, D, H]; of the texts after them
        `texts` [N, T + 1] and `states` [N, T, H].
        """
        return _load(self.folder / "cache.safetensors")

    def greedy(self) -> list[Greedy]:
        """The greedy continuations."""
        return [Greedy(**row) for row in json.loads((self.folder / "greedy.json").read_text(encoding="utf-8"))]


_CASE_PARTS = ("input_ids", "attention_mask", "hidden")


def _case_order(name: str) -> tuple[int, int, str]:
    """Cases of one shape (B, S) one after another, short ones first: `b8_s128_left` → (128, 8, left)."""
    batch, sequence, padding = name.split("_")
    return int(sequence[1:]), int(batch[1:]), padding


def _open(file: Path) -> safe_open:
    try:
        return safe_open(file, framework="numpy")
    except (SafetensorError, OSError) as error:
        raise IntegrityError(f"{file} can't be read: {error}", file=file) from error


def _load(file: Path) -> dict[str, Array]:
    with _open(file) as tensors:
        return {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118 - not a mapping
