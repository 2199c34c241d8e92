"""Random checkpoints of odd geometry, and Hugging Face's answers for them: whole prompts, and through a cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from transformers import (
    Gemma3ForCausalLM,
    Gemma3nForCausalLM,
    Gemma4ForCausalLM,
    Gemma4UnifiedForCausalLM,
    LlamaForCausalLM,
    Qwen2ForCausalLM,
    Qwen3ForCausalLM,
)

from pipeline.bundling import tables
from pipeline.checkpoint.reader import Checkpoint, open_checkpoint
from pipeline.core import log
from pipeline.core.recipe import DECODER, Bundle, StepLimits
from pipeline.judge import kv_cache
from pipeline.judge.kv_cache import Logits, Trace
from pipeline.judge.metrics import compare, join
from pipeline.models import Architecture, architecture_for, build
from pipeline.runtime.sections import Sections

FULL, SLIDING = "full_attention", "sliding_attention"
Model = Gemma3nForCausalLM | Gemma3ForCausalLM
PLAIN = {"llama": LlamaForCausalLM, "qwen2": Qwen2ForCausalLM, "qwen3": Qwen3ForCausalLM}
BUNDLE = Bundle(cache_length=160, prefill=(8,), precisions=("fp32",), decode=40, prompts=1, continuation=1)
"""One prefill and a short cache: a decoder that converts quickly, and conversations that cross windows up to 32."""


@dataclass(frozen=True)
class Agreement:
    """A model against Hugging Face over a grid of shapes: worst row's NMSE and where, share of equal top tokens."""

    cases: int
    nmse: float
    where: str
    top1: float


@st.composite
def geometries(draw: st.DrawFn, most_layers: int = 5, windows: tuple[int, ...] = (2, 5, 16, 600)) -> dict[str, Any]:
    """Arguments of `Gemma3nTextConfig`: small, and odd in every structural feature."""
    layers = draw(st.integers(2, most_layers))
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
        "sliding_window": draw(st.sampled_from(windows)),
        "final_logit_softcapping": draw(st.sampled_from([5.0, 30.0])),
    }


@st.composite
def gemma3_geometries(
    draw: st.DrawFn,
    most_layers: int = 4,
    windows: tuple[int, ...] = (2, 5, 16, 600),
    factors: tuple[float, ...] = (1.0, 2.0, 8.0),
) -> dict[str, Any]:
    """Arguments of `Gemma3TextConfig`, as `geometries`; `factors` of linear rope scaling."""
    layers = draw(st.integers(2, most_layers))
    kinds = draw(st.permutations([FULL, SLIDING])) + draw(
        st.lists(st.sampled_from([FULL, SLIDING]), min_size=layers - 2, max_size=layers - 2)
    )
    kv_heads, size = draw(st.sampled_from([1, 2, 3])), draw(st.sampled_from([8, 12, 32]))
    heads = kv_heads * draw(st.sampled_from([1, 2, 3]))
    factor = draw(st.sampled_from(factors))
    scaling = {"rope_type": "linear", "factor": factor} if factor > 1 else {"rope_type": "default"}
    return {
        "vocab_size": draw(st.integers(40, 300)),
        "hidden_size": heads * draw(st.sampled_from([6, 10, 16])),
        "intermediate_size": draw(st.sampled_from([24, 40, 64])),
        "num_hidden_layers": layers,
        "layer_types": kinds,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": size,
        "query_pre_attn_scalar": draw(st.sampled_from([size, 24])),
        "attention_bias": draw(st.booleans()),
        "sliding_window": draw(st.sampled_from(windows)),
        "final_logit_softcapping": draw(st.sampled_from([None, 5.0, 30.0])),
        "rope_parameters": {
            FULL: {"rope_theta": draw(st.sampled_from([1e6, 3e4])), **scaling},
            SLIDING: {"rope_theta": draw(st.sampled_from([1e4, 1e3])), "rope_type": "default"},
        },
    }


@st.composite
def gemma4_geometries(
    draw: st.DrawFn, most_layers: int = 5, windows: tuple[int, ...] = (2, 5, 16, 600)
) -> dict[str, Any]:
    """Arguments of `Gemma4TextConfig`, or of `Gemma4UnifiedTextConfig` with `model_type`, as `geometries`."""
    unified, equal = draw(st.booleans()), draw(st.booleans())
    layers = draw(st.integers(3, most_layers))
    own_size = draw(st.sampled_from([0, 4, 24]))
    shared = 0 if unified or not own_size else draw(st.integers(0, layers - 2))
    unshared = draw(st.permutations([FULL, SLIDING]))
    kinds = [*unshared, *draw(st.lists(st.sampled_from([FULL, SLIDING]), min_size=layers - 3, max_size=layers - 3))]
    heads = draw(st.sampled_from([6, 12]))
    vocabulary = draw(st.integers(40, 300))
    own = {"vocab_size_per_layer_input": vocabulary, "hidden_size_per_layer_input": own_size}
    return ({"model_type": "gemma4_unified_text"} if unified else own) | {
        "vocab_size": vocabulary,
        "hidden_size": heads * draw(st.sampled_from([6, 10])),
        "intermediate_size": draw(st.sampled_from([24, 40])),
        "num_hidden_layers": layers,
        "num_kv_shared_layers": shared,
        "layer_types": [*kinds, FULL],
        "use_double_wide_mlp": draw(st.booleans()),
        "num_attention_heads": heads,
        "num_key_value_heads": draw(st.sampled_from([1, 2, 3])),
        "attention_k_eq_v": equal,
        "num_global_key_value_heads": draw(st.sampled_from([None, 1, 2])) if equal else None,
        "head_dim": draw(st.sampled_from([8, 12])),
        "global_head_dim": draw(st.sampled_from([16, 32])),
        "attention_bias": draw(st.booleans()),
        "sliding_window": draw(st.sampled_from(windows)),
        "final_logit_softcapping": draw(st.sampled_from([None, 5.0, 30.0])),
    }


def gemma4_reference(geometry: dict[str, Any], seed: int) -> Any:
    """As `reference`, of the class that `model_type` names, if it is given."""
    unified = "model_type" in geometry
    drawn = {name: value for name, value in geometry.items() if name != "model_type"}
    return reference(drawn, seed, Gemma4UnifiedForCausalLM if unified else Gemma4ForCausalLM)


SCALINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": 4.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 64},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
}
"""Kinds of rotary scaling of `plain_geometries`; each changes angles within the sequences that tests read."""


@st.composite
def plain_geometries(draw: st.DrawFn, kinds: tuple[str, ...] = ("llama", "qwen2", "qwen3")) -> dict[str, Any]:
    """Arguments of `LlamaConfig`, `Qwen2Config` or `Qwen3Config`, as `geometries`; `model_type` says whose."""
    kv_heads, size = draw(st.sampled_from([1, 2, 3])), draw(st.sampled_from([8, 12, 32]))
    heads, kind = kv_heads * draw(st.sampled_from([1, 2, 3])), draw(st.sampled_from(kinds))
    scaling = draw(st.sampled_from([*SCALINGS]))
    own = {"attention_bias": draw(st.booleans())} if kind != "qwen2" else {}
    own |= {"mlp_bias": draw(st.booleans())} if kind == "llama" else {}
    return own | {
        "model_type": kind,
        "vocab_size": draw(st.integers(40, 300)),
        "hidden_size": heads * (draw(st.sampled_from([6, 10, 16])) if kind == "qwen3" else size),
        "intermediate_size": draw(st.sampled_from([24, 40, 64])),
        "num_hidden_layers": draw(st.integers(1, 4)),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": size,
        "rms_norm_eps": draw(st.sampled_from([1e-6, 1e-5])),
        "tie_word_embeddings": True,
        "rope_parameters": {
            "rope_type": scaling,
            "rope_theta": draw(st.sampled_from([1e4, 1e6, 5e5])),
            **SCALINGS[scaling],
        },
    }


def plain_reference(geometry: dict[str, Any], seed: int) -> Any:
    """As `reference`, of the class that `model_type` names."""
    return reference(
        {name: value for name, value in geometry.items() if name != "model_type"}, seed, PLAIN[geometry["model_type"]]
    )


def reference(geometry: dict[str, Any], seed: int, kind: Any = Gemma3nForCausalLM) -> Any:
    """Hugging Face's model with everything that it stores, also what starts at a constant, at a random value."""
    torch.manual_seed(seed)
    model = kind(kind.config_class(**geometry, attn_implementation="eager")).eval()
    for tensor in (*model.parameters(), *stored_buffers(model)):
        tensor.data += torch.randn(tensor.shape) * (0.2 if tensor.dim() == 1 else 0.08)
    return model


def stored_buffers(model: Any) -> list[torch.Tensor]:
    """Buffers that a checkpoint holds; those that start at 1 would hide their loss."""
    held = model.state_dict(keep_vars=True)
    return [buffer for name, buffer in model.named_buffers() if name in held]


def save(model: Model, folder: Path) -> Path:
    """Write the model as a checkpoint in float32."""
    model.save_pretrained(folder)
    return folder


def logits(model: Model, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
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


def known_tokens(model: Model) -> int:
    """How many tokens Hugging Face's text model takes: those of the shorter table."""
    return int(getattr(model.config, "vocab_size_per_layer_input", model.config.vocab_size))


def compare_on_grid(model: Any, expected: Model, batches: tuple[int, ...], sequences: tuple[int, ...]) -> Agreement:
    """Worst NMSE and top-1 agreement of `model.logits` with Hugging Face over a grid of shapes."""
    parts, names = [], []
    for name, ids, mask in cases(known_tokens(expected), batches, sequences):
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
    """The fp32 step graph of a checkpoint folder, made as stages graph and fp32 make it."""
    opened, bare = open_checkpoint(checkpoint), out.with_name(f"bare-{out.name}")
    build.export_step(opened, StepLimits(max_batch=8, max_sequence=2048), bare)
    return fill(opened, bare, out)


def fill(checkpoint: Checkpoint, bare: Path, out: Path) -> Path:
    """An exported graph with the checkpoint's weights, made as stage fp32 makes it."""
    graph = build.with_weights(checkpoint, bare)
    graph.prune()
    graph.write(out)
    return out


def convert_decoder(checkpoint: Path, bundle: Bundle, folder: Path) -> Path:
    """The fp32 sections of a checkpoint folder in `folder`, made as stages graph and fp32 make them."""
    opened, bare = open_checkpoint(checkpoint), folder / "bare-decoder.tflite"
    build.export_decoder(opened, bundle, bare)
    fill(opened, bare, folder / DECODER)
    tables.write_tables(opened, bundle, "fp32", folder)
    return folder


def compare_conversations(play: Callable[[Trace], Logits], expected: Model, bundle: Bundle, seed: int) -> Agreement:
    """Hugging Face without a cache against `play`: two random conversations, as `cache.schedules` has them."""
    schedules = kv_cache.schedules(bundle, getattr(expected.config, "sliding_window", None) or 0)
    tokens = np.random.default_rng(seed).integers(0, known_tokens(expected), (2, schedules[0].length), dtype=np.int32)
    with torch.inference_mode():
        right = expected(input_ids=torch.from_numpy(tokens).long(), use_cache=False).logits.numpy()
    order = (0, 1, 0)
    judged = [(row, int(position)) for row in order for position in schedules[row].judged]
    nothing = np.empty((2, 0, 0), np.float32)
    logits = play(Trace(schedules=schedules, tokens=tokens, hidden=nothing, cached=nothing))
    scores = compare(np.stack([right[row, position] for row, position in judged]), logits)
    worst = int(scores.nmse.argmax())
    row, position = judged[worst]
    return Agreement(
        cases=len(judged),
        nmse=float(scores.nmse[worst]),
        where=f"conversation {row}, position {position}",
        top1=float(scores.top1.mean()),
    )


def in_file(folder: Path, *, xnnpack: bool = True) -> Callable[[Trace], Logits]:
    """How the sections in `folder` are played."""
    return _played(Sections(folder, xnnpack=xnnpack))


def in_pytorch(config: dict[str, Any], state: Mapping[str, torch.Tensor], bundle: Bundle) -> Callable[[Trace], Logits]:
    """How the decoder modules in PyTorch are played, with weights by canonical name.

    In one thread: for operators as small as these, waiting for another one takes longer than the work.
    """
    played = _played(EagerSections(architecture_for(config), state, bundle))

    def play(trace: Trace) -> Logits:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return played(trace)
        finally:
            torch.set_num_threads(threads)

    return play


def _played(sections: Sections) -> Callable[[Trace], Logits]:
    return lambda trace: kv_cache.replay(sections, trace, log.unshown())


class EagerSections(Sections):
    """A decoder in PyTorch in place of an open file; what is fed to it is up to `Sections`."""

    def __init__(self, architecture: Architecture, state: Mapping[str, torch.Tensor], bundle: Bundle) -> None:
        lengths = {f"prefill_{length}": length for length in bundle.prefill} | {"decode": 1}
        self.signatures = dict.fromkeys(lengths)
        self._mapped, self._runners, self._shapes, self._whole = None, {}, {}, False
        for name, length in lengths.items():
            module = architecture.decoder(logits=name == "decode").eval()
            module.model.load_state_dict({key: state[key] for key in module.model.state_dict()})
            self._runners[name] = _runner(module)
            inputs = architecture.decoder_inputs(length, bundle.cache_length, max(bundle.prefill))
            kept = {f"kv_cache_{key}": value for key, value in inputs.pop("kv_cache").items()}
            shapes = {key: tuple(value.shape) for key, value in {**inputs, **kept}.items()}
            self._shapes[name] = {"input_pos": (length,), "mask": (1, 1, length, bundle.cache_length), **shapes}
        keys = {"embedder": "embeddings", "per_layer_embedder": "per_layer_embeddings"}
        self._embedders = {
            keys[table.name]: _looked_up(state[table.tensor] * table.scale, table.shape)
            for table in architecture.tables()
        }


def _runner(module: torch.nn.Module) -> Callable[..., dict[str, np.ndarray]]:
    def run(**inputs: np.ndarray) -> dict[str, np.ndarray]:
        tensors = {name: torch.from_numpy(value) for name, value in inputs.items()}
        names = [name for name in tensors if name.startswith("kv_cache_")]
        kept = {name.removeprefix("kv_cache_"): tensors.pop(name) for name in names}
        with torch.inference_mode():
            outputs = module(**tensors, kv_cache=kept)
        new = {f"kv_cache_{name}": value for name, value in outputs.pop("kv_cache").items()}
        return {name: value.numpy() for name, value in {**outputs, **new}.items()}

    return run


def _looked_up(table: torch.Tensor, shape: tuple[int, ...]) -> Callable[..., dict[str, np.ndarray]]:
    rows = table.numpy().reshape(len(table), 1, 1, *shape)
    return lambda token_ids: {"embeddings": rows[int(token_ids[0, 0])]}
