"""From a graph module to a `.tflite` file."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.convert.flatbuffer import Graph
from pipeline.core.errors import ExportError


def assign(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Give `module`, built on the meta device, its weights without copying them.

    Raises:
        ExportError: a parameter or buffer of the module is left without values. A buffer that is not in the
            checkpoint would otherwise hold whatever was in memory.
    """
    module.load_state_dict(dict(tensors), strict=True, assign=True)
    empty = [name for name, tensor in [*module.named_parameters(), *module.named_buffers()] if tensor.is_meta]
    if empty:
        raise ExportError(f"the graph has no values for {', '.join(empty)}", cause="the checkpoint does not hold them")


def export(
    module: nn.Module,
    inputs: Mapping[str, Tensor],
    dimensions: Mapping[str, Mapping[int, tuple[str, int, int]]],
    out: Path,
) -> None:
    """Write `module` as a TFLite file with the one signature `serving_default`.

    Args:
        module: takes `inputs` by name and returns a dict of tensors.
        inputs: one example of each input; of a dynamic dimension any size ≥ 2.
        dimensions: input name → axis → (name, least, most) of the dimensions that are chosen at run time.
        out: the file to write.

    Raises:
        ExportError: torch or the converter refuses the graph; the message is theirs.
    """
    import litert_torch
    from litert_torch import _config

    from pipeline.convert.lowering import dynamic_shapes

    _config.config.show_progress = False
    try:
        with dynamic_shapes(), torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = litert_torch.convert(
                module.eval(),
                # Copies: torch.export takes one tensor given for two inputs as one input (torch 2.13.0).
                sample_kwargs={name: tensor.clone() for name, tensor in inputs.items()},
                dynamic_shapes=_symbols(inputs, dimensions),
                lightweight_conversion=True,
            )
        raw = out.with_name(out.name + ".raw")
        model.export(str(raw))
    except (RuntimeError, ValueError, TypeError, NotImplementedError) as error:
        raise ExportError(
            f"the graph could not be converted: {error}",
            cause="an operator that the converter does not know with these shapes",
            remedy="report it with config.json of the checkpoint",
        ) from error
    graph = Graph.read(raw)
    graph.prune()  # the converter writes a buffer and an empty quantisation for every activation: 0.7 % of a small file
    graph.write(out)
    raw.unlink()


def _symbols(
    inputs: Mapping[str, Tensor], dimensions: Mapping[str, Mapping[int, tuple[str, int, int]]]
) -> dict[str, dict[int, Any]]:
    """torch.export's dynamic shapes; equal names are one dimension.

    torch.export takes a least size of 1 as 2 for all it may assume; the graph runs with 1 all the same, which verify
    checks.
    """
    made: dict[str, Any] = {}
    for axes in dimensions.values():
        for name, least, most in axes.values():
            made.setdefault(name, torch.export.Dim(name, min=least, max=most))
    return {name: {axis: made[entry[0]] for axis, entry in dimensions.get(name, {}).items()} for name in inputs}
