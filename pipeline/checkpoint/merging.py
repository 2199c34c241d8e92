"""An adapter merged into its base, from file to file, a block of rows at a time: an ordinary checkpoint comes out.

The values are those of PEFT's `merge_and_unload` (0.21.2) on a base that was loaded in its stored type: W + s · B A in
float32, rounded once; with DoRA each row scaled to its trained length first; of an embedding s · B A is rounded before
it is added. In memory are a few blocks of rows and one module's A and B.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch

from pipeline.checkpoint.adapters import Adapter, Change, Part
from pipeline.checkpoint.headers import FLOATS, TensorInfo
from pipeline.checkpoint.reader import CONFIG, INDEX, Checkpoint, Float32, item_size, read_json
from pipeline.core import log, parallel
from pipeline.core.direct import DirectFile
from pipeline.core.manifest import dump_json

_BLOCK = 1 << 18
"""Elements of a block of rows: 1 MiB in float32, which stays in a core's cache."""
_LEAST_ROWS = 64
"""Rows of the smallest block: few rows are multiplied in another order."""


Block = Callable[[], memoryview]
"""Makes a block of a tensor's bytes; blocks are made by several threads at a time."""


def write(
    base: Checkpoint, adapter: Adapter, weights: Path, changes: Mapping[str, Change], out: Path
) -> dict[str, str]:
    """Write the files of `base` that differ in the merged checkpoint into the folder `out`.

    Returns their names with their sha256, which is taken on the way: to read them again would take a third of the time.

    Args:
        base: the base.
        adapter: what holds the parts.
        weights: the folder of its weights.
        changes: what happens to the base's tensors, by name in the merged checkpoint (`adapters.changes`).
        out: an empty folder.
    """
    held = Checkpoint(folder=weights, tensors=adapter.tensors)
    files = _layout(base, changes)
    total = sum(_size(info) for tensors in files.values() for info in tensors.values())
    sums = {}
    with log.progress(f"merging {len(changes)} tensors", total) as bar, _alone():
        for file, tensors in files.items():
            with DirectFile(out / file) as stream:
                stream.write(_header(tensors))
                for count in _fill(stream, base, held, changes, tensors):
                    bar.advance(count)
            sums[file] = stream.sha256()
    return {**sums, **_write_tables(base, changes, out)}


def _fill(
    stream: DirectFile,
    base: Checkpoint,
    held: Checkpoint,
    changes: Mapping[str, Change],
    tensors: Mapping[str, TensorInfo],
) -> Iterator[int]:
    """Write the data of `tensors`, the merged ones and those of the base; how many bytes, as they are written."""
    for name, info in tensors.items():
        if name not in changes:
            stored = base.tensors[name]
            yield from stream.copy(base.folder / stored.file, stored.offset, stored.offset + stored.size)
            continue
        for data in parallel.ordered(lambda block: block(), _merged(base, changes[name], held, info)):
            stream.write(data)
            yield len(data)


@contextmanager
def _alone() -> Iterator[None]:
    """One thread of PyTorch's for each of ours: it would wait for its other ones after every block."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _layout(base: Checkpoint, changes: Mapping[str, Change]) -> dict[str, dict[str, TensorInfo]]:
    """The tensors of each file that is written anew; a new tensor joins the one that it begins as."""
    touched = sorted({base.tensors[change.base].file for change in changes.values()})
    files: dict[str, dict[str, TensorInfo]] = {file: {} for file in touched}
    for name in dict.fromkeys((*base.tensors, *changes)):
        change = changes.get(name)
        info = base.tensors[change.base if change else name]
        if info.file in files:
            shape = change.shape if change else info.shape
            files[info.file][name] = TensorInfo(shape=shape, dtype=info.dtype, file=info.file, offset=0, size=info.size)
    return files


def _size(info: TensorInfo) -> int:
    return math.prod(info.shape) * item_size(info) if info.dtype in FLOATS else info.size


def _header(tensors: Mapping[str, TensorInfo]) -> bytes:
    """A safetensors header for `tensors`, whose data follow in this order."""
    table: dict[str, object] = {"__metadata__": {"format": "pt"}}
    place = 0
    for name, info in tensors.items():
        end = place + _size(info)
        table[name] = {"dtype": info.dtype, "shape": list(info.shape), "data_offsets": [place, end]}
        place = end
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _merged(base: Checkpoint, change: Change, held: Checkpoint, info: TensorInfo) -> Iterator[Block]:
    """The bytes of a changed tensor, as many rows at a time as fit into a block."""
    kind = getattr(torch, FLOATS[info.dtype])
    whole = [part.names["whole"] for part in change.parts if "whole" in part.names]
    parts = [part for part in change.parts if "whole" not in part.names]
    loaded = [{role: _tensor(held.read(name)) for role, name in part.names.items()} for part in parts]
    count = change.shape[0]
    step = max(_LEAST_ROWS, _BLOCK // math.prod(change.shape[1:]))

    def block(start: int, stop: int) -> memoryview:
        # A whole tensor takes the place of the base's, the last one of several; it is rounded to the base's type.
        rows = _tensor(held.rows(whole[-1], start, stop) if whole else base.rows(change.base, start, stop))
        rows = rows.to(kind).float() if whole else rows
        for place, (part, tensors) in enumerate(zip(parts, loaded, strict=True)):
            rows = rows.to(kind).float() if place else rows
            rows = _changed(part, tensors, rows, start, kind)
        return rows.to(kind).contiguous().view(torch.uint8).numpy().data.cast("B")

    for start, stop in pairwise([*range(0, max(1, count - _LEAST_ROWS + 1), step), count]):
        yield partial(block, start, stop)


def _changed(
    part: Part, tensors: Mapping[str, torch.Tensor], rows: torch.Tensor, start: int, kind: torch.dtype
) -> torch.Tensor:
    """What a part makes of `rows`, float32 values of type `kind` that stand at `start` of their matrix; in float32.

    In place wherever it can be: new memory for every block took most of the time.
    """
    stop = start + len(rows)
    if "tokens" in tensors:
        rows = rows.clone()
        for place, row in enumerate(part.rows):
            if start <= row < stop:
                rows[row - start] = tensors["tokens"][place]
        return rows
    down, up = tensors["A"], tensors["B"]
    if part.embedding:  # [r, V] and [H, r]
        return rows + ((up @ down[:, start:stop]).T * part.scale).to(kind)
    merged = (up[start:stop] @ down).mul_(part.scale).add_(rows)
    if "magnitude" not in tensors:
        return merged
    lengths: torch.Tensor = torch.linalg.norm(merged, dim=1)
    return merged.mul_((tensors["magnitude"][start:stop] / lengths).view(-1, 1))


def _tensor(values: Float32) -> torch.Tensor:
    """`values` as a tensor; what is mapped from a file can't be written to, which PyTorch does not know."""
    return torch.from_numpy(values if values.flags.writeable else values.copy())


def _write_tables(base: Checkpoint, changes: Mapping[str, Change], out: Path) -> dict[str, str]:
    """The configuration and the index, where a vocabulary was resized or a tensor is new; returns their sha256."""
    written = {}
    sizes = {change.shape[0] for name, change in changes.items() if change.shape != base.tensors[change.base].shape}
    if sizes:
        config = json.loads(json.dumps(base.config))
        holder = config if "vocab_size" in config else config.setdefault("text_config", {})
        holder["vocab_size"] = sizes.pop()
        written[CONFIG] = config
    new = {name: base.tensors[change.base].file for name, change in changes.items() if name not in base.tensors}
    if new and (base.folder / INDEX).is_file():
        index = read_json(base.folder / INDEX)
        held = index["weight_map"]
        assert isinstance(held, dict)  # preflight has read it
        written[INDEX] = {**index, "weight_map": {**held, **new}}
    sums = {}
    for name, table in written.items():
        text = dump_json(table).encode()
        (out / name).write_bytes(text)
        sums[name] = hashlib.sha256(text).hexdigest()
    return sums
