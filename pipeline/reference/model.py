"""Hugging Face transformers as the reference: fp32, eager attention, position ids that count attended tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
)
from transformers.utils import logging as transformers_logging

from pipeline.checkpoint import chat, names, reading
from pipeline.checkpoint.reader import open_checkpoint
from pipeline.core import log
from pipeline.core.errors import IntegrityError
from pipeline.judge.reference import Greedy
from pipeline.reference import streaming
from pipeline.reference.linear import multiply_by_onednn

Floats = NDArray[np.float32]
Tokens = NDArray[np.int32]

# Names in a checkpoint, of a wrapped model or one with towers, → names in the text-only model, one after the other.
_TEXT_TOWER = {
    names.WRAPPERS.pattern: "",
    r"^model\.language_model\.(?:model\.)?": "model.",
    r"^language_model\.(model|lm_head)\b": r"\1",
    r"^model\.lm_head\.": "lm_head.",
}
_NOT_TEXT = ("vision_tower", "audio_tower", "embed_vision", "embed_audio", "multi_modal_projector")
_SCORES = 1 << 26
"""Attention scores that one layer may materialise per batch (256 MiB in fp32)."""
_MAX_ROWS = 16
_MAX_TOKENS = 1 << 10
"""Tokens that go through the model at once: 1.5 GB of activations with Gemma 3n E2B's widths."""


@dataclass(frozen=True)
class HuggingFace:
    """The fp32 reference model and the tokens that frame text.

    `bos` stands before every text, and before a prompt if `begins`, as in LiteRT-LM.
    """

    model: Any  # its class is the checkpoint's, and transformers' types stop short of calls
    tokenizer: chat.Tokenizer
    device: str
    bos: int
    begins: bool
    pad: int
    stop: tuple[int, ...]

    @classmethod
    def load(
        cls, checkpoint: Path, device: str, *, streamed: bool = False, dtype: torch.dtype = torch.float32
    ) -> HuggingFace:
        """Load the text model of `checkpoint`; vision and audio weights are left alone.

        Args:
            checkpoint: a folder as Hugging Face has them.
            device: where the model runs, as torch calls it.
            streamed: read each matrix when it is needed (see `streaming`), on the CPU and in float32.
            dtype: what it computes in; the reference is float32.

        Raises:
            IntegrityError: tensors are missing, have another shape, or belong to no part of the model.
        """
        transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # transformers ships no types
        whole = AutoConfig.from_pretrained(checkpoint, local_files_only=True)
        config = whole.get_text_config()
        config.tie_word_embeddings = whole.tie_word_embeddings  # transformers asks the whole model's configuration
        for part in (whole, config):  # what is quantised never comes here: a left-over of the training
            vars(part).pop("quantization_config", None)
        # The class of the text configuration, and not AutoModelForCausalLM, which goes by the checkpoint's own type.
        kind: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
        opened = open_checkpoint(checkpoint)
        # transformers would want a library of its own for what is packed: it gets the values instead.
        packed = any(tensor.scale for tensor in opened.tensors.values())
        values = {name: torch.from_numpy(opened.read(name).copy()) for name in opened.tensors} if packed else None
        model, report = (
            streaming.load(kind, config, opened, _TEXT_TOWER)
            if streamed
            else kind.from_pretrained(
                None if packed else checkpoint,
                state_dict=values,
                config=config,
                key_mapping=_TEXT_TOWER,
                dtype=dtype,
                attn_implementation="eager",
                local_files_only=True,
                output_loading_info=True,
            )
        )
        _check_loaded(checkpoint, report)
        if device == "cpu" and dtype is torch.float32:
            multiply_by_onednn(model)
        if streamed or packed:
            model.generation_config = _generation_config(checkpoint)
        conventions = reading.read(opened)
        return cls(
            model=model.eval() if streamed else model.eval().to(device),
            tokenizer=conventions.tokenizer,
            device=device,
            bos=conventions.first,
            begins=conventions.begins,
            pad=conventions.pad,
            stop=conventions.stop,
        )

    @property
    def cap(self) -> float | None:
        """The soft-cap of its logits; a configuration that does not name it has its class's."""
        cap: float | None = getattr(self.model.config, "final_logit_softcapping", None)
        return cap

    def tokenize(self, text: str) -> list[int]:
        """Token ids without bos or other special tokens."""
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def as_turn(self, text: str) -> str:
        """`text` as the user's turn of a conversation, by the checkpoint's template, up to where the model answers."""
        return self.as_prompt([{"role": "user", "content": text}])

    def as_prompt(self, messages: Sequence[Mapping[str, str]]) -> str:
        """A conversation up to where the model answers; without a template what was said last, as it is."""
        return chat.render(self.tokenizer, messages, prompt=True)

    def without_stop(self, ids: Sequence[int]) -> str:
        """The text of a continuation without the token that ended it, as LiteRT-LM gives it."""
        return str(self.tokenizer.decode(ids[:-1] if ids and ids[-1] in self.stop else ids))

    def render(self, messages: Sequence[Mapping[str, str]]) -> str:
        """A conversation as the checkpoint's template has it; its contents alone where there is no template.

        Raises:
            UsageError: the template refuses it.
        """
        return chat.render(self.tokenizer, messages)

    def batches(self, ids: Tokens) -> list[slice]:
        """The rows of `ids` [B, S] that go through the model together, which bounds the memory."""
        length = ids.shape[1]
        # Eager attention lays all scores of a layer out.
        scores = self.model.config.num_attention_heads * length**2
        rows = max(1, min(_MAX_ROWS, _SCORES // scores, _MAX_TOKENS // length))
        return [slice(start, start + rows) for start in range(0, len(ids), rows)]

    def hidden(self, ids: Tokens, mask: Tokens, bar: log.Progress | None = None) -> Floats:
        """Final hidden states float32 [B, S, H] of `ids` and `mask` [B, S], in batches."""
        parts = []
        for rows in self.batches(ids):
            attention, tokens = (torch.from_numpy(part[rows]).long().to(self.device) for part in (mask, ids))
            with torch.inference_mode():
                output = self.model.model(
                    input_ids=tokens,
                    attention_mask=attention,
                    # Padding on the left moves no token: its positions count attended ones alone.
                    position_ids=(attention.cumsum(-1) - 1).clamp(min=0),
                    use_cache=False,
                )
            parts.append(output.last_hidden_state.float().cpu().numpy())
            if bar:
                bar.advance(tokens.numel())
        return np.concatenate(parts)

    def hidden_cached(self, ids: Tokens, count: int, bar: log.Progress) -> Floats:
        """Final hidden states float32 [B, count, H] of the last `count` tokens of `ids` [B, S], with the cache.

        What comes before is read in chunks, the last tokens one at a time.
        """
        tokens = torch.from_numpy(ids).long().to(self.device)
        seen, parts, start = None, [], tokens.shape[1] - count
        edges = [*range(0, start, max(1, _MAX_TOKENS // len(ids))), *range(start, tokens.shape[1] + 1)]
        with torch.inference_mode():
            for begin, end in pairwise(edges):
                output = self.model.model(input_ids=tokens[:, begin:end], cache=seen, use_cache=True)
                seen = output.cache
                parts.append(output.last_hidden_state.cpu().numpy())
                bar.advance((end - begin) * len(ids))
        return np.concatenate(parts[-count:], axis=1)

    def continue_greedily(self, prompts: Sequence[str], count: int, bar: log.Progress) -> list[Greedy]:
        """At most `count` greedy tokens after each of `prompts`, with the cache, as `generate` gives them.

        All prompts go through the model together, padded on the left. Per token, `margins` is how far it led, in
        logits, and `log_likelihoods` how likely it was, in nats. `bar` is advanced by a token of all prompts at a time.
        """
        asked = [self.begin(prompt) for prompt in prompts]
        longest = max(map(len, asked))
        ids = torch.tensor([[self.pad] * (longest - len(row)) + row for row in asked], device=self.device)
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in asked], device=self.device)
        settings = GenerationConfig(  # type: ignore[no-untyped-call]  # transformers ships no types for it
            max_new_tokens=count, do_sample=False, eos_token_id=list(self.stop), pad_token_id=self.pad
        )
        leads = _Leads(bar)
        with torch.inference_mode():
            output = self.model.generate(
                ids, attention_mask=mask, generation_config=settings, logits_processor=LogitsProcessorList([leads])
            )
        added = [self._ended(row) for row in output[:, longest:].tolist()]
        margins, likelihoods = (list(zip(*steps, strict=True)) for steps in (leads.margins, leads.log_likelihoods))
        return [
            Greedy(
                prompt=prompts[row],
                prompt_ids=asked[row],
                continuation_ids=new,
                text=self.tokenizer.decode(new, skip_special_tokens=True),
                margins=list(margins[row][: len(new)]),
                log_likelihoods=list(likelihoods[row][: len(new)]),
            )
            for row, new in enumerate(added)
        ]

    def begin(self, prompt: str) -> list[int]:
        """Token ids of a prompt, with bos before them if prompts begin so."""
        ids = self.tokenize(prompt)
        return [self.bos, *ids] if self.begins and ids[:1] != [self.bos] else ids

    def _ended(self, tokens: list[int]) -> list[int]:
        """Up to the first stop token, which is included; what follows is padding."""
        return tokens[: next((i + 1 for i, token in enumerate(tokens) if token in self.stop), None)]


class _Leads(LogitsProcessor):
    """Looks at the logits [B, V] of each step and keeps two numbers a row; all of them would be gigabytes."""

    def __init__(self, bar: log.Progress) -> None:
        self.bar = bar
        self.margins: list[list[float]] = []
        self.log_likelihoods: list[list[float]] = []

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """`scores` as they are."""
        # A lead of 1e-4 between logits near 30 is at the end of what float32 holds.
        wide = scores.double()
        first, second = torch.topk(wide, 2).values.unbind(-1)
        self.margins.append((first - second).tolist())
        self.log_likelihoods.append((first - wide.logsumexp(-1)).tolist())
        self.bar.advance(len(input_ids))
        return scores


def _generation_config(checkpoint: Path) -> GenerationConfig:
    """`generation_config.json`, or transformers' defaults where there is none."""
    if (checkpoint / "generation_config.json").is_file():
        return GenerationConfig.from_pretrained(checkpoint, local_files_only=True)
    return GenerationConfig()  # type: ignore[no-untyped-call]  # transformers ships no types for it


def _check_loaded(checkpoint: Path, report: streaming.Report) -> None:
    """Refuse a model in which transformers left a tensor at its initial value or ignored one that belongs to it."""
    extra = [
        key
        for key in report["unexpected_keys"]
        if not any(part in str(key) for part in _NOT_TEXT) and not names.LEFT_OVERS.search(str(key))
    ]
    wrong = {"missing": report["missing_keys"], "unknown": extra, "of another shape": report["mismatched_keys"]}
    found = [f"{kind}: {', '.join(sorted(map(str, keys)))}" for kind, keys in wrong.items() if keys]
    if found:
        raise IntegrityError(
            f"transformers can't load {checkpoint} whole: {'; '.join(found)}",
            cause="the checkpoint does not fit its config.json",
            remedy="fetch it again, or report it to the checkpoint's author",
        )
