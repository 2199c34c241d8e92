"""Cut symbol tables and section headers off the shared libraries below a folder: `strip_libraries.py FOLDER`.

What the loader maps stands in the program headers (ELF specification, "Program Loading"); what lies behind the last
mapped segment is for linkers and debuggers. The three largest libraries of the image carry 270 MB of it. This is what
`strip` would do, without a compiler's tools in the image; it needs a bare Python only.
"""

from __future__ import annotations

import struct
import sys
from collections.abc import Sequence
from pathlib import Path

_MAGIC = b"\x7fELF\x02\x01"
"""64 bits, little-endian."""
_LOAD = 1


def cut(file: Path) -> int:
    """Cut `file` behind its last mapped segment, and return the bytes saved; 0 for what is no such library."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        head = stream.read(64)
        if head[:6] != _MAGIC or len(head) < 64:
            return 0
        (start,), (length, count) = struct.unpack_from("<Q", head, 32), struct.unpack_from("<HH", head, 54)
        stream.seek(start)
        table = stream.read(length * count)
    rows = [struct.unpack_from("<IIQQQQ", table, length * place) for place in range(count)]
    end: int = max([start + length * count, *(row[2] + row[5] for row in rows)])
    if end >= size or not any(row[0] == _LOAD for row in rows):
        return 0
    with file.open("r+b") as stream:
        stream.seek(40)
        stream.write(struct.pack("<Q", 0))  # where section headers are: nowhere,
        stream.seek(58)
        stream.write(struct.pack("<HHH", 0, 0, 0))  # of no size, none of them, without names
        stream.truncate(end)
    return size - end


def main(argv: Sequence[str]) -> int:
    """Cut all of them and say what that saved."""
    files = [file for file in Path(argv[0]).rglob("*.so*") if file.is_file() and not file.is_symlink()]
    print(f"{sum(map(cut, files)) / 1e6:.0f} MB of symbols cut off {len(files)} libraries")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
