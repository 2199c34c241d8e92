"""What Hugging Face says of pictures and sounds: greedy text after prompts in which they stand.

Its classes run unchanged: the towers' embedders, and the text model that `model.py` has loaded. Only what joins them
is here, as `Gemma3nModel.forward` does. One thing is otherwise than in `Gemma3nProcessor`: a sound takes as many places
as it has soft tokens, as in LiteRT-LM, and is not filled up to 188.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache
from transformers.models.gemma3.modeling_gemma3 import create_masks_for_vision_model, get_block_sequence_ids_for_mask
from transformers.models.gemma3n.modeling_gemma3n import Gemma3nMultimodalEmbedder

from pipeline.checkpoint.names import tower_name
from pipeline.checkpoint.reader import open_checkpoint
from pipeline.core import log
from pipeline.core.errors import UsageError
from pipeline.judge.sensing import QUESTIONS, Answer, Kind
from pipeline.reference import streaming
from pipeline.reference.model import Floats, HuggingFace

Heard = Sequence[tuple[Kind, str, Floats]]
"""What stands in a message: kind, name and soft tokens [n, H] of each."""


@dataclass(frozen=True, kw_only=True)
class Sense:
    """How one kind of medium stands in a prompt.

    The ids of the tokens before and behind it and of its places; the `embedder` of a tower's own tokens, whose ids are
    from `first` to before `last`. Without one these are its places alone. What is `whole` sees itself, and the chat
    template has its beginning where it stands. `around` is the text that the processor puts around all of it. `ends`:
    the token behind it is no token to LiteRT-LM, which gives it the per-layer inputs of a place.
    """

    start: int
    end: int
    place: int
    embedder: Any
    first: int
    last: int
    whole: bool = False
    around: str = "\n\n"
    ends: bool = False

    def holds(self, ids: torch.Tensor) -> torch.Tensor:
        """Which of `ids` LiteRT-LM is given as vectors."""
        own = (ids >= self.first) & (ids < self.last)
        return own | (ids == self.end) if self.ends else own

    @property
    def said(self) -> int:
        """The token that stands for it in what the chat template renders."""
        return self.start if self.whole else self.place

    @classmethod
    def of(cls, own: Any, embedder: Any, *, start: int, end: int, place: int) -> Sense:
        """That of the tower whose configuration is `own`, which says where its tokens stand."""
        first, last = own.vocab_offset, own.vocab_offset + own.vocab_size
        return cls(start=start, end=end, place=place, embedder=embedder, first=first, last=last)

    @classmethod
    def places(cls, *, place: int, **said: Any) -> Sense:
        """That of a tower without tokens of its own."""
        return cls(place=place, embedder=None, first=place, last=place + 1, **said)


def weights(checkpoint: Path, part: str) -> dict[str, streaming.Weight]:
    """Those of a part of the whole model, such as `audio_tower`, by their names in it."""
    stored = {tower_name(name): tensor for name, tensor in streaming.stored(open_checkpoint(checkpoint))}
    prefix = f"{part}."
    return {name.removeprefix(prefix): weight for name, weight in stored.items() if name.startswith(prefix)}


def embedder(checkpoint: Path, config: Any, text: Any, part: str, kind: Any = Gemma3nMultimodalEmbedder) -> Any:
    """Hugging Face's embedder of a tower, its matrices read as they are needed; `kind` is its class."""
    with torch.device("meta"):
        made = kind(config, text)
    return streaming.load_part(made, weights(checkpoint, part))


def answer(
    reference: HuggingFace, senses: Mapping[Kind, Sense], question: str, media: Heard, count: int
) -> tuple[Answer, Floats]:
    """At most `count` greedy tokens after a message of `media` and a `question`, and the states [n, H] before each."""
    content = [*({"type": kind} for kind, _, _ in media), {"type": "text", "text": question}]
    text = reference.as_prompt([{"role": "user", "content": content}])  # type: ignore[dict-item]
    for kind, sense in senses.items():
        start, end, place, said = (
            str(reference.tokenizer.backend_tokenizer.id_to_token(token))
            for token in (sense.start, sense.end, sense.place, sense.said)
        )
        pieces = text.split(said)
        own = [soft for each, _, soft in media if each == kind]
        if len(pieces) != len(own) + 1:
            raise UsageError(
                f"the chat template says {said} {len(pieces) - 1} times for {len(own)} media of kind {kind}",
                cause="it is that of a text model, or drops what it does not know",
                remedy="give the whole model's template with TEMPLATE=file.jinja, or say TOWERS=none",
            )
        for index, soft in enumerate(own, 1):
            pieces[index] = f"{sense.around}{start}{place * len(soft)}{end}{sense.around}{pieces[index]}"
        text = "".join(pieces)
    ids = torch.tensor([reference.begin(text)], device=reference.device)
    places = _held((sense for sense in senses.values() if not sense.embedder), ids)
    with torch.inference_mode():
        embedded = _embedded(reference, senses, ids, media)
        beside = _beside(reference, ids, embedded, places)
    told, states = _greedy(reference, beside, count)
    vectors = _held(senses.values(), ids)
    return Answer(
        media=tuple((kind, name) for kind, name, _ in media),
        question=question,
        prompt=ids.masked_fill(vectors, -1)[0].tolist(),
        **told,
    ), states


def _held(senses: Iterable[Sense], ids: torch.Tensor) -> torch.Tensor:
    """Which of `ids` any of `senses` holds."""
    held = torch.zeros_like(ids, dtype=torch.bool)
    for sense in senses:
        held |= sense.holds(ids)
    return held


def _embedded(reference: HuggingFace, senses: Mapping[Kind, Sense], ids: torch.Tensor, media: Heard) -> torch.Tensor:
    """The prompt's embeddings [1, S, H]: of text, of the towers' own tokens, and of media."""
    outside = ids >= reference.model.config.vocab_size  # places alone
    embedded: torch.Tensor = reference.model.model.embed_tokens(ids.masked_fill(outside, 0))
    for kind, sense in senses.items():
        own = (ids >= sense.first) & (ids < sense.last)
        if sense.embedder and own.any():
            embedded[own] = sense.embedder(input_ids=ids[own][None].cpu())[0].to(embedded)  # it is on the CPU
        if soft := [torch.from_numpy(rows) for each, _, rows in media if each == kind]:
            embedded[ids == sense.place] = torch.cat(soft).to(embedded)
    return embedded


def _beside(reference: HuggingFace, ids: torch.Tensor, embedded: torch.Tensor, places: torch.Tensor) -> dict[str, Any]:
    """What the first call takes: the prompt's embeddings, and what transformers' whole model gives beside them.

    `places` [1, S] are those of media that are no tokens of a tower.
    """
    model = reference.model.model
    if hasattr(model, "get_per_layer_inputs"):
        # As `Gemma4Model.forward`; of a tower's own tokens `Gemma3nTextModel` knows.
        tokens = ids.masked_fill(places, model.config.pad_token_id)
        return {"inputs_embeds": embedded, "per_layer_inputs": model.get_per_layer_inputs(tokens)}
    # As `Gemma3Model.forward`: places see each other, where they stand side by side.
    cache = DynamicCache(config=model.config)
    masks = create_masks_for_vision_model(
        config=model.config,
        inputs_embeds=embedded,
        attention_mask=None,
        cache=cache,
        position_ids=None,
        block_sequence_ids=get_block_sequence_ids_for_mask(places.long()),
    )
    return {"inputs_embeds": embedded, "attention_mask": masks, "cache": cache}


def _greedy(reference: HuggingFace, beside: Mapping[str, Any], count: int) -> tuple[dict[str, Any], Floats]:
    """Text and margins of what follows, and what the head read; the first call takes what is `beside` tokens."""
    added: list[int] = []
    margins: list[float] = []
    states: list[Floats] = []
    head: Any = reference.model.lm_head
    heard = head.register_forward_pre_hook(lambda _, read: states.append(read[0][0, -1].float().cpu().numpy().copy()))
    with torch.inference_mode():
        output = reference.model(**beside, use_cache=True, logits_to_keep=1)
        while True:
            first, second = torch.topk(output.logits[0, -1].double(), 2)[0].tolist()
            margins.append(first - second)
            added.append(int(output.logits[0, -1].argmax()))
            if added[-1] in reference.stop or len(added) == count:
                break
            output = reference.model(
                input_ids=torch.tensor([added[-1:]], device=reference.device),
                cache=output.cache,
                use_cache=True,
                logits_to_keep=1,
            )
    heard.remove()
    text = reference.tokenizer.decode(added, skip_special_tokens=True)
    return {"tokens": added, "text": text, "margins": margins}, np.stack(states)


def answers(
    reference: HuggingFace, senses: Mapping[Kind, Sense], messages: Iterator[Heard], prompts: int, count: int
) -> tuple[list[Answer], list[Floats]]:
    """Greedy text of so many prompts: what is in each message, and a question; and the states before its tokens."""
    made = []
    with log.progress("greedy text about pictures and sounds", prompts * count, "tokens") as bar:
        for index, media in zip(range(prompts), messages, strict=False):
            made.append(answer(reference, senses, QUESTIONS[index % len(QUESTIONS)], media, count))
            bar.advance(count)
    return [each for each, _ in made], [states for _, states in made]
