"""The dynamic int8 scheme as a whole: what the recipe's [int8] section makes of a graph.

Stage int8 and tune both call this, so that what tune measured is what int8 builds.
"""

from __future__ import annotations

from pipeline.core.recipe import Int8
from pipeline.quantize import gptq, groups, int8x2, prepare, rows
from pipeline.tflite.graph import Graph


def make_int8(graph: Graph, int8: Int8, hessians: gptq.Hessians | None = None) -> None:
    """Make `graph`, its weights attached in float32, int8: weights now, activations while it runs."""
    rounding = prepare.prepare(graph, int8, hessians)
    groups.split_columns(graph, rows.keeper(int8.groups), int8.group_size)
    rows.quantise_weights(graph, rows.keeper(int8.keep_float), rounding)
    int8x2.split_inputs(graph, rows.keeper(int8.int8x2))
