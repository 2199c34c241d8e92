"""The pictures and sounds that towers are judged on, as `make run` gives them to the runtime."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pipeline.judge.pictures import write
from pipeline.judge.sounds import Samples, sounds
from pipeline.runtime.litert_lm import Kind, Medium
from pipeline.runtime.picture import Sight
from pipeline.runtime.sound import Hearing


@dataclass(frozen=True, kw_only=True)
class Given:
    """Pictures, as files, and sounds by name, for a model that has this sight and hearing."""

    sight: Sight | None
    hearing: Hearing | None
    pictures: Mapping[str, Path]
    sounds: Mapping[str, Samples]

    def __call__(self, kind: Kind, name: str) -> Medium:
        """One as the runtime takes it."""
        if kind == "image":
            assert self.sight
            data = self.sight.read(self.pictures[name])
            return Medium(kind=kind, data=data, tokens=self.sight.tokens(data))
        assert self.hearing
        return Medium(kind=kind, data=self.hearing.packed(self.hearing.fitted(self.sounds[name])))


@contextmanager
def given(sight: Sight | None, hearing: Hearing | None, scratch: Path) -> Iterator[Given]:
    """Those that every model is judged on; pictures lie in `scratch` meanwhile."""
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        pictures = write(Path(folder)) if sight else {}
        yield Given(sight=sight, hearing=hearing, pictures=pictures, sounds=sounds() if hearing else {})
