"""Files of a Hugging Face checkpoint, written from what is read elsewhere; needs NumPy alone."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, kw_only=True)
class Tensor:
    """A tensor's shape, and how to read its values, float32 in blocks of whole rows."""

    shape: tuple[int, ...]
    blocks: Callable[[], Iterator[NDArray[np.float32]]]


def to_bfloat16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """The bits of `values` (finite) rounded to bfloat16, ties to even."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")


def write_safetensors(tensors: Mapping[str, Tensor], file: Path) -> None:
    """Write `tensors` in bfloat16, one at a time, in the order of their names."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in sorted(tensors):
        shape = list(tensors[name].shape)
        start, end = end, end + 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as out:
        out.write(struct.pack("<Q", len(text)) + text)
        for name in sorted(tensors):
            for block in tensors[name].blocks():
                out.write(to_bfloat16(block).tobytes())


def write_json(content: Mapping[str, Any], file: Path, *, indent: int | None = 2) -> None:
    """Write `content` as UTF-8, keys as they come."""
    text = json.dumps(content, ensure_ascii=False, indent=indent)
    file.write_text(text + "\n", encoding="utf-8")
