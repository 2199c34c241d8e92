"""Where two runs of a stage differ: the file, its tensor, the byte."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pipeline.checkpoint.headers import LENGTH_BYTES, header_length, parse_header
from pipeline.core import manifest
from pipeline.core.errors import IntegrityError
from pipeline.tflite.graph import Graph
from pipeline.tflite.lazy import Array

_BLOCK = 1 << 22


def where_different(left: Path, right: Path) -> str:
    """The first tensor that differs, if the files have tensors, and the first byte."""
    # The byte is what counts; a name says where to look.
    place = _first_byte(left, right)
    tensors: Sequence[str] = []
    if left.suffix == ".tflite":
        tensors = _graph_tensors(left, right)
    elif left.suffix == ".safetensors":
        tensors = [name for name, (start, stop) in _places(left).items() if start <= place < stop]
    named = f"tensor {tensors[0]}, " if tensors else ""
    return f"{named}first at byte {place} of {left.stat().st_size} and {right.stat().st_size}"


def _first_byte(left: Path, right: Path) -> int:
    start = 0
    with left.open("rb") as one, right.open("rb") as other:
        while True:
            a, b = one.read(_BLOCK), other.read(_BLOCK)
            if a != b or not a:
                # A file that ends early differs at its end.
                short = min(len(a), len(b))
                differs = np.flatnonzero(np.frombuffer(a[:short], np.uint8) != np.frombuffer(b[:short], np.uint8))
                return start + (int(differs[0]) if len(differs) else short)
            start += len(a)


def _graph_tensors(left: Path, right: Path) -> list[str]:
    """Names of constants that differ, in the order of the file."""
    try:
        one, other = (_constants(file) for file in (left, right))
    # A damaged file has no tensors to name, and the byte is known all the same.
    except (IntegrityError, ValueError, IndexError):
        return []
    return [name for name in one if name in other and not np.array_equal(one[name], other[name])]


def _constants(file: Path) -> dict[str, Array]:
    graph = Graph.read(file)
    return {
        view.name(tensor): view.constant(tensor)
        for view in graph.views()
        for tensor in range(len(view.main.tensors))
        if view.is_constant(tensor)
    }


def _places(file: Path) -> dict[str, tuple[int, int]]:
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = header_length(stream.read(LENGTH_BYTES), size, file.name)
        tensors = parse_header(stream.read(length), size, file.name)
    return {name: (tensor.offset, tensor.offset + tensor.size) for name, tensor in tensors.items()}


def compare(stage: str, root: Path, again: Path) -> int:
    """Hold a stage's files against those of the second run; their number.

    Raises:
        IntegrityError: names the first that differs, and where.
    """
    first, second = (
        {record.path: record.sha256 for record in manifest.read(folder / stage).outputs} for folder in (root, again)
    )
    for path in sorted(first.keys() | second.keys()):
        if path not in first or path not in second:
            _refuse(f"{path} is made in one of the two runs only")
        if first[path] != second[path]:
            _refuse(f"{path} differs: {where_different(root / path, again / path)}")
    return len(first)


def _refuse(fault: str) -> None:
    raise IntegrityError(
        fault,
        cause="a stage depends on something besides its inputs, or a file was changed after it was made",
        remedy="run it again; if the second folder is the same twice, the first was changed",
    )
