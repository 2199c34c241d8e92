"""Train the Gemma 3n model that ships with the project, from the corpus that ships with it.

    python tools/train_tiny.py                 # examples/tiny-gemma3n, about a quarter of an hour on two cores
    python tools/train_tiny.py --evaluate      # only measure what is there

The model has every structural feature of Gemma 3n at a size that a test can convert in seconds. It
is trained because quality gates mean nothing on the flat logits of random weights, and because fresh
weights hide faults: transformers starts `correct_output_scale` at zero and every norm at one, so a
converter that drops them still agrees. Here no parameter starts at a constant, and none ends at one.

Everything is transformers' own `Gemma3nForCausalLM`; nothing about the forward pass is rewritten.
Same seed, versions, thread count and processor type should give the same weights.
"""

from __future__ import annotations

import argparse
import collections
import copy
import io
import itertools
import json
import math
import random
import re
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import sentencepiece
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma3nForCausalLM, Gemma3nTextConfig, GenerationConfig
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

PAD, EOS, BOS, UNK = range(4)
SYMBOLS = ("<mask>", "<start_of_turn>", "<end_of_turn>", "\n")
"""User-defined pieces, ids 4 to 7. `<mask>` is there because transformers' class would add it at the end."""
END_OF_TURN = 6
PIECES = 1990
TEXT_FILES = ("README.md", "LICENSE")
"""Written by hand, kept when the folder is replaced."""

GEOMETRY = {
    "vocab_size": 2048,
    "vocab_size_per_layer_input": 2016,
    "hidden_size": 128,
    "num_hidden_layers": 8,
    "intermediate_size": [512, 512, 512, 512, 384, 384, 256, 256],
    "activation_sparsity_pattern": [0.95] * 3 + [0.0] * 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "hidden_size_per_layer_input": 16,
    "laurel_rank": 16,
    "altup_num_inputs": 4,
    "altup_active_idx": 0,
    "altup_correct_scale": True,
    "sliding_window": 16,
    "layer_types": (["sliding_attention"] * 3 + ["full_attention"]) * 2,
    "num_kv_shared_layers": 3,
    "final_logit_softcapping": 30.0,
    "tie_word_embeddings": True,
    "max_position_embeddings": 2048,
    "rope_parameters": {
        "full_attention": {"rope_type": "default", "rope_theta": 1_000_000.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
    },
}

CHAT_TEMPLATE = """\
{{- bos_token -}}
{%- if messages[0]['role'] == 'system' -%}
    {%- if messages[0]['content'] is string -%}
        {%- set prefix = messages[0]['content'] + '\\n\\n' -%}
    {%- else -%}
        {%- set prefix = messages[0]['content'][0]['text'] + '\\n\\n' -%}
    {%- endif -%}
    {%- set turns = messages[1:] -%}
{%- else -%}
    {%- set prefix = '' -%}
    {%- set turns = messages -%}
{%- endif -%}
{%- for message in turns -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{- raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') -}}
    {%- endif -%}
    {%- if message['role'] == 'assistant' -%}
        {%- set role = 'model' -%}
    {%- else -%}
        {%- set role = message['role'] -%}
    {%- endif -%}
    {{- '<start_of_turn>' + role + '\\n' -}}
    {%- if loop.first -%}
        {{- prefix -}}
    {%- endif -%}
    {%- if message['content'] is string -%}
        {{- message['content'] | trim -}}
    {%- else -%}
        {%- for item in message['content'] -%}
            {%- if item['type'] == 'text' -%}
                {{- item['text'] | trim -}}
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
    {{- '<end_of_turn>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<start_of_turn>model\\n' -}}
{%- endif -%}
"""

PROMPTS = (
    "And it came to pass",
    "The LORD is my",
    "Everyone has the right to",
    "Toute personne a droit",
    "ⴽⴰⵢⴳⴰⵜ ⵢⴰⵏ",
    "لكل شخص",
    "😀",
)
QUESTIONS = ("😀", "What is 🐙?", "Name this: 🍕", "Show me: octopus", "English: article 3?")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How to train. The defaults made the shipped weights."""

    steps: int = 1600
    tokens_per_step: int = 1024
    lengths: tuple[int, ...] = (64, 128, 256)
    length_weights: tuple[int, ...] = (2, 4, 4)
    peak_rate: float = 3e-3
    warm_up: int = 80
    weight_decay: float = 0.1
    gradient_limit: float = 1.0
    rare_repeats: int = 2
    """How often an epoch repeats conversations and lines beyond ASCII; the Bible is nine tenths of the text."""
    seed: int = 20261124
    threads: int = 2


def say(text: str) -> None:
    """Tell the person at the terminal. The one place that prints."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


# ---------------------------------------------------------------------------- corpus and tokenizer


def read_lines(corpus: Path, split: str) -> list[str]:
    """Return the documents of a split."""
    return (corpus / f"{split}.txt").read_text(encoding="utf-8").splitlines()


def read_chats(corpus: Path, split: str) -> list[tuple[str, str]]:
    """Return the conversations of a split, as (user, model)."""
    lines = (corpus / f"chat-{split}.jsonl").read_text(encoding="utf-8").splitlines()
    return [(chat["user"], chat["model"]) for chat in map(json.loads, lines)]


def is_rare(line: str) -> bool:
    """Say whether a line is beyond ASCII, which the Bible never is."""
    return not line.isascii()


def train_tokenizer(lines: Sequence[str]) -> bytes:
    """Return a SentencePiece BPE model with byte fallback, set up as Gemma's is.

    Lines beyond ASCII count twice, so that Tifinagh, Arabic and Cyrillic get pieces of their own.
    The coverage leaves rare Chinese characters and some emoji to bytes: that path must run too.
    """
    weighted = [line for line in lines for _ in range(2 if is_rare(line) else 1)]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(weighted),
        model_writer=model,
        model_type="bpe",
        vocab_size=PIECES,
        byte_fallback=True,
        character_coverage=0.999,
        pad_id=PAD,
        eos_id=EOS,
        bos_id=BOS,
        unk_id=UNK,
        pad_piece="<pad>",
        eos_piece="<eos>",
        bos_piece="<bos>",
        unk_piece="<unk>",
        user_defined_symbols=list(SYMBOLS),
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


def write_tokenizer(model: bytes, folder: Path) -> PreTrainedTokenizerBase:
    """Write the tokenizer files and return the tokenizer read back from them."""
    (folder / "tokenizer.model").write_bytes(model)
    settings = {
        "tokenizer_class": "GemmaTokenizer",
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
        "mask_token": "<mask>",
        "add_bos_token": True,
        "add_eos_token": False,
        "extra_special_tokens": ["<start_of_turn>", "<end_of_turn>"],
        "clean_up_tokenization_spaces": False,
        "model_max_length": GEOMETRY["max_position_embeddings"],
    }
    text = json.dumps(settings, indent=2) + "\n"
    (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    AutoTokenizer.from_pretrained(folder).save_pretrained(folder)
    # transformers 5.23.0 writes the absolute path of tokenizer.model into this file: write ours again.
    (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")
    return AutoTokenizer.from_pretrained(folder)


def tokenizer_samples(corpus: Path) -> list[str]:
    """Return strings that tokenizers tend to disagree on, and lines of every script."""
    awkward = [" ", "  a", "a  b   c    d ", "\n", "a\nb\n\nc", "\n leading", "tab\there", "x" * 50, "1234567", "é"]
    awkward += ["<start_of_turn>user\n😀<end_of_turn>\n", "漢字かな한글", "ⵣ ⴰⵎⴰⵣⵉⵖ", "سلام  عليكم", "﷽", "🫠🪿"]
    lines = read_lines(corpus, "verification") + read_lines(corpus, "calibration")
    return awkward + lines + [f"  {line[:40]}  \n{line[40:80]}" for line in lines[:100]]


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, model: bytes, samples: Sequence[str]) -> None:
    """Raise unless the tokenizer agrees with SentencePiece, gives every text back, and fits the tables."""
    pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
    assert len(tokenizer) == pieces.vocab_size() <= GEOMETRY["vocab_size_per_layer_input"], len(tokenizer)
    assert [tokenizer.convert_tokens_to_ids(t) for t in SYMBOLS] == [4, 5, 6, 7]
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id) == (PAD, EOS, BOS)
    for text in samples:
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert ids == pieces.encode(text), (text, ids, pieces.encode(text))
        assert tokenizer.decode(ids) == text, (text, tokenizer.decode(ids))
        assert tokenizer.encode(text) == [BOS, *ids], text
    messages = [{"role": "system", "content": "S"}, {"role": "user", "content": " 😀 "}]
    messages += [{"role": "assistant", "content": "a"}, {"role": "user", "content": [{"type": "text", "text": "b"}]}]
    expected = (
        "<bos><start_of_turn>user\nS\n\n😀<end_of_turn>\n<start_of_turn>model\na<end_of_turn>\n"
        "<start_of_turn>user\nb<end_of_turn>\n<start_of_turn>model\n"
    )
    rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert rendered == expected, rendered


def document_ids(tokenizer: PreTrainedTokenizerBase, line: str) -> list[int]:
    """Return `<bos>` text `<eos>`."""
    return [*tokenizer.encode(line), EOS]


def chat_ids(tokenizer: PreTrainedTokenizerBase, user: str, model: str | None) -> list[int]:
    """Return the ids of a conversation; without an answer it ends where the model's turn begins."""
    messages = [{"role": "user", "content": user}]
    if model is not None:
        messages.append({"role": "assistant", "content": model})
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=model is None)
    return list(tokenizer.encode(text, add_special_tokens=False))


def split_ids(tokenizer: PreTrainedTokenizerBase, corpus: Path, split: str) -> list[list[int]]:
    """Return every document and conversation of a split as ids."""
    lines = [document_ids(tokenizer, line) for line in read_lines(corpus, split)]
    return lines + [chat_ids(tokenizer, user, model) for user, model in read_chats(corpus, split)]


def training_documents(tokenizer: PreTrainedTokenizerBase, corpus: Path, rare_repeats: int) -> list[list[int]]:
    """Return the documents of one epoch as ids."""
    documents = []
    for line in read_lines(corpus, "train"):
        documents += [document_ids(tokenizer, line)] * (rare_repeats if is_rare(line) else 1)
    for user, model in read_chats(corpus, "train"):
        documents += [chat_ids(tokenizer, user, model)] * rare_repeats
    return documents


def batches(documents: list[list[int]], settings: Settings) -> Iterator[torch.Tensor]:
    """Yield int64 [rows, length + 1] for ever: shuffled documents, packed, every row after a `<bos>`.

    Rows times length is `tokens_per_step` whatever the length, so steps cost about the same.
    """
    rng = random.Random(settings.seed)
    stream: list[int] = []
    while True:
        length = rng.choices(settings.lengths, settings.length_weights)[0]
        rows = []
        for _ in range(settings.tokens_per_step // length):
            while len(stream) < length + 1:
                stream += [i for document in rng.sample(documents, len(documents)) for i in document]
            start = 1 if stream[0] == BOS else 0
            rows.append([BOS, *stream[start : start + length]])
            del stream[: start + length]
        yield torch.tensor(rows)


# ------------------------------------------------------------------------------------------ model


def initial(name: str, parameter: torch.Tensor) -> tuple[float, float]:
    """Return mean and standard deviation to start a parameter from.

    Norms start small after a block (calm residual stream, which int8 likes), query and key norms at
    the fourth root of 1/head_dim because Gemma 3n does not scale its scores otherwise, and the AltUp
    router large because its input is divided by the hidden size.
    """
    if re.search(r"[qk]_norm", name):
        return GEOMETRY["head_dim"] ** -0.25, 0.03
    if re.search(r"post_(attention|feedforward|laurel|per_layer_input)", name):
        return 0.4, 0.05
    if name.endswith("norm.weight") or "correct_output_scale" in name:
        return 1.0, 0.1
    if "modality_router" in name:
        return 0.0, 3.0
    if "coefs" in name:
        return 0.0, 0.1
    if "embed_tokens_per_layer" in name:
        return 0.0, 0.2
    if "embed_tokens" in name:
        return 0.0, 0.05
    return 0.0, parameter.shape[-1] ** -0.5


def make_model(settings: Settings) -> Gemma3nForCausalLM:
    """Return the untrained model in float32, no parameter at a constant."""
    model = Gemma3nForCausalLM(Gemma3nTextConfig(**GEOMETRY))
    generator = torch.Generator().manual_seed(settings.seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            mean, deviation = initial(name, parameter)
            parameter.copy_(mean + deviation * torch.randn(parameter.shape, generator=generator))
            if "altup_projections" in name or "altup_unembed" in name:
                # Near the identity, or three quarters of the final state would be a random mixture at first.
                parameter.mul_(0.3).add_(torch.eye(parameter.shape[0]))
    return model


def make_optimizer(model: torch.nn.Module, settings: Settings) -> torch.optim.AdamW:
    """Return AdamW that decays matrices only: decay would pull norms and scales to the zero they must not reach."""
    decayed, kept = [], []
    for name, parameter in model.named_parameters():
        (decayed if parameter.ndim > 1 and "embed" not in name else kept).append(parameter)
    groups = [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": kept, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=settings.peak_rate, betas=(0.9, 0.98), fused=True)


def rate(step: int, settings: Settings) -> float:
    """Return the learning rate of a step: linear warm-up, then a cosine to nearly zero."""
    if step < settings.warm_up:
        return settings.peak_rate * (step + 1) / settings.warm_up
    part = (step - settings.warm_up) / max(1, settings.steps - settings.warm_up)
    return settings.peak_rate * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * part)))


def cross_entropy(model: Gemma3nForCausalLM, rows: torch.Tensor, reduction: str = "mean") -> torch.Tensor:
    """Return the loss of int64 [rows, length + 1], each token predicted from those before it."""
    logits = model(input_ids=rows[:, :-1], use_cache=False).logits
    return functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten(), reduction=reduction)


def fit(model: Gemma3nForCausalLM, documents: list[list[int]], settings: Settings) -> float:
    """Train in place and return the seconds it took."""
    optimizer = make_optimizer(model, settings)
    model.train()
    started = time.monotonic()
    average = math.nan
    for step, rows in zip(range(settings.steps), batches(documents, settings), strict=False):
        for group in optimizer.param_groups:
            group["lr"] = rate(step, settings)
        loss = cross_entropy(model, rows)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.gradient_limit)
        optimizer.step()
        optimizer.zero_grad()
        average = loss.item() if step == 0 else 0.97 * average + 0.03 * loss.item()
        if (step + 1) % 50 == 0:
            seconds = time.monotonic() - started
            left = seconds / (step + 1) * (settings.steps - step - 1)
            speed = settings.tokens_per_step * (step + 1) / seconds
            done = f"step {step + 1}/{settings.steps}"
            say(f"{done}  loss {average:.3f}  {speed:,.0f} tokens/s  {left / 60:.1f} min left")
    model.eval()
    return time.monotonic() - started


def check_parameters(model: torch.nn.Module, before: dict[str, torch.Tensor]) -> None:
    """Raise unless every parameter is finite, varied, away from 0 and 1, and was moved by training."""
    for name, parameter in model.named_parameters():
        value = parameter.detach().float()
        assert torch.isfinite(value).all(), name
        assert value.unique().numel() > 4 and value.std() > 1e-3, f"{name} is (nearly) constant"
        for constant in (0.0, 1.0):
            assert (value - constant).abs().mean() > 1e-2, f"{name} is close to {constant}"
        assert (value - before[name]).abs().mean() > 1e-4, f"{name} was not trained"


def save(model: Gemma3nForCausalLM, folder: Path) -> None:
    """Write config.json, generation_config.json and model.safetensors in bfloat16; round `model` to it.

    The rounded copy is loaded back and must give the same logits, with no key too many or too few.
    """
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16())
    generation = GenerationConfig(bos_token_id=BOS, eos_token_id=[EOS, END_OF_TURN], pad_token_id=PAD, do_sample=False)
    stored = copy.deepcopy(model).bfloat16()
    stored.generation_config = generation
    stored.save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)
    reloaded, report = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    ids = torch.arange(3, 3 + 256).reshape(2, 128)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, reloaded(ids).logits), "the saved model gives other logits"


# ------------------------------------------------------------------------------------- evaluation


def bigram_loss(train: Sequence[Sequence[int]], test: Sequence[Sequence[int]], discount: float = 0.75) -> float:
    """Return the mean loss (nats per token) on `test` of an interpolated Kneser-Ney bigram model of `train`.

    Kneser and Ney 1995, as in Chen and Goodman 1998, with the unigram level interpolated with the
    uniform distribution.
    """
    pairs = collections.Counter(pair for ids in train for pair in itertools.pairwise(ids))
    starts: collections.Counter[int] = collections.Counter()
    followers: collections.Counter[int] = collections.Counter()
    histories: collections.Counter[int] = collections.Counter()
    for (first, second), count in pairs.items():
        starts[first] += count
        followers[first] += 1
        histories[second] += 1
    kinds = len(pairs)
    spare = discount * len(histories) / kinds / GEOMETRY["vocab_size"]
    total = tokens = 0.0
    for ids in test:
        for first, second in itertools.pairwise(ids):
            probability = max(histories[second] - discount, 0) / kinds + spare
            if starts[first]:
                seen = max(pairs[first, second] - discount, 0) / starts[first]
                probability = seen + discount * followers[first] / starts[first] * probability
            total -= math.log(probability)
            tokens += 1
    return total / tokens


@torch.no_grad()
def model_loss(model: Gemma3nForCausalLM, documents: Sequence[Sequence[int]]) -> float:
    """Return the mean loss (nats per token) over documents, each read from its `<bos>`."""
    total = sum(cross_entropy(model, torch.tensor([ids]), reduction="sum").item() for ids in documents)
    return total / sum(len(ids) - 1 for ids in documents)


def windows(documents: Sequence[Sequence[int]], length: int) -> list[list[int]]:
    """Return the documents joined and cut into full windows."""
    stream = [i for ids in documents for i in ids]
    return [stream[start : start + length] for start in range(0, len(stream) - length + 1, length)]


@torch.no_grad()
def greedy(model: Gemma3nForCausalLM, ids: list[int], tokenizer: PreTrainedTokenizerBase, length: int = 32) -> str:
    """Return the most likely continuation of a prompt."""
    prompt = torch.tensor([ids])
    made = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=length, do_sample=False)
    return str(tokenizer.decode(made[0, len(ids) :], skip_special_tokens=True))


def evaluate(folder: Path, corpus: Path) -> dict[str, object]:
    """Measure the saved bfloat16 weights (computed in float32) on the verification split."""
    torch.set_num_threads(1)  # one short text at a time: a second thread costs more than it gives
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    train, test = (split_ids(tokenizer, corpus, split) for split in ("train", "verification"))
    lines = [document_ids(tokenizer, line) for line in read_lines(corpus, "verification")]
    chats = test[len(lines) :]
    rare = [ids for ids, line in zip(lines, read_lines(corpus, "verification"), strict=True) if is_rare(line)]
    plain = [ids for ids, line in zip(lines, read_lines(corpus, "verification"), strict=True) if not is_rare(line)]
    perplexity = {
        "verification": math.exp(model_loss(model, test)),
        "verification, bigram model": math.exp(bigram_loss(train, test)),
        "verification, ASCII lines": math.exp(model_loss(model, plain)),
        "verification, other lines": math.exp(model_loss(model, rare)),
        "verification, conversations": math.exp(model_loss(model, chats)),
        "verification, windows of 256": math.exp(model_loss(model, windows(test, 256))),
        "verification, windows of 1024": math.exp(model_loss(model, windows(test, 1024))),
        "train, every 40th document": math.exp(model_loss(model, train[::40])),
    }
    questions = read_chats(corpus, "verification")
    right = sum(greedy(model, chat_ids(tokenizer, user, None), tokenizer) == answer for user, answer in questions)
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "train_tokens": sum(map(len, train)),
        "verification_tokens": sum(len(ids) - 1 for ids in test),
        "perplexity": {name: round(value, 3) for name, value in perplexity.items()},
        "held_out_questions": {"asked": len(questions), "right": right},
        "greedy": {text: greedy(model, tokenizer.encode(text), tokenizer) for text in PROMPTS},
        "greedy_chat": {text: greedy(model, chat_ids(tokenizer, text, None), tokenizer) for text in QUESTIONS},
    }


# ----------------------------------------------------------------------------------- command line


def replace_folder(made: Path, target: Path) -> None:
    """Put `made` where `target` is, with two renames, so that nobody meets a half-written folder."""
    old = target.with_name(f".{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    made.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def train(target: Path, corpus: Path, settings: Settings) -> None:
    """Train, check, measure, and replace `target`."""
    made = target.with_name(f".{target.name}.partial")
    shutil.rmtree(made, ignore_errors=True)
    shutil.copytree(corpus, made / "corpus")
    turns = [text for chat in read_chats(corpus, "train") for text in chat]
    pieces = train_tokenizer(read_lines(corpus, "train") + turns)
    tokenizer = write_tokenizer(pieces, made)
    check_tokenizer(tokenizer, pieces, tokenizer_samples(corpus))
    model = make_model(settings)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    documents = training_documents(tokenizer, corpus, settings.rare_repeats)
    epochs = settings.steps * settings.tokens_per_step / sum(map(len, documents))
    say(f"{sum(p.numel() for p in model.parameters()):,} parameters, {epochs:.1f} epochs")
    seconds = fit(model, documents, settings)
    save(model, made)
    check_parameters(model, before)
    report = {"settings": asdict(settings), "seconds": round(seconds), "torch": torch.__version__}
    report |= evaluate(made, corpus)
    text = json.dumps(report, indent=2, ensure_ascii=False) + "\n"
    (made / "training.json").write_text(text, encoding="utf-8")
    for name in TEXT_FILES:
        if (target / name).exists():
            shutil.copyfile(target / name, made / name)
    replace_folder(made, target)
    say(text)


def main() -> int:
    """Parse the command line and train or evaluate."""
    defaults = Settings()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("examples/tiny-gemma3n"), help="folder of the model")
    parser.add_argument("--corpus", type=Path, help="folder of the corpus (default: corpus/ in the model's folder)")
    parser.add_argument("--steps", type=int, default=defaults.steps, help=f"training steps (default {defaults.steps})")
    parser.add_argument("--seed", type=int, default=defaults.seed, help=f"default {defaults.seed}")
    parser.add_argument("--threads", type=int, default=defaults.threads, help=f"default {defaults.threads}")
    parser.add_argument("--evaluate", action="store_true", help="measure the model in --out, train nothing")
    arguments = parser.parse_args()
    corpus = arguments.corpus or arguments.out / "corpus"
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    torch.use_deterministic_algorithms(mode=True)
    if arguments.evaluate:
        say(json.dumps(evaluate(arguments.out, corpus), indent=2, ensure_ascii=False))
    else:
        train(arguments.out, corpus, Settings(steps=arguments.steps, seed=arguments.seed, threads=arguments.threads))
    return 0


if __name__ == "__main__":
    sys.exit(main())
