"""From the fp32 step graph to int8 files: weights with one scale per row.

A float matrix or table [rows, columns] becomes int8 [rows, columns] in −127 … 127 and scales float32 [rows], symmetric
(Krishnamoorthi, arXiv 1806.08342, per channel). A row's scale is its peak over 127; the one with the least squared
error gains too little to search for. Of 4-bit weights it is another matter, see `blockwise.py`.

The graph is rewritten here and not by AEQ (ai-edge-quantizer 0.10.0), for two reasons. AEQ writes a zero point per row,
ours are shared, so its files are larger. And static quantisation needs what AEQ's policy does not say: which operators
stay float was found by measurement (`static.py`), and ranges come from graphs whose shapes are chosen at run time
(`calibrate.py`).

What stands in an int8 file:

- Weights of linear layers (a row is an output channel) and both tables (a row is a token), each stored once. A table is
  read by EMBEDDING_LOOKUP, whose kernel takes int8 rows with a scale each and gives float32, exactly, with and without
  XNNPACK, in LiteRT 2.3.0 and TensorFlow 2.21. The tied head reads the very same tensor.
- `dynamic`: a linear layer takes float32 and quantises each token's activations while it runs, as one row or as two
  (`int8x2.py`). Before weights are rounded, scales can be moved between neighbouring layers (`equalize.py`), what
  layers read can be rotated (`rotate.py`), and a layer can be made a sum of narrower ones, each with its own scale per
  row (`groups.py`).
- `static`: matrix products take and give int8 (or int16) with ranges from calibration, see `static.py`.

Result: the shipped model's int8 file has 0.275 of the fp32 bytes, AEQ's 0.290; docs/experiments.md.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

import numpy as np
from numpy.typing import NDArray

from pipeline.checkpoint.names import EMBEDDING
from pipeline.checkpoint.names import HEAD as OWN_HEAD
from pipeline.tflite.graph import Graph, Origin
from pipeline.tflite.lazy import Array, Blocks, Scales
from pipeline.tflite.schema import Operator

LOOKUP, LINEAR, PRODUCT = "EMBEDDING_LOOKUP", "FULLY_CONNECTED", "BATCH_MATMUL"
# Versions that TFLite's version rules demand: per-channel int8 weights, int8 rows with float output.
LINEAR_VERSION, LOOKUP_INT8_VERSION = 12, 3
# Far below anything that counts in a layer, and far inside what XNNPACK takes.
_SMALLEST_ROW = 2.0**-20
HEAD = "head"
"""What recipes call the product that gives the logits."""

Keep = Callable[[str], bool]
RoundRows = Callable[[Array, Array, int, int], NDArray[np.int8]]
"""Rows [rows, columns] as integers, by scales [rows, columns / group]; the least and the largest integer."""
Rounding = Callable[[Origin, int], RoundRows | None]
"""Of a part of a matrix that has so many columns: what rounds its rows, None for the nearest integers."""


def keeper(patterns: Iterable[str]) -> Keep:
    """A predicate over the names of layers (`layers.0.mlp.up_proj;1`): true where a pattern is found.

    The pattern `head` is the model's head alone.
    """
    compiled = [re.compile(f"^{HEAD};" if pattern == HEAD else pattern) for pattern in patterns]
    return lambda name: any(pattern.search(name) for pattern in compiled)


def layer_name(view: Graph, operator: Operator) -> str:
    """The name by which recipes know an operator: its own, and `head;` for the product that gives the logits.

    That product is known by its matrix. Its own name is another one in each graph: `head;`, or where it is the graph's
    output that output's (`decode_logits_output`).
    """
    weight = int(operator.inputs[1]) if view.code(operator) == LINEAR else -1
    if view.is_constant(weight) and view.origin(weight).matrix in (OWN_HEAD, EMBEDDING):
        return f"{HEAD};"
    return view.operator_name(operator)


def tied(graph: Graph) -> frozenset[str]:
    """The matrices that are looked up and multiplied with, be it in two signatures."""
    read: dict[str, set[str]] = {LOOKUP: set(), LINEAR: set()}
    for view in graph.views():
        for operator in view.operators():
            code, weight = view.code(operator), int(operator.inputs[1]) if len(operator.inputs) > 1 else -1
            if code in read and view.is_constant(weight):
                read[code].add(view.origin(weight).matrix)
    return frozenset(read[LOOKUP] & read[LINEAR])


def to_nearest(_part: Origin, _columns: int) -> None:
    """The rounding of a recipe without `gptq`."""


# --- weights


def quantise_rows(values: Blocks, rounded_by: RoundRows | None = None) -> tuple[Blocks, Scales]:
    """Symmetric int8 with one scale per row: [rows, columns] float → int8 in −127 … 127, scale = max |row| / 127.

    To the nearest integer, or as `rounded_by` says (GPTQ, by `gptq.Hessians`).

    Rows are read twice: now for their scales, and for their values when the file is written. A row a million times
    smaller than the largest has that row's scale · 2⁻²⁰: XNNPACK refuses a product of scales outside 2⁻³² … 2⁸.
    """
    scale = scales_of_peaks(np.concatenate(list(values.each(row_peaks))))

    def rounded(block: Array, row: int) -> NDArray[np.int8]:
        own = scale[row : row + len(block)]
        return rounded_by(block, own[:, None], -127, 127) if rounded_by else round_rows(block, own)

    return values.map(np.int8, rounded), Scales.channels(scale)


def row_peaks(values: Array) -> NDArray[np.float64]:
    """The largest magnitude in each row."""
    # Two passes without a copy, where abs() would make one of the block.
    peaks: NDArray[np.float64] = np.maximum(values.max(axis=1), -values.min(axis=1)).astype(np.float64)
    return peaks


def scales_of_peaks(peak: NDArray[np.float64]) -> NDArray[np.float32]:
    """The scale of each row of a whole tensor, from the rows' largest magnitudes."""
    # A matrix of zeros: any scale will do but 0.
    if not peak.any():
        return np.ones(peak.shape, np.float32)
    scale: NDArray[np.float32] = (np.maximum(peak, peak.max() * _SMALLEST_ROW) / 127).astype(np.float32)
    return scale


def round_rows(values: Array, scale: Array) -> NDArray[np.int8]:
    """Rows as int8, each by its scale."""
    # TFLite's 8-bit specification keeps weights within −127 … 127.
    return np.clip(np.rint(values / scale[:, None]), -127, 127).astype(np.int8)


def quantise_weights(graph: Graph, keep: Keep, rounding: Rounding = to_nearest) -> None:
    """Make tables and the weights of linear layers int8, except where `keep` says otherwise."""
    for view in graph.views():
        for operator in view.operators():
            code, weight = view.code(operator), int(operator.inputs[1]) if len(operator.inputs) > 1 else -1
            if code not in (LINEAR, LOOKUP) or not view.is_constant(weight):
                continue
            # Also where this one stays float: code and version are one entry, which all operators of a kind share.
            view.opcode(code, LINEAR_VERSION if code == LINEAR else LOOKUP_INT8_VERSION)
            if view.type_of(weight) == "FLOAT32" and not keep(layer_name(view, operator)):
                values = view.blocks(weight)
                view.set_constant(weight, *quantise_rows(values, rounding(view.origin(weight), values.shape[-1])))
