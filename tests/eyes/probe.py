"""A bundle that reads back what LiteRT-LM hands to the decoder: soft tokens and per-layer inputs, in numbers.

The runtime gives text alone. This decoder keeps the vectors that it is given in the KV cache, and answers with numbers
out of it, four letters each: a value's 20 bits in base 32. Which value an answer's position spells goes by the position
alone, so that one bundle serves prompts of any length.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pipeline.bundling import litertlm
from pipeline.bundling.metadata import of_checkpoint, tokenizer_json

LENGTH, WIDTH, PREFILL = 2048, 128, 128
SPAN, DIGITS, BASE = 16.0, 4, 32
"""Values in −8 … 8, in steps of 1.5e-5: a normalised mean square error of 2e-11 where they have unit variance."""
_STEPS = float(BASE**DIGITS)
_NEAR = (4.0, 32.0, 257.0)
"""Rows from the first soft token on among which a value is taken, in turns: short sounds have a few alone."""


def place(value: int) -> tuple[int, int]:
    """Row, from the first soft token on, and column of the value that is spelt `value`-th from position 0 on."""
    turn, near = divmod(value, 3)
    return int(turn % _NEAR[near]), int(value * 29 % WIDTH)


class Probe(nn.Module):
    """The decoder; `keeps` is which of its inputs it keeps, `letters` are the tokens of the 32 digits."""

    def __init__(self, start: int, letters: Sequence[int], vocabulary: int, keeps: str, *, spells: bool) -> None:
        super().__init__()
        tokens = torch.zeros(BASE, vocabulary)
        tokens[torch.arange(BASE), torch.tensor(letters)] = 20.0
        self.register_buffer("tokens", tokens)
        self.start, self.keeps, self.spells = start, keeps, spells

    def forward(
        self,
        embeddings: Tensor,
        input_pos: Tensor,
        mask: Tensor,
        kv_cache_k_0: Tensor,
        kv_cache_v_0: Tensor,
        per_layer_embeddings: Tensor | None = None,
    ) -> dict[str, Tensor]:
        rows, position = torch.arange(LENGTH, dtype=torch.float32), input_pos.to(torch.float32)
        hit = (rows[:, None] == position[None, :]).to(torch.float32)
        given = embeddings[0]
        if per_layer_embeddings is not None:
            given = given * 0.0 + per_layer_embeddings[0].reshape(-1, WIDTH)
        kept = kv_cache_k_0 * (1.0 - torch.clamp(hit.sum(1), max=1.0)[:, None]) + torch.matmul(hit, given)[None, None]
        made = {"kv_cache_k_0": kept, "kv_cache_v_0": kv_cache_v_0 + 0.0 * mask.sum()}
        if self.spells:
            made["logits"] = self._spelt(kept[0, 0], position[0])[None]
        return made

    def _spelt(self, kept: Tensor, position: Tensor) -> Tensor:
        value, turn = torch.floor(position / DIGITS), torch.floor(position / (3 * DIGITS))
        near, digit = value - 3.0 * turn, position - DIGITS * value
        first, second, third = (turn - size * torch.floor(turn / size) for size in _NEAR)
        row = torch.where(near < 0.5, first, torch.where(near < 1.5, second, third)) + self.start
        column = 29.0 * value - WIDTH * torch.floor(29.0 * value / WIDTH)
        line = torch.matmul((torch.arange(LENGTH, dtype=torch.float32) == row).to(torch.float32)[None], kept)
        held = (line * (torch.arange(WIDTH, dtype=torch.float32) == column).to(torch.float32)[None]).sum()
        whole = torch.clamp(torch.round((held + SPAN / 2) / SPAN * _STEPS), 0.0, _STEPS - 1)
        unit = torch.where(digit < 0.5, 32768.0, torch.where(digit < 1.5, 1024.0, torch.where(digit < 2.5, 32.0, 1.0)))
        number = torch.floor(whole / unit) - BASE * torch.floor(whole / (unit * BASE))
        one = (torch.arange(BASE, dtype=torch.float32) == number).to(torch.float32)[None]
        return torch.matmul(one, self.tokens)


def letters(tokenizer: object) -> dict[str, int]:
    """Thirty-two letters that are tokens of their own."""
    vocabulary = tokenizer.get_vocab()  # type: ignore[attr-defined]
    return dict([(k, i) for k, i in sorted(vocabulary.items()) if len(k) == 1 and k.isascii() and k.isalnum()][:BASE])


def write(root: Path, start: int, keeps: str, out: Path) -> dict[str, int]:
    """Write the bundle `out` of a finished line in `root`, whose soft tokens begin at `start`; its letters."""
    import litert_torch

    described = of_checkpoint(root / "fetch" / "checkpoint", LENGTH, "vision,audio")
    spelt = letters(described.tokenizer)

    def signature(converter: object, name: str, tokens: int) -> object:
        inputs = {
            "embeddings": torch.zeros(1, tokens, WIDTH),
            "input_pos": torch.arange(tokens, dtype=torch.int32),
            "mask": torch.zeros(1, 1, tokens, LENGTH),
            "kv_cache_k_0": torch.zeros(1, 1, LENGTH, WIDTH),
            "kv_cache_v_0": torch.zeros(1, 1, WIDTH, LENGTH),
        }
        if keeps == "per layer":
            inputs["per_layer_embeddings"] = torch.zeros(1, tokens, 8, 16)
        module = Probe(start, list(spelt.values()), described.vocabulary, keeps, spells=tokens == 1).eval()
        return converter.signature(name, module, sample_kwargs=inputs)  # type: ignore[attr-defined]

    converter = signature(signature(litert_torch, "decode", 1), f"prefill_{PREFILL}", PREFILL)
    decoder = out.with_suffix(".tflite")
    converter.convert(lightweight_conversion=True).export(str(decoder))  # type: ignore[attr-defined]
    tables = ("embedder", "per_layer_embedder") if keeps == "per layer" else ("embedder",)
    towers = {file.stem: file for file in sorted((root / "towers" / "fp32").glob("*.tflite"))}
    models = {"decoder": decoder, **{name: root / "fp32" / f"{name}.tflite" for name in tables}, **towers}
    metadata = dataclasses.replace(described.metadata, sections=tuple(models))
    litertlm.write(metadata, tokenizer_json(described.tokenizer, described.vocabulary), models, out)
    return spelt


def read(text: str, spelt: Sequence[str], position: int) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """What an answer says whose first letter stands behind `position`: places [n, 2] and values [n]."""
    digits = [spelt.index(letter) for letter in text]
    skipped = -position % DIGITS
    whole = digits[skipped : len(digits) - (len(digits) - skipped) % DIGITS]
    numbers = np.array(whole).reshape(-1, DIGITS) @ BASE ** np.arange(DIGITS)[::-1]
    first = (position + skipped) // DIGITS
    return np.array([place(first + i) for i in range(len(numbers))]), numbers / _STEPS * SPAN - SPAN / 2
