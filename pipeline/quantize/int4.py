"""The int4 scheme as a whole: what the recipe's [int4] section makes of a graph.

Stage int4 and tune both call this, so that what tune measured is what int4 builds.
"""

from __future__ import annotations

from pipeline.checkpoint.names import EMBEDDING, HEAD
from pipeline.core.recipe import Int4
from pipeline.quantize import blockwise, given, gptq, int8x2, prepare, row_ranges, rows
from pipeline.tflite.graph import Graph


def make_int4(graph: Graph, int4: Int4, hessians: gptq.Hessians | None = None) -> None:
    """Give `graph`, its weights attached in float32, 4-bit ones, and 8-bit ones where the recipe says so."""
    kept = given.keep(graph)  # first: from here on they are 4-bit matrices, which nothing rewrites
    lookups = dict.fromkeys(rows.tied(graph), int4.lookups)
    rounding = prepare.prepare(graph, int4, hessians, rounded=bool(kept), lookups=lookups)
    # After rotating, before rounding: a range is a constant of its own, with its own scales.
    frequent = frozenset[int]()
    # One where they are tied: both have a row per token.
    for matrix in sorted({EMBEDDING, HEAD} - kept) if int4.int8_tokens else ():
        frequent |= row_ranges.split_rows(graph, matrix, int4.int8_tokens)
    eight, whole = rows.keeper(int4.keep_int8), rows.keeper(int4.keep_float)
    blockwise.quantise_weights(graph, eight, rounding, frequent, whole)
    # Last: whether a layer takes two rows or two products depends on the bits of its weights.
    int8x2.split_inputs(graph, rows.keeper(int4.int8x2))
