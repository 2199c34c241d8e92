"""Ears held against Hugging Face."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from pipeline.core.recipe import Gate
from pipeline.judge.gates import Measurement
from pipeline.judge.sensing import Floats, Reference, Soft, judge_soft, runner
from pipeline.judge.sounds import sounds
from pipeline.runtime.sound import Hearing, Samples

_BUILT_IN = ("silence", "the shortest", "speech, 1.88 s")
_Heard = Callable[[str], Floats]


def judge_tower(
    name: str,
    sections: Path,
    hearing: Hearing,
    reference: Reference,
    gate: Gate | None,
    scratch: Path,
    figures: Sequence[Measurement] = (),
) -> Soft:
    """As `seeing.judge_tower`."""
    given = sounds()

    def opened(xnnpack: bool) -> _Heard:
        ears = Ears(sections, hearing, scratch if xnnpack else None)
        return lambda each: ears.hear(given[each])

    soft = {each: reference.soft[each] for each in given}
    return judge_soft(name, soft, _BUILT_IN, opened, gate, figures)


class Ears:
    """The encoder and the adapter as the runtime runs them."""

    def __init__(self, sections: Path, hearing: Hearing, scratch: Path | None) -> None:
        """As `sensing.runner`."""
        self._hearing = hearing
        self._encoder, self._adapter = (
            runner(sections / f"audio_{part}.tflite", scratch) for part in ("encoder", "adapter")
        )
        self._most = int(self._encoder.get_input_details()["src_inputs"]["shape"][1])

    def hear(self, sound: Samples) -> Floats:
        """The soft tokens [n, H] that become positions of a prompt."""
        frames, mask = self._hearing.frames(sound, self._most)
        features = self._encoder(src_inputs=frames, mask=mask)
        made = next(iter(self._adapter(**features).values()))
        there = features["mask"]
        assert isinstance(made, np.ndarray)
        assert isinstance(there, np.ndarray)
        rows: Floats = made[0, : 1 + int(np.flatnonzero(there[0])[-1])]
        return rows
