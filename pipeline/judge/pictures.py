"""Pictures that eyes are judged on, the same at every run: drawn ones, and a photograph with what people do to it.

The photograph is in the public domain (Grace Hopper, U.S. Navy); it comes with matplotlib. Sizes and proportions are
many, so that most pictures have to be made larger or smaller; some are grey, some transparent, some lie on their side
and say so (EXIF), some have a palette or 16 bits.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

_SEED = 20261130
_ORIENTATION = 0x0112
"""EXIF's tag of the way up."""
_JPEG = b"\xff\xd8"
"""What a JPEG file begins with."""
Picture = Image.Image
Values = NDArray[np.int64]
"""Pixels before they are bytes."""


def write(folder: Path) -> Mapping[str, Path]:
    """Write them into `folder`: files by name."""
    files = {}
    for name, data in pictures().items():
        files[name] = folder / f"{name}{'.jpg' if data.startswith(_JPEG) else '.png'}"
        files[name].write_bytes(data)
    return files


def pictures() -> Mapping[str, bytes]:
    """By name: PNG and JPEG files."""
    draw = np.random.default_rng(_SEED)
    photograph = _photograph()
    face = photograph.crop((150, 40, 400, 290))
    noise = _drawn(draw.integers(0, 256, (256, 256, 3)))
    clear = photograph.resize((300, 355))
    clear.putalpha(_drawn(_ramp(355, 300)[..., 0]).convert("L"))
    made: dict[str, Picture | tuple[Picture, int]] = {
        "photograph": photograph,
        "photograph, upright by its word": (photograph.rotate(90, expand=True), 6),
        "photograph, mirrored by its word": (photograph, 2),
        "photograph, grey": photograph.convert("L"),
        "photograph, palette": photograph.convert("P", palette=Image.Palette.ADAPTIVE, colors=32),
        "photograph, transparent": clear,
        "photograph, small": photograph.resize((47, 61)),
        "photograph, large": photograph.resize((1733, 1201)),
        "photograph, a strip": photograph.crop((0, 200, 512, 231)),
        "face": face,
        "face, 768": face.resize((768, 768)),
        "face, dark": face.point(lambda value: value // 5),
        "face, negative": face.point(lambda value: 255 - value),
        "noise": noise,
        "noise, 768": _drawn(draw.integers(0, 256, (768, 768, 3))),
        "noise, wide": _drawn(draw.integers(0, 256, (97, 1403, 3))),
        "noise, grey of 16 bits": Image.fromarray(draw.integers(0, 256, (80, 120), dtype=np.uint16)),
        "black": Image.new("RGB", (64, 64)),
        "white": Image.new("RGB", (640, 480), "white"),
        "red": Image.new("RGB", (33, 65), (220, 20, 30)),
        "one pixel": Image.new("RGB", (1, 1), (10, 200, 90)),
        "ramp": _drawn(_ramp(301, 423)),
        "stripes": _drawn(_stripes(512, 3)),
        "stripes, fine": _drawn(_stripes(1024, 1)),
        "board": _drawn((np.indices((400, 400)).sum(0) // 50 % 2 * 255)[..., None].repeat(3, 2)),
        "circle": _drawn(_circle(375, 500)),
    }
    return {name: _file(*each) if isinstance(each, tuple) else _file(each) for name, each in made.items()}


def _photograph() -> Picture:
    import matplotlib

    with Image.open(Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg") as opened:
        return opened.convert("RGB")


def _file(picture: Picture, orientation: int | None = None) -> bytes:
    """A JPEG file where it says which way is up, else a PNG file, which loses nothing."""
    out = io.BytesIO()
    if orientation is None:
        picture.save(out, "PNG")
        return out.getvalue()
    said = Image.Exif()
    said[_ORIENTATION] = orientation
    picture.save(out, "JPEG", quality=95, exif=said)
    return out.getvalue()


def _drawn(values: Values) -> Picture:
    return Image.fromarray(values.astype(np.uint8))


def _ramp(height: int, width: int) -> Values:
    across, down = np.meshgrid(np.arange(width) * 255 // width, np.arange(height) * 255 // height)
    return np.stack([across, down, 255 - across], -1)


def _stripes(size: int, wide: int) -> Values:
    down, across = np.indices((size, size))
    return np.stack([(across // wide % 2) * 255, (down // wide % 2) * 255, ((across + down) // wide % 2) * 255], -1)


def _circle(height: int, width: int) -> Values:
    down, across = np.indices((height, width))
    inside = (down - height / 2) ** 2 + (across - width / 2) ** 2 < (height / 3) ** 2
    return np.where(inside[..., None], np.array([250, 200, 20]), np.array([20, 60, 160]))
