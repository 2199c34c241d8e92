"""Small random models with the shipped tokenizer and template, which say text: what a stage line needs to be judged."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import geometry
import torch

from pipeline.checkpoint import chat
from pipeline.core.recipe import PROJECT
from pipeline.core.stage import DEFAULT_MODEL

VOCABULARY = 2048
"""Tokens of the shipped tokenizer."""


def save(model: Any, folder: Path, **config: object) -> Path:
    """Write one of Hugging Face's models as a checkpoint that speaks; `config` are other keys of its config.json.

    Rows of tokens that are no plain text are made short, so that what a random model says is text.
    """
    shipped = PROJECT / DEFAULT_MODEL
    tokenizer = chat.open_tokenizer(shipped)
    texts = [tokenizer.decode([token]) for token in range(VOCABULARY)]
    spoken = torch.tensor([text.isascii() and text.isprintable() and "<" not in text for text in texts])
    model.get_input_embeddings().weight.data[~spoken] *= 0.05
    if not model.config.tie_word_embeddings:
        model.get_output_embeddings().weight.data[~spoken] *= 0.05
    geometry.save(model, folder)
    for file in (*shipped.glob("tokenizer*"), *shipped.glob("chat_template*"), shipped / "generation_config.json"):
        shutil.copy(file, folder)
    said = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    said |= {"bos_token_id": 2, "eos_token_id": [1, 6], "pad_token_id": 0, **config}
    (folder / "config.json").write_text(json.dumps(said), encoding="utf-8")
    return folder
