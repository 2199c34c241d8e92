"""Weights made easy to round, before they are: layers equalized, inputs rotated, errors passed on.

What a recipe's [int8] and [int4] say of it in the same words; the float model stays what it is.
"""

from __future__ import annotations

from collections.abc import Mapping

from pipeline.core.recipe import Int4, Int8
from pipeline.quantize import equalize, gptq, rotate, rows
from pipeline.tflite.graph import Graph


def prepare(
    graph: Graph,
    section: Int8 | Int4,
    hessians: gptq.Hessians | None,
    *,
    rounded: bool = False,
    lookups: Mapping[str, float] | None = None,
) -> rows.Rounding:
    """Equalize and rotate `graph`, its weights in float32, as `section` says.

    No scale moves where some weights are `rounded` already: those could not take it. `lookups` as
    `gptq.Hessians.rounding` has them.

    Returns:
        What its weights are to be rounded by: GPTQ by `hessians` where the section says so.
    """
    column_factors = equalize.equalize_columns(graph, section.equalize) if section.equalize and not rounded else {}
    rotated = rotate.rotate_inputs(graph, rows.keeper(section.rotate), section.rotation)
    return hessians.rounding(column_factors, rotated, lookups) if hessians and section.gptq else rows.to_nearest
