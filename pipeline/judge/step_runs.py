"""Running a step graph on the reference's inputs: the judged positions, the shape grid, greedy continuations."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline.core import log
from pipeline.core.errors import UsageError
from pipeline.judge import corpus, metrics
from pipeline.judge.metrics import Scores
from pipeline.judge.reference import Floats, Head, Reference, ShapeData
from pipeline.runtime.litert import FixedStep, StepModel

Logits = NDArray[np.float32]


@dataclass(frozen=True)
class JudgedPositions:
    """The judged positions of a corpus: batches, the reference's hidden states [n, H], the real next tokens [n]."""

    positions: corpus.Positions
    batches: Sequence[corpus.Batch]
    hidden: Floats
    targets: corpus.Tokens
    head: Head

    @classmethod
    def of(cls, reference: Reference, *, batch: int, pad: int) -> JudgedPositions:
        """The reference's positions in batches of at most `batch` rows."""
        windows, positions, hidden = reference.corpus()
        return cls(
            positions=positions,
            batches=corpus.prefix_batches(windows, positions, batch, pad),
            hidden=hidden,
            # A prefix of `length` tokens ends before the token at that place, which is the one to predict.
            targets=windows[positions.window, positions.length],
            head=reference.head,
        )

    def part(self, every: int, longest: int | None = None) -> tuple[JudgedPositions, NDArray[np.int64]]:
        """Every `every`-th pair of batches, for what takes long; which positions it keeps, of all in their order.

        Of these only batches of sequences of at most `longest` tokens. Neighbours are padded on different sides, and
        mostly of one length, for which a runtime plans its memory once.

        Raises:
            UsageError: none is that short.
        """
        if every == 1 and longest is None:
            return self, np.arange(len(self.positions))
        batches = [batch for place, batch in enumerate(self.batches) if place // 2 % every == 0]
        batches = [batch for batch in batches if longest is None or batch.input_ids.shape[1] <= longest]
        if not batches:
            raise UsageError(
                f"no judged text is as short as {longest} tokens",
                cause="`[step] fixed` names a shape that is too short for the recipe's `corpus`",
                remedy="name a longer one",
            )
        chosen = np.concatenate([batch.index for batch in batches])
        starts = np.cumsum([0, *(len(batch.index) for batch in batches)])
        renumbered = [
            corpus.Batch(batch.input_ids, batch.attention_mask, np.arange(start, start + len(batch.index)))
            for batch, start in zip(batches, starts, strict=False)
        ]
        kept = corpus.Positions(self.positions.window[chosen], self.positions.length[chosen])
        return JudgedPositions(kept, renumbered, self.hidden[chosen], self.targets[chosen], self.head), chosen


def run_positions(model: StepModel | FixedStep, judged: JudgedPositions, label: str, scratch: Path) -> Logits:
    """The file's logits float32 [n, V] at each judged position, in a memory map at `scratch` (gigabytes for E2B)."""
    shape = (len(judged.positions), judged.head.vocabulary)
    # 5,000 positions of 262,144 tokens are 5 GB.
    logits = np.memmap(scratch, dtype=np.float32, mode="w+", shape=shape)
    with log.progress(f"{label}: judged positions", shape[0], "positions") as bar:
        for batch in judged.batches:
            logits[batch.index] = model.logits(batch.input_ids, batch.attention_mask)
            bar.advance(len(batch.index))
    return logits


def against_reference(
    files: Sequence[Logits], judged: JudgedPositions, chosen: Sequence[NDArray[np.int64]] | None = None
) -> list[Scores]:
    """Each file's logits [n, V] scored against Hugging Face's, which are computed from the hidden states lot by lot.

    Of each file they are the positions `chosen`, by default all.
    """
    return judged.head.score_each(files, judged.hidden, judged.targets, chosen)


def against_file(logits: Logits, other: Logits, judged: JudgedPositions, chosen: NDArray[np.int64]) -> Scores:
    """`logits` [n, V] of `judged` scored against another file's, of which they are the positions `chosen` [n].

    Lot by lot: both are memory maps, and a copy of all would be gigabytes.
    """
    lots = (slice(start, start + judged.head.rows) for start in range(0, len(logits), judged.head.rows))
    return metrics.join([metrics.compare(other[chosen[lot]], logits[lot], judged.targets[lot]) for lot in lots])


@dataclass(frozen=True)
class GridResult:
    """A file on the shape grid, against Hugging Face: worst row's NMSE and where, mean KLD and top-1 over all rows.

    `cases` of the grid's `all_cases` were run.
    """

    cases: int
    all_cases: int
    rows: int
    nmse: float
    where: str
    kld: float
    top1: float
    max_abs: float


def run_grid(model: StepModel, reference: Reference, label: str, most: float = math.inf, window: int = 0) -> GridResult:
    """Run the file on the shape grid; with a limit `most` on batch × sequence² only on what `_thinned` leaves of it.

    `window` is the model's sliding window, which one row at least goes beyond.
    """
    grid = list(reference.shapes())
    cases = grid if math.isinf(most) else _thinned(grid, most, window)
    parts = []
    with log.progress(f"{label}: shape grid", sum(case[1].size for case in cases), "tokens") as bar:
        for lot in _lots(cases, reference.head.rows):
            logits = []
            for _, ids, mask, _ in lot:
                logits.append(model.logits(ids, mask))
                bar.advance(ids.size)
            parts.append(reference.head.score(np.concatenate(logits), np.concatenate([case[3] for case in lot])))
    scores = metrics.join(parts)
    names = [f"{name}, row {row}" for name, ids, _, _ in cases for row in range(len(ids))]
    nmse = scores.nmse
    # A row that is not finite is the worst there can be, and argmax would skip it.
    worst = int(np.argmax(np.where(np.isfinite(nmse), nmse, math.inf)))
    return GridResult(
        cases=len(cases),
        all_cases=len(grid),
        rows=len(nmse),
        nmse=float(nmse[worst]),
        where=names[worst],
        kld=float(scores.kld.mean()),
        top1=float(scores.top1.mean()),
        max_abs=float(scores.max_abs.max()),
    )


def _lots(cases: Sequence[ShapeData], rows: int) -> Iterator[list[ShapeData]]:
    """The cases in their order, `rows` rows or a few more together: the head is widened anew for each lot."""
    lot: list[ShapeData] = []
    for case in cases:
        lot.append(case)
        if sum(len(each[1]) for each in lot) >= rows:
            yield lot
            lot = []
    if lot:
        yield lot


def _thinned(cases: Sequence[ShapeData], most: float, window: int) -> list[ShapeData]:
    """Each shape once, with paddings in turn, as far as it is not beyond `most`, and one row beyond the window.

    A padding changes what a kernel is given, not which kernel runs or how: with paddings in turn each still meets
    every length that several batches have, and every batch.
    """
    shapes: dict[tuple[int, ...], list[ShapeData]] = {}
    for case in cases:
        shapes.setdefault(case[1].shape, []).append(case)
    batches, lengths = (sorted(set(sizes)) for sizes in zip(*shapes, strict=True))
    beyond = _beyond(lengths, window)
    return [
        same[(batches.index(batch) + lengths.index(length)) % len(same)]
        for (batch, length), same in shapes.items()
        if batch * length**2 <= most or (batch, length) == (batches[0], beyond)
    ]


def _beyond(lengths: Sequence[int], window: int) -> int:
    """The shortest of the ascending `lengths` that goes beyond the window; the longest if none does."""
    return next((length for length in lengths if length > window), lengths[-1])


def count_unsound(
    model: StepModel, reference: Reference, most: float = math.inf, window: int = 0
) -> tuple[int, list[str]]:
    """How many corner cases of the shape grid give a logit that is not finite, and the names of the cases that ran.

    Corners are the shortest and the longest sequence of the smallest and of the largest batch, one padding each, as far
    as batch × sequence² is at most `most`, and one row beyond the window: enough for a quantised file, whose numbers
    the corpus judges.
    """
    every = {ids.shape: (name, ids, mask) for name, ids, mask, _ in reference.shapes()}
    row = min(batch for batch, _ in every), _beyond(sorted({length for _, length in every}), window)
    shapes = {shape: case for shape, case in every.items() if shape[0] * shape[1] ** 2 <= most or shape == row}
    batches = {batch for batch, _ in shapes}
    corners = []
    for batch in sorted({min(batches), max(batches)}):
        lengths = {length for size, length in shapes if size == batch}
        corners += [shapes[batch, length] for length in sorted({min(lengths), max(lengths)})]
    bad = sum(not np.isfinite(model.logits(ids, mask)).all() for _, ids, mask in corners)
    return bad, [name for name, _, _ in corners]


def greedy(model: StepModel, reference: Reference, prompts: int, count: int, stop: Sequence[int]) -> list[list[int]]:
    """The file's own continuation of the first `prompts` of the reference's prompts."""
    return [model.continue_greedily(row.prompt_ids, count, stop) for row in reference.greedy()[:prompts]]


def agreement(ours: Sequence[int], theirs: Sequence[int]) -> int:
    """How many tokens two continuations have in common before they part."""
    for place, (one, other) in enumerate(zip(ours, theirs, strict=False)):
        if one != other:
            return place
    return min(len(ours), len(theirs))
