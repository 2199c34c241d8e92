"""Eyes held against Hugging Face."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from pipeline.core.recipe import Gate
from pipeline.judge.gates import Measurement
from pipeline.judge.pictures import write
from pipeline.judge.sensing import Floats, Reference, Soft, judge_soft, runner
from pipeline.runtime.picture import Sight

_BUILT_IN = ("photograph", "noise")


def judge_tower(
    name: str,
    sections: Path,
    sight: Sight,
    reference: Reference,
    gate: Gate | None,
    scratch: Path,
    figures: Sequence[Measurement] = (),
) -> Soft:
    """The sections in the folder `sections`, which checks call `name`, as `judge_soft`.

    `scratch` is where pictures and repacked weights may lie.
    """
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        files = write(Path(folder))

        def opened(xnnpack: bool) -> Callable[[str], Floats]:
            eyes = Eyes(sections, sight, scratch if xnnpack else None)
            return lambda each: eyes.see(files[each])

        soft = {each: reference.soft[each] for each in files}
        return judge_soft(name, soft, _BUILT_IN, opened, gate, figures)


class Eyes:
    """The encoder and the adapter as the runtime runs them."""

    def __init__(self, sections: Path, sight: Sight, scratch: Path | None) -> None:
        """As `sensing.runner`."""
        self._sight = sight
        self._encoder, self._adapter = (
            runner(sections / f"vision_{part}.tflite", scratch) for part in ("encoder", "adapter")
        )

    def see(self, file: Path) -> Floats:
        """The vectors [n, H] that become positions of a prompt: soft tokens, and where it is one the picture's end."""
        features = self._encoder(**self._sight.given(file))
        made = self._adapter(soft_tokens=features["features"])["mm_embedding"]
        assert isinstance(made, np.ndarray)
        rows: Floats = made[0]
        if "mask" in features:  # the runtime takes as many of the first as there are
            mask = features["mask"]
            assert isinstance(mask, np.ndarray)
            rows = rows[: int(mask.sum())]
        return rows
