"""Where each constant of a finished file stands, and the sha256 of its bytes.

With places beside digests, anybody can hold a file against the list without a reader of flatbuffers: cut out the
bytes, hash them. Files are mapped, never read whole: only the flatbuffer's tables are touched to find the places.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from pipeline.bundling.litertlm import MODEL, WEIGHTS, read_sections
from pipeline.core import log, manifest, parallel
from pipeline.tflite.graph import model_at, type_name
from pipeline.tflite.schema import BufferReader


@dataclass(frozen=True, kw_only=True)
class Constant:
    """A stored constant: `offset` and `size` in bytes of the file, `section` the bundle's section it belongs to.

    `name` is that of the first tensor that uses it; several can. `shape` and `type` are that tensor's.
    """

    section: str
    name: str
    shape: tuple[int, ...]
    type: str
    offset: int
    size: int
    sha256: str = ""


def digests(files: Mapping[str, Path]) -> dict[str, list[dict[str, object]]]:
    """Every constant of each file (`.tflite` or `.litertlm`), in the order of their places, under the file's key.

    Raises:
        BundleError: a bundle's header can't be read.
    """
    placed = {key: places(file) for key, file in files.items()}
    with log.progress("hashing tensors", sum(item.size for items in placed.values() for item in items)) as bar:

        def hashed(file: Path, items: Sequence[Constant]) -> list[dict[str, object]]:
            def work(item: Constant) -> Constant:
                digest = manifest.sha256_of_part(file, item.offset, item.size)
                bar.advance(item.size)
                return replace(item, sha256=digest)

            return [asdict(item) for item in parallel.ordered(work, items)]

        return {key: hashed(files[key], items) for key, items in placed.items()}


def places(file: Path) -> list[Constant]:
    """The constants of `file` in the order of their places, not yet hashed.

    Raises:
        BundleError: a bundle's header can't be read.
    """
    # A file of one model is its own and only section.
    starts, beside = {"": 0}, {}
    if file.suffix == ".litertlm":
        sections = read_sections(file)
        starts = {item.model_type: item.offset for item in sections if item.kind == MODEL}
        beside = {item.model_type: item.offset for item in sections if item.kind == WEIGHTS}
    with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
        found = [
            item
            for section, start in starts.items()
            for item in _constants(data, start, section, beside.get(section, 0))
        ]
    # Ascending, so that a checker reads the file from front to end.
    return sorted(found, key=lambda item: item.offset)


def _constants(data: mmap.mmap, start: int, section: str, beside: int) -> Iterator[Constant]:
    """The constants of the model that begins at byte `start` of `data`; those that stand outside do from `beside`."""
    model, seen = model_at(data, start), {(0, 0)}  # buffer 0 is empty by convention
    outside = {item.Id(): item for item in map(model.ExternalBuffers, range(model.ExternalBuffersLength()))}
    for graph in map(model.Subgraphs, range(model.SubgraphsLength())):
        for tensor in map(graph.Tensors, range(graph.TensorsLength())):
            # Tied weights are one buffer: whoever checks a file need hash it once.
            held = tensor.Buffer(), tensor.ExternalBuffer()
            if held in seen:
                continue
            seen.add(held)
            if found := outside.get(tensor.ExternalBuffer()):
                offset, size = beside + found.Offset(), found.Length()
            else:
                offset, size = _place(model.Buffers(tensor.Buffer()), start)
            if size:
                yield Constant(
                    section=section,
                    name=(tensor.Name() or b"").decode("utf-8", "replace"),
                    shape=tuple(tensor.Shape(axis) for axis in range(tensor.ShapeLength())),
                    type=type_name(tensor.Type()),
                    offset=offset,
                    size=size,
                )


def _place(buffer: BufferReader, start: int) -> tuple[int, int]:
    """Offset in the file and size of a buffer's bytes, which stand in the flatbuffer or, in large files, behind it."""
    # Of files over 2 GB, whose flatbuffer can't reach so far; offsets count from the beginning of the model.
    if buffer.Offset() > 1:  # 1: the writer's mark for a place that is still to be filled in
        return start + buffer.Offset(), buffer.Size()
    table = buffer._tab
    field = table.Offset(4)  # of `data`, the first field: schema.fbs, table Buffer
    return (table.Vector(field), table.VectorLen(field)) if field else (0, 0)
