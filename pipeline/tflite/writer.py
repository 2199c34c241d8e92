"""Writing a model as a `.tflite` file of any size, weights streamed into it, byte for byte the same each time.

Seen in ai-edge-litert 2.3.0 (2026-11-24): `flatbuffer_utils.write_model` fails above 2 GB, because the whole file must
fit a flatbuffer. Larger files keep their buffers behind it, at `Buffer.offset`, which both LiteRT and TensorFlow 2.21
read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache, partial
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from pipeline.core import log, parallel
from pipeline.core.errors import IntegrityError
from pipeline.tflite.lazy import Array, Blocks, flat_bytes
from pipeline.tflite.schema import Builder, Data, Model

# Flatbuffer offsets are signed 32-bit; leave room for the graph itself.
_INLINE_LIMIT = 2**30
_ALIGNMENT = 64
IDENTIFIER = b"TFL3"


def write(model: Model, file: Path) -> None:
    """Write `model`, a `ModelT` of TFLite's schema, whole or not at all; the same model gives the same bytes."""
    # Taken out while the file is written and put back at the end: packing would copy them into the flatbuffer.
    blobs = [buffer.data for buffer in model.buffers]
    total = sum(len(blob) for blob in blobs if blob is not None)
    try:
        with file.open("wb") as stream, log.progress(f"writing {file.name}", total) as bar:
            if total < _INLINE_LIMIT:
                _write_inline(model, stream, blobs, file.with_name(file.name + ".scratch"), bar)
            else:
                _write_behind(model, stream, blobs, bar)
    except BaseException:  # a value that is not finite, a full disk, an interrupt
        file.unlink(missing_ok=True)
        raise
    finally:
        for buffer, blob in zip(model.buffers, blobs, strict=True):
            # The model stays as it was, so that it can be edited and written again.
            buffer.data, buffer.offset, buffer.size = blob, 0, 0


def _write_inline(model: Model, stream: BinaryIO, blobs: Sequence[Data], scratch: Path, bar: log.Progress) -> None:
    """Write one flatbuffer, built in a mapped file: in memory it would be there twice."""
    for buffer in model.buffers:
        buffer.data = None
    # What the graph itself takes, and for each buffer its bytes, its length and what it may take to align both.
    room = len(_pack(model)) + sum(len(blob) + 2 * _ALIGNMENT for blob in blobs if blob is not None)
    lazy = sum(len(blob) for blob in blobs if isinstance(blob, Blocks))
    with scratch.open("w+b") as file:
        # Without a name already: whatever ends this process, no file stays behind.
        scratch.unlink()
        for write in write_all([blob for blob in blobs if isinstance(blob, Blocks)], bar):
            write(file)
        file.truncate(lazy + room)
        # As a plain array: `Pack` writes anything else an element at a time.
        whole = np.asarray(np.memmap(file, np.uint8, mode="r+", shape=(lazy + room,)))
        start = 0
        for buffer, blob in zip(model.buffers, blobs, strict=True):
            buffer.data = whole[start : start + len(blob)] if isinstance(blob, Blocks) else blob
            start += len(blob) if isinstance(blob, Blocks) else 0
        stream.write(_pack(model, whole[lazy:]))


def _pack(model: Model, space: NDArray[np.uint8] | None = None) -> memoryview:
    """The flatbuffer, built in `space` if it is given."""
    # As arrays: of these `Pack` makes vectors through CreateNumpyVector, which shares equal ones (below); a list is
    # written number by number.
    for subgraph in model.subgraphs:
        for holder in (*subgraph.tensors, *subgraph.operators):
            for field in ("shape", "shapeSignature", "inputs", "outputs"):
                numbers = getattr(holder, field, None)
                if numbers is not None:
                    setattr(holder, field, np.asarray(numbers, np.int32))
    builder = _sharing_builder()(space)
    builder.Finish(model.Pack(builder), file_identifier=IDENTIFIER)
    # A builder fills its space from the end to the front.
    packed: memoryview = memoryview(builder.Bytes)[builder.Head() :]
    return packed


def _write_behind(model: Model, stream: BinaryIO, blobs: Sequence[Data], bar: log.Progress) -> None:
    """Write with the buffers behind the flatbuffer, one at a time.

    Offsets are known once the flatbuffer's own size is, and they have a fixed width: pack with a placeholder to
    learn the size, then pack again.
    """
    # Any number but 0 will do here: fields that are 0 are left out of a flatbuffer, and the size would be another.
    _place(model, blobs, start=_ALIGNMENT)
    places = _place(model, blobs, start=_aligned(len(_pack(model))))
    stream.write(_pack(model))
    writing = write_all([blob for blob in blobs if isinstance(blob, Blocks)], bar)
    for index, start in places.items():
        # Zeros and not a seek: the bytes between are part of the file, whose sha256 is published.
        stream.write(b"\0" * (start - stream.tell()))
        blob = blobs[index]
        if isinstance(blob, Blocks):
            next(writing)(stream)
        elif blob is not None:
            stream.write(blob.data)


def _place(model: Model, blobs: Sequence[Data], start: int) -> dict[int, int]:
    places: dict[int, int] = {}
    for index, blob in enumerate(blobs):
        if blob is None:
            continue
        places[index] = start
        buffer = model.buffers[index]
        buffer.data, buffer.offset, buffer.size = None, start, len(blob)
        start = _aligned(start + len(blob))
    return places


def write_all(constants: Sequence[Blocks], bar: log.Progress) -> Iterator[Callable[[BinaryIO], None]]:
    """For each of `constants` in turn what writes it to a stream, to be called at once; bytes are counted on `bar`.

    Blocks are made in a thread per core, several constants at once where they are small.

    Raises:
        IntegrityError: from the call, a constant has more or fewer bytes than its shape says.
    """
    parts = ((place, part) for place, constant in enumerate(constants) for part in constant.parts())

    def make(item: tuple[int, tuple[int, int]]) -> tuple[int, NDArray[np.uint8]]:
        place, part = item
        rows = constants[place].rows(*part)
        return place, flat_bytes(rows.astype(constants[place].dtype, copy=False))

    def write(blocks: Iterable[tuple[int, NDArray[np.uint8]]], size: int, stream: BinaryIO) -> None:
        written = 0
        for _, block in blocks:
            written += stream.write(block.data)
            bar.advance(len(block))
        if written != size:
            raise IntegrityError(f"{written} bytes were made for a constant of {size}")

    for place, blocks in groupby(parallel.ordered(make, parts), key=itemgetter(0)):
        yield partial(write, blocks, len(constants[place]))


@lru_cache
def _sharing_builder() -> Callable[[NDArray[np.uint8] | None], Builder]:
    """A flatbuffer builder that stores equal vectors once and aligns weights.

    Zero points (8 bytes per channel, all zero, demanded by the runtime) and the shapes of thousands of tensors would
    otherwise be a noticeable part of an int8 file. The stock builder also ignores the schema's `force_align: 16`.
    """
    import flatbuffers

    class SharingBuilder(flatbuffers.Builder):  # type: ignore[misc]
        def __init__(self, space: NDArray[np.uint8] | None) -> None:
            super().__init__(1024)
            if space is not None:
                self.Bytes, self.head = space.data, len(space)
            self.known: dict[tuple[str, bytes], int] = {}

        def CreateNumpyVector(self, x: Array) -> int:  # noqa: N802 - the library's name
            # Smaller buffers share their bytes where they are equal; weights never are, and to hash them would take its
            # time.
            if x.dtype == np.uint8 and x.size >= _ALIGNMENT:
                return self._aligned_vector(x)
            # With the type: eight zero bytes are one long or two ints, of which a reader takes the length.
            key = (x.dtype.str, x.tobytes())
            if key not in self.known:
                self.known[key] = super().CreateNumpyVector(x)
            return self.known[key]

        def _aligned_vector(self, x: Array) -> int:
            # 16 is what the schema demands of a buffer; kernels read whole SIMD words from there.
            self.StartVector(1, x.size, 16)
            # By hand what the library does byte by byte: one copy, which numpy does at the speed of memory.
            self.head -= x.size
            self.Bytes[self.Head() : self.Head() + x.size] = x.data
            self.vectorNumElems = x.size
            offset: int = self.EndVector()
            return offset

    return SharingBuilder


def _aligned(offset: int) -> int:
    return -(-offset // _ALIGNMENT) * _ALIGNMENT
