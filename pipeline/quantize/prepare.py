"""Weights made easy to round, before they are: scales folded between neighbours, inputs rotated, errors passed on.

What a recipe's [int8] and [int4] say of it in the same words; the float model stays what it is.
"""

from __future__ import annotations

from pipeline.core.recipe import Int4, Int8
from pipeline.quantize import equalize, gptq, rotate, rows
from pipeline.tflite.graph import Graph


def smooth(graph: Graph, section: Int8 | Int4, moments: gptq.Moments | None) -> rows.Rounding:
    """Fold and rotate `graph`, its weights in float32, as `section` says.

    Returns:
        What its weights are to be rounded by: GPTQ by `moments` where the section says so.
    """
    moved = equalize.fold_scales(graph, section.equalize) if section.equalize else {}
    turned = rotate.rotate_inputs(graph, rows.keeper(section.rotate), section.rotation)
    return moments.rounding(moved, turned) if moments and section.gptq else rows.to_nearest
