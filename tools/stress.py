"""Put what quantisation finds hard into a checkpoint, without changing what it computes: a stress model for quality.

    python -m tools.stress CHECKPOINT FOLDER --variant outliers

In float32 the logits stay what they were (tests/stages/test_stress.py: NMSE ≤ 1e-8), so whatever a quantised file of
the result loses, it loses by quantisation. Of every layer, as far as it has them:

- channels of a norm are multiplied, and the columns of all matrices that read it divided;
- rows of up_proj are multiplied, and the columns of down_proj divided, since gate and up meet in a product;
- rows of v_proj are multiplied, and the columns of o_proj divided, where no norm of the values stands between;
- heads of v_proj are turned by a drawn orthogonal matrix, and o_proj turned back: attention mixes positions, not
  channels, and a norm of values without weights sees lengths alone.

Matrices and norms that change are written in float32, whole and in memory; all else stays as it is stored. The same
variant of the same checkpoint has the same bytes.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file

from pipeline.checkpoint import reader
from pipeline.checkpoint.reader import Checkpoint, open_checkpoint
from pipeline.core import log
from pipeline.models import architecture_of
from pipeline.models.build import tensor_names

Change = Callable[[NDArray[np.float64]], NDArray[np.float64]]
"""What happens to a tensor, in float64."""


@dataclass(frozen=True, kw_only=True)
class Variant:
    """What is drawn: of every layer anew, by `seed`.

    `norms`, `up` and `values` are the factors of as many channels of each norm, row of up_proj, row of v_proj. `spread`
    is the standard deviation, in octaves, of the factors that all channels of norms and up_proj get besides. `turned`:
    heads of values are.
    """

    norms: tuple[float, ...] = ()
    up: tuple[float, ...] = ()
    values: tuple[float, ...] = ()
    spread: float = 0.0
    turned: bool = False
    seed: int = 0


_THREE = (32.0, 64.0, 128.0)
VARIANTS: Mapping[str, Variant] = {
    "outliers": Variant(norms=_THREE, up=(64.0,) * 4),
    "outliers-2": Variant(norms=_THREE, up=(64.0,) * 4, seed=1),
    "outliers-3": Variant(norms=(16.0,) * 8, up=(32.0,) * 8, values=(16.0, 32.0), seed=2),
    "norms": Variant(norms=_THREE, seed=3),
    "norm": Variant(norms=(256.0,), seed=4),
    "up": Variant(up=(64.0,) * 4, seed=5),
    "up-many": Variant(up=(16.0,) * 16, seed=6),
    "values": Variant(values=(32.0, 64.0), turned=True, seed=7),
    "turned": Variant(turned=True, seed=8),
    "spread": Variant(spread=1.0, seed=9),
    "spread-wide": Variant(spread=2.0, seed=10),
    "all": Variant(norms=_THREE, up=(64.0,) * 4, values=(32.0,), spread=1.0, turned=True, seed=11),
}
"""Twelve, from the channels that real Gemma 3 shows to all at once."""
_READERS = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "pre_feedforward_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
}
_PLAIN = {**_READERS, "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj")}
"""Norms, and the matrices that read them; where a layer has no norm before its MLP alone, the one after attention.

Gemma 3n's Laurel adds what it reads to what it gives, so that there the norm before attention can't be changed.
"""


def changes(checkpoint: Checkpoint, variant: Variant) -> dict[str, list[Change]]:
    """What happens to which tensors, by canonical name, in this order."""
    architecture = architecture_of(checkpoint)
    config: Any = architecture.text  # of whichever family: its numbers go by the same names
    with torch.device("meta"):
        modules = dict(architecture.step().model.named_modules())
    held = tensor_names(checkpoint)
    found: dict[str, list[Change]] = {}
    for layer in range(config.num_hidden_layers):
        random = np.random.default_rng([variant.seed, layer])
        prefix = f"layers.{layer}."
        norms = _READERS if f"{prefix}pre_feedforward_layernorm" in modules else _PLAIN
        free = {norm: matrices for norm, matrices in norms.items() if f"{prefix}{norm}" in modules}
        if f"{prefix}laurel" in modules:
            del free["input_layernorm"]
        for norm, matrices in free.items():
            factors = _factors(random, len(modules[f"{prefix}{norm}"].weight), variant.norms, variant.spread)
            _add(found, f"{prefix}{norm}.weight", _scaled_norm(factors, modules[f"{prefix}{norm}"].offset))
            for name in (f"{prefix}{matrix}.weight" for matrix in matrices):
                if name in held:
                    _add(found, name, _columns(1 / factors))
        factors = _factors(random, modules[f"{prefix}mlp.up_proj"].out_features, variant.up, variant.spread)
        _move(found, held, f"{prefix}mlp.up_proj", [f"{prefix}mlp.down_proj"], factors)
        if f"{prefix}self_attn.v_proj.weight" in held:
            _change_values(found, held, layer, config, modules, variant, random)
    return found


def _change_values(
    found: dict[str, list[Change]],
    held: Mapping[str, str],
    layer: int,
    config: Any,
    modules: Mapping[str, Any],
    variant: Variant,
    random: np.random.Generator,
) -> None:
    """Scale and turn the values of a layer, and take it back in every layer that attends to them."""
    heads, size = config.kv_shape(config.layer_types[layer])
    attending = [i for i in range(config.num_hidden_layers) if config.kv_source(i) == layer]
    groups = config.num_attention_heads // heads
    own, others = f"layers.{layer}.self_attn.v_proj", [f"layers.{i}.self_attn.o_proj" for i in attending]
    if f"layers.{layer}.self_attn.v_norm" not in modules:
        _move(found, held, own, others, _factors(random, heads * size, variant.values, 0.0), (heads, groups, size))
    if variant.turned:
        turns = [np.linalg.qr(random.standard_normal((size, size)))[0] for _ in range(heads)]
        for name in _with_bias(held, own):
            _add(found, name, _turned_rows(turns))
        for name in others:
            _add(found, f"{name}.weight", _turned_columns([turn for turn in turns for _ in range(groups)]))


def _move(
    found: dict[str, list[Change]],
    held: Mapping[str, str],
    matrix: str,
    readers: list[str],
    factors: NDArray[np.float64],
    heads: tuple[int, int, int] | None = None,
) -> None:
    """Multiply rows of `matrix` and divide columns of its `readers`, of which `heads` (K, G, D) repeat each head."""
    for name in _with_bias(held, matrix):
        _add(found, name, _rows(factors))
    if heads:
        kept, groups, size = heads
        factors = factors.reshape(kept, 1, size).repeat(groups, axis=1).reshape(-1)
    for name in readers:
        _add(found, f"{name}.weight", _columns(1 / factors))


def _with_bias(held: Mapping[str, str], matrix: str) -> list[str]:
    return [name for name in (f"{matrix}.weight", f"{matrix}.bias") if name in held]


def _add(found: dict[str, list[Change]], name: str, change: Change) -> None:
    found.setdefault(name, []).append(change)


def _factors(random: np.random.Generator, width: int, few: tuple[float, ...], spread: float) -> NDArray[np.float64]:
    """Of each channel: 2^(spread · a normal number), and `few` times that in as many places."""
    factors = np.exp2(spread * random.standard_normal(width))
    factors[random.permutation(width)[: len(few)]] *= few[:width]
    return factors


def _scaled_norm(factors: NDArray[np.float64], offset: float) -> Change:
    return lambda weight: (weight + offset) * factors - offset


def _columns(factors: NDArray[np.float64]) -> Change:
    return lambda matrix: matrix * factors


def _rows(factors: NDArray[np.float64]) -> Change:
    return lambda values: (values.T * factors).T


def _turned_rows(turns: list[NDArray[np.float64]]) -> Change:
    """R v of each head, [heads · D, …]."""
    return lambda values: np.concatenate(
        [turn @ part for turn, part in zip(turns, np.split(values, len(turns)), strict=True)]
    )


def _turned_columns(turns: list[NDArray[np.float64]]) -> Change:
    """O Rᵀ of each head, [outputs, heads · D]."""
    return lambda matrix: np.concatenate(
        [part @ turn.T for turn, part in zip(turns, np.split(matrix, len(turns), axis=1), strict=True)], axis=1
    )


def tensors(checkpoint: Checkpoint, variant: Variant) -> Iterator[tuple[str, torch.Tensor]]:
    """The stressed checkpoint's tensors by stored name: changed ones in float32."""
    stored = {tensor_names(checkpoint)[name]: own for name, own in changes(checkpoint, variant).items()}
    for name in checkpoint.tensors:
        if name in stored:
            values = checkpoint.read(name).astype(np.float64)
            for change in stored[name]:
                values = change(values)
            yield name, torch.from_numpy(np.ascontiguousarray(values, np.float32))
        else:
            kept = torch.from_numpy(np.array(checkpoint.stored(name)))
            yield name, kept.view(torch.bfloat16) if checkpoint.tensors[name].dtype == "BF16" else kept


def write(source: Path, folder: Path, variant: Variant) -> Path:
    """Write the stressed checkpoint; returns `folder`."""
    checkpoint = open_checkpoint(source)
    folder.mkdir(parents=True)
    for file in source.iterdir():
        if file.is_file() and file.suffix != ".safetensors" and file.name != reader.INDEX:
            shutil.copy(file, folder)
    save_file(dict(tensors(checkpoint, variant)), folder / reader.SINGLE, {"format": "pt"})
    return folder


def main() -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--variant", choices=VARIANTS, default="outliers")
    arguments = parser.parse_args()
    if arguments.folder.exists():
        parser.error(f"{arguments.folder} exists")
    write(arguments.checkpoint, arguments.folder, VARIANTS[arguments.variant])
    log.line(json.dumps({"variant": arguments.variant, "folder": str(arguments.folder)}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
