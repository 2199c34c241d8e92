"""4-bit weights: in each row of a matrix, 32 neighbours share a scale.

A float matrix [rows, columns], where 32 divides columns, becomes integers −8 … 7, two in a byte, and scales float16
[rows, columns / 32]. Of some candidates for a scale the one with the least squared error is taken; integers are the
nearest, or by GPTQ (`gptq.py`).

What LiteRT 2.3.0 runs sets the form (found with small graphs in the real interpreter):

- FULLY_CONNECTED with 4-bit weights in blocks is right in XNNPACK and in the built-in kernels, at static and dynamic
  shapes, for blocks of 32, 64, … that divide a row. With one scale per row XNNPACK is right too, but the built-in
  kernels give noise and no error, so that form is not written here.
- EMBEDDING_LOOKUP reads the same form, exactly: a table that is looked up and multiplied with is stored once.
- Scales are float16 in the file. XNNPACK keeps them as bfloat16, which would cost a relative 2⁻⁹ of every block: so
  only scales are used that both types hold, and the two sets of kernels see the same weights.
- XNNPACK has a fast kernel for one row of activations and none for two. So `int8x2` gives a 4-bit layer two products of
  a row each.

Result: Gemma 3 270M's int4 step graph has KL(Hugging Face || file) 0.040 at 0.70 of int8's size; docs/experiments.md.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
from numpy.typing import NDArray

from pipeline.quantize import rows as quantize
from pipeline.tflite.graph import Graph
from pipeline.tflite.lazy import Array, Blocks, BlockScales, pack

# The smallest block that XNNPACK knows: the finer, the closer.
BLOCK = 32
"""Neighbours that share a scale: 4.5 bits per weight."""
# What TFLite's version rules demand of a lookup in 4-bit rows.
LOOKUP_VERSION = 4
# All sixteen values: a scale is chosen by its error, so the range need not be symmetric as that of int8 is.
_LOW, _HIGH = -8, 7
# Scales that are tried for a block, over its largest magnitude: smaller ones clip a few values, and the rest is finer.
_TRIED = tuple(share / 7.5 for share in (1.0, 0.94, 0.88, 0.82, 0.76, 0.7))
# At the smallest scale tried the largest value becomes 7 steps; 2⁻⁹ is what rounding the scale to bfloat16 takes off.
LARGEST_ERROR = 1 - 7 * _TRIED[-1] * (1 - 2**-9)
"""By which a value may be clipped, over the largest in its block."""
# The least float16 above zero, and the largest that bfloat16 holds too: 65504 is none of its values.
_SMALLEST, _LARGEST = 2.0**-24, 65280.0


def quantise_weights(
    graph: Graph,
    keep_int8: quantize.Keep,
    rounding: quantize.Rounding = quantize.to_nearest,
    int8_buffers: Collection[int] = (),
    keep_float: quantize.Keep = lambda _: False,
) -> None:
    """4-bit tables and weights of linear layers; 8-bit ones, a scale per row, where `keep_int8` names the operator.

    So have the constants in `int8_buffers` (row_ranges.py), and rows that can't be cut into blocks. Linear layers
    quantise their input while they run. What `keep_float` names stays as it is, in float32.
    """
    for view in graph.views():
        for operator in view.operators():
            code, weight = view.code(operator), int(operator.inputs[1]) if len(operator.inputs) > 1 else -1
            if code not in (quantize.LINEAR, quantize.LOOKUP) or not view.is_constant(weight):
                continue
            view.opcode(code, quantize.LINEAR_VERSION if code == quantize.LINEAR else LOOKUP_VERSION)
            if view.type_of(weight) == "FLOAT32" and keep_float(quantize.layer_name(view, operator)):
                continue
            if code == quantize.LINEAR:
                operator.builtinOptions.asymmetricQuantizeInputs = True  # else the built-in kernels take another step
            if view.type_of(weight) == "FLOAT32":
                values = view.blocks(weight)
                # A lookup and the head may share the matrix: whichever comes first makes it small, and the other finds
                # it so.
                rounded_by = rounding(view.origin(weight), values.shape[-1])
                wide = keep_int8(quantize.layer_name(view, operator)) or view.buffer(weight) in int8_buffers
                if not wide and not values.shape[-1] % BLOCK:
                    view.set_four_bits(weight, *quantise_blocks(values, rounded_by))
                else:
                    view.set_constant(weight, *quantize.quantise_rows(values, rounded_by))


def quantise_blocks(values: Blocks, rounded_by: quantize.RoundRows | None = None) -> tuple[Blocks, BlockScales]:
    """[rows, columns] float → 4-bit integers two in a byte, and the scales with which they are closest.

    To the nearest integer, or as `rounded_by` says (GPTQ, by `gptq.Hessians`).

    Rows are read twice: now for their scales, and for their values when the file is written.
    """
    rows, columns = values.shape
    scale = np.concatenate(list(values.each(best_scales)))

    def packed(start: int, stop: int) -> Array:
        block, own = values.rows(start, stop), scale[start:stop]
        return pack(rounded_by(block, own, _LOW, _HIGH) if rounded_by else round_blocks(block, own))

    return Blocks((rows, columns // 2), np.uint8, packed), BlockScales(scale, BLOCK)


def best_scales(values: Array) -> NDArray[np.float16]:
    """For each block in each row, the scale of those tried that has the least sum of squared errors."""
    blocks = values.reshape(len(values), -1, BLOCK)
    peak = np.abs(blocks).max(-1)
    best, least = np.ones(peak.shape, np.float16), np.full(peak.shape, np.inf, np.float32)
    for share in _TRIED:
        scale = storable(peak * np.float32(share))
        step = scale.astype(np.float32)[..., None]
        error = np.square(_nearest(blocks, step) * step - blocks).sum(-1)
        closer = error < least
        best, least = np.where(closer, scale, best), np.where(closer, error, least)
    return best


def round_blocks(values: Array, scale: NDArray[np.float16]) -> NDArray[np.int8]:
    """Rows as integers, −8 … 7, each block by its scale."""
    blocks = values.reshape(len(values), -1, BLOCK)
    # In float32: a quotient of float16 has 11 bits, too few to tell which integer is nearest.
    return _nearest(blocks, scale.astype(np.float32)[..., None]).astype(np.int8).reshape(values.shape)


def _nearest(blocks: Array, scale: Array) -> Array:
    return np.clip(np.rint(blocks / scale), _LOW, _HIGH)


def storable(scale: Array) -> NDArray[np.float16]:
    """The nearest scale that bfloat16 and float16 both hold exactly."""
    # uint64, since adding half a unit may carry out of 32 bits.
    bits = scale.astype(np.float32).view(np.uint32).astype(np.uint64)
    # bfloat16 is the upper half of a float32; half of its last place is added to round to the nearest.
    short = ((bits + 0x8000) & 0xFFFF0000).astype(np.uint32).view(np.float32)
    return np.clip(short, _SMALLEST, _LARGEST).astype(np.float16)
