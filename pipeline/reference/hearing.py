"""What Hugging Face hears: soft tokens of sounds. Its feature extractor, audio encoder and embedder run unchanged."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig
from transformers.models.gemma3n import Gemma3nAudioFeatureExtractor
from transformers.models.gemma3n.modeling_gemma3n import Gemma3nAudioEncoder

from pipeline.core import log
from pipeline.judge.sounds import Samples
from pipeline.reference import streaming
from pipeline.reference.answers import Heard, Sense, embedder, weights
from pipeline.reference.model import Floats

_LONG = 8 * 16_000
"""Samples of a sound above which nothing is asked about it: prompts cost."""


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
        with torch.device("meta"):
            kind: Any = Gemma3nAudioEncoder  # transformers ships no types for how it is made
            tower = kind._from_config(config.audio_config, dtype=torch.float32)
        tower = streaming.load_part(tower, weights(checkpoint, "audio_tower"))
        own = embedder(checkpoint, config.audio_config, config.text_config, "embed_audio")
        extractor = Gemma3nAudioFeatureExtractor.from_pretrained(checkpoint, local_files_only=True)
        return cls(tower=tower, embedder=own, extractor=extractor, config=config)

    @property
    def sense(self) -> Sense:
        """How sounds stand in a prompt."""
        said, own = self.config, self.config.audio_config
        places = {"start": said.boa_token_id, "end": said.eoa_token_id, "place": said.audio_token_id}
        return Sense.of(own, self.embedder, **places)

    def soft_tokens(self, sound: Samples) -> Floats:
        """[n, H] of a sound."""
        taken = self.extractor(sound, return_tensors="pt")
        with torch.inference_mode():
            heard = self.tower(taken["input_features"], ~taken["input_features_mask"])
            embedded: Floats = self.embedder(inputs_embeds=heard.last_hidden_state)[0].numpy()
        return embedded


def listen(ears: Ears, sounds: Mapping[str, Samples]) -> dict[str, Floats]:
    """The soft tokens of each sound."""
    heard = {}
    with log.progress("reference on sounds", len(sounds), "sounds") as bar:
        for name, sound in sounds.items():
            heard[name] = ears.soft_tokens(sound)
            bar.advance()
    return heard


def messages(heard: Mapping[str, Floats]) -> Iterator[Heard]:
    """What is in each message that is asked about: a sound, and in every eighth two."""
    short = sorted(heard, key=lambda name: (len(heard[name]), name))
    short = [name for name in short if len(heard[name]) * 16 * 160 <= _LONG]
    index = 0
    while True:
        names = [short[(index * 7) % len(short)], *([short[-1 - index % 3]] if index % 8 == 7 else [])]
        yield [("audio", name, heard[name]) for name in dict.fromkeys(names)]
        index += 1
