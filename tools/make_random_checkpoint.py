"""Make a checkpoint of true Gemma 3, Gemma 3n or Gemma 4 geometry with random weights, to measure memory and time.

    python -m tools.make_random_checkpoint e2b FOLDER [--seed N]

bf16 safetensors in shards of at most 5 GB, as the Hub has them; drawn and written a block of rows at a time. Tokenizer
and chat template are the shipped model's. The same seed gives the same bytes.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.core import log
from pipeline.core.recipe import PROJECT
from pipeline.models import architecture_for

SHARD_BYTES = 5_000_000_000
_BLOCK = 1 << 24
"""Values drawn at a time (64 MiB in float32)."""


def _layers(count: int, width: int, shared: int) -> dict[str, Any]:
    """What differs between the sizes: layers in groups of four sliding and one full, the first ten sparse."""
    return {
        "num_hidden_layers": count,
        "intermediate_size": [width] * count,
        "num_kv_shared_layers": shared,
        "layer_types": [("sliding_attention", "full_attention")[(i + 1) % 5 == 0] for i in range(count)],
        "activation_sparsity_pattern": [0.95 if i < 10 else 0.0 for i in range(count)],
    }


COMMON = {
    "model_type": "gemma3n_text",
    "architectures": ["Gemma3nForCausalLM"],
    "vocab_size": 262_400,
    "vocab_size_per_layer_input": 262_144,
    "hidden_size": 2048,
    "hidden_size_per_layer_input": 256,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 256,
    "laurel_rank": 64,
    "sliding_window": 512,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
GEMMA4 = {
    "model_type": "gemma4_text",
    "architectures": ["Gemma4ForCausalLM"],
    "vocab_size": 262_144,
    "vocab_size_per_layer_input": 262_144,
    "hidden_size_per_layer_input": 256,
    "num_attention_heads": 8,
    "head_dim": 256,
    "global_head_dim": 512,
    "sliding_window": 512,
    "final_logit_softcapping": 30.0,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
GEMMA3_1B = {
    "model_type": "gemma3_text",
    "architectures": ["Gemma3ForCausalLM"],
    "vocab_size": 262_144,
    "hidden_size": 1152,
    "intermediate_size": 6912,
    "num_hidden_layers": 26,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "sliding_window": 512,
    "layer_types": [("sliding_attention", "full_attention")[(i + 1) % 6 == 0] for i in range(26)],
    "bos_token_id": 2,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
GEOMETRIES: dict[str, dict[str, Any]] = {
    # vocabulary cut, so that a size between the shipped model and the real ones has layers and tables in proportion
    "0.3b": COMMON | _layers(5, 4096, 0) | {"vocab_size": 32_768, "vocab_size_per_layer_input": 32_768},
    "gemma3-1b": GEMMA3_1B,
    "e2b": COMMON | _layers(30, 8192, 10),
    "e4b": COMMON | _layers(35, 16_384, 15),
    "e4b-10": COMMON | _layers(10, 16_384, 5),
    "gemma4-e2b": GEMMA4
    | {
        "hidden_size": 1536,
        "intermediate_size": 6144,
        "num_hidden_layers": 35,
        "num_key_value_heads": 1,
        "num_kv_shared_layers": 20,
        "use_double_wide_mlp": True,
        "layer_types": [("sliding_attention", "full_attention")[(i + 1) % 5 == 0] for i in range(35)],
    },
    "gemma4-e4b": GEMMA4
    | {
        "hidden_size": 2560,
        "intermediate_size": 10_240,
        "num_hidden_layers": 42,
        "num_key_value_heads": 2,
        "num_kv_shared_layers": 18,
        "layer_types": [("sliding_attention", "full_attention")[(i + 1) % 6 == 0] for i in range(42)],
    },
}
"""Gemma 3 1B, Gemma 3n and Gemma 4, E2B and E4B, as their config.json gives them (Google), and a smaller Gemma 3n."""

CARD = """---
license: cc0-1.0
tags: [trained-from-scratch]
---
Random weights of true geometry: they say nothing, and serve to measure memory and time.
"""


def make(config: Mapping[str, Any], folder: Path, seed: int = 0) -> Path:
    """Write the checkpoint; returns `folder`."""
    shapes = {f"model.{name}": shape for name, shape in architecture_for(config).tensors().items()}
    shards = _split(shapes)
    folder.mkdir(parents=True)
    total = 2 * sum(map(math.prod, shapes.values()))
    weight_map = dict[str, str]()
    with log.progress("random weights", total) as bar:
        for place, names in enumerate(shards, start=1):
            file = f"model-{place:05d}-of-{len(shards):05d}.safetensors"
            _write_shard(folder / file, {name: shapes[name] for name in names}, seed, bar)
            weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1), encoding="utf-8")
    (folder / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 6]}), encoding="utf-8")
    (folder / "README.md").write_text(CARD, encoding="utf-8")
    for name in ("tokenizer*", "chat_template*"):
        for shipped in (PROJECT / "examples" / "tiny-gemma3n").glob(name):
            shutil.copy(shipped, folder)
    return folder


def _split(shapes: Mapping[str, tuple[int, ...]]) -> list[list[str]]:
    """Tensor names by shard: filled in order, a shard has at least one tensor."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, shape in shapes.items():
        bytes_ = 2 * math.prod(shape)
        if shards[-1] and size + bytes_ > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += bytes_
    return shards


def _write_shard(file: Path, shapes: Mapping[str, tuple[int, ...]], seed: int, bar: log.Progress) -> None:
    header, start = {}, 0
    for name, shape in shapes.items():
        end = start + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for name, shape in shapes.items():
            for block in _values(name, shape, seed):
                stream.write(block.data)
                bar.advance(block.nbytes)


def _values(name: str, shape: tuple[int, ...], seed: int) -> Iterator[NDArray[np.uint16]]:
    """bf16 bit patterns: norms around 1, matrices at a scale that keeps activations at theirs."""
    random = np.random.default_rng([seed, *name.encode()])
    left = math.prod(shape)
    while left:
        drawn = random.standard_normal(min(left, _BLOCK), dtype=np.float32)
        values = 1 + 0.1 * drawn if len(shape) == 1 else drawn / math.sqrt(shape[-1])
        yield (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
        left -= len(drawn)


def main() -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("geometry", choices=sorted(GEOMETRIES))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.folder.exists():
        parser.error(f"{arguments.folder} exists")
    make(GEOMETRIES[arguments.geometry], arguments.folder, arguments.seed)
    return 0


if __name__ == "__main__":
    sys.exit(main())
