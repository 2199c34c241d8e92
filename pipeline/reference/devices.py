"""Which device the reference computes on, and what becomes of work that a GPU's memory does not hold.

The code is the same for all devices: float32, on a GPU with TF32 off, and results are on the CPU again.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.core import log, memory
from pipeline.core.errors import UsageError, VerificationError
from pipeline.judge import screening
from pipeline.judge.corpus import Tokens
from pipeline.judge.metrics import Reals, nmse
from pipeline.judge.reference import Head
from pipeline.reference.model import HuggingFace

T = TypeVar("T")
Device = Literal["auto", "cpu", "cuda"]
"""What DEVICE= may say."""
_FULL = re.compile(r"out of memory|STATUS_ALLOC_FAILED")
"""What CUDA and its libraries say of full memory where torch's own allocator was not asked."""
NMSE = 1e-8
"""Normalised mean square error up to which two devices say the same, of hidden states or logits."""


def choose(wanted: str, parameters: int | None = None) -> str:
    """`cuda` or `cpu` for `auto`, else what is asked for; the CPU where so many `parameters` are too many for a GPU.

    Raises:
        UsageError: cuda is asked for and there is none.
    """
    available = torch.cuda.is_available()
    if wanted == "cuda" and not available:
        raise UsageError("there is no usable CUDA device", remedy="use DEVICE=cpu, or install the CUDA lock")
    if wanted == "cpu" or not available:
        return "cpu"
    needed, free = memory.of_reference(parameters or 0), torch.cuda.mem_get_info()[0]
    if parameters is not None and needed > free:
        sizes = f"{log.human_bytes(needed)} for the reference, {log.human_bytes(free)} are free"
        log.warn(f"the GPU's memory is too small: {sizes}; the CPU computes")
        return "cpu"
    if parameters is not None and memory.must_stream(parameters):
        log.warn(
            f"the machine's memory does not hold {log.human_bytes(needed)} on their way to the GPU; the CPU computes"
        )
        return "cpu"
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.set_float32_matmul_precision("highest")
    return "cuda"


def within_memory(device: str, compute: Callable[[str], T]) -> T:
    """What `compute` gives on `device`; on the CPU, from the start, where a GPU's memory turns out to be too small."""
    try:
        return compute(device)
    except RuntimeError as error:
        if device == "cpu" or not (isinstance(error, torch.OutOfMemoryError) or _FULL.search(str(error))):
            raise
        log.warn(f"the GPU's memory is too small: {str(error).splitlines()[0]}; the CPU computes, from the start")
    memory.give_back()  # outside `except`: what was computed is held by the error until here
    torch.cuda.empty_cache()
    return compute("cpu")


def opened(checkpoint: Path, device: str) -> HuggingFace:
    """The reference in fp32: whole on a GPU, on the CPU a matrix at a time."""
    log.step(f"the reference runs in fp32 on {device}" + (", a matrix at a time" if device == "cpu" else ""))
    return HuggingFace.load(checkpoint, device, streamed=device == "cpu")


def logits(checkpoint: Path, device: str, windows: Tokens) -> Iterator[NDArray[np.float32]]:
    """What the reference says of each of `windows` [N, L], float32 [L, V], its hidden states computed on `device`."""

    def read(device: str) -> tuple[NDArray[np.float32], float | None]:
        reference = opened(checkpoint, device)
        return reference.hidden(windows, np.ones_like(windows)), reference.cap

    states, cap = within_memory(device, read)
    head = Head.of_checkpoint(checkpoint, cap)
    return (screening.logits(head, rows) for rows in states)


def require_same(again: Reals, given: Reals, by: str, stage: str) -> float:
    """The normalised mean square error between hidden states `given` by a device, and those of the CPU `again`.

    Raises:
        VerificationError: it is more than `NMSE`.
    """
    found = nmse(again, given)
    if not found <= NMSE:  # also where it is no number
        raise VerificationError(
            f"the reference differs from itself: NMSE {found:.1e} of hidden states, limit {NMSE:.0e}",
            cause=f"{by} does not compute in full fp32",
            remedy=f"run `make {stage} DEVICE=cpu`",
        )
    return found
