"""A checkpoint's matrices and tables, attached to a graph as constants that are read when the file is written.

Whatever the model's size, its weights take no memory on their way from the checkpoint into the file: they are read,
widened, narrowed to the file's type and written a block of rows at a time.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from pipeline.checkpoint.reader import Checkpoint, Float32
from pipeline.core.errors import IntegrityError
from pipeline.tflite.graph import Graph, Origin, text
from pipeline.tflite.lazy import Blocks, FourBits

PREFIX = "weights."
"""How the inputs of an exported graph are called that are no inputs, but weights by parameter name."""


def attach(graph: Graph, checkpoint: Checkpoint, names: Mapping[str, str]) -> None:
    """Make the weight inputs of every signature float32 constants; equal names share one buffer.

    Args:
        graph: as `export` wrote it.
        checkpoint: where the values are.
        names: canonical → checkpoint name.
    """
    # By the name in the checkpoint: what is tied there, or the same in two signatures, stands in the file once.
    buffers: dict[str, int] = {}
    for view in graph.views():
        for port in [port for port in view.ports() if text(port.name).startswith(PREFIX)]:
            name = text(port.name).removeprefix(PREFIX).removeprefix("model.")
            stored = names[name]
            if stored not in buffers:
                values = in_order(rows(checkpoint, stored), view.shape(int(port.tensorIndex)))
                buffers[stored] = graph.add_buffer(values, Origin(name))
            view.make_constant(port, buffers[stored], name)


def rows(checkpoint: Checkpoint, tensor: str) -> Blocks:
    """A tensor of the checkpoint in float32, read when it is needed.

    Its blocks raise IntegrityError where a value is not finite.
    """
    shape = checkpoint.tensors[tensor].shape
    if checkpoint.tensors[tensor].scale is None:
        return Blocks(shape, np.float32, lambda *part: _finite(checkpoint, tensor, *part))
    return FourBits(
        shape,
        lambda *part: _finite(checkpoint, tensor, *part),
        lambda *part: checkpoint.integers(tensor, *part),
        checkpoint.scales(tensor),
    )


def in_order(kernel: Blocks, shape: tuple[int, ...]) -> Blocks:
    """A convolution's kernel as TFLite has it; what is none stays as it is.

    torch has [outputs, inputs, height, width], over time alone without a height. TFLite has [outputs, height, width,
    inputs], and where each channel goes by itself (`shape` says) [1, height, width, channels].
    """
    if len(shape) < len(kernel.shape) == 3:
        return _stacked(kernel, shape)
    if len(kernel.shape) < 3:  # a kernel of 3 x 3 over three channels has the same shape in both
        return kernel
    if shape[0] == kernel.shape[0]:
        return Blocks(shape, kernel.dtype, lambda *part: np.moveaxis(kernel.rows(*part), 1, -1))
    apart = lambda *_: kernel.rows(0, kernel.shape[0]).reshape(kernel.shape[0], -1).T.reshape(shape)  # noqa: E731
    return Blocks(shape, kernel.dtype, apart)


def _stacked(tables: Blocks, shape: tuple[int, ...]) -> Blocks:
    """Tables [n, rows, columns] one under the other, of each as many of its first rows as `shape` has room for."""
    count = tables.shape[0]
    each = shape[0] // count

    def rows(start: int, stop: int) -> Float32:
        return np.concatenate([tables.rows(i, i + 1)[0, :each] for i in range(count)])[start:stop]

    return Blocks(shape, tables.dtype, rows)


def vector(checkpoint: Checkpoint, tensor: str) -> Float32:
    """A whole tensor in float32, for small ones.

    Raises:
        IntegrityError: a value is not finite.
    """
    return _finite(checkpoint, tensor, 0, checkpoint.tensors[tensor].shape[0])


def limit(checkpoint: Checkpoint, tensor: str) -> Float32:
    """A number that something is held within, of no dimension; infinite where it is not.

    Raises:
        IntegrityError: it is none.
    """
    value = checkpoint.read(tensor)
    if np.isnan(value):
        raise IntegrityError(f"the limit {tensor} is no number", cause="the file is corrupt", remedy="get it anew")
    return value


def _finite(checkpoint: Checkpoint, tensor: str, start: int, stop: int) -> Float32:
    block = checkpoint.rows(tensor, start, stop)
    # Here and not later: an int8 scale made of a NaN turns a whole row into zeros without a word.
    if not np.isfinite(block).all():
        raise IntegrityError(
            f"tensor {tensor} holds values that are not finite",
            cause="the fine-tune diverged or the file is corrupt",
            remedy="use an earlier checkpoint of the fine-tune",
        )
    return block
