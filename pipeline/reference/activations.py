"""The largest activation of a model, as the reference computes it: what a runtime in float16 would have to hold.

A GPU computes in float16 unless a bundle says otherwise. Gemma 3's residual stream goes beyond what that holds, and
what overflows is no text any more. It is the first tokens of a text that have the largest, whatever the text, so a few
windows tell.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from pipeline.reference.model import HuggingFace


def largest(reference: HuggingFace, read: Callable[[], object]) -> float:
    """The largest magnitude that a module of a decoder layer of the `reference` reads or gives while `read` runs it."""
    seen = [0.0]
    modules = {module: None for layer in reference.model.model.layers for module in layer.modules()}
    hooks = [module.register_forward_hook(partial(_look, seen)) for module in modules]
    try:
        read()
    finally:
        for hook in hooks:
            hook.remove()
    return max(seen)


def _look(seen: list[float], _module: nn.Module, inputs: tuple[object, ...], output: object) -> None:
    given = output if isinstance(output, tuple) else (output,)
    # Masks hold the least float there is, which is no activation: they are passed by name, and are not among these.
    for value in (*inputs, *given):
        if isinstance(value, torch.Tensor) and value.is_floating_point() and value.numel():
            seen.append(max(seen.pop(), *(abs(float(end)) for end in torch.aminmax(value))))
