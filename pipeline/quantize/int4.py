"""The int4 scheme as a whole: what the recipe's [int4] section makes of a graph.

Stage int4 and tune both call this, so that what tune measured is what int4 builds.
"""

from __future__ import annotations

from pipeline.core.recipe import Int4
from pipeline.quantize import blockwise, gptq, int8x2, prepare, row_ranges, rows
from pipeline.tflite.graph import Graph

TABLE = "embed_tokens.weight"
"""The table that is the head as well."""


def make(graph: Graph, int4: Int4, moments: gptq.Moments | None = None) -> None:
    """Give `graph`, its weights attached in float32, 4-bit ones, and 8-bit ones where the recipe says so."""
    rounding = prepare.smooth(graph, int4, moments)
    if int4.int8_tokens:
        row_ranges.cut(graph, TABLE, int4.int8_tokens)
    blockwise.make_mixed(graph, rows.keeper([*int4.keep_int8, *row_ranges.FINE]), rounding)
    int8x2.take_two_rows(graph, rows.keeper(int4.int8x2))
