"""Hadamard matrices, and rows rotated by them block by block."""

from __future__ import annotations

import numpy as np
from numpy.typing import DTypeLike, NDArray

from pipeline.tflite.lazy import Array

_TOGETHER = 1 << 16
"""Values that are rotated together: in float64 they stay in a core's cache, which takes a ninth of the time."""


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


def rotate_blocks(values: Array, size: int, dtype: DTypeLike = np.float64) -> Array:
    """Each row of `values` [..., columns], every `size` columns of it rotated by themselves, as `dtype`."""
    rotated, basis = np.empty(values.shape, dtype), hadamard(size).astype(np.float64)
    blocks, results = values.reshape(-1, size), rotated.reshape(-1, size)
    step = max(1, _TOGETHER // size)
    for start in range(0, len(blocks), step):
        # In float64, and rounded once.
        results[start : start + step] = blocks[start : start + step].astype(np.float64) @ basis
    return rotated


def rotate_both(values: Array, size: int) -> NDArray[np.float64]:
    """Bᵀ V B of a matrix V [n, n], B being of blocks of `size`: its rows rotated, and its columns."""
    turned, basis = rotate_blocks(values, size), hadamard(size).astype(np.float64)
    both: NDArray[np.float64] = (basis @ turned.reshape(-1, size, len(values))).reshape(values.shape)
    return both
