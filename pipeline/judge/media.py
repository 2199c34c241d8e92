"""The pictures and sounds that towers are judged on, as `make run` gives them to the runtime."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline.judge.pictures import write
from pipeline.judge.sounds import sounds
from pipeline.runtime.litert_lm import Kind, Medium
from pipeline.runtime.picture import Sight
from pipeline.runtime.sound import Hearing


@contextmanager
def given(sight: Sight | None, hearing: Hearing | None, scratch: Path) -> Iterator[Callable[[Kind, str], Medium]]:
    """Each by kind and name; pictures lie in `scratch` meanwhile."""
    played = sounds() if hearing else {}
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        shown = write(Path(folder)) if sight else {}

        def medium(kind: Kind, name: str) -> Medium:
            if kind == "image":
                assert sight
                return Medium(kind=kind, data=sight.read(shown[name]))
            assert hearing
            return Medium(kind=kind, data=hearing.packed(hearing.fitted(played[name])))

        yield medium
