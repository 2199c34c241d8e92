"""Random Gemma 3n checkpoints of odd geometry, and Hugging Face's answers for them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from transformers import Gemma3nForCausalLM, Gemma3nTextConfig

from pipeline import fp32
from pipeline.convert import weights
from pipeline.convert.checkpoint import open_checkpoint
from pipeline.core.recipe import StepLimits
from pipeline.judge.metrics import compare, join

FULL, SLIDING = "full_attention", "sliding_attention"


@dataclass(frozen=True)
class Agreement:
    """A model against Hugging Face over a grid of shapes: worst row's NMSE and where, share of equal top tokens."""

    cases: int
    nmse: float
    where: str
    top1: float


@st.composite
def geometries(draw: st.DrawFn) -> dict[str, Any]:
    """Arguments of `Gemma3nTextConfig`: small, and odd in every structural feature."""
    layers = draw(st.integers(2, 5))
    shared = draw(st.integers(0, layers - 2))
    kinds = draw(
        st.permutations([FULL, SLIDING, *draw(st.lists(st.sampled_from([FULL, SLIDING]), min_size=3, max_size=3))])
    )
    kinds = kinds[:layers]
    if shared:  # every type that is shared needs an unshared layer of its own
        kinds = [FULL, SLIDING, *kinds[2:]] if draw(st.booleans()) else [SLIDING, FULL, *kinds[2:]]
    kv_heads = draw(st.sampled_from([1, 2, 3]))
    heads = kv_heads * draw(st.sampled_from([1, 2, 3]))
    inputs = draw(st.integers(2, 5))
    vocabulary = draw(st.integers(40, 300))
    return {
        "vocab_size": vocabulary,
        "vocab_size_per_layer_input": vocabulary - draw(st.integers(0, 20)),
        "hidden_size": heads * draw(st.sampled_from([6, 10, 16])),
        "num_hidden_layers": layers,
        "num_kv_shared_layers": shared,
        "layer_types": kinds,
        "intermediate_size": draw(st.lists(st.sampled_from([24, 40, 64]), min_size=layers, max_size=layers)),
        "activation_sparsity_pattern": draw(
            st.lists(st.sampled_from([0.0, 0.5, 0.95]), min_size=layers, max_size=layers)
        ),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": draw(st.sampled_from([8, 12, 32])),
        "hidden_size_per_layer_input": draw(st.sampled_from([4, 8, 24])),
        "laurel_rank": draw(st.sampled_from([3, 8])),
        "altup_num_inputs": inputs,
        "altup_active_idx": draw(st.integers(0, inputs - 1)),
        "altup_correct_scale": draw(st.booleans()),
        "sliding_window": draw(st.sampled_from([2, 5, 16, 600])),
        "final_logit_softcapping": draw(st.sampled_from([5.0, 30.0])),
    }


def reference(geometry: dict[str, Any], seed: int) -> Gemma3nForCausalLM:
    """Hugging Face's model with every parameter, also those that start at a constant, at a random value."""
    torch.manual_seed(seed)
    model = Gemma3nForCausalLM(Gemma3nTextConfig(**geometry, attn_implementation="eager")).eval()
    for parameter in model.parameters():
        parameter.data += torch.randn(parameter.shape) * (0.2 if parameter.dim() == 1 else 0.08)
    return model


def save(model: Gemma3nForCausalLM, folder: Path) -> Path:
    """Write the model as a checkpoint in float32."""
    model.save_pretrained(folder)
    return folder


def logits(model: Gemma3nForCausalLM, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Hugging Face's logits float32 [B, V] at each row's last attended position."""
    tokens, attention = torch.from_numpy(ids).long(), torch.from_numpy(mask).long()
    positions = (attention.cumsum(-1) - 1).clamp(min=0)
    last = ids.shape[1] - 1 - mask[:, ::-1].argmax(axis=1)
    rows = []
    with torch.inference_mode():
        for row in range(len(ids)):  # one at a time: eager attention at 2,048 tokens is large
            one = slice(row, row + 1)
            output = model(
                input_ids=tokens[one],
                attention_mask=attention[one],
                position_ids=positions[one],
                logits_to_keep=torch.tensor([int(last[row])]),
                use_cache=False,
            )
            rows.append(output.logits[0, 0].numpy())
    return np.stack(rows)


def cases(
    vocabulary: int, batches: tuple[int, ...], sequences: tuple[int, ...], seed: int = 0
) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Token ids and masks int32 [B, S] for every batch, sequence and kind of padding."""
    random = np.random.default_rng(seed)
    for batch in batches:
        for sequence in sequences:
            for padding in ("none", "left", "right"):
                ids = random.integers(0, vocabulary, (batch, sequence), dtype=np.int32)
                mask = np.ones_like(ids)
                for row in range(batch):
                    padded = 0 if padding == "none" else int(random.integers(0, sequence))
                    mask[row, slice(padded) if padding == "left" else slice(sequence - padded, None)] = 0
                yield f"b{batch}_s{sequence}_{padding}", ids, mask


def compare_on_grid(
    model: Any, expected: Gemma3nForCausalLM, batches: tuple[int, ...], sequences: tuple[int, ...]
) -> Agreement:
    """Worst NMSE and top-1 agreement of `model.logits` with Hugging Face over a grid of shapes."""
    parts, names = [], []
    for name, ids, mask in cases(expected.config.vocab_size_per_layer_input, batches, sequences):
        parts.append(compare(logits(expected, ids, mask), model.logits(ids, mask)))
        names += [name] * len(ids)
    scores = join(parts)
    worst = int(scores.nmse.argmax())
    return Agreement(
        cases=len(parts), nmse=float(scores.nmse[worst]), where=names[worst], top1=float(scores.top1.mean())
    )


class Eager:
    """A step graph in PyTorch, with the one method of an open file that the judge needs."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.module = module.eval()

    def logits(self, input_ids: np.ndarray, attention_mask: np.ndarray) -> np.ndarray:
        """Logits float32 [B, V] for int32 [B, S]."""
        with torch.inference_mode():
            output: np.ndarray = self.module(torch.from_numpy(input_ids), torch.from_numpy(attention_mask))[
                "logits"
            ].numpy()
        return output


def convert(checkpoint: Path, out: Path) -> Path:
    """The fp32 step graph of a checkpoint folder, made as stage fp32 makes it."""
    opened = open_checkpoint(checkpoint)
    with weights.mapped(opened, fp32.tensor_names(opened), out.with_suffix(".scratch")) as tensors:
        fp32.export_step(opened, tensors, StepLimits(max_batch=8, max_sequence=2048), out)
    return out
