"""The dynamic int8 scheme as a whole: what the recipe's [int8] section makes of a graph.

Stage int8 and tune both call this, so that what tune measured is what int8 builds.
"""

from __future__ import annotations

from pipeline.convert import blocks, gptq, quantize, residual, smooth
from pipeline.convert.flatbuffer import Graph
from pipeline.core.recipe import Int8


def make(graph: Graph, int8: Int8, moments: gptq.Moments | None = None) -> None:
    """Make `graph`, its weights attached in float32, int8: weights now, activations while it runs."""
    rounding = smooth.smooth(graph, int8, moments)
    blocks.split_columns(graph, quantize.keeper(int8.blocks), int8.block)
    quantize.quantise_weights(graph, quantize.keeper(int8.keep_float), rounding)
    residual.take_two_rows(graph, quantize.keeper(int8.two_rows))
