"""Stage golden's part about pictures and sounds."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

from pipeline.core.recipe import Bundle
from pipeline.judge.pictures import write
from pipeline.judge.sensing import Kind, Reference, asked
from pipeline.judge.sounds import sounds
from pipeline.reference import hearing, seeing
from pipeline.reference.answers import Sense, answers
from pipeline.reference.model import HuggingFace


def make(
    checkpoint: Path, reference: HuggingFace, towers: Sequence[str], bundle: Bundle, parameters: int, folder: Path
) -> None:
    """Compute and store what the reference, of so many parameters, sees and hears, and says of it.

    Raises:
        UsageError: timm, of which the vision tower is, is not installed.
    """
    senses: dict[Kind, Sense] = {}
    seen = {}
    if "vision" in towers:
        with tempfile.TemporaryDirectory(dir=folder) as pictures:
            seen = seeing.look(checkpoint, write(Path(pictures)), folder)
    if "audio" in towers:
        ears = hearing.Ears.load(checkpoint)
        senses["audio"], heard = ears.sense, hearing.listen(ears, sounds())
        told, states = answers(reference, senses, hearing.messages(heard), *asked(bundle, parameters))
        Reference(soft=heard, answers=told, states=states).store(folder, "audio")
    if seen:
        played = hearing.messages(heard) if "audio" in towers else None
        senses["image"] = eyes = seeing.Eyes.load(checkpoint).sense
        shown = seeing.messages(seen, played, ends=eyes.embedder is not None, alone=eyes.whole)
        told, states = answers(reference, senses, shown, *asked(bundle, parameters))
        Reference(soft=seen, answers=told, states=states).store(folder, "vision")
