"""Hadamard matrices, and rows rotated by them block by block."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pipeline.tflite.lazy import Array


def hadamard(size: int) -> NDArray[np.float32]:
    """The normalised Sylvester matrix [size, size], symmetric and its own inverse.

    Raises:
        ValueError: `size` is no power of two.
    """
    if size < 1 or size & (size - 1):
        raise ValueError(f"there is no Sylvester matrix of size {size}, which is no power of two")
    signs = np.ones((1, 1))
    while len(signs) < size:
        signs = np.block([[signs, signs], [signs, -signs]])
    # Divided in float64 and rounded once: 1/√n is not a float32 for odd powers of two.
    unit: NDArray[np.float32] = (signs / np.sqrt(size)).astype(np.float32)
    return unit


def rotate_blocks(values: Array, size: int) -> NDArray[np.float64]:
    """Each row of `values` [..., columns], every `size` columns of it rotated by themselves."""
    blocks = values.reshape(*values.shape[:-1], -1, size).astype(np.float64)
    # In float64, which the caller rounds once.
    rotated: NDArray[np.float64] = (blocks @ hadamard(size).astype(np.float64)).reshape(values.shape)
    return rotated
