"""Where a checkpoint lies before it is fetched: a local folder or a server, of which parts of files are read."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.checkpoint.headers import TensorInfo
from pipeline.checkpoint.reader import Float32, item_size, parse_json, read_part, widen

_LARGEST_JSON = 100 << 20  # bytes


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where a checkpoint lies: `sizes` of its top files in bytes, and how to `read` bytes `start` to `stop` of one.

    Of a `remote` one little is read: what takes whole tensors to know is looked at again once they are here. `below`
    tells the paths of what lies in its subfolders, which belongs to no checkpoint.
    """

    where: str
    sizes: Mapping[str, int]
    read: Callable[[str, int, int], bytes]
    remote: bool = False
    below: Callable[[], Iterable[str]] = tuple

    @classmethod
    def of_folder(cls, folder: Path) -> Source:
        """A local folder."""
        sizes = {file.name: file.stat().st_size for file in folder.iterdir() if file.is_file()}
        return cls(
            where=str(folder),
            sizes=sizes,
            read=lambda *part: read_part(folder, *part),
            below=lambda: (file.relative_to(folder).as_posix() for file in folder.glob("*/*")),
        )

    def is_here(self, model: str) -> bool:
        """Whether `model`, as a configuration names it, is this folder."""
        return bool(model) and not self.remote and Path(model).resolve() == Path(self.where).resolve()

    def json(self, name: str) -> dict[str, object]:
        """A whole JSON file, empty if it is absent.

        Raises:
            IntegrityError: it is not JSON.
        """
        if name not in self.sizes:
            return {}
        return parse_json(self.read(name, 0, min(self.sizes[name], _LARGEST_JSON)), name)

    def rows(self, tensor: TensorInfo, start: int, stop: int) -> Float32:
        """Rows `start` to `stop` of a matrix of floats, float32 [rows, width]."""
        row = tensor.shape[1] * item_size(tensor)
        data = self.read(tensor.file, tensor.offset + start * row, tensor.offset + stop * row)
        return widen(np.frombuffer(data, dtype=np.uint8), tensor.dtype).reshape(stop - start, -1)
