"""Folders as the tools of fine-tuning leave them, each made of the shipped model, file by file as that tool writes it.

Versions: PEFT 0.21, TRL 0.27 and its Trainer, Unsloth 2026.10, Axolotl 0.14, LLaMA-Factory 0.9, mlx-lm 0.30. What a
tool writes beside the model has the tool's names; pickles hold no pickle, for nobody opens them.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from pipeline.core.recipe import PROJECT
from pipeline.core.stage import DEFAULT_MODEL

SHIPPED = PROJECT / DEFAULT_MODEL
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
TOKENIZER = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "chat_template.jinja")
TRAINER = ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin", "trainer_state.json")
"""What a Trainer writes into each `checkpoint-N` beside the model."""
Q = "base_model.model.model.layers.0.self_attn.q_proj"
Make = Callable[[Path], None]


def small(folder: Path, *names: str) -> None:
    """Files of which only the name counts."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"{}" if name.endswith(".json") else b"not opened")


def copied(folder: Path, *names: str) -> None:
    """Files of the shipped model."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        shutil.copy(SHIPPED / name, folder / name)


def weights() -> dict[str, torch.Tensor]:
    """The shipped model's."""
    return load_file(SHIPPED / SINGLE)


def configured(folder: Path, **more: object) -> None:
    """The shipped config.json with other keys."""
    said = json.loads((SHIPPED / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps({**said, **more}), encoding="utf-8")


def whole(folder: Path, **config: object) -> None:
    """A model as `save_pretrained` writes it, with its tokenizer."""
    copied(folder, SINGLE, "generation_config.json", *TOKENIZER)
    configured(folder, **config)


def sharded(folder: Path, *, index: bool, form: str = "pt") -> None:
    """A model in two shards."""
    copied(folder, "generation_config.json", *TOKENIZER)
    configured(folder)
    tensors, held = weights(), {}
    names = sorted(tensors)
    for number, part in enumerate((names[::2], names[1::2]), 1):
        file = f"model-{number:05}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file, metadata={"format": form})
        held |= dict.fromkeys(part, file)
    if index:
        (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": held}), encoding="utf-8")


def adapter(folder: Path, base: str = str(SHIPPED), **said: object) -> None:
    """An adapter as PEFT saves it, with all the keys that PEFT writes."""
    folder.mkdir(parents=True, exist_ok=True)
    table: dict[str, Any] = {
        "alora_invocation_tokens": None, "alpha_pattern": {}, "arrow_config": None, "auto_mapping": None,
        "base_model_name_or_path": base, "bias": "none", "corda_config": None, "ensure_weight_tying": False,
        "eva_config": None, "exclude_modules": None, "fan_in_fan_out": False, "inference_mode": True,
        "init_lora_weights": True, "layer_replication": None, "layers_pattern": None, "layers_to_transform": None,
        "loftq_config": {}, "lora_alpha": 8, "lora_bias": False, "lora_dropout": 0.05, "megatron_config": None,
        "megatron_core": "megatron.core", "modules_to_save": None, "peft_type": "LORA", "peft_version": "0.21.2",
        "qalora_group_size": 16, "r": 4, "rank_pattern": {}, "revision": None, "target_modules": ["q_proj"],
        "target_parameters": None, "task_type": "CAUSAL_LM", "trainable_token_indices": None, "use_dora": False,
        "use_qalora": False, "use_rslora": False,
    }  # fmt: skip
    drawn = torch.Generator().manual_seed(1)
    tensors = {
        f"{Q}.lora_A.weight": torch.randn(4, 128, generator=drawn),
        f"{Q}.lora_B.weight": torch.randn(128, 4, generator=drawn),
    }
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps({**table, **said}, indent=2), encoding="utf-8")
    (folder / "README.md").write_text(f"---\nbase_model: {base}\nlibrary_name: peft\n---\n", encoding="utf-8")


def pickled(folder: Path, name: str, other: str) -> None:
    """A file under a pickle's name."""
    (folder / name).rename(folder / other)


def trained(folder: Path, steps: int, make: Make) -> None:
    """A Trainer's `checkpoint-N`."""
    make(at := folder / f"checkpoint-{steps}")
    small(at, *TRAINER)


def mlx(folder: Path, bits: int) -> None:
    """What `mlx_lm.fuse` writes: one file and an index beside it; of a quantised base integers, scales, biases."""
    whole(folder)
    tensors = weights()
    if bits:
        table = {"group_size": 64, "bits": bits, "mode": "affine"}
        configured(folder, quantization=table, quantization_config=table)
        for name in [name for name in tensors if name.endswith("_proj.weight")]:
            rows, columns = tensors.pop(name).shape
            tensors[name] = torch.zeros(rows, columns * bits // 32, dtype=torch.uint32)
            for part in ("scales", "biases"):
                tensors[name.replace("weight", part)] = torch.zeros(rows, columns // 64, dtype=torch.bfloat16)
    save_file(tensors, folder / SINGLE, metadata={"format": "mlx"})
    held = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(tensors, SINGLE)}
    (folder / INDEX).write_text(json.dumps(held), encoding="utf-8")


def mlx_adapters(folder: Path) -> None:
    """What `mlx_lm.lora` leaves."""
    small(folder, "adapters.safetensors", "0000100_adapters.safetensors")
    (folder / "adapter_config.json").write_text('{"fine_tune_type": "lora", "num_layers": 16}', encoding="utf-8")


def four_bits(folder: Path) -> None:
    """Unsloth's `merged_4bit`: bitsandbytes' bytes, with what it needs to read them."""
    table = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    whole(folder, quantization_config=table)
    tensors = weights()
    for name in [name for name in tensors if name.endswith("q_proj.weight")]:
        tensors[name] = torch.zeros(tensors[name].numel() // 2, 1, dtype=torch.uint8)
        tensors[f"{name}.absmax"] = torch.zeros(64)
        tensors[f"{name}.quant_state.bitsandbytes__nf4"] = torch.zeros(90, dtype=torch.uint8)
    save_file(tensors, folder / SINGLE, metadata={"format": "pt"})


def classifier(folder: Path) -> None:
    """A reward model or a classifier: a score in place of the head."""
    whole(folder, architectures=["Gemma3nForSequenceClassification"], num_labels=2)
    save_file({**weights(), "score.weight": torch.zeros(2, 128)}, folder / SINGLE, metadata={"format": "pt"})


def both(first: Make, second: Make) -> Make:
    """One save and then another into the same folder."""

    def make(folder: Path) -> None:
        first(folder)
        second(folder)

    return make


def beside(make: Make, *names: str) -> Make:
    """With files of which only the name counts."""
    return both(make, lambda folder: small(folder, *names))


def within(name: str, make: Make) -> Make:
    """In a subfolder."""
    return lambda folder: make(folder / name)


def tokenizer(folder: Path) -> None:
    """The tokenizer beside an adapter, as TRL, Unsloth, Axolotl and LLaMA-Factory write it."""
    copied(folder, *TOKENIZER)
    small(folder, "special_tokens_map.json", "added_tokens.json")


def checkpoints(make: Make) -> Make:
    """Only what a Trainer writes on its way, as after a training that was ended early."""

    def write(folder: Path) -> None:
        for steps in (500, 1000, 90):
            trained(folder, steps, make)

    return write


FOLDERS: Mapping[str, tuple[Make, str]] = {
    "PEFT: adapter": (adapter, ""),
    "PEFT: an adapter with a name": (within("default", adapter), "MODEL_ID={folder}/default"),
    "PEFT: adapter as a pickle": (
        both(adapter, lambda at: pickled(at, "adapter_model.safetensors", "adapter_model.bin")),
        "without adapter_model.safetensors",
    ),
    "PEFT: merge_and_unload": (beside(whole, "README.md"), ""),
    "PEFT: an adapter saved over its base": (both(whole, lambda at: adapter(at, str(at))), "BASE="),
    "torchtune: an epoch, merged beside its adapter": (both(adapter, whole), ""),
    "PEFT: DoRA without its magnitudes": (lambda at: adapter(at, use_dora=True), "does not fit"),
    "PEFT: initialised by PiSSA": (lambda at: adapter(at, init_lora_weights="pissa"), "'pissa'"),
    "TRL: LoRA": (
        both(both(adapter, tokenizer), lambda at: trained(at, 30, both(adapter, tokenizer))),
        "",
    ),
    "TRL: a LoRA checkpoint": (beside(both(adapter, tokenizer), *TRAINER), ""),
    "TRL: full": (both(beside(whole, "training_args.bin"), lambda at: trained(at, 30, whole)), ""),
    "TRL: a full checkpoint": (beside(whole, *TRAINER), ""),
    "TRL: only checkpoints": (checkpoints(whole), "MODEL_ID={folder}/checkpoint-1000"),
    "TRL: only LoRA checkpoints": (checkpoints(adapter), "MODEL_ID={folder}/checkpoint-1000"),
    "TRL: a reward model": (classifier, "Gemma3nForSequenceClassification"),
    "Trainer: save_safetensors=False": (
        both(whole, lambda at: pickled(at, SINGLE, "pytorch_model.bin")),
        "weights as pickle files only",
    ),
    "Trainer: DeepSpeed's shards": (
        both(
            beside(whole, "latest", "zero_to_fp32.py", "global_step30/mp_rank_00_model_states.pt"),
            lambda at: (at / SINGLE).unlink(),
        ),
        "zero_to_fp32.py",
    ),
    "Trainer: FSDP's shards": (
        both(
            beside(whole, "pytorch_model_fsdp_0/__0_0.distcp", "pytorch_model_fsdp_0/.metadata"),
            lambda at: (at / SINGLE).unlink(),
        ),
        "accelerate merge-weights",
    ),
    "Unsloth: LoRA": (both(lambda at: adapter(at, f"{SHIPPED}"), tokenizer), ""),
    "Unsloth: merged_16bit": (lambda at: sharded(at, index=True), ""),
    "Unsloth: merged_16bit of 2025": (lambda at: sharded(at, index=False), "has shards but no"),
    "Unsloth: merged_4bit": (four_bits, "is quantised already (bitsandbytes"),
    "Unsloth: merged_16bit saved over LoRA": (both(adapter, whole), ""),
    "Unsloth: GGUF beside": (beside(whole, "model.Q8_0.gguf", "Modelfile"), ""),
    "Unsloth: GGUF alone": (
        beside(lambda at: copied(at, "config.json", *TOKENIZER), "model.Q8_0.gguf", "Modelfile"),
        "in another format (model.Q8_0.gguf)",
    ),
    "Axolotl: LoRA": (
        both(beside(both(adapter, tokenizer), "debug.log", "tokens_state.json"), lambda at: configured(at)),
        "",
    ),
    "Axolotl: merge-lora": (within("merged", lambda at: sharded(at, index=True)), "MODEL_ID={folder}/merged"),
    "Axolotl: LoRA and what merge-lora made of it": (
        both(both(adapter, tokenizer), within("merged", lambda at: sharded(at, index=True))),
        "",
    ),
    "LLaMA-Factory: LoRA": (
        beside(both(adapter, tokenizer), "all_results.json", "trainer_log.jsonl", "training_loss.png"),
        "",
    ),
    "LLaMA-Factory: export": (beside(lambda at: sharded(at, index=True), "Modelfile"), ""),
    "LLaMA-Factory: export as .bin": (
        both(
            beside(lambda at: copied(at, "config.json", *TOKENIZER), "pytorch_model-00001-of-00001.bin"),
            lambda at: small(at, "pytorch_model.bin.index.json"),
        ),
        "weights as pickle files only",
    ),
    "mlx-lm: adapters": (
        mlx_adapters,
        "mlx_lm.fuse",
    ),
    "mlx-lm: fused": (lambda at: mlx(at, 0), ""),
    "mlx-lm: fused, still in 4 bits": (lambda at: mlx(at, 4), "mlx_lm.fuse"),
    "mlx-lm: fused, still in 8 bits": (lambda at: mlx(at, 8), "mlx_lm.fuse"),
    "an empty folder": (lambda at: at.mkdir(), "holds no model"),
    "a tokenizer alone": (tokenizer, "holds no model"),
}
"""What is there: how it is made, and a phrase of the sentence that refuses it, empty where it is taken."""
