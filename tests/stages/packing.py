"""Checkpoints whose matrices are 4-bit integers, packed by the rules of compressed-tensors, independently of ours."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file


@dataclass(frozen=True)
class Grid:
    """A matrix: integers −8 … 7 [rows, columns] and their scales bfloat16 as float32 [rows, groups]."""

    integers: NDArray[np.int8]
    scale: NDArray[np.float32]

    @property
    def values(self) -> NDArray[np.float32]:
        """The floats that they stand for."""
        group = self.integers.shape[1] // self.scale.shape[1]
        return self.integers * np.repeat(self.scale, group, axis=1)


def config(group: int, **weights: Any) -> dict[str, Any]:
    """The `quantization_config` of such a checkpoint; `group` 0 is a scale for a row."""
    strategy = {"strategy": "group", "group_size": group} if group else {"strategy": "channel", "group_size": None}
    scheme = {"num_bits": 4, "type": "int", "symmetric": True, "dynamic": False, "actorder": None, **strategy}
    table = {"targets": ["Linear"], "weights": {**scheme, **weights}, "input_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": table},
        "ignore": ["lm_head"],
    }


def grid(matrix: torch.Tensor, group: int) -> Grid:
    """The nearest integers, by scales of the largest value in a group over 7.5, in bfloat16."""
    rows, columns = matrix.shape
    blocks = matrix.float().reshape(rows, -1, group or columns)
    scale = (blocks.abs().amax(-1) / 7.5).to(torch.bfloat16).float()
    integers = torch.clamp(torch.round(blocks / scale[..., None]), -8, 7)
    return Grid(integers.to(torch.int8).reshape(rows, columns).numpy(), scale.numpy())


def words(integers: NDArray[np.int8]) -> torch.Tensor:
    """Eight integers in an int32, the first in the lowest four bits, each plus 8."""
    eight = (integers.astype(np.int64) + 8).reshape(len(integers), -1, 8)
    packed = (eight << (4 * np.arange(8))).sum(-1).astype(np.uint32).view(np.int32)
    return torch.from_numpy(packed.copy())


def pack(checkpoint: Path, out: Path, group: int, floats: Path | None = None) -> Mapping[str, Grid]:
    """Write `checkpoint` to `out` with its layers' matrices packed, and to `floats` with their values in float32.

    Args:
        checkpoint: a folder with a model.safetensors.
        out: the folder to write.
        group: neighbours of a row that share a scale; 0: all of them.
        floats: another folder to write, the same model without a packed matrix.

    Returns:
        What each matrix became, by its stored name.
    """
    tensors = load_file(checkpoint / "model.safetensors")
    wide = [name for name, one in tensors.items() if ".layers." in name and one.ndim == 2]
    packed = {name: grid(tensors[name], group) for name in wide if tensors[name].shape[1] % (group or 32) == 0}
    settings = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    for folder in filter(None, (out, floats)):
        shutil.copytree(checkpoint, folder, ignore=shutil.ignore_patterns("*.safetensors", "corpus"))
    kept = {name: one for name, one in tensors.items() if name not in packed}
    stored = dict(kept)
    for name, one in packed.items():
        stem = name.removesuffix("weight")
        stored[f"{stem}weight_packed"] = words(one.integers)
        stored[f"{stem}weight_scale"] = torch.from_numpy(one.scale).to(torch.bfloat16)
        stored[f"{stem}weight_shape"] = torch.tensor(one.integers.shape)
    save_file(stored, out / "model.safetensors", metadata={"format": "pt"})
    (out / "config.json").write_text(json.dumps({**settings, "quantization_config": config(group)}), encoding="utf-8")
    if floats:
        values = {name: torch.from_numpy(one.values) for name, one in packed.items()}
        save_file({**kept, **values}, floats / "model.safetensors", metadata={"format": "pt"})
    return packed
