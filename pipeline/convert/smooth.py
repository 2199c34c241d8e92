"""Weights made easy to round, before they are: scales folded between neighbours, inputs rotated, errors passed on.

What a recipe's [int8] and [int4] say of it in the same words; the float model stays what it is.
"""

from __future__ import annotations

from pipeline.convert import fold, gptq, quantize, rotate
from pipeline.convert.flatbuffer import Graph
from pipeline.core.recipe import Int4, Int8


def smooth(graph: Graph, section: Int8 | Int4, moments: gptq.Moments | None) -> quantize.Rounding:
    """Fold and rotate `graph`, its weights in float32, as `section` says.

    Returns:
        What its weights are to be rounded by: GPTQ by `moments` where the section says so.
    """
    moved = fold.fold_scales(graph, section.fold) if section.fold else {}
    turned = rotate.rotate_inputs(graph, quantize.keeper(section.rotate), section.rotation)
    return moments.rounding(moved, turned) if moments and section.gptq else quantize.to_nearest
