"""An adapter and its base brought together: both obtained and pinned, merged, their files put in place."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from pipeline.checkpoint import adapters
from pipeline.checkpoint.adapters import Changes
from pipeline.checkpoint.reader import open_checkpoint, read_tensors
from pipeline.core.manifest import Known
from pipeline.release.origin import Asked


@dataclass(frozen=True, kw_only=True)
class Joined:
    """What came of it: the `changes`, and the revisions of both."""

    changes: Changes
    revision: str
    base_revision: str


def join(
    asked: Asked, names: Iterable[str], canonical: Callable[[str], str | None], root: Path, target: Path, known: Known
) -> Joined:
    """Merge the adapter that was asked for into its base, in the empty folder `target`.

    Args:
        asked: an adapter.
        names: the files that the merged checkpoint needs.
        canonical: the canonical name of a tensor, or None for what the text model leaves out.
        root: the model's artefact folder, where downloads wait.
        target: where the files go.
        known: hashes, of which it learns those of what is written here.

    Raises:
        FetchError: the adapter does not fit its base, or leaves out a table that must follow.
    """
    adapter, own, base = asked.adapter, asked.origin, asked.base
    assert adapter and base
    sizes, where = base.source.sizes, base.source.where
    changes = adapters.changes(adapter, read_tensors(sizes, sizes, base.source.read, where), canonical, where)
    brought = [name for name in own.source.sizes if adapters.brought(name, own.source.sizes)]
    kept = [name for name in names if name not in brought]
    terms = [name for name in brought if name in sizes and adapters.TERMS.fullmatch(name)]
    weights = sum(sizes[name] for name in kept if name.endswith(".safetensors"))
    there = base.obtain([*kept, *terms], root, extra=weights)
    taken = [*brought, adapters.CONFIG, adapters.WEIGHTS]
    trained = own.obtain(taken, root)
    adapters.check_tokens(own.source, base.source, changes.tokens)
    with ThreadPoolExecutor(1) as beside:  # a folder's revision is a hash of all that is in it
        pinned = beside.submit(base.revision, kept, known)
        from pipeline.checkpoint import merging  # PyTorch, which nothing else here needs and takes a second

        sums = merging.write(open_checkpoint(there), adapter, trained, changes.changed, target)
    for name in (name for name in kept if name not in sums):
        base.put(there / name, target / name)
    for name in terms:
        base.put(there / name, target / f"{name}.base")
    for name in brought:
        own.put(trained / name, target / name)
    revision, base_revision = own.revision(taken, known), pinned.result()
    known.settle()  # or the last file, which may be all weights, would be read once more
    known.learn({target / name: sha256 for name, sha256 in sums.items()})
    return Joined(changes=changes, revision=revision, base_revision=base_revision)
