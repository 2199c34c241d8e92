"""Torch operators that mean exactly one TFLite operator, for the graph modules in `pipeline/models`.

PyTorch's own `linear`, `matmul` and `embedding` are decomposed on the way to TFLite into reshapes, expands and
transposes. Those double the tied embedding (once as a table, once transposed as the head), triple the number of
operators, and add shape arithmetic that fails when batch and sequence are unknown. These operators go through whole.
In eager mode they compute what their PyTorch namesakes do. How they become TFLite stands in `lowering.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


@torch.library.custom_op("pipeline::matmul", mutates_args=())
def matmul(x: Tensor, y: Tensor, transposed: bool) -> Tensor:
    """x @ y, or x @ yᵀ over the last two axes if `transposed`; leading axes are equal, or `y` has none.

    With a constant two-dimensional `y` the converter makes it FULLY_CONNECTED, else it is BATCH_MATMUL.
    """
    return torch.matmul(x, y.transpose(-1, -2) if transposed else y)


@matmul.register_fake
def _(x: Tensor, y: Tensor, transposed: bool) -> Tensor:
    return x.new_empty((*x.shape[:-1], y.shape[-2 if transposed else -1]))


@torch.library.custom_op("pipeline::lookup", mutates_args=())
def lookup(ids: Tensor, table: Tensor) -> Tensor:
    """Rows of `table` [V, H] at `ids` int32 [N] → [N, H]."""
    return functional.embedding(ids, table)


@lookup.register_fake
def _(ids: Tensor, table: Tensor) -> Tensor:
    return table.new_empty((ids.shape[0], table.shape[1]))


@torch.library.custom_op("pipeline::normalise", mutates_args=())
def normalise(x: Tensor, eps: float) -> Tensor:
    """x / √(mean(x²) + ε) over the last axis.

    Five TFLite operators, one node for torch.export: each node costs it some 10 ms once shapes are symbolic.
    """
    return x * torch.rsqrt(torch.mean(x * x, dim=-1, keepdim=True) + eps)


@normalise.register_fake
def _(x: Tensor, eps: float) -> Tensor:
    return torch.empty_like(x)


class Linear(nn.Linear):
    """`nn.Linear` on the last axis of an input of any rank, as one FULLY_CONNECTED."""

    def forward(self, x: Tensor) -> Tensor:
        product: Tensor = matmul(x, self.weight, True)
        return product if self.bias is None else product + self.bias


class Embedding(nn.Embedding):
    """`nn.Embedding` for int32 ids of shape [B, S], as one EMBEDDING_LOOKUP."""

    def forward(self, ids: Tensor) -> Tensor:
        rows: Tensor = lookup(ids.reshape(-1), self.weight)
        return rows.reshape(*ids.shape, self.embedding_dim)
