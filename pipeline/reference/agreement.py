"""Whether what golden stored of a GPU's reference is what the CPU says, at a few positions.

A window of the text, at whose positions logits are held against each other, and the first tokens of a decoded text.
Golden itself compares hidden states before it ends; here another process, maybe on another machine, reads the files.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from pipeline.core import log
from pipeline.core.recipe import Gate
from pipeline.judge import gates, metrics
from pipeline.judge.corpus import Tokens
from pipeline.judge.gates import Check, Measurement
from pipeline.judge.parity import TIE
from pipeline.judge.reference import Doubles, Greedy, Reference
from pipeline.reference import devices
from pipeline.reference.model import HuggingFace

NAME = "reference"
"""Of the limits in a recipe's `gates`, and in checks."""
_GATE = Gate(nmse=devices.NMSE)
"""Where the recipe has none."""
_TOKENS = 8
_LIKELY = 1e-3
"""Nats by which the log-likelihood of a token may be off."""


def checks(stored: Reference, checkpoint: Path, device: str, gate: Gate | None) -> list[Check]:
    """The checks on what golden `stored`, computed on `device`, for which the CPU streams the model of `checkpoint`."""
    log.step(f"the reference ran on {device}: a few positions again on the CPU")
    cpu = devices.opened(checkpoint, "cpu")
    error, positions = _on_text(stored, cpu)
    told = Measurement(
        metric="nmse", name="worst logits NMSE on text", value=error, against="CPU", detail=f"{positions} positions"
    )
    row = stored.greedy()[0]
    count = len(row.continuation_ids[:_TOKENS])
    other = _other_tokens(row, _logits(stored, cpu, [*row.prompt_ids, *row.continuation_ids[: count - 1]])[-count:])
    name, detail = "decoded tokens that the CPU does not say", f"the first {count} of a text"
    return [*gates.judge(NAME, gate or _GATE, [told]), gates.must_hold(NAME, name, other, count, detail)]


def _on_text(stored: Reference, cpu: HuggingFace) -> tuple[float, int]:
    """The worst normalised mean square error of logits over the judged positions of the first window; how many."""
    windows, positions, hidden = stored.corpus()
    here = positions.window == 0
    again = _logits(stored, cpu, windows[0].tolist())[positions.length[here] - 1]
    return float(metrics.compare(again, stored.head.logits(hidden[here])).nmse.max()), int(here.sum())


def _other_tokens(row: Greedy, logits: Doubles) -> int:
    """How many of the first tokens, before each of which `logits` [n, V] stand, the CPU finds less likely, or another.

    A token that leads by less than `TIE` may be another one.
    """
    said, leads, likely = (
        np.array(each[: len(logits)]) for each in (row.continuation_ids, row.margins, row.log_likelihoods)
    )
    own = logits[np.arange(len(said)), said] - np.logaddexp.reduce(logits, axis=1)
    other = (logits.argmax(axis=1) != said) & (leads > TIE)
    return int((other | ~(abs(own - likely) <= _LIKELY)).sum())


def _logits(stored: Reference, cpu: HuggingFace, ids: list[int]) -> Doubles:
    """What the CPU says after each of `ids`: [n, V]."""
    row: Tokens = np.array([ids], np.int32)
    return stored.head.logits(cpu.hidden(row, np.ones_like(row))[0])
