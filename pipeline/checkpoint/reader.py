"""A Hugging Face checkpoint: its tensors, its configuration, its weights by rows.

Weights are read through a memory map and turned to float32 a block of rows at a time, so that nothing of the model's
size is ever in anonymous memory: the largest table of Gemma 3n E2B alone is 8 GB in float32.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pipeline.checkpoint import headers, heads, packed
from pipeline.checkpoint.headers import FLOATS, TensorInfo, listed
from pipeline.checkpoint.names import EMBEDDING, HEAD, outer
from pipeline.core.errors import FetchError, IntegrityError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
CONFIG = "config.json"

Float32 = npt.NDArray[np.float32]
Stored = npt.NDArray[np.uint16] | npt.NDArray[np.float16] | npt.NDArray[np.float32]


def float_type(tensors: Iterable[TensorInfo]) -> str:
    """The type that most parameters of `tensors` have, as torch and numpy spell it, e.g. `bfloat16`."""
    counts = Counter[str]()
    for tensor in tensors:
        counts[FLOATS.get(tensor.dtype, tensor.dtype.lower())] += math.prod(tensor.shape)
    # Sorted first, so that of equals the same one is taken each time.
    return max(sorted(counts), key=lambda name: counts[name])


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A checkpoint in a folder; made by `open_checkpoint`. All headers have been checked."""

    folder: Path
    tensors: Mapping[str, TensorInfo]

    @cached_property
    def config(self) -> dict[str, object]:
        """`config.json`."""
        return read_json(self.folder / CONFIG)

    @cached_property
    def generation_config(self) -> dict[str, object]:
        """`generation_config.json`, empty if there is none."""
        file = self.folder / "generation_config.json"
        return read_json(file) if file.is_file() else {}

    @cached_property
    def tied(self) -> bool:
        """Whether the token embedding is the output head as well; see `heads`."""
        return heads.is_tied(self._outer, self.tensors, self.rows)

    @property
    def head(self) -> str:
        """The stored name of the matrix [V, H] that gives the logits.

        Raises:
            IntegrityError: there is none.
        """
        order = (EMBEDDING, HEAD) if self.tied else (HEAD,)
        for name in order:
            if name in self._outer:
                return self._outer[name]
        raise IntegrityError(
            f"{self.folder} holds neither {EMBEDDING} nor {HEAD}",
            cause="the checkpoint was changed after it was fetched",
            file=self.folder,
        )

    @cached_property
    def _outer(self) -> dict[str, str]:
        """The stored names of embedding and head, by canonical name, as far as there are any."""
        return outer(self.tensors)

    @property
    def files(self) -> tuple[str, ...]:
        """The weight files, by name."""
        return tuple(headers.files(self.tensors.values()))

    @cached_property
    def _maps(self) -> dict[str, npt.NDArray[np.uint8]]:
        # Opened once and kept: a block of rows is asked for thousands of times.
        return {file: np.memmap(self.folder / file, dtype=np.uint8, mode="r") for file in self.files}

    def read(self, name: str) -> Float32:
        """The whole tensor in float32, in its own shape; read-only where it is stored in float32.

        Raises:
            KeyError: there is no such tensor.
            IntegrityError: it is not float.
        """
        tensor = self.tensors[name]
        return self._read(name, 0, math.prod(tensor.shape)).reshape(tensor.shape)

    def rows(self, name: str, start: int, stop: int) -> Float32:
        """Rows `start` to `stop` (exclusive, at most the number of rows) of the tensor's first dimension, in float32.

        Raises:
            KeyError: there is no such tensor.
            IndexError: the tensor has no rows, or the range does not lie within them.
            IntegrityError: it is not float.
        """
        shape = self.tensors[name].shape
        if not shape or not 0 <= start <= stop <= shape[0]:
            raise IndexError(f"rows {start} to {stop} of tensor {name} with shape {list(shape)}")
        width = math.prod(shape[1:])
        return self._read(name, start * width, stop * width).reshape(stop - start, *shape[1:])

    def stored(self, name: str) -> Stored:
        """The tensor as it is stored, mapped and not read: bfloat16 as uint16 bit patterns, else float.

        One that is stored as integers is read whole.
        """
        tensor = self.tensors[name]
        if tensor.scale:
            return self.read(name)
        data = self._maps[tensor.file][tensor.offset : tensor.offset + tensor.size]
        if tensor.dtype == "BF16":
            patterns: npt.NDArray[np.uint16] = data.view("<u2")
            return patterns.reshape(tensor.shape)
        values: npt.NDArray[np.float16] | npt.NDArray[np.float32]
        values = data.view("<f2") if tensor.dtype == "F16" else data.view("<f4")
        return values.reshape(tensor.shape)

    def integers(self, name: str, start: int, stop: int) -> npt.NDArray[np.int8]:
        """Rows `start` to `stop` of a matrix that is stored as 4-bit integers, int8 [rows, columns]."""
        tensor = self.tensors[name]
        row = tensor.shape[1] // 2
        first, last = (tensor.offset + place * row for place in (start, stop))
        return packed.unpack(np.asarray(self._maps[tensor.file][first:last]), tensor.shape[1])

    def scales(self, name: str) -> Float32:
        """The scales of such a matrix, float32 [rows, groups]."""
        scale = self.tensors[name].scale
        assert scale is not None
        return self._floats(scale, 0, math.prod(scale.shape)).reshape(scale.shape)

    def _read(self, name: str, start: int, stop: int) -> Float32:
        """Elements `start` to `stop` of the flat tensor; of one that is stored as integers whole rows."""
        tensor = self.tensors[name]
        if tensor.scale:
            width, groups = tensor.shape[1], tensor.scale.shape[1]
            first, last = start // width, stop // width
            scale = self._floats(tensor.scale, first * groups, last * groups).reshape(-1, groups)
            return packed.values(self.integers(name, first, last), scale).reshape(-1)
        if tensor.dtype not in FLOATS:
            raise IntegrityError(f"tensor {name} has dtype {tensor.dtype}, which is not float32, float16 or bfloat16")
        return self._floats(tensor, start, stop)

    def _floats(self, tensor: TensorInfo, start: int, stop: int) -> Float32:
        first, last = (tensor.offset + place * item_size(tensor) for place in (start, stop))
        return widen(np.asarray(self._maps[tensor.file][first:last]), tensor.dtype)


def item_size(tensor: TensorInfo) -> int:
    """Bytes of one element of a float tensor."""
    return 4 if tensor.dtype == "F32" else 2


def widen(stored: npt.NDArray[np.uint8], dtype: str) -> Float32:
    """Stored bytes of a float tensor of `dtype` (as safetensors spells it) as float32, exactly."""
    if dtype == "F32":
        # No copy: callers get the file's own pages.
        return stored.view("<f4")
    if dtype == "F16":
        return stored.view("<f2").astype(np.float32)
    # bfloat16 is the upper half of float32, so widening is exact; one buffer, shifted in place
    wide = stored.view("<u2").astype(np.uint32)
    wide <<= 16
    return wide.view(np.float32)


def open_checkpoint(folder: Path) -> Checkpoint:
    """The checkpoint in `folder`, its headers and its index checked; no weight is read.

    Raises:
        FetchError: it holds no safetensors weights.
        IntegrityError: a shard is missing, a file is not what its header or the index says.
    """
    # Through links: fetch links a local folder's files.
    names = {file.name for file in folder.iterdir() if file.is_file()}
    if not names & {SINGLE, INDEX}:
        raise FetchError(
            f"{folder} holds neither {SINGLE} nor {INDEX}", remedy="run `make fetch` with the same MODEL_ID"
        )
    tensors = read_tensors(
        names,
        {name: (folder / name).stat().st_size for name in names},
        lambda *part: read_part(folder, *part),
        str(folder),
    )
    return Checkpoint(folder=folder, tensors=tensors)


def read_tensors(
    names: Collection[str], sizes: Mapping[str, int], read: Callable[[str, int, int], bytes], where: str
) -> dict[str, TensorInfo]:
    """All tensors of a checkpoint, single or sharded, from its headers alone; packed ones as `packed.fold` has them.

    Args:
        names: the files there are.
        sizes: bytes of each file.
        read: reads bytes `start` to `stop` of a file.
        where: the checkpoint, for messages.

    Raises:
        IntegrityError: a shard is missing, a file is not what its header or the index says.
    """
    if SINGLE in names:  # the order of transformers
        return packed.fold(read_header(SINGLE, sizes[SINGLE], read))
    weight_map = headers.parse_index(read(INDEX, 0, sizes[INDEX]), INDEX)
    shards = sorted(set(weight_map.values()))
    missing = [shard for shard in shards if shard not in names]
    if missing:
        raise IntegrityError(
            f"{where} lacks {len(missing)} of the {len(shards)} shards that {INDEX} names: {listed(missing)}",
            cause="the download or upload was not finished",
            remedy="copy the missing files too",
        )
    return packed.fold(headers.merge({shard: read_header(shard, sizes[shard], read) for shard in shards}))


def read_header(file: str, size: int, read: Callable[[str, int, int], bytes]) -> dict[str, TensorInfo]:
    """The tensors of one safetensors `file` of `size` bytes; `read` as in `read_tensors`.

    Raises:
        IntegrityError: it is not what its header says.
    """
    length = headers.header_length(read(file, 0, min(size, headers.LENGTH_BYTES)), size, file)
    return headers.parse_header(read(file, headers.LENGTH_BYTES, headers.LENGTH_BYTES + length), size, file)


def read_part(folder: Path, name: str, start: int, stop: int) -> bytes:
    """Bytes `start` to `stop` (exclusive) of a file in `folder`."""
    with (folder / name).open("rb") as stream:
        stream.seek(start)
        return stream.read(stop - start)


def parse_json(data: bytes, name: str) -> dict[str, object]:
    """`data` as a JSON object.

    Raises:
        IntegrityError: it is none.
    """
    try:
        # Editors on Windows put a byte order mark in front, which JSON has no room for.
        value = json.loads(data.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise IntegrityError(
            f"{name} is not JSON: {error}", cause="the file is corrupt or was edited", remedy="get that file anew"
        ) from error
    if not isinstance(value, dict):
        raise IntegrityError(f"{name} is not a JSON object", cause="the file is corrupt", remedy="get that file anew")
    return value


def read_json(file: Path) -> dict[str, object]:
    """The JSON object in `file`.

    Raises:
        IntegrityError: it is none.
    """
    return parse_json(file.read_bytes(), file.name)
