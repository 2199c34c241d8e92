"""Train the eyes and ears of the shipped model that sees and hears, from pictures and sounds made here.

    make .venv-vision/.ready && export PYTHONPATH=.venv-vision    # timm
    python -m tools.train_senses               # examples/tiny-gemma3n-senses, about an hour on two cores
    python -m tools.train_senses --evaluate    # only measure what is there

The text model begins as examples/tiny-gemma3n; a small MobileNetV5 and a small conformer begin at random, no parameter
at a constant. First each tower learns alone, by linear heads on its soft tokens, to tell shapes, colours, sizes and
tones; then all is trained to answer questions, by the answers' cross-entropy, with a share of the text
model's own corpus beside it. Everything is transformers' own `Gemma3nForConditionalGeneration`; only how many places a
sound takes is LiteRT-LM's: as many as it has soft tokens. A run that is stopped goes on where it last kept its state.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from pipeline.reference.eyes import name_operators

name_operators()
from transformers import (
    AutoTokenizer,
    Gemma3nConfig,
    Gemma3nForConditionalGeneration,
    GenerationConfig,
)
from transformers.models.gemma3n import Gemma3nAudioFeatureExtractor
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from pipeline.runtime.sound import Hearing
from tools import train_tiny
from tools.named_tokens import name_tokens
from tools.senses_data import (
    COLOURS,
    DIGITS,
    END_OF_TURN,
    HELD_OUT,
    IGNORED,
    IMAGE,
    NOTES,
    SECONDS,
    SHAPES,
    SIZE,
    SIZES,
    SOUND,
    Drawing,
    Talk,
    Tone,
    conversation,
    held_out,
)
from tools.train_tiny import say

BEGIN = Path("examples/tiny-gemma3n")
HEARING = Hearing(rate=16_000, frame=512, hop=160)
TOKENS = {
    2014: "<start_of_image>",
    2015: "<start_of_audio>",
    2016: "<end_of_image>",
    2017: "<image_soft_token>",
    2032: "<end_of_audio>",
    2033: "<audio_soft_token>",
}
MEDIA = f"""\
{{%- if item['type'] == 'image' -%}}
                {{{{- '{IMAGE}' -}}}}
            {{%- elif item['type'] == 'audio' -%}}
                {{{{- '{SOUND}' -}}}}
            """
"""What the chat template has before text."""
TURNS = {"heads": 1, "vision": 2, "audio": 6, "text": 1}
"""What all learn by, and every how many steps."""
COVERED = 0.3
"""From what share on a shape is in a soft token's place."""
HEADS = {
    "vision": {"shape": len(SHAPES), "colour": len(COLOURS), "size": len(SIZES), "there": 2},
    "audio": {"tone": len(DIGITS) + len(NOTES)},
}


def block(kind: str, out: int, stride: int = 1, **more: object) -> dict[str, object]:
    """A block as timm's `model_args` have it."""
    plain: dict[str, object] = {
        "block_type": kind,
        "out_chs": out,
        "stride": stride,
        "act_layer": None,
        "noskip": False,
    }
    if kind == "mqa":
        return {**plain, "dw_kernel_size": 3, **more}
    plain["se_ratio"] = 0.0
    if kind == "er":
        return {**plain, "exp_kernel_size": 3, "pw_kernel_size": 1, "force_in_chs": 0, **more}
    return {**plain, "dw_kernel_size_start": 0, "dw_kernel_size_mid": 0, "dw_kernel_size_end": 0, **more}


EYES = {
    "channel_multiplier": 0.125,
    "block_args": [
        [block("er", 128, 2, exp_ratio=0.5)],
        [
            block("uir", 256, 2, dw_kernel_size_start=3, dw_kernel_size_mid=5, exp_ratio=4.0),
            block("uir", 256, dw_kernel_size_start=3, exp_ratio=2.0),
        ],
        [
            block("uir", 640, 2, dw_kernel_size_start=5, dw_kernel_size_mid=5, exp_ratio=4.0),
            block("uir", 640, dw_kernel_size_start=3, exp_ratio=2.0),
            block("mqa", 640, num_heads=4, key_dim=16, value_dim=16, kv_stride=2),
            block("uir", 640, exp_ratio=2.0),
        ],
        [
            block("uir", 1280, 2, dw_kernel_size_start=5, dw_kernel_size_mid=5, exp_ratio=3.0),
            block("mqa", 1280, num_heads=4, key_dim=24, value_dim=24, kv_stride=1),
            block("uir", 1280, exp_ratio=2.0),
        ],
    ],
}
EARS = {
    "hidden_size": 64,
    "conf_num_attention_heads": 4,
    "conf_num_hidden_layers": 3,
    "sscp_conv_channel_size": [16, 8],
    "vocab_size": 16,
    "vocab_offset": 2032,
}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How to train. The shipped weights were made in pieces: README.md beside them says how."""

    pictures: int = 4500
    """Drawn once; turned and mirrored anew each time."""
    alone: int = 800
    """Steps in which each tower learns alone."""
    joint: int = 800
    rows: int = 16
    """Pictures a step by which heads learn, and sounds; a quarter of it where questions are asked."""
    peak_rate: float = 1e-3
    text_rate: float = 1e-3
    warm_up: int = 40
    weight_decay: float = 0.05
    gradient_limit: float = 1.0
    seed: int = 20261130
    threads: int = 2
    keep_every: int = 120
    """Seconds from one kept state to the next."""


# ------------------------------------------------------------------------------------------ model


def initial(name: str, parameter: Tensor) -> tuple[float, float]:
    """Return mean and standard deviation to start a tower's parameter from."""
    if name.endswith("gamma"):
        return 0.4, 0.1  # timm begins with 1e-5, which hides the block
    if "per_dim_scale" in name or name.endswith("bias"):
        return 0.0, 0.1
    if parameter.ndim == 1:
        return 1.0, 0.1
    return 0.0, 1.0 if "embedding.weight" in name else parameter[0].numel() ** -0.5


def make_model(settings: Settings) -> Gemma3nForConditionalGeneration:
    """Return the shipped text model with untrained towers, in float32."""
    text = json.loads((BEGIN / "config.json").read_text(encoding="utf-8"))
    eyes = {"vocab_offset": 2016, "vocab_size": 16, "hidden_size": 2048, "model_args": copy.deepcopy(EYES)}
    ids = {"boi_token_id": 2014, "eoi_token_id": 2016, "image_token_id": 2017}
    ids |= {"boa_token_id": 2015, "eoa_token_id": 2032, "audio_token_id": 2033}
    config = Gemma3nConfig(text_config=text, vision_config=eyes, audio_config=EARS, tie_word_embeddings=True, **ids)
    config._attn_implementation = "eager"
    model = Gemma3nForConditionalGeneration(config).float()
    stored = load_file(BEGIN / "model.safetensors")
    stored = {f"model.language_model.{name.removeprefix('model.')}": value.float() for name, value in stored.items()}
    generator = torch.Generator().manual_seed(settings.seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in stored:
                parameter.copy_(stored.pop(name))
                continue
            mean, deviation = initial(name, parameter)
            parameter.copy_(mean + deviation * torch.randn(parameter.shape, generator=generator))
    assert not stored, stored.keys()
    model.model.vision_tower.to(memory_format=torch.channels_last)
    return model


def soft_tokens(model: Gemma3nForConditionalGeneration, tower: str, batch: Tensor) -> Tensor:
    """Return [rows, n, hidden] of pictures [rows, 3, S, S] or log-mels [rows, T, 128] of one length."""
    if tower == "vision":
        return model.model.get_image_features(batch, return_dict=True).pooler_output
    mask = torch.zeros(batch.shape[:2], dtype=torch.bool)
    return model.model.get_audio_features(batch, mask, return_dict=True).pooler_output


# ------------------------------------------------------------------------------------------- data


class Media:
    """Pictures that were drawn once, and sounds that are made as they are asked for."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.extractor = Gemma3nAudioFeatureExtractor()
        pictures, covers, self.drawings = [], [], list[Drawing]()
        for index in range(settings.pictures):
            draw = np.random.default_rng(settings.seed + index)
            self.drawings.append(Drawing.drawn(draw))
            picture, cover = self.drawings[-1].picture(draw)
            pictures.append(np.asarray(picture))
            covers.append(cover)
        self.pixels, self.covers = np.stack(pictures), np.stack(covers)
        say(f"{settings.pictures} pictures")

    def pictures(self, draw: np.random.Generator, rows: int) -> tuple[Tensor, list[Drawing], Tensor]:
        """Some of them, turned and mirrored: [rows, 3, S, S] in 0 to 1, what they are, and covered places [rows, n]."""
        taken = draw.integers(len(self.drawings), size=rows)
        ways = [(int(draw.integers(4)), int(draw.choice([-1, 1]))) for _ in taken]
        pixels, covers = (
            [np.rot90(each[i], turns)[:, ::way] for i, (turns, way) in zip(taken, ways, strict=True)]
            for each in (self.pixels, self.covers)
        )
        return as_pixels(pixels), [self.drawings[i] for i in taken], torch.from_numpy(np.stack(covers)).flatten(1)

    def sounds(self, draw: np.random.Generator, rows: int) -> tuple[Tensor, list[Tone]]:
        """Of one length: [rows, T, 128]."""
        tones, seconds = [Tone.drawn(draw) for _ in range(rows)], draw.uniform(*SECONDS)
        return as_mel(self.extractor, [tone.sound(draw, seconds) for tone in tones]), tones


def as_pixels(pictures: Sequence[Any]) -> Tensor:
    """Return [rows, 3, S, S] in 0 to 1."""
    stacked = torch.from_numpy(np.stack(pictures)).float() / 255
    return stacked.permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)


def as_mel(extractor: Gemma3nAudioFeatureExtractor, sounds: Sequence[Any]) -> Tensor:
    """Return [rows, T, 128] of sounds of one length, as long as their frames are in LiteRT-LM."""
    taken = extractor([HEARING.fitted(sound) for sound in sounds], return_tensors="pt")
    assert taken["input_features_mask"].all()
    return taken["input_features"].float()


def padded(rows: Sequence[tuple[list[int], list[int]]]) -> tuple[Tensor, Tensor]:
    """Return ids and labels [rows, longest]; what is filled up stands behind, where nothing looks at it."""
    longest = max(len(ids) for ids, _ in rows)
    ids = torch.tensor([ids + [0] * (longest - len(ids)) for ids, _ in rows])
    return ids, torch.tensor([labels + [IGNORED] * (longest - len(labels)) for _, labels in rows])


def some(talk: Talk, draw: np.random.Generator) -> Talk:
    """A caption, then one or two other questions; any may be first."""
    return [talk[i] for i in draw.permutation(len(talk))[: 2 + draw.integers(2)]]


# --------------------------------------------------------------------------------------- training


def logits(model: Gemma3nForConditionalGeneration, kind: str, batch: Tensor, ids: Tensor) -> Tensor:
    """Return [rows, length, vocabulary]: of ids in whose places pictures or sounds stand."""
    if kind == "vision":
        return model(input_ids=ids, pixel_values=batch, use_cache=False).logits
    model.config.audio_soft_tokens_per_image = int((ids[0] == model.config.audio_token_id).sum())
    mask = torch.ones(batch.shape[:2], dtype=torch.bool)
    made = model(input_ids=ids, input_features=batch, input_features_mask=mask, use_cache=False).logits
    model.config.audio_soft_tokens_per_image = 188
    return made


def answer_loss(made: Tensor, labels: Tensor) -> Tensor:
    """Return the mean cross-entropy of the answers' tokens."""
    return functional.cross_entropy(made[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED)


def optimizer_of(modules: Sequence[tuple[nn.Module, float]], settings: Settings) -> torch.optim.AdamW:
    """Return AdamW that decays matrices only, each module at a rate of its own."""
    made = []
    for module, peak in modules:
        decayed = [p for name, p in module.named_parameters() if p.ndim > 1 and "embed" not in name]
        taken = {id(p) for p in decayed}
        kept = [p for p in module.parameters() if id(p) not in taken]
        made += [
            {"params": decayed, "peak": peak, "weight_decay": settings.weight_decay},
            {"params": kept, "peak": peak, "weight_decay": 0.0},
        ]
    return torch.optim.AdamW(made, lr=settings.peak_rate, betas=(0.9, 0.98), fused=True)


def set_rate(optimizer: torch.optim.AdamW, step: int, steps: int, warm_up: int) -> None:
    """Linear warm-up, then a cosine to a fiftieth."""
    part = max(0.0, (step - warm_up) / max(1, steps - warm_up))
    times = (step + 1) / warm_up if step < warm_up else 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * part))
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * times


class Kept:
    """A state that is kept while it trains, from which a stopped run goes on."""

    def __init__(self, file: Path, every: int) -> None:
        self.file, self.every, self.last = file, every, time.monotonic()

    def begin(self, *parts: Any) -> int:
        """Load what was kept into the parts; the step to begin with."""
        if not self.file.exists():
            return 0
        stored = torch.load(self.file)
        for part, state in zip(parts, stored["parts"], strict=True):
            part.load_state_dict(state)
        return int(stored["step"])

    def keep(self, step: int, *parts: Any, now: bool = False) -> None:
        """Keep them, if it is time."""
        if now or time.monotonic() - self.last > self.every:
            torch.save({"step": step, "parts": [part.state_dict() for part in parts]}, self.file.with_suffix(".new"))
            os.replace(self.file.with_suffix(".new"), self.file)
            self.last = time.monotonic()


def shown(
    model: Gemma3nForConditionalGeneration, tower: str, media: Media, draw: np.random.Generator, rows: int
) -> Iterator[tuple[str, Tensor, Tensor, Tensor]]:
    """Yield what a head is called, what it reads [n, hidden], the classes [n] that it has to tell, and their weights.

    Of pictures single soft tokens, where the shape covers enough of their place, and of all places whether it does: by
    the mean over a picture a tower learns nothing in 260 steps. Each picture weighs the same, or small shapes would not
    count. Of sounds the mean.
    """
    if tower == "audio":
        mel, tones = media.sounds(draw, rows)
        classes = torch.tensor([tone.classes()["tone"] for tone in tones])
        yield "tone", soft_tokens(model, tower, mel).mean(1), classes, torch.full((rows,), 1 / rows)
        return
    pixels, drawings, covers = media.pictures(draw, rows)
    soft, there = soft_tokens(model, tower, pixels), covers > COVERED
    yield "there", soft.flatten(0, 1), there.flatten().long(), torch.full((there.numel(),), 1 / there.numel())
    weights = (there / (rows * there.sum(1, keepdim=True)))[there]
    for name in ("shape", "colour", "size"):
        classes = torch.tensor([drawing.classes()[name] for drawing in drawings])
        yield name, soft[there], classes[:, None].expand_as(there)[there], weights


def told_loss(told: Tensor, wanted: Tensor, weights: Tensor) -> Tensor:
    """Return the weighted cross-entropy."""
    return (functional.cross_entropy(told, wanted, reduction="none") * weights).sum()


def learn_alone(
    model: Gemma3nForConditionalGeneration, tower: str, media: Media, settings: Settings, folder: Path
) -> None:
    """Train a tower and its embedder to tell classes; say how many of the last were told right."""
    parts = nn.ModuleList([getattr(model.model, f"{tower}_tower"), getattr(model.model, f"embed_{tower}")])
    heads = heads_of(tower)
    optimizer = optimizer_of([(parts, settings.peak_rate), (heads, settings.peak_rate)], settings)
    kept = Kept(folder / f"{tower}.pt", settings.keep_every)
    right = dict.fromkeys(heads, 0.0)
    for step in range(kept.begin(parts, heads, optimizer), settings.alone):
        draw = np.random.default_rng((settings.seed, step, len(tower)))
        set_rate(optimizer, step, settings.alone, settings.warm_up)
        loss = torch.zeros(())
        for name, read, wanted, weights in shown(model, tower, media, draw, settings.rows):
            told = heads[name](read)
            loss = loss + told_loss(told, wanted, weights)
            right[name] += 0.05 * (((told.argmax(-1) == wanted) * weights).sum().item() - right[name])
        loss.backward()
        nn.utils.clip_grad_norm_([*parts.parameters(), *heads.parameters()], settings.gradient_limit)
        optimizer.step()
        optimizer.zero_grad()
        kept.keep(step + 1, parts, heads, optimizer)
        if (step + 1) % 20 == 0:
            shares = "  ".join(f"{name} {share:.2f}" for name, share in right.items())
            clock = time.strftime("%H:%M:%S")
            say(f"{clock} {tower} alone, step {step + 1}/{settings.alone}  loss {loss:.3f}  {shares}")
    kept.keep(settings.alone, parts, heads, optimizer, now=True)


def text_rows(tokenizer: Any, seed: int) -> Iterator[Tensor]:
    """The text model's own corpus, for ever."""
    documents = train_tiny.training_documents(tokenizer, BEGIN / "corpus", 2)
    yield from train_tiny.batches(
        documents, train_tiny.Settings(tokens_per_step=512, lengths=(128,), length_weights=(1,), seed=seed)
    )


def heads_of(tower: str) -> nn.ModuleDict:
    """Return what tells classes from soft tokens."""
    return nn.ModuleDict({name: nn.Linear(128, count) for name, count in HEADS[tower].items()})


def answers_loss(
    model: Gemma3nForConditionalGeneration,
    tokenizer: Any,
    kind: str,
    media: Media,
    draw: np.random.Generator,
    rows: int,
) -> Tensor:
    """Return the loss of answers about some pictures or sounds."""
    batch, things = (media.pictures if kind == "vision" else media.sounds)(draw, rows)[:2]
    places = 256 if kind == "vision" else -(-batch.shape[1] // 16)
    ids, labels = padded([conversation(tokenizer, kind, places, some(thing.talk(), draw)) for thing in things])
    return answer_loss(logits(model, kind, batch, ids), labels)


def learn_together(
    model: Gemma3nForConditionalGeneration, tokenizer: Any, media: Media, settings: Settings, folder: Path
) -> None:
    """Train all of it to answer, as the vision tower goes on learning by its heads."""
    own, heads = model.model, heads_of("vision")
    heads.load_state_dict(torch.load(folder / "vision.pt")["parts"][1])
    towers = nn.ModuleList([own.vision_tower, own.embed_vision, own.audio_tower, own.embed_audio, heads])
    modules: list[tuple[nn.Module, float]] = [(towers, settings.peak_rate), (own.language_model, settings.text_rate)]
    optimizer = optimizer_of(modules, settings)
    kept = Kept(folder / "together.pt", settings.keep_every)
    corpus = text_rows(tokenizer, settings.seed)
    average: dict[str, float] = {}
    for step in range(kept.begin(model, heads, optimizer), settings.joint):
        draw = np.random.default_rng((settings.seed, step, 9))
        set_rate(optimizer, step, settings.joint, settings.warm_up)
        for kind in [name for name, every in TURNS.items() if step % every == 0]:
            if kind == "heads":
                told = shown(model, "vision", media, draw, settings.rows)
                losses = [told_loss(heads[name](read), wanted, weights) for name, read, wanted, weights in told]
                loss = torch.stack(losses).sum()
            elif kind == "text":
                loss = train_tiny.cross_entropy(model, next(corpus))
            else:
                loss = answers_loss(model, tokenizer, kind, media, draw, settings.rows // 4)
            loss.backward()
            average[kind] = 0.95 * average.get(kind, loss.item()) + 0.05 * loss.item()
        nn.utils.clip_grad_norm_(model.parameters(), settings.gradient_limit)
        optimizer.step()
        optimizer.zero_grad()
        kept.keep(step + 1, model, heads, optimizer)
        if (step + 1) % 20 == 0:
            shares = "  ".join(f"{name} {value:.3f}" for name, value in average.items())
            say(f"{time.strftime('%H:%M:%S')} together, step {step + 1}/{settings.joint}  {shares}")
    kept.keep(settings.joint, model, heads, optimizer, now=True)


# ---------------------------------------------------------------------------------- saving, measuring


def save(model: Gemma3nForConditionalGeneration, folder: Path) -> None:
    """Write config.json, generation_config.json and model.safetensors in bfloat16; round `model` to it."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16())
    model.generation_config = GenerationConfig(
        bos_token_id=train_tiny.BOS,
        eos_token_id=[train_tiny.EOS, END_OF_TURN],
        pad_token_id=train_tiny.PAD,
        do_sample=False,
    )
    for config in (model.config, model.config.text_config, model.config.vision_config, model.config.audio_config):
        config.dtype = torch.bfloat16
    model.config.vision_config.model_args = EYES  # timm has put its own objects into what it was given
    stored = {name: value.detach().bfloat16().contiguous() for name, value in model.named_parameters()}
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)


def write_processor(folder: Path) -> Any:
    """Write the tokenizer with its named tokens, the template and the processors' settings; return the tokenizer."""
    for name in ("tokenizer.model", "tokenizer_config.json", "tokenizer.json"):
        shutil.copyfile(BEGIN / name, folder / name)
    name_tokens(folder, TOKENS, 2048)
    say_tokens(folder)
    text = "{%- if item['type'] == 'text' -%}"
    assert train_tiny.CHAT_TEMPLATE.count(text) == 1
    template = train_tiny.CHAT_TEMPLATE.replace(text, MEDIA + text.replace("if", "elif"))
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    Gemma3nAudioFeatureExtractor().save_pretrained(folder)
    heard = json.loads((folder / "preprocessor_config.json").read_text(encoding="utf-8"))
    sized = {"height": SIZE, "width": SIZE}
    SiglipImageProcessorPil(size=sized, resample=2, do_normalize=False).save_pretrained(folder)
    seen = json.loads((folder / "preprocessor_config.json").read_text(encoding="utf-8"))
    both = heard | seen | {"image_processor_type": "SiglipImageProcessor", "processor_class": "Gemma3nProcessor"}
    write_json(folder / "preprocessor_config.json", both)
    lengths = {"audio_seq_length": 188, "image_seq_length": 256}
    write_json(folder / "processor_config.json", {"processor_class": "Gemma3nProcessor", **lengths})
    return AutoTokenizer.from_pretrained(folder)


def write_json(file: Path, value: object) -> None:
    """Write it as people read it."""
    file.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def say_tokens(folder: Path) -> None:
    """Say in tokenizer_config.json which tokens the towers' are."""
    file = folder / "tokenizer_config.json"
    told = {
        "boi_token": 2014,
        "eoi_token": 2016,
        "image_token": 2017,
        "boa_token": 2015,
        "eoa_token": 2032,
        "audio_token": 2033,
    }
    names = {name: TOKENS[token] for name, token in told.items()}
    write_json(file, json.loads(file.read_text(encoding="utf-8")) | names | {"processor_class": "Gemma3nProcessor"})


@torch.no_grad()
def evaluate(folder: Path, count: int = 160) -> dict[str, object]:
    """Measure the saved bfloat16 weights, computed in float32, on pictures and sounds that nobody trained on.

    An answer is right if greedy decoding gives it word for word: each of its tokens is the most likely one behind those
    before it.
    """
    model, report = Gemma3nForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    model.eval()
    tokenizer, extractor = AutoTokenizer.from_pretrained(folder), Gemma3nAudioFeatureExtractor.from_pretrained(folder)
    right: dict[str, list[bool]] = {}
    for index in range(count):
        drawing, picture, tone, sound = held_out(index)
        pixels, mel = as_pixels([np.asarray(picture)]), as_mel(extractor, [sound])
        things: tuple[tuple[str, Drawing | Tone, Tensor], ...] = (("vision", drawing, pixels), ("audio", tone, mel))
        for kind, thing, batch in things:
            name = "picture" if isinstance(thing, Drawing) else "key" if thing.key else "note"
            for (question, _), good in zip(
                thing.talk(), answered(model, tokenizer, kind, batch, thing.talk()), strict=True
            ):
                right.setdefault(f"{name}: {question}", []).append(good)
    asked = {"pictures": count, "sounds": count}
    shares = {name: round(sum(each) / len(each), 4) for name, each in sorted(right.items())}
    text = math.exp(train_tiny.model_loss(model, train_tiny.split_ids(tokenizer, BEGIN / "corpus", "verification")))
    parameters = {name: sum(p.numel() for p in part.parameters()) for name, part in model.model.named_children()}
    return {
        "parameters": parameters,
        "held_out": asked,
        "right": shares,
        "perplexity of verification text": round(text, 3),
    }


def answered(model: Any, tokenizer: Any, kind: str, batch: Tensor, talk: Talk) -> list[bool]:
    """Say for each question, asked alone, whether greedy decoding gives the answer."""
    places = 256 if kind == "vision" else -(-batch.shape[1] // 16)
    ids, labels = padded([conversation(tokenizer, kind, places, [each]) for each in talk])
    made = logits(model, kind, batch.expand(len(talk), *batch.shape[1:]), ids)[:, :-1].argmax(-1)
    return [bool(row) for row in ((made == labels[:, 1:]) | (labels[:, 1:] == IGNORED)).all(-1)]


EXAMPLES = Path("try")
"""Where pictures and sounds to try lie, in the model's folder."""


def draw_examples(folder: Path) -> None:
    """Write two pictures and two sounds, held out, to try."""
    (folder / EXAMPLES).mkdir()
    draw = np.random.default_rng(HELD_OUT - 1)
    for colour, shape, size in (("red", "star", "large"), ("blue", "ring", "small")):
        drawing = Drawing(colour=colour, shape=shape, size=size)
        drawing.picture(draw)[0].save(folder / EXAMPLES / f"{size}-{colour}-{shape}.png")
    for name, tone in (("key-5", Tone(key=True, name=5)), ("note-a", Tone(key=False, name=5))):
        sound = HEARING.packed(HEARING.fitted(tone.sound(draw, 1.0)))
        (folder / EXAMPLES / f"{name}.wav").write_bytes(sound)


# ----------------------------------------------------------------------------------- command line


def train(target: Path, settings: Settings) -> None:
    """Train, check, measure, and replace `target`; what was learnt before a stop lies beside it."""
    state = target.with_name(f".{target.name}.state")
    state.mkdir(exist_ok=True)
    made = target.with_name(f".{target.name}.partial")
    shutil.rmtree(made, ignore_errors=True)
    made.mkdir()
    tokenizer = write_processor(made)
    media, model = Media(settings), make_model(settings)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    model.train()
    for tower in HEADS:
        learn_alone(model, tower, media, settings, state)
    learn_together(model, tokenizer, media, settings, state)
    save(model.eval(), made)
    train_tiny.check_parameters(model, before)
    draw_examples(made)
    report: dict[str, object] = {
        "settings": asdict(settings),
        "torch": torch.__version__,
    }
    report |= evaluate(made)
    write_json(made / "training.json", report)
    for name in train_tiny.TEXT_FILES:
        if (target / name).exists():
            shutil.copyfile(target / name, made / name)
    train_tiny.replace_folder(made, target)
    shutil.rmtree(state)
    say(json.dumps(report, indent=2, ensure_ascii=False))


def main() -> int:
    """Parse the command line and train or evaluate."""
    defaults = Settings()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("examples/tiny-gemma3n-senses"), help="folder of the model")
    for name in ("pictures", "alone", "joint", "threads"):
        parser.add_argument(
            f"--{name}", type=int, default=getattr(defaults, name), help=f"default {getattr(defaults, name)}"
        )
    parser.add_argument("--evaluate", action="store_true", help="measure the model in --out, train nothing")
    arguments = vars(parser.parse_args())
    out, measure = arguments.pop("out"), arguments.pop("evaluate")
    settings = Settings(**arguments)
    torch.set_num_threads(settings.threads)
    torch.manual_seed(settings.seed)
    if measure:
        say(json.dumps(evaluate(out), indent=2, ensure_ascii=False))
    else:
        train(out, settings)
    return 0


if __name__ == "__main__":
    sys.exit(main())
