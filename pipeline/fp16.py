"""fp16: the step graph with its weights in float16, half the bytes of fp32; arithmetic stays float32."""

from __future__ import annotations

import sys

from pipeline.convert import quantize, readback
from pipeline.convert.flatbuffer import Graph
from pipeline.core import log
from pipeline.core.stage import Context, Outcome, Stage, main

NAME = "step.tflite"


def work(context: Context) -> Outcome:
    """Write `step.tflite` and look into what was written."""
    source = context.root / context.upstream["fp32"].output(NAME).path
    file = context.folder / NAME
    log.step("write weights as float16")
    graph = Graph.read(source)
    quantize.make_half(graph)
    graph.prune()
    graph.write(file)
    log.step("read the file back")
    found = readback.read_back(file)
    facts = readback.check(found, "fp16", file)
    readback.round_trip(file)
    log.step(f"{log.human_bytes(found.size)}, {found.size / source.stat().st_size:.3f} of fp32")
    return Outcome(facts=facts)


STAGE = Stage(name="fp16", summary="Write the step graph with float16 weights.", work=work, needs=("fp32",))

if __name__ == "__main__":
    sys.exit(main(STAGE))
