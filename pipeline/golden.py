"""golden: the reference that every file is held against, computed by Hugging Face transformers in fp32.

Attention is eager, position ids count attended tokens as `generate` does, and nothing of this project's own graph code
runs here. Stored are final hidden states (after the last norm), from which `judge.reference` gets the logits.

On a GPU (`--device cuda`) the same fp32 arithmetic runs with TF32 off; a sample of windows is computed on the CPU as
well, and must agree to a normalised mean square error of 1e-8.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import save_file
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoTokenizer, GenerationConfig
from transformers.utils import logging as transformers_logging

from pipeline.core import log, manifest, memory
from pipeline.core.errors import IntegrityError, ResourceError, UsageError, VerificationError
from pipeline.core.manifest import Facts
from pipeline.core.recipe import PROJECT, Bundle, Corpus, Graphs, Recipe, Shapes
from pipeline.core.stage import Context, Outcome, Stage, main
from pipeline.judge import cache, corpus, metrics
from pipeline.judge.corpus import Tokens
from pipeline.judge.reference import Head

Floats = NDArray[np.float32]

# Names of the text tower inside a conditional-generation checkpoint → names in the text-only model.
_TEXT_TOWER = {r"^model\.language_model\.": "model.", r"^language_model\.(model|lm_head)\b": r"\1"}
_NOT_TEXT = ("vision_tower", "audio_tower", "embed_vision", "embed_audio", "multi_modal_projector")
_SCORES = 1 << 26
"""Attention scores that one layer may materialise per batch (256 MiB in fp32)."""
_MAX_ROWS = 16
_WORKING_MEMORY = 3 << 29
"""Bytes besides the weights: 1.3 GB were the peak with the shipped model."""
_SAMPLE_WINDOWS = 8
_DEVICE_NMSE = 1e-8


@dataclass(frozen=True)
class HuggingFace:
    """The fp32 reference model and the tokens that frame text."""

    model: Any
    tokenizer: Any
    bos: int
    pad: int
    stop: tuple[int, ...]

    @classmethod
    def load(cls, checkpoint: Path, device: str) -> HuggingFace:
        """Load the text model of `checkpoint`; vision and audio weights are left alone.

        Raises:
            IntegrityError: tensors are missing, have another shape, or belong to no part of the model.
        """
        transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # transformers ships no types
        config = AutoConfig.from_pretrained(checkpoint, local_files_only=True)
        options: dict[str, Any] = {"config": config.get_text_config(), "key_mapping": _TEXT_TOWER}
        # The class of the text configuration, and not AutoModelForCausalLM, which goes by the checkpoint's own type.
        kind: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(options["config"])]
        model, report = kind.from_pretrained(
            checkpoint,
            dtype=torch.float32,
            attn_implementation="eager",
            local_files_only=True,
            output_loading_info=True,
            **options,
        )
        _check_loaded(checkpoint, report)
        tokenizer = AutoTokenizer.from_pretrained(checkpoint, local_files_only=True)
        stop = model.generation_config.eos_token_id or model.config.eos_token_id or []
        return cls(
            model=model.eval().to(device),
            tokenizer=tokenizer,
            bos=int(_first(tokenizer.bos_token_id, model.config.bos_token_id)),
            pad=int(_first(tokenizer.pad_token_id, model.config.pad_token_id, 0)),
            stop=tuple(stop) if isinstance(stop, list) else (int(stop),),
        )

    def tokenize(self, text: str) -> list[int]:
        """Token ids without bos or other special tokens."""
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def as_turn(self, text: str) -> str:
        """`text` as the user's turn of a conversation, by the checkpoint's template, up to where the model answers."""
        turn = [{"role": "user", "content": text}]
        return str(self.tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True))

    def hidden(self, ids: Tokens, mask: Tokens, bar: log.Progress | None = None) -> Floats:
        """Final hidden states float32 [B, S, H] of `ids` and `mask` [B, S], in batches that bound the memory."""
        rows = min(_MAX_ROWS, max(1, _SCORES // (self.model.config.num_attention_heads * ids.shape[1] ** 2)))
        parts = []
        for start in range(0, len(ids), rows):
            attention, tokens = (
                torch.from_numpy(part[start : start + rows]).long().to(self.model.device) for part in (mask, ids)
            )
            with torch.inference_mode():
                output = self.model.model(
                    input_ids=tokens,
                    attention_mask=attention,
                    position_ids=(attention.cumsum(-1) - 1).clamp(min=0),
                    use_cache=False,
                )
            parts.append(output.last_hidden_state.cpu().numpy())
            if bar:
                bar.advance(tokens.numel())
        return np.concatenate(parts)

    def hidden_cached(self, ids: Tokens, count: int, bar: log.Progress) -> Floats:
        """Final hidden states float32 [B, count, H] of the last `count` tokens of `ids` [B, S], with the cache.

        What comes before is read at once, the last tokens one at a time.
        """
        tokens = torch.from_numpy(ids).long().to(self.model.device)
        seen, parts, start = None, [], tokens.shape[1] - count
        with torch.inference_mode():
            for begin, end in [(0, start), *((i, i + 1) for i in range(start, tokens.shape[1]))]:
                output = self.model.model(input_ids=tokens[:, begin:end], past_key_values=seen, use_cache=True)
                seen = output.past_key_values
                parts.append(output.last_hidden_state.cpu().numpy())
                bar.advance((end - begin) * len(ids))
        return np.concatenate(parts[1:], axis=1)

    def continue_greedily(self, prompt: str, count: int) -> dict[str, Any]:
        """At most `count` greedy tokens after bos and `prompt`, with the cache, as `generate` gives them.

        Per token, `margins` is how far it led, in logits, and `log_likelihoods` how likely it was, in nats.
        """
        ids = self.tokenize(prompt)
        ids = ids if ids[:1] == [self.bos] else [self.bos, *ids]
        tokens = torch.tensor([ids], device=self.model.device)
        settings = GenerationConfig(  # type: ignore[no-untyped-call]  # transformers ships no types for it
            max_new_tokens=count,
            do_sample=False,
            eos_token_id=list(self.stop),
            pad_token_id=self.pad,
            return_dict_in_generate=True,
            output_logits=True,
        )
        with torch.inference_mode():
            output = self.model.generate(tokens, attention_mask=torch.ones_like(tokens), generation_config=settings)
        added = output.sequences[0, len(ids) :].tolist()
        logits = torch.cat(output.logits).double()
        best = torch.topk(logits, 2).values.tolist()
        chosen = torch.log_softmax(logits, dim=-1)[torch.arange(len(added)), added].tolist()
        return {
            "prompt": prompt,
            "prompt_ids": ids,
            "continuation_ids": added,
            "text": self.tokenizer.decode(added, skip_special_tokens=True),
            "margins": [first - second for first, second in best],
            "log_likelihoods": chosen,
        }


def _first(*values: int | None) -> int:
    """The first value that is not None; 0 is a token like any other."""
    found = [value for value in values if value is not None]
    if not found:
        raise IntegrityError(
            "neither the tokenizer nor config.json names a bos token", remedy="add `bos_token_id` to config.json"
        )
    return found[0]


def _check_loaded(checkpoint: Path, report: dict[str, Any]) -> None:
    """Refuse a model in which transformers left a tensor at its initial value or ignored one that belongs to it."""
    extra = [key for key in report["unexpected_keys"] if not any(part in key for part in _NOT_TEXT)]
    wrong = {"missing": report["missing_keys"], "unknown": extra, "of another shape": report["mismatched_keys"]}
    found = [f"{kind}: {', '.join(map(str, sorted(keys)))}" for kind, keys in wrong.items() if keys]
    if found:
        raise IntegrityError(
            f"transformers can't load {checkpoint} whole: {'; '.join(found)}",
            cause="the checkpoint does not fit its config.json",
            remedy="fetch it again, or report it to the checkpoint's author",
        )


def choose_device(wanted: str) -> str:
    """`cuda` or `cpu` for `auto`, else what is asked for.

    Raises:
        ResourceError: cuda is asked for and there is none.
    """
    available = torch.cuda.is_available()
    if wanted == "cuda" and not available:
        raise ResourceError("there is no usable CUDA device", remedy="use DEVICE=cpu, or install the CUDA lock")
    if wanted == "cpu" or not available:
        return "cpu"
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.set_float32_matmul_precision("highest")
    return "cuda"


def make_corpus(reference: HuggingFace, windows: Tokens, file: Path) -> Floats:
    """Compute and store the hidden states of `windows`; returns them, float32 [N, L, H]."""
    with log.progress("reference on the corpus", windows.size, "tokens") as bar:
        hidden = reference.hidden(windows, np.ones_like(windows), bar)
    save_file({"input_ids": windows, "hidden": hidden}, file)
    return hidden


def make_shapes(reference: HuggingFace, shapes: Shapes, file: Path) -> int:
    """Compute and store the shape grid: per case ids, mask and the hidden state [B, H] of each row's last token."""
    rows = max(shapes.batch)
    vocabulary = reference.model.config.vocab_size
    families: dict[tuple[int, str], tuple[corpus.Batch, Floats]] = {}
    total = rows * sum(shapes.sequence) * len(shapes.padding)
    with log.progress("reference on the shape grid", total, "tokens") as bar:
        for sequence in shapes.sequence:
            for padding in shapes.padding:
                family = corpus.shape_family(
                    rows, sequence, padding, vocabulary=vocabulary, bos=reference.bos, pad=reference.pad
                )
                hidden = reference.hidden(family.input_ids, family.attention_mask, bar)
                last = sequence - 1 - family.attention_mask[:, ::-1].argmax(axis=1)
                families[sequence, padding] = family, hidden[np.arange(rows), last]
    tensors: dict[str, NDArray[Any]] = {}
    cases = list(corpus.shape_cases(shapes.batch, shapes.sequence, shapes.padding))
    for case in cases:
        family, hidden = families[case.sequence, case.padding]
        chosen = list(case.rows)
        tensors[f"{case.name}.input_ids"] = family.input_ids[chosen]
        tensors[f"{case.name}.attention_mask"] = family.attention_mask[chosen]
        tensors[f"{case.name}.hidden"] = hidden[chosen]
    save_file(tensors, file)
    return len(cases)


def self_floor(reference: HuggingFace, windows: Tokens, hidden: Floats, head: Head) -> Facts:
    """How far the reference is from itself: a few windows again with another number of threads, or on the CPU.

    A file's distance below this is noise of the reference.

    Raises:
        VerificationError: a GPU's hidden states differ from the CPU's by more than the tolerance.
    """
    device, threads = reference.model.device, torch.get_num_threads()
    windows, hidden = windows[:_SAMPLE_WINDOWS], hidden[:_SAMPLE_WINDOWS]
    other = 2 if device.type == "cpu" and threads == 1 else 1
    reference.model.to("cpu")
    torch.set_num_threads(threads if device.type == "cuda" else other)
    again = reference.hidden(windows, np.ones_like(windows))
    torch.set_num_threads(threads)
    reference.model.to(device)
    error = (again.astype(np.float64) - hidden) ** 2
    nmse = float(error.sum() / (hidden.astype(np.float64) ** 2).sum())
    if nmse > _DEVICE_NMSE:
        raise VerificationError(
            f"the reference differs from itself: NMSE {nmse:.1e} of hidden states, limit {_DEVICE_NMSE:.0e}",
            cause=f"{device.type} with {threads} threads does not compute in full fp32",
            remedy="run `make golden DEVICE=cpu`",
        )
    places = np.linspace(0, windows.size - 1, num=min(256, windows.size)).astype(np.int64)
    flat = [part.reshape(windows.size, -1)[places] for part in (hidden, again)]
    scores = metrics.compare(head.logits(flat[0]), head.logits(flat[1]))
    against = "CPU" if device.type == "cuda" else f"{other} instead of {threads} threads"
    return {
        "against": against,
        "positions": len(places),
        "nmse": nmse,
        "kld_mean": float(scores.kld.mean()),
        "kld_max": float(scores.kld.max()),
        "top1": float(scores.top1.mean()),
    }


def work(context: Context) -> Outcome:
    """Load the reference, run it on corpus, shapes and prompts, and store what it says."""
    recipe, checkpoint = context.recipe, context.root / "fetch" / "checkpoint"
    text = PROJECT / recipe.corpus.verification
    documents = corpus.read_documents(text)
    corpus.require_disjoint(documents, corpus.read_documents(PROJECT / recipe.corpus.calibration))
    device = choose_device(context.arguments.device)
    if device == "cpu":
        _require_memory(context.upstream["fetch"].facts["parameters"])
    log.step(f"loading the checkpoint in fp32 on {device}")
    reference = HuggingFace.load(checkpoint, device)
    windows = corpus.pack_windows(
        documents,
        reference.tokenize,
        bos=reference.bos,
        window=recipe.corpus.window,
        limit=max(1, recipe.corpus.positions // corpus.POSITIONS_PER_WINDOW),
    )
    hidden = make_corpus(reference, windows, context.folder / "corpus.safetensors")
    floor = self_floor(reference, windows, hidden, Head.of_checkpoint(checkpoint))
    cases = (
        0
        if context.graphs == "bundle"
        else make_shapes(reference, recipe.shapes, context.folder / "shapes.safetensors")
    )
    greedy = _greedy(reference, documents, recipe, context.graphs)
    spoken: Facts = (
        {} if context.graphs == "step" else make_recital(reference, documents, recipe.bundle, context.folder)
    )
    manifest.write_atomically(context.folder / "greedy.json", json.dumps(greedy, ensure_ascii=False, indent=1) + "\n")
    return Outcome(
        facts={
            "dtype": "float32",
            "attention": "eager",
            "device": device,
            "verification_sha256": hashlib.sha256(text.read_bytes()).hexdigest(),
            "documents": len(documents),
            "windows": len(windows),
            "window": recipe.corpus.window,
            "shape_cases": cases,
            "bos": reference.bos,
            "pad": reference.pad,
            "stop": list(reference.stop),
            "self_floor": dict(floor),
            **spoken,
        }
    )


def _require_memory(parameters: manifest.Fact) -> None:
    """Refuse a model whose float32 weights do not fit; a batch of attention scores and the libraries come on top."""
    assert isinstance(parameters, int)
    memory.require(
        4 * parameters + _WORKING_MEMORY,
        "the Hugging Face reference in float32",
        "run this stage on a larger machine, or on a GPU with DEVICE=cuda; `make int8` alone does not need it",
    )


def _greedy(reference: HuggingFace, documents: Sequence[str], recipe: Recipe, graphs: Graphs) -> list[dict[str, Any]]:
    """As many continuations, and as long, as step graph and bundles are held against.

    Every fourth prompt of a bundle is the same beginning as a chat turn, so that answers end at a stop token.
    """
    wanted: list[Corpus | Bundle] = [recipe.corpus] if graphs != "bundle" else []
    wanted += [recipe.bundle] if graphs != "step" else []
    prompts = corpus.pick_prompts(documents, max(each.prompts for each in wanted))
    if graphs != "step" and reference.tokenizer.chat_template:
        prompts[3::4] = [reference.as_turn(prompt) for prompt in prompts[3::4]]
    count = max(each.continuation for each in wanted)
    with log.progress("greedy continuations", len(prompts), "prompts") as bar:
        rows = []
        for prompt in prompts:
            rows.append(reference.continue_greedily(prompt, count))
            bar.advance()
    return rows


def make_recital(reference: HuggingFace, documents: Sequence[str], bundle: Bundle, folder: Path) -> Facts:
    """Compute and store what the reference says of the conversations that go through the cache.

    Raises:
        UsageError: the verification text is too short for them.
    """
    script, _ = cache.scripts(bundle, reference.model.config.sliding_window)
    tokens = corpus.pack_windows(documents, reference.tokenize, bos=reference.bos, window=script.length, limit=2)
    if len(tokens) < 2:
        raise UsageError(
            f"the verification text is too short for two conversations of {script.length} tokens",
            remedy="give more text, or lower bundle.decode in the recipe",
        )
    with log.progress("reference through the cache", 2 * tokens.size, "tokens") as bar:
        hidden = reference.hidden(tokens, np.ones_like(tokens), bar)
        cached = reference.hidden_cached(tokens, bundle.decode, bar)
    save_file({"input_ids": tokens, "hidden": hidden, "cached": cached}, folder / "cache.safetensors")
    return {"sliding_window": reference.model.config.sliding_window, "conversation": script.length}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The device."""
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where the reference runs")


STAGE = Stage(
    name="golden",
    summary="Compute the Hugging Face fp32 reference on the verification text and the shape grid.",
    needs=("fetch",),
    work=work,
    add_arguments=add_arguments,
)

if __name__ == "__main__":
    sys.exit(main(STAGE))
