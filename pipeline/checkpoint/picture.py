"""How a checkpoint's processor sees: the size of its pictures, and what becomes of their pixels."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pipeline.core.errors import TowerError
from pipeline.core.facts import Patches

Float32 = npt.NDArray[np.float32]
_BILINEAR, _BICUBIC = 2, 3
_WHOLE = 255.0


@dataclass(frozen=True, kw_only=True, eq=False)
class Look:
    """Pictures of `size` x `size` pixels, of which the model takes 0 … 1 · `factor` + `shift`, float32 [3]."""

    size: int
    factor: Float32
    shift: Float32

    @property
    def changes(self) -> bool:
        """Whether the model takes other values than 0 … 1."""
        return bool((self.factor != 1.0).any() or self.shift.any())


def open_look(checkpoint: Path) -> Look:
    """How the processor in the folder `checkpoint` sees, by transformers' `SiglipImageProcessor`.

    Raises:
        TowerError: it does what the bundle can't.
    """
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    told = SiglipImageProcessorPil.from_pretrained(checkpoint, local_files_only=True)
    size = dict(told.size or {})
    if size.keys() != {"height", "width"} or size["height"] != size["width"] or not told.do_resize:
        raise TowerError(f"the image processor in {checkpoint} does not make squares: {size}")
    if int(told.resample) != _BILINEAR:
        raise TowerError(
            f"the image processor in {checkpoint} has resample {int(told.resample)}, expected {_BILINEAR} (bilinear)"
        )
    if any(getattr(told, name, None) for name in ("do_center_crop", "do_pad", "do_pan_and_scan")):
        raise TowerError(f"the image processor in {checkpoint} crops or pads, which pictures here are not")
    scale = np.float64(told.rescale_factor * _WHOLE if told.do_rescale else _WHOLE)
    mean, deviation = (
        np.broadcast_to(np.asarray(part if told.do_normalize else plain, np.float64), 3)
        for part, plain in ((told.image_mean, 0.0), (told.image_std, 1.0))
    )
    # The factor of 1 / 255 is rounded: what is next to one means one.
    factor = np.where(np.isclose(scale / deviation, 1.0, rtol=1e-7), 1.0, scale / deviation)
    return Look(size=size["height"], factor=factor.astype(np.float32), shift=(-mean / deviation).astype(np.float32))


def open_patches(checkpoint: Path) -> Patches:
    """How the processor in the folder `checkpoint` makes patches, by transformers' `Gemma4ImageProcessor`.

    Raises:
        TowerError: it does what the bundle can't.
    """
    from transformers.models.gemma4.image_processing_pil_gemma4 import Gemma4ImageProcessorPil

    try:
        told = Gemma4ImageProcessorPil.from_pretrained(checkpoint, local_files_only=True)
    except ValueError as error:  # another number of soft tokens than it knows
        raise TowerError(f"transformers refuses the image processor in {checkpoint}: {error}") from error
    for name, found, wanted in (
        ("do_resize", told.do_resize, True),
        ("resample", int(told.resample), _BICUBIC),
        ("do_rescale", told.do_rescale, True),
        ("rescale_factor", round(told.rescale_factor * _WHOLE, 6), 1.0),
    ):
        if found != wanted:
            raise TowerError(f"the image processor in {checkpoint} has {name} {found}, expected {wanted}")
    if told.do_normalize and (any(told.image_mean) or {*told.image_std} != {1.0}):
        raise TowerError(f"the image processor in {checkpoint} normalises pixels, which the vision encoder itself does")
    return Patches(size=told.patch_size, pool=told.pooling_kernel_size, tokens=told.max_soft_tokens)
