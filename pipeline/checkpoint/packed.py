"""Weights that a checkpoint stores as 4-bit integers: compressed-tensors, format `pack-quantized`, symmetric.

Of a matrix `X.weight` [rows, columns] such a checkpoint holds `X.weight_packed` int32 [rows, columns / 8], eight
integers −8 … 7 in a word, each plus 8, the first in the lowest bits; `X.weight_scale`, floats [rows, columns / group];
and `X.weight_shape`, which the two say already. A value is its integer times its scale (compressed-tensors 0.20.1,
`compressors/pack_quantized`). Here the three become one tensor `X.weight` of type `INT4`, so that all else knows no
other names.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from pipeline.checkpoint.headers import FLOATS, TensorInfo
from pipeline.core.errors import FetchError

INT4 = "INT4"
"""The type of such a matrix in `TensorInfo`; it has the `scale` of its groups."""
GROUP = 32
"""What divides the groups that are taken, and rows: the block of an int4 file, whose integers and scales stay those."""
_PACKED, _SCALE, _SHAPE = "weight_packed", "weight_scale", "weight_shape"
_IN_A_WORD = 8
_BITS = 4
METHOD, FORMAT = "compressed-tensors", "pack-quantized"


def fold(tensors: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    """`tensors` with one entry for each packed matrix; what does not belong to one, or does not fit, stays as it is."""
    folded = dict(tensors)
    for name, packed in tensors.items():
        stem = name.removesuffix(_PACKED)
        scale = tensors.get(f"{stem}{_SCALE}")
        if stem != name and scale and f"{stem}weight" not in tensors and _fits(packed, scale):
            rows, words = packed.shape
            for part in (_PACKED, _SCALE, _SHAPE):
                folded.pop(f"{stem}{part}", None)
            folded[f"{stem}weight"] = replace(packed, shape=(rows, words * _IN_A_WORD), dtype=INT4, scale=scale)
    return folded


def _fits(packed: TensorInfo, scale: TensorInfo) -> bool:
    """Whether the two are the integers and scales of groups that blocks of `GROUP` can hold."""
    if packed.dtype != "I32" or scale.dtype not in FLOATS or len(packed.shape) != 2 or len(scale.shape) != 2:
        return False
    columns, groups = packed.shape[1] * _IN_A_WORD, scale.shape[1]
    return scale.shape[0] == packed.shape[0] and groups > 0 and columns % (groups * GROUP) == 0


def check(config: Mapping[str, object], tensors: Mapping[str, TensorInfo], where: str) -> None:
    """Refuse a checkpoint with packed matrices that an int4 file can't hold as they are.

    Args:
        config: `config.json`.
        tensors: what the checkpoint holds, folded.
        where: the checkpoint, for messages.

    Raises:
        FetchError: names what it can't hold.
    """
    apart = [name for name in tensors if name.endswith((f".{_PACKED}", ".weight_zero_point", ".weight_g_idx"))]
    if not apart and not any(tensor.dtype == INT4 for tensor in tensors.values()):
        return
    odd = [*_odd(config), *sorted(apart)[:1]]
    if odd:
        raise FetchError(
            f"{where} is quantised already ({METHOD}), and its {odd[0]} has no like in an int4 file",
            cause=f"taken as they are: {_BITS}-bit integers without zero points, in groups of {GROUP}, 64, 96, …",
            remedy="give the full-precision checkpoint that it was made from (`base_model` in its README)",
        )


def _odd(config: Mapping[str, object]) -> Iterator[str]:
    """What `config` says of the quantisation that is more than 4-bit weights by groups."""
    text = config.get("text_config")
    own = config.get("quantization_config") or (text.get("quantization_config") if isinstance(text, Mapping) else None)
    if not isinstance(own, Mapping) or own.get("quant_method") != METHOD:
        yield "quantization_config"
        return
    for key in ("kv_cache_scheme", "transform_config", "sparsity_config"):
        if own.get(key):
            yield key
    groups = own.get("config_groups")
    for group in groups.values() if isinstance(groups, Mapping) else ():
        weights = group.get("weights") if isinstance(group, Mapping) else None
        if not isinstance(weights, Mapping):
            yield "group without weights"
            continue
        if (form := group.get("format") or own.get("format")) != FORMAT:
            yield f"format {form!r}"
        if group.get("input_activations") or group.get("output_activations"):
            yield "quantised activations"
        if weights.get("num_bits") != _BITS or weights.get("type", "int") != "int":
            yield f"type of weights ({weights.get('num_bits')}-bit {weights.get('type')})"
        if not weights.get("symmetric", True):
            yield "zero points"
        if weights.get("strategy") == "group" and int(weights.get("group_size") or 0) % GROUP:
            yield f"groups of {weights.get('group_size')}"


def unpack(words: npt.NDArray[np.uint8], columns: int) -> npt.NDArray[np.int8]:
    """Stored bytes of whole rows as integers −8 … 7, int8 [rows, columns]."""
    # The low half of a byte first: little-endian words hold their integers in this order.
    both = np.stack([words & 15, words >> 4], axis=-1).view(np.int8)
    both -= 8
    return both.reshape(-1, columns)


def values(integers: npt.NDArray[np.int8], scale: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Integers [rows, columns] times their scales [rows, groups]: exact where scales have 16 bits."""
    wide = integers.astype(np.float32).reshape(len(integers), scale.shape[1], -1)
    wide *= scale[..., None]
    return wide.reshape(integers.shape)
