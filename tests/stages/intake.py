"""Checkpoints as people have them: the shipped model in other forms, and what fetch is expected to make of each."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from pipeline.core.recipe import PROJECT
from pipeline.core.stage import DEFAULT_MODEL

SHIPPED = PROJECT / DEFAULT_MODEL
EOS, END_OF_TURN = 1, 6
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
HEAD, EMBEDDING = "lm_head.weight", "embed_tokens.weight"

PREFIXES = {
    "text": "model.",
    "tower": "model.language_model.",
    "transformers 4": "language_model.model.",
    "twice": "model.language_model.model.",
    "peft": "base_model.model.model.",
    "compiled": "_orig_mod.model.",
    "parallel": "module.model.language_model.",
}
HEADS = ("none", "copy", "float32 copy", "own", "one row", "alone", "other shape")
FILES = ("single", "shards", "index names more", "index names less", "no index", "stale single", "twice", "lost shard")
CONFIGS = ("text", "nested", "untied", "untied nested", "ties not said", "quantised", "quantised nested")
TEMPLATES = ("jinja", "tokenizer_config", "chat_template.json", "none")
STOPS = ("generation", "config", "top only", "text_config only", "null", "tokenizer")
EXTRAS = ("none", "towers", "buffers", "adapter", "packed", "padded", "no tokenizer", "unknown")


@dataclass(frozen=True)
class Form:
    """A form of the shipped model: how its tensors are called and stored, and what its small files say."""

    prefix: str = "text"
    head: str = "none"
    files: str = "single"
    config: str = "text"
    template: str = "jinja"
    stop: str = "generation"
    extra: str = "none"

    @property
    def name(self) -> str:
        """What differs from the shipped model."""
        mine, plain = vars(self), vars(Form())
        return ", ".join(f"{key} {value}" for key, value in mine.items() if value != plain[key]) or "as shipped"

    @property
    def nested(self) -> bool:
        """Whether config.json is that of a model with towers."""
        return "nested" in self.config or self.stop in ("top only", "text_config only")

    @property
    def refusal(self) -> str:
        """A phrase of the sentence that refuses it; empty where it is to be converted."""
        if self.files == "no index":
            return "has shards but no"
        if self.extra == "no tokenizer":
            return "has no tokenizer"
        files = {"lost shard": "lacks 1 of the 2 shards", "twice": "holds too", "stale single": "lie beside"}
        if self.files in files:
            return files[self.files]
        if self.extra == "adapter":
            return "an adapter that was not merged"
        if self.extra == "packed" and self.config.startswith("quantised"):
            return "is quantised already"
        if self.config.startswith("untied") and self.head in ("none", "alone"):
            return f"stores no {HEAD if self.head == 'none' else EMBEDDING}"
        phrases = {"packed": "not float", "padded": "resized or padded", "unknown": "extra"}
        if self.extra == "padded" and self.head == "alone":
            return ""  # there is no embedding to pad
        return phrases.get(self.extra, "another shape" if self.head == "other shape" else "")

    @property
    def stops(self) -> tuple[int, ...]:
        """The tokens that end an answer: those that the first source names, and the end of a turn in the template."""
        named = {EOS, END_OF_TURN} if self.stop == "generation" else {END_OF_TURN} if self.stop == "top only" else {EOS}
        return tuple(sorted(named | (set() if self.template == "none" else {END_OF_TURN})))


def one_at_a_time() -> list[Form]:
    """Every single difference, and pairs of those that meet in one place of the code."""
    axes = {
        "prefix": tuple(PREFIXES),
        "head": HEADS,
        "files": FILES,
        "config": CONFIGS,
        "template": TEMPLATES,
        "stop": STOPS,
        "extra": EXTRAS,
    }
    found = [replace(Form(), **{key: value}) for key, values in axes.items() for value in values]
    found += [
        Form(prefix=prefix, head=head) for prefix, head in product(("tower", "transformers 4", "peft"), HEADS[1:6])
    ]
    found += [Form(head=head, config=config) for head, config in product(HEADS[1:6], ("untied", "nested", "quantised"))]
    found += [Form(template=template, stop=stop) for template, stop in product(TEMPLATES[1:], STOPS[1:])]
    found += [Form(config="quantised", extra="packed"), Form(prefix="tower", config="nested", extra="towers")]
    return list(dict.fromkeys(found))


@cache
def _weights() -> dict[str, torch.Tensor]:
    return {name.removeprefix("model."): value for name, value in load_file(SHIPPED / SINGLE).items()}


def write(form: Form, folder: Path) -> Path:
    """The checkpoint `folder`/tiny in this form."""
    model = folder / "tiny"
    model.mkdir(parents=True)
    for name in ("tokenizer.json", "tokenizer.model", "README.md", "LICENSE"):
        if not (form.extra == "no tokenizer" and name.startswith("tokenizer.")):
            shutil.copy(SHIPPED / name, model / name)
    _write_words(form, model)
    (model / "config.json").write_text(json.dumps(_config(form)))
    _write_weights(form, model, _tensors(form))
    return model


def own_head() -> torch.Tensor:
    """A head that training has moved."""
    table = _weights()[EMBEDDING]
    change = 0.05 * torch.randn(table.shape, generator=torch.Generator().manual_seed(0))
    return (table.float() + change).to(table.dtype)


def _tensors(form: Form) -> dict[str, torch.Tensor]:
    weights, prefix = dict(_weights()), PREFIXES[form.prefix]
    table = weights[EMBEDDING]
    row = table.clone()
    row[1001, 7] += 1
    heads = {
        "copy": table.clone(),
        "float32 copy": table.float(),
        "own": own_head(),
        "one row": row,
        "alone": table.clone(),
        "other shape": torch.cat([table, table]),
    }
    if form.head == "alone":
        del weights[EMBEDDING]
    elif form.extra == "padded":
        weights[EMBEDDING] = torch.cat([table, torch.zeros_like(table[:64])])
    if form.extra == "packed":
        weights["norm.weight"] = weights["norm.weight"].to(torch.uint8)
    stored = {prefix + name: value for name, value in weights.items()}
    if form.head in heads:
        outer = prefix.removesuffix("model.") if form.prefix in ("text", "peft", "compiled") else ""
        outer = {"transformers 4": "language_model.", "parallel": "module."}.get(form.prefix, outer)
        stored[outer + HEAD] = heads[form.head]
    more = {
        "towers": ("model.vision_tower.stem.weight", "model.embed_audio.norm.weight"),
        "buffers": (f"{prefix}rotary_emb.inv_freq", f"{prefix}embed_tokens.embed_scale"),
        "adapter": (f"{prefix}layers.0.mlp.up_proj.lora_A.default.weight",),
        "unknown": (f"{prefix}layers.0.surprise.weight",),
    }
    return {**stored, **{name: torch.ones(4, 4) for name in more.get(form.extra, ())}}


def _write_weights(form: Form, model: Path, tensors: dict[str, torch.Tensor]) -> None:
    if form.files == "single":
        save_file(tensors, model / SINGLE, metadata={"format": "pt"})
        return
    names = sorted(tensors)
    parts = dict(zip(SHARDS, (names[::2], names[1::2]), strict=True))
    weight_map = {name: shard for shard, part in parts.items() for name in part}
    if form.files == "twice":
        parts[SHARDS[1]] = [*parts[SHARDS[1]], names[0]]
    if form.files == "index names more":
        weight_map["model.ghost.weight"] = SHARDS[0]
    if form.files == "index names less":
        del weight_map[names[3]]
    for shard, part in parts.items():
        save_file({name: tensors[name] for name in part}, model / shard, metadata={"format": "pt"})
    if form.files != "no index":
        (model / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    if form.files == "stale single":
        save_file({names[0]: tensors[names[0]]}, model / SINGLE, metadata={"format": "pt"})
    if form.files == "lost shard":
        (model / SHARDS[0]).unlink()


def _config(form: Form) -> dict[str, Any]:
    text = json.loads((SHIPPED / "config.json").read_text())
    table = {"load_in_4bit": True, "quant_method": "bitsandbytes"}
    if form.config == "ties not said":
        del text["tie_word_embeddings"]
    if form.stop in ("top only", "tokenizer"):
        del text["eos_token_id"]
    if form.config == "quantised nested":
        text["quantization_config"] = table
    config = {"model_type": "gemma3n", "text_config": text} if form.nested else text
    if form.config == "quantised":
        config["quantization_config"] = table
    if form.config.startswith("untied"):
        config["tie_word_embeddings"] = False
    if form.stop == "top only":
        config["eos_token_id"] = END_OF_TURN
    return config


def _write_words(form: Form, model: Path) -> None:
    """Template and stop tokens where this form has them."""
    said = json.loads((SHIPPED / "tokenizer_config.json").read_text())
    source = (SHIPPED / "chat_template.jinja").read_text()
    if form.template == "jinja":
        (model / "chat_template.jinja").write_text(source)
    elif form.template == "tokenizer_config":
        said["chat_template"] = source
    elif form.template == "chat_template.json":
        (model / "chat_template.json").write_text(json.dumps({"chat_template": source}))
    if form.extra != "no tokenizer":
        (model / "tokenizer_config.json").write_text(json.dumps(said))
    generation = json.loads((SHIPPED / "generation_config.json").read_text())
    if form.stop == "null":
        generation["eos_token_id"] = None
    if form.stop in ("generation", "null"):
        (model / "generation_config.json").write_text(json.dumps(generation))
