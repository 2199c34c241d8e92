"""Name the published images in README.md: `python -m tools.images [COMMIT CPU CUDA]`.

With three words it first notes two newer ones, of a COMMIT, by name and digest, in releases/images.txt: the workflow
`image` does, and proposes the change.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path

from pipeline.core import manifest
from pipeline.core.recipe import PROJECT
from pipeline.release import images
from tools.tables import replaced

README = "README.md"


def paragraph(file: Path) -> str:
    """What README says of the images in `file`."""
    cpu, cuda = (images.published(lock, file) for lock in ("cpu", "cuda"))
    if not cpu:
        return "No image is published yet: `make image` builds one in a clone, called `hf-to-litert`."
    return f"IMAGE is `{cpu}`, for GPUs (`--gpus all`) `{cuda}`."


def documents(project: Path = PROJECT) -> dict[Path, str]:
    """README.md with what it has to say of the images, by its path."""
    text = (project / README).read_text(encoding="utf-8")
    told = paragraph(project / images.FILE.relative_to(PROJECT))
    return {project / README: replaced(text, "image", told, by="tools.images")}


def note(commit: str, cpu: str, cuda: str, project: Path = PROJECT) -> None:
    """Add two published images to the list, unless they are in it.

    Raises:
        SystemExit: what is said is no commit, or no name with a digest.
    """
    if not re.fullmatch("[0-9a-f]{40}", commit) or not all(map(images.PUSHED.fullmatch, (cpu, cuda))):
        sys.exit(f"error: this is no commit and two images by digest: {commit} {cpu} {cuda}")
    file = project / images.FILE.relative_to(PROJECT)
    text = file.read_text(encoding="utf-8")
    rows = (f"{commit} cpu {cpu}\n", f"{commit} cuda {cuda}\n")
    manifest.write_atomically(file, text + "".join(row for row in rows if row not in text))


def main(words: Sequence[str], project: Path = PROJECT) -> int:
    """Note what is newer, and write README.md."""
    if words:
        commit, cpu, cuda = words
        note(commit, cpu, cuda, project)
    for file, text in documents(project).items():
        manifest.write_atomically(file, text)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
