"""What Gemma 4's towers share: linear layers that hold what they read and give within limits, and the way into text."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from pipeline.export.operators import Linear
from pipeline.models.transformer import RMSNorm


class ClippedLinear(nn.Module):
    """A linear layer. If it is `bounded`, what it reads and what it gives are held within limits of the checkpoint."""

    def __init__(self, inputs: int, outputs: int, *, bounded: bool) -> None:
        super().__init__()
        self.linear = Linear(inputs, outputs, bias=False)
        self.bounded = bounded
        if bounded:
            self.input_min, self.output_min = (nn.Parameter(torch.tensor(-math.inf)) for _ in range(2))
            self.input_max, self.output_max = (nn.Parameter(torch.tensor(math.inf)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        """[…, inputs] → […, outputs]."""
        if not self.bounded:
            made: Tensor = self.linear(x)
            return made
        held = torch.minimum(torch.maximum(x, self.input_min), self.input_max)
        return torch.minimum(torch.maximum(self.linear(held), self.output_min), self.output_max)


class Embedder(nn.Module):
    """What makes vectors of the text model of a tower's: a norm without weights, and a projection."""

    def __init__(self, size: int, text: int, eps: float) -> None:
        super().__init__()
        self.embedding_pre_projection_norm = RMSNorm(size, eps, scaled=False)
        self.embedding_projection = Linear(size, text, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[…, D] → […, H]."""
        made: Tensor = self.embedding_projection(self.embedding_pre_projection_norm(x))
        return made
