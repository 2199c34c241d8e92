"""Eyes held against Hugging Face."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from pipeline.core.recipe import Gate
from pipeline.judge.gates import Check
from pipeline.judge.pictures import write
from pipeline.judge.sensing import Floats, Reference, judge_soft, runner
from pipeline.runtime.picture import Sight

TOWER = "vision-fp32"
"""What the sections of the tower are called in checks, and their limits in the recipe."""
_BUILT_IN = ("photograph", "noise")


def judge_tower(sections: Path, sight: Sight, reference: Reference, gate: Gate | None, scratch: Path) -> list[Check]:
    """The sections of the tower in the folder `sections`; `scratch` is where pictures and repacked weights may lie."""
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        files = write(Path(folder))

        def opened(xnnpack: bool) -> Callable[[str], Floats]:
            eyes = Eyes(sections, sight, scratch if xnnpack else None)
            return lambda name: eyes.see(files[name])

        return judge_soft(TOWER, {name: reference.soft[name] for name in files}, _BUILT_IN, opened, gate)


class Eyes:
    """The encoder and the adapter as the runtime runs them."""

    def __init__(self, sections: Path, sight: Sight, scratch: Path | None) -> None:
        """As `sensing.runner`."""
        self._sight = sight
        self._encoder, self._adapter = (
            runner(sections / f"vision_{part}.tflite", scratch) for part in ("encoder", "adapter")
        )

    def see(self, file: Path) -> Floats:
        """The vectors [n + 1, H] that become positions of a prompt: soft tokens, and the picture's end."""
        features = self._encoder(images=self._sight.given(file))
        made = self._adapter(soft_tokens=features["features"])["mm_embedding"]
        assert isinstance(made, np.ndarray)
        rows: Floats = made[0]
        return rows
