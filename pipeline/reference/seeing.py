"""What Hugging Face sees: soft tokens of pictures, by `eyes.py` in a process of its own, which has timm."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from safetensors.numpy import load_file
from transformers import AutoConfig

from pipeline.core import process, senses
from pipeline.core.errors import UsageError, VerificationError
from pipeline.core.recipe import PROJECT
from pipeline.reference.answers import Heard, Sense, embedder
from pipeline.reference.model import Floats

BESIDE = PROJECT / ".venv-vision"
"""Where timm and torchvision lie: beside the environment, in which transformers would go other ways with them."""
_PACKAGE = "timm"
_WITHOUT = ("gemma3", "gemma4")
"""The types of models whose eyes have no tokens of their own: soft tokens alone are seen."""


@dataclass(frozen=True, kw_only=True)
class Eyes:
    """What a checkpoint's eyes are to a prompt."""

    checkpoint: Path
    config: Any
    embedder: Any

    @classmethod
    def load(cls, checkpoint: Path) -> Eyes:
        """Those of a checkpoint."""
        config = AutoConfig.from_pretrained(checkpoint, local_files_only=True)
        if config.model_type in _WITHOUT:
            return cls(checkpoint=checkpoint, config=config, embedder=None)
        own = embedder(checkpoint, config.vision_config, config.text_config, "embed_vision")
        return cls(checkpoint=checkpoint, config=config, embedder=own)

    @property
    def sense(self) -> Sense:
        """How pictures stand in a prompt."""
        said, own = self.config, self.config.vision_config
        places = {"start": said.boi_token_id, "end": said.eoi_token_id, "place": said.image_token_id}
        if self.embedder:
            return Sense.of(own, self.embedder, **places)
        return (
            Sense.places(**places, whole=True)
            if said.model_type == "gemma3"
            else Sense.places(**places, around="", ends=True)
        )


def look(checkpoint: Path, files: Mapping[str, Path], scratch: Path) -> dict[str, Floats]:
    """The vectors [n, H] of each picture in `files`, by its name: its soft tokens, and of Gemma 3n that of its end.

    Raises:
        UsageError: timm is not installed.
        VerificationError: the process fails, and has said why.
    """
    if not (BESIDE / _PACKAGE).is_dir() and not find_spec(_PACKAGE):
        hears = "audio, or " if senses.of_folder(checkpoint, ("audio",)) else ""
        raise UsageError(
            "the reference's vision tower needs timm, which is not installed here",
            remedy="`make` installs it; by hand: pip install --no-deps --require-hashes "
            f"--target {BESIDE.name} -r locks/vision.txt; or say TOWERS={hears}none",
        )
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        out = Path(folder) / "seen.safetensors"
        path = os.pathsep.join(filter(None, (str(BESIDE), str(PROJECT), os.environ.get("PYTHONPATH", ""))))
        command = [sys.executable, "-m", "pipeline.reference.eyes", str(checkpoint), str(out)]
        if process.run([*command, *map(str, files.values())], env={**os.environ, "PYTHONPATH": path}):
            raise VerificationError(
                "transformers' vision tower fails on this checkpoint", cause="the lines above are what it said"
            )
        return load_file(out)


def messages(
    seen: Mapping[str, Floats], heard: Iterator[Heard] | None, *, ends: bool = True, alone: bool = False
) -> Iterator[Heard]:
    """What is in each message that is asked about: a picture; in every eighth two, and a sound if the model `heard`.

    What is seen `ends` with a vector that is a token of its own. If `alone`, no message has two: LiteRT-LM reads so
    many tokens in a call, and what is read in two does not see itself whole. Two have as many soft tokens each: one of
    fewer the runtime may enlarge.
    """
    names = sorted(seen)
    index = 0
    while True:
        first = names[(index * 7) % len(names)]
        alike = [name for name in names if len(seen[name]) == len(seen[first])]
        second = [alike[(index * 5 + 3) % len(alike)]] if index % 8 == 1 and not alone else []
        taken = [first, *second]
        media: Heard = [("image", name, seen[name][: -1 if ends else None]) for name in dict.fromkeys(taken)]
        yield [*media, *(next(heard)[:1] if heard and index % 8 == 1 else [])]
        index += 1
