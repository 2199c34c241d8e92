"""What Hugging Face hears: soft tokens of sounds, and greedy text after prompts with sounds in them.

Its classes run unchanged: the feature extractor, the audio encoder, the embedder, and the text model that `model.py`
has loaded. Only what joins them is here, as `Gemma3nModel.forward` does, which wants the vision tower's library too.
One thing is otherwise than in `Gemma3nProcessor`: a sound takes as many places as it has soft tokens, as in LiteRT-LM,
and is not filled up to 188.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig
from transformers.models.gemma3n import Gemma3nAudioFeatureExtractor
from transformers.models.gemma3n.modeling_gemma3n import Gemma3nAudioEncoder, Gemma3nMultimodalEmbedder

from pipeline.checkpoint.names import tower_name
from pipeline.checkpoint.reader import open_checkpoint
from pipeline.core import log
from pipeline.core.recipe import Bundle
from pipeline.judge.hearing import Heard, Reference
from pipeline.judge.sounds import QUESTIONS, Samples, sounds
from pipeline.reference import streaming
from pipeline.reference.model import Floats, HuggingFace

_LONG = 8 * 16_000
"""Samples of a sound above which it is asked about once only: prompts cost."""


@dataclass(frozen=True)
class Ears:
    """Hugging Face's ears in float32, their matrices read as they are needed."""

    tower: Any
    embedder: Any
    extractor: Any
    config: Any

    @classmethod
    def load(cls, checkpoint: Path) -> Ears:
        """Those of a checkpoint."""
        config = AutoConfig.from_pretrained(checkpoint, local_files_only=True)
        opened = open_checkpoint(checkpoint)
        stored = {tower_name(name): tensor for name, tensor in streaming.stored(opened)}
        with torch.device("meta"):
            kind: Any = Gemma3nAudioEncoder  # transformers ships no types for how it is made
            tower = kind._from_config(config.audio_config, dtype=torch.float32)
            embedder = Gemma3nMultimodalEmbedder(config.audio_config, config.text_config)
        tower = streaming.load_part(tower, _part(stored, "audio_tower."))
        embedder = streaming.load_part(embedder, _part(stored, "embed_audio."))
        extractor = Gemma3nAudioFeatureExtractor.from_pretrained(checkpoint, local_files_only=True)
        return cls(tower=tower, embedder=embedder, extractor=extractor, config=config)

    def soft_tokens(self, sound: Samples) -> Floats:
        """[n, H] of a sound."""
        taken = self.extractor(sound, return_tensors="pt")
        with torch.inference_mode():
            heard = self.tower(taken["input_features"], ~taken["input_features_mask"])
            embedded: Floats = self.embedder(inputs_embeds=heard.last_hidden_state)[0].numpy()
        return embedded

    def answer(self, reference: HuggingFace, question: str, sounds: Mapping[str, Floats], count: int) -> Heard:
        """At most `count` greedy tokens after a message of `sounds`, name → soft tokens, and a `question`."""
        content = [*({"type": "audio"} for _ in sounds), {"type": "text", "text": question}]
        text = reference.as_prompt([{"role": "user", "content": content}])  # type: ignore[dict-item]
        tokens = (self.config.boa_token_id, self.config.eoa_token_id, self.config.audio_token_id)
        start, end, place = (str(reference.tokenizer.backend_tokenizer.id_to_token(token)) for token in tokens)
        pieces = text.split(place)
        for index, soft in enumerate(sounds.values(), 1):
            pieces[index] = f"\n\n{start}{place * len(soft)}{end}\n\n{pieces[index]}"
        ids = torch.tensor([reference.begin("".join(pieces))])
        return Heard(
            sounds=tuple(sounds),
            question=question,
            **_greedy(reference, ids, self._embedded(reference, ids, list(sounds.values())), count),
        )

    def _embedded(self, reference: HuggingFace, ids: torch.Tensor, soft: Sequence[Floats]) -> torch.Tensor:
        """The prompt's embeddings [1, S, H]: of text, of the tower's own tokens, and of sounds."""
        with torch.inference_mode():
            embedded: torch.Tensor = reference.model.model.embed_tokens(ids)
            own = ids >= self.embedder.vocab_offset
            embedded[own] = self.embedder(input_ids=ids[own][None])[0]
            embedded[ids == self.config.audio_token_id] = torch.cat([torch.from_numpy(rows) for rows in soft])
        return embedded


def _part(stored: Mapping[str, streaming.Weight], prefix: str) -> dict[str, streaming.Weight]:
    return {name.removeprefix(prefix): weight for name, weight in stored.items() if name.startswith(prefix)}


def _greedy(reference: HuggingFace, ids: torch.Tensor, embedded: torch.Tensor, count: int) -> dict[str, Any]:
    """Text and margins of what follows; the first call takes embeddings, those after it tokens."""
    added: list[int] = []
    margins: list[float] = []
    with torch.inference_mode():
        per_layer = reference.model.model.get_per_layer_inputs(ids)
        output = reference.model(inputs_embeds=embedded, per_layer_inputs=per_layer, use_cache=True, logits_to_keep=1)
        while True:
            first, second = torch.topk(output.logits[0, -1].double(), 2)[0].tolist()
            margins.append(first - second)
            added.append(int(output.logits[0, -1].argmax()))
            if added[-1] in reference.stop or len(added) == count:
                break
            output = reference.model(
                input_ids=torch.tensor([added[-1:]]), cache=output.cache, use_cache=True, logits_to_keep=1
            )
    text = reference.tokenizer.decode(added, skip_special_tokens=True)
    return {"prompt_tokens": ids.shape[1], "tokens": added, "text": text, "margins": margins}


def make_sounds(checkpoint: Path, reference: HuggingFace, bundle: Bundle, folder: Path) -> None:
    """Compute and store what the reference hears, and says of it, for as many prompts as bundles are held against."""
    ears = Ears.load(checkpoint)
    soft = listen(ears, sounds())
    Reference(soft=soft, answers=answers(ears, reference, soft, bundle.prompts, bundle.continuation)).store(folder)


def listen(ears: Ears, sounds: Mapping[str, Samples]) -> dict[str, Floats]:
    """The soft tokens of each sound."""
    heard = {}
    with log.progress("reference on sounds", len(sounds), "sounds") as bar:
        for name, sound in sounds.items():
            heard[name] = ears.soft_tokens(sound)
            bar.advance()
    return heard


def answers(ears: Ears, reference: HuggingFace, heard: Mapping[str, Floats], prompts: int, count: int) -> list[Heard]:
    """Greedy text of so many prompts: a sound and a question, and every eighth with two sounds."""
    short = sorted(heard, key=lambda name: (len(heard[name]), name))
    short = [name for name in short if len(heard[name]) * 16 * 160 <= _LONG]
    made = []
    with log.progress("greedy text about sounds", prompts * count, "tokens") as bar:
        for index in range(prompts):
            names = [short[(index * 7) % len(short)], *([short[-1 - index % 3]] if index % 8 == 7 else [])]
            question = QUESTIONS[index % len(QUESTIONS)]
            made.append(ears.answer(reference, question, {name: heard[name] for name in dict.fromkeys(names)}, count))
            bar.advance(count)
    return made
