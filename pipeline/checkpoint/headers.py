"""Strict reading of safetensors headers and of the index of a sharded checkpoint.

A safetensors file is an unsigned 64-bit little-endian length N, N bytes of JSON that name each tensor's type, shape and
place, and the data. The rules are those of the format (https://huggingface.co/docs/safetensors): what the reference
reader refuses is refused here too, plus what it leaves to the reader (duplicate names, unprintable names). Only the
first 8 + N bytes and the size of the file are needed, so a file on a server can be judged before it is downloaded.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NoReturn

from pipeline.core.errors import IntegrityError

LENGTH_BYTES = 8
LONGEST_HEADER = 100_000_000  # bytes; the limit of the reference reader
# No model has as many; numpy itself stops there.
_MOST_DIMENSIONS = 64
FLOATS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""Types that weights may have, as safetensors and as torch and numpy spell them."""
# In bits: the format has types of four and six.
_BITS = {
    **dict.fromkeys(("F4",), 4),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
}


@dataclass(frozen=True, kw_only=True)
class TensorInfo:
    """A stored tensor: `dtype` as safetensors spells it, `offset` and `size` of its data in `file`, in bytes.

    Of a matrix that is stored as integers (`packed`), `scale` are the factors of their groups.
    """

    shape: tuple[int, ...]
    dtype: str
    file: str
    offset: int
    size: int
    scale: TensorInfo | None = None


def header_length(start: bytes, file_size: int, file: str) -> int:
    """The length N of the JSON header, from the first bytes of a file of `file_size` bytes.

    Raises:
        IntegrityError: the file is too short, or the length can't be true.
    """
    # Such a pointer is text of some 130 bytes, whose first eight would be read as a length.
    if start.startswith(b"version "):
        raise IntegrityError(
            f"{file} is a Git LFS pointer, not the file itself",
            cause="the repository was cloned without Git LFS",
            remedy="run `git lfs pull` in the clone",
        )
    if file_size < LENGTH_BYTES or len(start) < LENGTH_BYTES:
        _refuse(file, f"has only {min(file_size, len(start))} bytes")
    length = int.from_bytes(start[:LENGTH_BYTES], "little")
    # Before anything is read: a length of 2⁶³ would be asked of memory, or of a server.
    if length > LONGEST_HEADER:
        _refuse(file, f"gives its header a length of {length} bytes, more than the format allows")
    if LENGTH_BYTES + length > file_size:
        _refuse(file, f"has {file_size} bytes, its header alone needs {LENGTH_BYTES + length}")
    return length


def parse_header(header: bytes, file_size: int, file: str) -> dict[str, TensorInfo]:
    """The tensors of a file of `file_size` bytes with this JSON `header`, by name, in order of their place.

    Raises:
        IntegrityError: the header is not as the format demands, or its tensors do not fill the file exactly.
    """
    table = _load(header, file)
    metadata = table.pop("__metadata__", {})
    # Text alone, as the format says: other readers refuse the file, so this one must not make a model of it.
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        _refuse(file, "has a `__metadata__` that does not map text to text")
    base = LENGTH_BYTES + len(header)
    tensors = {name: _tensor(name, entry, base, file) for name, entry in table.items()}
    # Empty tensors share their place with the next one, and come first by their size.
    placed = dict(sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].size, item[0])))
    _check_places(placed, base, file_size, file)
    return placed


def parse_index(text: bytes, file: str) -> dict[str, str]:
    """The `weight_map` (tensor name → shard) of a `model.safetensors.index.json`.

    Raises:
        IntegrityError: it is not JSON, has no such map, or names a file outside the folder.
    """
    weight_map = _load(text, file, unit="index").get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        _refuse(file, "has no `weight_map`")
    for shard in weight_map.values():
        # A name is joined to the folder: `../` would read, and on a server ask for, files that are none of the
        # checkpoint.
        if not isinstance(shard, str) or "/" in shard or "\\" in shard or not shard.endswith(".safetensors"):
            _refuse(file, f"names {shard!r} as a shard, which is not a safetensors file beside it")
    return weight_map


def merge(shards: Mapping[str, Mapping[str, TensorInfo]]) -> dict[str, TensorInfo]:
    """All tensors of a sharded checkpoint, by name: the shards' own headers say what there is, an index names files.

    Raises:
        IntegrityError: two shards hold a tensor of one name.
    """
    merged: dict[str, TensorInfo] = {}
    for shard, tensors in shards.items():
        twice = tensors.keys() & merged.keys()
        if twice:
            _refuse(shard, f"holds {listed(twice)}, which {merged[min(twice)].file} holds too")
        merged.update(tensors)
    return merged


def files(tensors: Iterable[TensorInfo]) -> list[str]:
    """The files that hold `tensors` and their scales, by name."""
    parts = (part for tensor in tensors for part in (tensor, tensor.scale) if part)
    return sorted({part.file for part in parts})


def listed(names: Iterable[str], most: int = 5) -> str:
    """The first few `names` in order, and how many there are besides: `a, b, c and 7 more`."""
    ordered = sorted(names)
    rest = f" and {len(ordered) - most} more" if len(ordered) > most else ""
    return ", ".join(ordered[:most]) + rest


def _load(data: bytes, file: str, unit: str = "header") -> dict[str, object]:
    """`data` as a JSON object without duplicate keys and without NaN."""
    if not data.startswith(b"{"):  # demanded by the format; also keeps byte order marks and other encodings out
        _refuse(file, f"has a {unit} that does not start with {{")
    try:
        return dict(json.loads(data.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant))
    except (ValueError, RecursionError) as error:
        reason = "too deeply nested" if isinstance(error, RecursionError) else str(error)
        _refuse(file, f"has a {unit} that is not valid JSON ({reason})")


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    # Python takes the last of two equal keys, others the first: two readers would see two models.
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("a key appears twice")
    for key in table:
        key.encode("utf-8")  # a lone surrogate is valid JSON but no text
    return table


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


def _tensor(name: str, entry: object, base: int, file: str) -> TensorInfo:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        _refuse(file, f"describes tensor {name!r} without dtype, shape and data_offsets alone")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _BITS:
        _refuse(file, f"gives tensor {name!r} a dtype that the format does not have")
    if not _sizes(shape) or len(shape) > _MOST_DIMENSIONS:
        _refuse(file, f"gives tensor {name!r} a shape that is none")
    if not _sizes(offsets) or len(offsets) != 2:
        _refuse(file, f"gives tensor {name!r} data_offsets that are none")
    size = offsets[1] - offsets[0]
    # Multiplied and not divided: an odd number of 4-bit values is no whole number of bytes.
    if size * 8 != math.prod(shape) * _BITS[dtype]:
        _refuse(
            file, f"gives tensor {name!r} {size} bytes, its shape and dtype need {math.prod(shape) * _BITS[dtype] // 8}"
        )
    return TensorInfo(shape=tuple(shape), dtype=dtype, file=file, offset=base + offsets[0], size=size)


def _sizes(value: object) -> bool:
    """Whether `value` is a list of integers that fit an unsigned 64-bit integer."""
    # JSON's true would pass for 1 as an instance of int, and 1.0 is no size either.
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 1 << 64 for item in value)


def _check_places(placed: Mapping[str, TensorInfo], base: int, file_size: int, file: str) -> None:
    """Make sure that the tensors, in order of place, cover the data from end to end without gap or overlap."""
    end = base
    for name, tensor in placed.items():
        # Overlaps would let one tensor's bytes be two, and gaps can hide data that no one looks at.
        if tensor.offset != end:
            fault = "overlaps the tensor before it" if tensor.offset < end else "leaves a gap before it"
            _refuse(file, f"places tensor {name!r} so that it {fault}")
        end += tensor.size
    if end > file_size:
        _refuse(file, f"is truncated: it has {file_size} bytes, its header describes {end}")
    if end < file_size:
        _refuse(file, f"has {file_size - end} bytes after its last tensor")


def _refuse(file: str, fault: str) -> NoReturn:
    raise IntegrityError(
        f"{file} {fault}",
        cause="the file is truncated, corrupt, or was written by a broken tool",
        remedy="get that file anew from where it came from; if it was written here, save the checkpoint again",
    )
