"""inspect: what is in a `.tflite` or `.litertlm` file, and where it leaves another.

    make inspect FILE=file
    make inspect FILE=step.tflite AGAINST=fp32/step.tflite
    make inspect FILE=int8/decoder.tflite AGAINST=fp32/decoder.tflite

Tells signatures, sections, bits per weight, operators, products in float and the biggest tensors, from the file's
tables alone. With AGAINST=, two step graphs of one model, or two decoders with the embedders beside them, run on the
same tokens, and the signal-to-noise ratio of every operator's result says where they part.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import cast

from pipeline.bundling import contents
from pipeline.core import log, manifest
from pipeline.core.errors import UsageError
from pipeline.core.stage import guard
from pipeline.judge import sqnr
from pipeline.report.inspection import Told, text
from pipeline.runtime import litert
from pipeline.runtime.sections import DECODER, Conversation, Sections
from pipeline.tflite.graph import Graph

_BIGGEST = 12
_WINDOWS, _LONGEST = 4, 64
_SPOKEN = 1
"""Samples that decoders read: each token is a run of its own, and all its results are compared."""
_SEED = 20251124


def describe(file: Path, against: Path | None, biggest: int) -> dict[str, object]:
    """What is in `file`, and where it leaves `against`, as JSON; `biggest` constants are listed."""
    content = contents.read(file)
    models = [
        {
            **asdict(model),
            "constants": [asdict(constant) for constant in model.constants[:biggest]],
            "constants_in_all": len(model.constants),
            "weights": {kind: list(row) for kind, row in model.weights().items()},
            "bits_per_weight": model.bits_per_weight(),
        }
        for model in content.models
    ]
    description: dict[str, object] = {**asdict(content), "models": models}
    if against:
        where, samples = _samples(file, _vocabulary(content))
        if file.name == against.name == DECODER:
            trace = sqnr.compare(Decoder(file), Decoder(against), samples[:_SPOKEN])
        else:
            trace = sqnr.trace(file, against, samples)
        description["against"] = {"file": str(against), "text": where, **trace.facts(), "table": sqnr.table(trace)}
    return description


class Decoder(sqnr.Running):
    """A bundle's decoder, which reads a sample token by token through its cache, as `decode` does in LiteRT-LM."""

    def __init__(self, file: Path) -> None:
        decode = next((view for view in Graph.read(file).views() if view.signature() == "decode"), None)
        if decode is None:
            raise UsageError(f"{file} has no signature `decode`", remedy="name a decoder.tflite that int8 or fp32 made")
        super().__init__(decode, litert.open_traced(file))
        self._conversation = Conversation(Sections(file.parent, decoder=self.interpreter))

    def replay(self, sample: litert.Tokens) -> Iterator[int]:
        """Decode its tokens."""
        self._conversation.reset()
        for token in sample:
            self._conversation.decode(int(token))
            yield 1


def _vocabulary(found: contents.Contents) -> int:
    """The number of tokens that a model chooses from: the last axis of its first signature's results."""
    sizes = [port.shape[-1] for port in found.models[0].signatures[0].outputs if port.shape]
    return max([2, *sizes])


def _samples(file: Path, vocabulary: int) -> tuple[str, list[litert.Tokens]]:
    """Tokens to run: windows of the text that the reference was computed on, or drawn where there is none nearby."""
    import numpy as np
    from safetensors.numpy import load_file

    stored = file.resolve().parent.parent / "golden" / "corpus.safetensors"
    if stored.is_file():
        windows = load_file(stored)["input_ids"]
        return f"the verification text in {stored.parent.name}", list(windows[:_WINDOWS, :_LONGEST])
    drawn = np.random.default_rng(_SEED).integers(0, vocabulary, size=(_WINDOWS, _LONGEST), dtype=np.int32)
    return "random tokens, for there is no golden folder beside the file's", list(drawn)


def main(argv: Sequence[str] | None = None) -> int:
    """Run from the command line and return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.inspection", description=(__doc__ or "").split("\n", 1)[0].removeprefix("inspect: ")
    )
    parser.add_argument("file", type=Path, help="a .tflite or .litertlm file")
    parser.add_argument("--against", type=Path, metavar="FILE", help="the fp32 step graph or decoder of the same model")
    parser.add_argument(
        "--biggest", type=int, default=_BIGGEST, metavar="N", help="tensors to list (default: %(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="JSON on standard output")
    arguments = parser.parse_args(argv)

    def work() -> None:
        told = describe(arguments.file, arguments.against, arguments.biggest)
        log.answer(manifest.dump_json(told) if arguments.json else "\n".join(text(cast("Told", told))) + "\n")

    return guard(work)


if __name__ == "__main__":
    sys.exit(main())
