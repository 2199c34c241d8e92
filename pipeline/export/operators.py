"""Torch operators that mean exactly one TFLite operator, for the graph modules in `pipeline/models`.

PyTorch's own `linear`, `matmul` and `embedding` are decomposed on the way to TFLite into reshapes, expands and
transposes. Those double the tied embedding (once as a table, once transposed as the head), triple the number of
operators, and add shape arithmetic that fails when batch and sequence are unknown. These operators go through whole.
In eager mode they compute what their PyTorch namesakes do. How they become TFLite stands in `lowering.py`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional


@torch.library.custom_op("pipeline::matmul", mutates_args=())
def matmul(x: Tensor, y: Tensor, transposed: bool) -> Tensor:
    """x @ y, or x @ yᵀ over the last two axes if `transposed`, of two activations with equal leading axes."""
    return torch.matmul(x, y.transpose(-1, -2) if transposed else y)


@matmul.register_fake
def _(x: Tensor, y: Tensor, transposed: bool) -> Tensor:
    return x.new_empty((*x.shape[:-1], y.shape[-2 if transposed else -1]))


@torch.library.custom_op("pipeline::linear", mutates_args=())
def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x @ weightᵀ over the last axis of `x`, of any rank; `weight` is [outputs, inputs]."""
    return functional.linear(x, weight)


@linear.register_fake
def _(x: Tensor, weight: Tensor) -> Tensor:
    # Of shapes alone: torch.export traces with symbols, and weights that have no memory.
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


@torch.library.custom_op("pipeline::lookup", mutates_args=())
def lookup(ids: Tensor, table: Tensor) -> Tensor:
    """Rows of `table` [V, H] at `ids` int32 [N] → [N, H]."""
    return functional.embedding(ids, table)


@lookup.register_fake
def _(ids: Tensor, table: Tensor) -> Tensor:
    return table.new_empty((ids.shape[0], table.shape[1]))


@torch.library.custom_op("pipeline::normalise", mutates_args=())
def normalise(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """x · (weight / √(mean(x²) + ε)) over the last axis, `weight` [H] or none.

    Some TFLite operators, one node for torch.export: each node costs it some 10 ms once shapes are symbolic. The weight
    is multiplied with the inverse root and not with the result: the converter folds a constant factor on the input of a
    linear layer into a copy of the layer's weights, in memory, and one copy per signature.
    """
    # In the order that the lowering has, so that eager and file round alike.
    inverse = torch.rsqrt(torch.mean(x * x, dim=-1, keepdim=True) + eps)
    return x * (inverse if weight is None else inverse * weight)


@normalise.register_fake
def _(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    return torch.empty_like(x)


def fold(x: Tensor, kv_heads: int) -> Tensor:
    """[1, T, N, D] → [1, K, G · T, D], where `kv_heads` is K and G = N / K: the rows of a head stay together."""
    folded: Tensor = _rows(x, kv_heads) if isinstance(x.shape[1], int) else fold_unknown(x, kv_heads)
    return folded


def unfold(x: Tensor, heads: int) -> Tensor:
    """What `fold` made, [1, K, G · T, D] → [1, T, 1, N · D], where `heads` is N."""
    joined: Tensor = _joined(x, heads) if isinstance(x.shape[2], int) else unfold_unknown(x, heads)
    return joined


def _rows(x: Tensor, kv_heads: int) -> Tensor:
    return x.transpose(1, 2).reshape(1, kv_heads, -1, x.shape[3])


def _joined(x: Tensor, heads: int) -> Tensor:
    apart = x.reshape(1, heads, x.shape[2] // (heads // x.shape[1]), x.shape[3])
    return apart.transpose(1, 2).reshape(1, apart.shape[2], 1, -1)


@torch.library.custom_op("pipeline::fold", mutates_args=())
def fold_unknown(x: Tensor, kv_heads: int) -> Tensor:
    """`fold` where T is unknown: merging it with another axis would make torch.export guard on its value."""
    return _rows(x, kv_heads).clone()


@fold_unknown.register_fake
def _(x: Tensor, kv_heads: int) -> Tensor:
    return x.new_empty((1, kv_heads, x.shape[2] // kv_heads * x.shape[1], x.shape[3]))


@torch.library.custom_op("pipeline::unfold", mutates_args=())
def unfold_unknown(x: Tensor, heads: int) -> Tensor:
    """`unfold` where T is unknown."""
    return _joined(x, heads).clone()


@unfold_unknown.register_fake
def _(x: Tensor, heads: int) -> Tensor:
    return x.new_empty((1, x.shape[2] // (heads // x.shape[1]), 1, heads * x.shape[3]))


@torch.library.custom_op("pipeline::update", mutates_args=())
def update(x: Tensor, part: Tensor, start: Tensor) -> Tensor:
    """A copy of `x` with `part` (same rank) written at `start`, int32 [rank]; moved back where it would not fit."""
    result = x.clone()
    result[_place(x, start, part.shape)] = part
    return result


@update.register_fake
def _(x: Tensor, part: Tensor, start: Tensor) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("pipeline::gather", mutates_args=())
def gather(x: Tensor, index: Tensor, axis: int) -> Tensor:
    """The places `index`, int32 [n], of `x` along `axis`.

    As one GATHER: PyTorch's `index_select` becomes GATHER_ND, which GPUs do not run (LiteRT.js 2.5.3).
    """
    return x.index_select(axis, index)


@gather.register_fake
def _(x: Tensor, index: Tensor, axis: int) -> Tensor:
    return x.new_empty([*x.shape[:axis], index.shape[0], *x.shape[axis + 1 :]])


def _place(x: Tensor, start: Tensor, size: Sequence[int]) -> tuple[slice[int, int, None], ...]:
    begins = [max(0, min(int(at), whole - part)) for at, whole, part in zip(start, x.shape, size, strict=True)]
    # As DYNAMIC_UPDATE_SLICE does: what would not fit is moved back, and no error tells.
    return tuple(slice(begin, begin + part) for begin, part in zip(begins, size, strict=True))


@torch.library.custom_op("pipeline::convolve", mutates_args=())
def convolve(x: Tensor, weight: Tensor, stride: Sequence[int], padded: bool = False) -> Tensor:
    """The convolution of `x` [B, H, W, I] with `weight` [O, h, w, I]: [B, ., ., O].

    With zeros around if `padded`, as many as let H and W be divided by the stride alone, the odd one behind, as
    TensorFlow's "SAME" has it.
    """
    moved = functional.conv2d(
        _channels_first(x, weight, stride, padded), weight.permute(0, 3, 1, 2), None, list(stride)
    )
    return moved.permute(0, 2, 3, 1).contiguous()


@convolve.register_fake
def _(x: Tensor, weight: Tensor, stride: Sequence[int], padded: bool = False) -> Tensor:
    return x.new_empty((x.shape[0], *_steps(x, weight, stride, padded), weight.shape[0]))


@torch.library.custom_op("pipeline::convolve_apart", mutates_args=())
def convolve_apart(x: Tensor, weight: Tensor, stride: Sequence[int], padded: bool = False) -> Tensor:
    """Each channel of `x` [B, H, W, C] by itself with its own of `weight` [1, h, w, C]; `padded` as `convolve`."""
    kernel, channels = weight.permute(3, 0, 1, 2), x.shape[-1]
    moved = functional.conv2d(_channels_first(x, weight, stride, padded), kernel, None, list(stride), 0, 1, channels)
    return moved.permute(0, 2, 3, 1).contiguous()


@convolve_apart.register_fake
def _(x: Tensor, weight: Tensor, stride: Sequence[int], padded: bool = False) -> Tensor:
    return x.new_empty((x.shape[0], *_steps(x, weight, stride, padded), x.shape[-1]))


def _steps(x: Tensor, weight: Tensor, stride: Sequence[int], padded: bool) -> list[int]:
    if padded:
        return [-(-x.shape[axis] // stride[axis - 1]) for axis in (1, 2)]
    return [(x.shape[axis] - weight.shape[axis]) // stride[axis - 1] + 1 for axis in (1, 2)]


def _channels_first(x: Tensor, weight: Tensor, stride: Sequence[int], padded: bool) -> Tensor:
    """[B, H, W, C] → [B, C, H, W], with the zeros around it if it is `padded`."""
    moved = x.permute(0, 3, 1, 2)
    if not padded:
        return moved
    steps = _steps(x, weight, stride, padded)
    more = [max(0, (steps[axis - 1] - 1) * stride[axis - 1] + weight.shape[axis] - x.shape[axis]) for axis in (2, 1)]
    return functional.pad(moved, [part for zeros in more for part in (zeros // 2, zeros - zeros // 2)])


class Linear(nn.Linear):
    """`nn.Linear` on the last axis of an input of any rank, as one FULLY_CONNECTED."""

    def reset_parameters(self) -> None:
        """Draw initial values, but not for a shape alone: torch 2.13.0 would import its compiler, a second a stage."""
        if not self.weight.is_meta:
            super().reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        product: Tensor = linear(x, self.weight)
        return product if self.bias is None else product + self.bias


class Embedding(nn.Embedding):
    """`nn.Embedding` for int32 ids of shape [B, S], as one EMBEDDING_LOOKUP."""

    def reset_parameters(self) -> None:
        """Draw initial values, but not for a shape alone: as `Linear`."""
        if not self.weight.is_meta:
            super().reset_parameters()

    def forward(self, ids: Tensor) -> Tensor:
        # EMBEDDING_LOOKUP takes a vector of ids.
        rows: Tensor = lookup(ids.reshape(-1), self.weight)
        return rows.reshape(*ids.shape, self.embedding_dim)
