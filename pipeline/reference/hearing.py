"""What Hugging Face hears: soft tokens of sounds. Its feature extractor, audio encoder and embedder run unchanged."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig
from transformers.models.gemma3n import Gemma3nAudioFeatureExtractor
from transformers.models.gemma3n.modeling_gemma3n import Gemma3nAudioEncoder, Gemma3nMultimodalEmbedder
from transformers.models.gemma4 import Gemma4AudioFeatureExtractor
from transformers.models.gemma4.modeling_gemma4 import Gemma4AudioModel, Gemma4MultimodalEmbedder

from pipeline.core import log
from pipeline.judge.sounds import Samples
from pipeline.reference import streaming
from pipeline.reference.answers import Heard, Sense, embedder, weights
from pipeline.reference.model import Floats

COUNTED = "gemma4"
"""The type of models whose encoder says which of its rows are of the sound, as its mask says of frames."""
_KINDS: Mapping[str, tuple[Any, Any, Any]] = {
    "gemma3n": (Gemma3nAudioEncoder, Gemma3nAudioFeatureExtractor, Gemma3nMultimodalEmbedder),
    COUNTED: (Gemma4AudioModel, Gemma4AudioFeatureExtractor, Gemma4MultimodalEmbedder),
}
"""Tower, processor and embedder by the type of the model; transformers ships no types for how they are made."""
_HOP = 160
"""Samples of theirs from one window to the next; a soft token is made of four."""
_LONG = 8 / 30
"""Of the longest sound's soft tokens, above which nothing is asked about a sound: prompts cost."""


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
        kind, extractor, way = _KINDS[config.model_type]
        with torch.device("meta"):
            tower = kind._from_config(config.audio_config, dtype=torch.float32)
        tower = streaming.load_part(tower, weights(checkpoint, "audio_tower"))
        own = embedder(checkpoint, config.audio_config, config.text_config, "embed_audio", way)
        heard = extractor.from_pretrained(checkpoint, local_files_only=True)
        return cls(tower=tower, embedder=own, extractor=heard, config=config)

    @property
    def sense(self) -> Sense:
        """How sounds stand in a prompt."""
        said, own = self.config, self.config.audio_config
        if said.model_type == COUNTED:
            places = {"start": said.boa_token_id, "end": said.eoa_token_index, "place": said.audio_token_id}
            return Sense.places(**places, around="", ends=True)
        places = {"start": said.boa_token_id, "end": said.eoa_token_id, "place": said.audio_token_id}
        return Sense.of(own, self.embedder, **places)

    def soft_tokens(self, sound: Samples) -> Floats:
        """[n, H] of a sound."""
        counted = self.config.model_type == COUNTED
        whole = filled(sound) if counted else sound
        taken = self.extractor([whole], return_tensors="pt", truncation=not counted)  # of 30 s a sample would go
        there = taken["input_features_mask"]
        with torch.inference_mode():
            heard = self.tower(taken["input_features"], there if counted else ~there)
            embedded = self.embedder(inputs_embeds=heard.last_hidden_state)[0]
        rows: Floats = (embedded[heard.attention_mask[0]] if counted else embedded).numpy()
        return rows


def filled(sound: Samples) -> Samples:
    """`sound` in whole soft tokens, as LiteRT-LM is to get it, and the sample behind the last window.

    Of a shorter one the processor would leave some windows of the last soft token out.
    """
    whole = -(-((len(sound) - 1) // _HOP) // 4) * 4 * _HOP + 1
    return np.pad(sound, (0, max(0, whole - len(sound))))[:whole]


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
    short = [name for name in short if len(heard[name]) <= _LONG * len(heard[short[-1]])]
    index = 0
    while True:
        names = [short[(index * 7) % len(short)], *([short[-1 - index % 3]] if index % 8 == 7 else [])]
        yield [("audio", name, heard[name]) for name in dict.fromkeys(names)]
        index += 1
