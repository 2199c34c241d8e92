"""4-bit weights: in each row of a matrix, 32 neighbours share a scale.

What LiteRT 2.3.0 runs (found with small graphs in the real interpreter, 2026-11-24):

- FULLY_CONNECTED with 4-bit weights in blocks is right in XNNPACK and in the built-in kernels, at static and dynamic
  shapes, for blocks of 32, 64, … that divide a row. With one scale per row XNNPACK is right too, but the built-in
  kernels give noise and no error, so that form is not written here.
- EMBEDDING_LOOKUP reads the same form, exactly: a table that is looked up and multiplied with is stored once.
- Scales are float16 in the file. XNNPACK keeps them as bfloat16, which would cost a relative 2⁻⁹ of every block: so
  only scales are used that both types hold, and the two sets of kernels see the same weights.
- One row of activations takes XNNPACK 0.4 of an int8 product's time (262,144 × 640, one thread: 4.0 ms and 10.6 ms),
  two rows take more than int8's (39 ms and 18 ms): it has no kernel for two. So `int8x2` gives a 4-bit layer two
  products of a row each.

What 4 bits cost Gemma 3 270M, the weights alone, in mean KL(original || file) and perplexity (simulated on 313 to 618
positions of held-out text, 2026-11-24):

=====================================================  ======  =======
the tied table as head                                 0.108    +8.9 %
the tied table where tokens are looked up              0.083   +10.1 %
both                                                   0.187   +19.6 %
the head, 124,928 of its 262,144 rows with 8 bits      0.0056   +1.2 %
all linear layers                                      0.53      +61 %
gate, up and o alone, rounded by GPTQ (958 tokens)     0.115    +8.9 %
=====================================================  ======  =======

That is with the nearest integers: noise in the logits of some 200,000 rare tokens lifts all of them together, most
where a text is hard, so Tifinagh suffers most. GPTQ (`gptq.py`) takes most of that away. The real files, 1,260
held-out positions in 10 windows, KL(fp32 file || file), on 2026-11-28; 59,392 rows with 8 bits, the rest of the table
with 4, its input as two rows where it says GPTQ:

==========================================  ======  ======  ===================  =====
4 bits in                                   KLD     top-1   perplexity           MB
==========================================  ======  ======  ===================  =====
the table, nearest                          0.219   84.7 %  +31 %, Tifinagh ×2.3   213
the table, GPTQ in the order of columns     0.075   88.3 %  +12 %, Tifinagh ×1.2   213
the table, GPTQ, the largest inputs first   0.038   90.9 %  +4.7 %, Tifinagh +3 %  213
the same and q, o, gate, up                 0.112   82.8 %  +10 %, Tifinagh +4 %   182
==========================================  ======  ======  ===================  =====

Of 1,260 other positions, with GPTQ, and 8 bits for the tokens below 32,768 and from 235,520 to 250,000 (the last 12,000
are hardly ever used):

==========================================  ======  ======  ====================  =====
4 bits in                                   KLD     top-1   perplexity            MB
==========================================  ======  ======  ====================  =====
the table, the last 12,000 with 8 bits too  0.027   92.2 %  +3.2 %, Tifinagh +3 %  213.0
the table                                   0.029   92.0 %  +3.2 %, Tifinagh +5 %  209.5
the table, gate and up                      0.086   85.6 %  +7.2 %, Tifinagh +7 %  188.5
the same, equalized by 0.35                 0.077   85.2 %  +5.8 %, Tifinagh +0 %  188.5
the same, equalized by 0.7                  0.076   86.8 %  +4.8 %, Tifinagh +2 %  188.5
equalized by 0.7, 8 bits in gate, up 0–2    0.055   88.3 %  +3.2 %, Tifinagh +1 %  192.0
==========================================  ======  ======  ====================  =====

Inputs rotated as well (`rotate.py`), what `make tune SECTION=int4` found on 2026-11-29: step graph, calibration text,
2,016 positions, KL(fp32 file || file), and size over that of 8 bits everywhere:

===================================================  =====================  ======  =====
8 bits in                                            KLD                    top-1   size
===================================================  =====================  ======  =====
nothing                                              0.078 (0.068 … 0.087)  84.3 %  0.606
gate, up 0–5                                         0.060 (0.053 … 0.069)  86.1 %  0.631
and q, k, v 0–5 and 12–17, down 12–17                0.046 (0.040 … 0.053)  87.1 %  0.663
and q, k, v 6–11, down 0–5                           0.038 (0.033 … 0.045)  89.3 %  0.685
and o 0–11                                           0.035 (0.030 … 0.041)  89.1 %  0.698
attention, down; equalized                           0.047 (0.040 … 0.055)  88.1 %  0.691
everything                                           0.004 (0.004 … 0.005)  96.0 %  1.000
===================================================  =====================  ======  =====

So the first layers stay at 8 bits, q, k, v all through, and down in the last third. With o up to layer 5 alone the
bundle keeps 0.70 of int8's: that is Gemma 3's recipe. Through its cache, 5,488 positions, KL(Hugging Face || file),
it has 0.042 (0.036 … 0.049), 88.6 % and a perplexity of +3.2 % (+2.0 % … +4.4 %). Equalizing gives nothing any more:
0.076 instead of 0.071 on 252 positions with nothing at 8 bits.

Two rows or one: the bundle with attention and down at 8 bits, equalized, on the same positions, and its tokens/s over
the int8 bundle's (prefill and decode of 128 in LiteRT-LM, 5 rounds in turns). One row's error is lost beside that of
the weights, so the recipe has one:

===========  =====================  ======  =========================  ==========
two rows in  KLD                    top-1   perplexity                 tokens/s
===========  =====================  ======  =========================  ==========
every layer  0.051 (0.042 … 0.062)  87.7 %  +2.8 % (+1.6 % … +3.9 %)   0.59, 0.93
none         0.053 (0.044 … 0.065)  87.6 %  +2.9 % (+1.6 % … +4.1 %)   1.07, 1.31
===========  =====================  ======  =========================  ==========

A bias on the table's 4-bit rows of minus their rounding noise's mean and half its variance, which would take from a
softmax what noise adds to it, changes nothing once rows are rounded by GPTQ: 0.027 and +3.2 % as without.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pipeline.quantize import gptq
from pipeline.quantize import rows as quantize
from pipeline.tflite.graph import Graph
from pipeline.tflite.lazy import Array, Blocks, BlockScales, pack

BLOCK = 32
"""Neighbours that share a scale: 4.5 bits per weight."""
LOOKUP_VERSION = 4
_LOW, _HIGH = -8, 7
# Scales that are tried for a block, over its largest magnitude: smaller ones clip a few values, and the rest is finer.
_TRIED = tuple(share / 7.5 for share in (1.0, 0.94, 0.88, 0.82, 0.76, 0.7))
LARGEST_ERROR = 1 - 7 * _TRIED[-1] * (1 - 2**-9)
"""By which a value may be clipped, over the largest in its block."""
_SMALLEST, _LARGEST = 2.0**-24, 65280.0


def quantise_weights(graph: Graph, keep_int8: quantize.Keep, rounding: quantize.Rounding = quantize.to_nearest) -> None:
    """4-bit tables and weights of linear layers; 8-bit ones, a scale per row, where `keep_int8` names the operator.

    Rows that can't be cut into blocks have 8 bits too. Linear layers quantise their input while they run.
    """
    for view in graph.each():
        for operator in view.operators():
            code, weight = view.code(operator), int(operator.inputs[1]) if len(operator.inputs) > 1 else -1
            if code not in (quantize.LINEAR, quantize.LOOKUP) or not view.is_constant(weight):
                continue
            view.opcode(code, quantize.LINEAR_VERSION if code == quantize.LINEAR else LOOKUP_VERSION)
            if code == quantize.LINEAR:
                operator.builtinOptions.asymmetricQuantizeInputs = True  # else the built-in kernels take another step
            if view.type_of(weight) == "FLOAT32":
                values = view.blocks(weight)
                factors = rounding(view.name(weight), values.shape[-1])
                if not keep_int8(view.operator_name(operator)) and not values.shape[-1] % BLOCK:
                    view.set_four_bits(weight, *quantise_blocks(values, factors))
                else:
                    view.set_constant(weight, *quantize.quantise_rows(values, factors))


def quantise_blocks(values: Blocks, factors: gptq.Factors | None = None) -> tuple[Blocks, BlockScales]:
    """[rows, columns] float → 4-bit integers two in a byte, and the scales with which they are closest.

    To the nearest integer, or with `factors` by GPTQ.

    Rows are read twice: now for their scales, and for their values when the file is written.
    """
    rows, columns = values.shape
    scale = np.concatenate(list(values.each(best_scales)))

    def packed(start: int, stop: int) -> Array:
        block, own = values.rows(start, stop), scale[start:stop]
        return pack(gptq.round_rows(block, own, factors(), _LOW, _HIGH) if factors else round_blocks(block, own))

    return Blocks((rows, columns // 2), np.uint8, packed), BlockScales(scale, BLOCK)


def best_scales(values: Array) -> NDArray[np.float16]:
    """For each block in each row, the scale of those tried that has the least sum of squared errors."""
    blocks = values.reshape(len(values), -1, BLOCK)
    peak = np.abs(blocks).max(-1)
    best, least = np.ones(peak.shape, np.float16), np.full(peak.shape, np.inf, np.float32)
    for share in _TRIED:
        scale = _storable(peak * np.float32(share))
        step = scale.astype(np.float32)[..., None]
        error = np.square(_nearest(blocks, step) * step - blocks).sum(-1)
        closer = error < least
        best, least = np.where(closer, scale, best), np.where(closer, error, least)
    return best


def round_blocks(values: Array, scale: NDArray[np.float16]) -> NDArray[np.int8]:
    """Rows as integers, −8 … 7, each block by its scale."""
    blocks = values.reshape(len(values), -1, BLOCK)
    return _nearest(blocks, scale.astype(np.float32)[..., None]).astype(np.int8).reshape(values.shape)


def _nearest(blocks: Array, scale: Array) -> Array:
    return np.clip(np.rint(blocks / scale), _LOW, _HIGH)


def _storable(scale: Array) -> NDArray[np.float16]:
    """The nearest scale that bfloat16 and float16 both hold exactly."""
    bits = scale.astype(np.float32).view(np.uint32).astype(np.uint64)
    short = ((bits + 0x8000) & 0xFFFF0000).astype(np.uint32).view(np.float32)
    return np.clip(short, _SMALLEST, _LARGEST).astype(np.float16)
