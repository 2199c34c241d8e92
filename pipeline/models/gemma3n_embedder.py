"""What Gemma 3n's towers share: the way into the text model, and kernels in TFLite's order."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pipeline.export.operators import Linear
from pipeline.models.transformer import RMSNorm


class Weight(nn.Module):
    """A convolution's kernel, in TFLite's order."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(shape))


class Embedder(nn.Module):
    """What makes vectors of the text model of a tower's: a norm, a projection, and a norm without weights."""

    def __init__(self, size: int, text: int, eps: float) -> None:
        super().__init__()
        self.soft_embedding_norm = RMSNorm(size, eps)
        self.embedding_projection = Linear(size, text, bias=False)
        self.embedding_post_projection_norm = RMSNorm(text, eps, scaled=False)

    def forward(self, x: Tensor) -> Tensor:
        """[…, D] → […, H]."""
        made: Tensor = self.embedding_post_projection_norm(self.embedding_projection(self.soft_embedding_norm(x)))
        return made


def stored(shape: tuple[int, ...]) -> tuple[int, ...]:
    """How torch has a kernel that TFLite has in `shape`: see `weights.in_order`."""
    if len(shape) < 4:
        return shape
    if shape[0] == 1:  # each channel by itself, over time alone or over a plane
        return (shape[3], 1, *shape[1 + (shape[1] == 1) : 3])
    return shape[0], shape[3], shape[1], shape[2]
