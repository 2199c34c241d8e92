"""From graph modules to a `.tflite` graph whose matrices are still to be attached.

Matrices and tables go through the converter as inputs, not as constants: it sees no weight. So its time and memory do
not depend on the size of the model, no copy of a weight is made by constant folding, and one graph serves every
precision. `weights.attach` puts the values in, straight from the checkpoint. Vectors (norms, biases) are small and are
constants from the start.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_map

from pipeline.core import host
from pipeline.core.errors import ExportError
from pipeline.tflite.graph import Graph, text
from pipeline.tflite.weights import PREFIX

if TYPE_CHECKING:
    from torch.export import Dim

Vector = Callable[[str], Tensor]
Dimensions = Mapping[str, Mapping[int, tuple[str, int, int]]]


Inputs = Mapping[str, Tensor | Mapping[str, Tensor]]
Outputs = dict[str, Tensor | dict[str, Tensor]]
"""By name; those of several layers, such as a cache, stand together."""


class Converted(Protocol):
    """What litert-torch made."""

    def export(self, file: str) -> None:
        """Write it."""


class Converter(Protocol):
    """What is used of litert-torch, which has no types: the module itself, and what it has gathered so far."""

    def signature(
        self,
        name: str,
        module: nn.Module,
        *,
        sample_kwargs: Mapping[str, Inputs],
        dynamic_shapes: Mapping[str, Mapping[str, object]] | None,
    ) -> Converter:
        """Another graph beside those before."""

    def convert(self, *, lightweight_conversion: bool) -> Converted:
        """All of them as one model."""


@dataclass(frozen=True)
class Signature:
    """One way to run a file.

    Attributes:
        name: what callers ask for.
        module: takes `inputs` by name, returns a dict of tensors or of dicts of them; inner names are joined by `_`.
            It is on the meta device.
        vector: the values of a parameter that is no matrix, by its name in `module`.
        inputs: one example of each input; of a dynamic dimension any size ≥ 2.
        dimensions: input name → axis → (name, least, most) of the dimensions that are chosen at run time; of those
            that stand together by both names, joined by `_`.
    """

    name: str
    module: nn.Module
    vector: Vector
    inputs: Inputs
    dimensions: Dimensions = field(default_factory=dict)


def export(signatures: Sequence[Signature], out: Path) -> None:
    """Write one TFLite file with `signatures`; the matrices of their modules are inputs called `weights.<parameter>`.

    Raises:
        ExportError: torch or the converter refuses a graph; the message is theirs.
    """
    import litert_torch
    from litert_torch import _config

    from pipeline.export.decompose import by_node
    from pipeline.export.lowering import dynamic_shapes
    from pipeline.export.repeat import once

    # Its progress bar writes over our lines, and into logs.
    _config.config.show_progress = False
    converter: Converter = litert_torch
    try:
        with dynamic_shapes(), by_node(), once(), torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for each in signatures:
                converter = _add(converter, each)
            # Constants are then taken as they are, when they are needed: without it memory grows with them.
            model = converter.convert(lightweight_conversion=True)
        raw = out.with_name(out.name + ".raw")
        model.export(str(raw))
    except (RuntimeError, ValueError, TypeError, NotImplementedError) as error:
        raise ExportError(
            f"the graph could not be converted: {error}",
            cause="an operator that the converter does not know with these shapes",
            remedy="report it with config.json of the checkpoint",
        ) from error
    graph = Graph.read(raw)
    _tidy(graph)
    graph.prune()  # the converter writes a buffer and an empty quantisation for every activation: 0.7 % of a small file
    graph.write(out)
    raw.unlink()


class _WithWeights(nn.Module):
    """A module on the meta device, given its vectors, whose matrices are inputs."""

    def __init__(self, module: nn.Module, vector: Vector) -> None:
        """Raises ExportError for a buffer: one that is not in the checkpoint would hold whatever was in memory."""
        super().__init__()
        # Such a buffer is filled by nobody on the meta device: litert-torch 0.10.0 wrote 2e-34 or 5e+32 into files for
        # it.
        buffers = [name for name, _ in module.named_buffers()]
        if buffers:
            raise ExportError(
                f"the graph has no values for {', '.join(buffers)}", cause="the checkpoint does not hold them"
            )
        parameters = dict(module.named_parameters())
        self.matrices = {name: _example(each.shape) for name, each in parameters.items() if each.dim() >= 2}
        for name in parameters:
            owner, _, leaf = name.rpartition(".")
            # Where a matrix is an input the parameter goes unused, but the converter looks at it: it must be small.
            values = torch.zeros(1) if name in self.matrices else vector(name)
            setattr(module.get_submodule(owner), leaf, nn.Parameter(values, requires_grad=False))
        self.module = module

    def forward(self, weights: Mapping[str, Tensor], inputs: Inputs) -> Outputs:
        outputs: Outputs = functional_call(self.module, dict(weights), (), dict(inputs))
        return outputs


def _example(shape: torch.Size) -> Tensor:
    """A float32 tensor that is never read nor written.

    It takes no memory, and none is set aside for it: a table of 9 GB is refused on a smaller machine otherwise.
    """
    return torch.frombuffer(host.unreserved(4 * shape.numel()), dtype=torch.float32).view(shape)


def _add(converter: Converter, signature: Signature) -> Converter:
    module = _WithWeights(signature.module, signature.vector)
    symbols = _symbols(signature.inputs, signature.dimensions)
    return converter.signature(
        signature.name,
        module.eval(),
        sample_kwargs={"weights": module.matrices, "inputs": _apart(signature.inputs)},
        # None for each: weights have the shape that they have.
        dynamic_shapes={"weights": dict.fromkeys(module.matrices), "inputs": symbols} if signature.dimensions else None,
    )


def _apart(inputs: Inputs) -> Inputs:
    """`inputs` without a tensor in two places: torch.export would take it as one input (torch 2.13.0)."""
    seen: set[int] = set()

    def own(tensor: Tensor) -> Tensor:
        known = tensor.data_ptr() in seen
        seen.add(tensor.data_ptr())
        return tensor.clone() if known else tensor

    apart: Inputs = tree_map(own, dict(inputs))
    return apart


Symbols = dict[int, "Dim"]


def _symbols(inputs: Inputs, dimensions: Dimensions) -> dict[str, Symbols | dict[str, Symbols]]:
    """torch.export's dynamic shapes; equal names are one dimension.

    torch.export takes a least size of 1 as 2 for all it may assume; the graph runs with 1 all the same, which verify
    checks.
    """
    made: dict[str, Dim] = {}
    for axes in dimensions.values():
        for name, least, most in axes.values():
            made.setdefault(name, torch.export.Dim(name, min=least, max=most))

    def of(name: str) -> Symbols:
        return {axis: made[entry[0]] for axis, entry in dimensions.get(name, {}).items()}

    return {
        name: of(name) if isinstance(value, Tensor) else {inner: of(f"{name}_{inner}") for inner in value}
        for name, value in inputs.items()
    }


def _tidy(graph: Graph) -> None:
    """Give inputs their own names, and take out the zero biases that `lowering` had to put in."""
    for view in graph.views():
        for port in view.ports():
            # The converter names an input by the path of its keyword arguments, joined by `_`.
            port.name = text(port.name).removeprefix("inputs_").replace("weights_", PREFIX, 1)
        for operator in view.operators():
            if view.code(operator) == "FULLY_CONNECTED" and len(operator.inputs) > 2 and operator.inputs[2] >= 0:
                bias = int(operator.inputs[2])
                # A bias of zeros would cost an addition per row, and in full-integer files a constant and its scales.
                if view.is_constant(bias) and not np.any(view.constant(bias)):
                    operator.inputs = [*operator.inputs[:2], -1]
        _read_reshaped(view)


def _read_reshaped(view: Graph) -> None:
    """Let sums and products that read [1, H] read [1, 1, 1, H] instead where that is made of it anyway.

    The converter mixes the two at one token. LiteRT 2.3.0 keeps both in one memory, and its built-in kernels write a
    product over its operand once nothing reads that one any more, also if the other is still to be read.
    """
    longer: dict[int, int] = {}
    for operator in view.operators():
        inputs, result = [int(tensor) for tensor in operator.inputs], int(operator.outputs[0])
        if view.code(operator) == "RESHAPE" and not view.is_constant(inputs[0]):
            shape, other = view.shape(inputs[0]), view.shape(result)
            # Only where axes of 1 were put in front: any other reshape would give each element another partner.
            if -1 not in shape and other == (1,) * (len(other) - len(shape)) + shape:
                longer[inputs[0]] = result
        elif view.code(operator) in ("ADD", "SUB", "MUL"):
            # A longer operand than the result would make the result longer.
            rank = len(view.shape(result))
            operator.inputs = [longer[i] if i in longer and len(view.shape(longer[i])) <= rank else i for i in inputs]
