"""The int8 schemes as a whole: what the recipe's [int8] section makes of a graph, dynamic or static.

Stage int8 and tune both call this, so that what tune measured is what int8 builds.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from pipeline.core import log
from pipeline.core.recipe import Int8, Scheme
from pipeline.quantize import calibrate, gptq, groups, int8x2, prepare, rows, static
from pipeline.runtime.litert import Tokens
from pipeline.tflite.graph import Graph


def make_int8(graph: Graph, int8: Int8, hessians: gptq.Hessians | None = None) -> None:
    """Make `graph`, its weights attached in float32, int8: weights now, activations while it runs."""
    rounding = prepare.prepare(graph, int8, hessians)
    # After rotating: a rotation mixes channels of one block, which a group may cut through.
    groups.split_columns(graph, rows.keeper(int8.groups), int8.group_size)
    rows.quantise_weights(graph, rows.keeper(int8.keep_float), rounding)
    int8x2.split_inputs(graph, rows.keeper(int8.int8x2))


def make_static(graph: Graph, int8: Int8, scheme: Scheme, fp32: Path, samples: Sequence[Tokens]) -> None:
    """Make a step `graph` int8, activations too, by the ranges that the file `fp32` shows on `samples` of real text.

    The head, which stays dynamic, takes two rows where others take two tensors.
    """
    keep = rows.keeper(int8.keep_float)
    # At 16 bits the value alone is fine enough; two terms would be for nothing.
    bits: static.Bits = 16 if scheme == "static16" else 8
    plan = partial(
        static.plan_static,
        keep=keep,
        two=rows.keeper(int8.int8x2_static if bits == 8 else ()),
        float_scores=int8.float_scores and bits == 8,
    )
    log.step(f"run fp32 on {len(samples)} samples of {sum(map(len, samples))} tokens for the ranges")
    seen = calibrate.collect(fp32, plan(Graph.read(fp32)).wanted, samples)
    graph.prune()  # as the fp32 file was: tensors have the same places in both
    static.make_static(graph, plan(graph), seen, keep, bits)
    int8x2.split_inputs(graph, rows.keeper(int8.int8x2_static))
