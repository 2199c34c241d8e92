"""Gemma 4 models that hear: the audio tower against Hugging Face, its sections in a bundle, and what LiteRT-LM says."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import senses4
import torch
from transformers.models.gemma4 import Gemma4AudioConfig, Gemma4AudioFeatureExtractor
from transformers.models.gemma4.modeling_gemma4 import Gemma4AudioModel, Gemma4MultimodalEmbedder

from pipeline.checkpoint.sound import open_front4
from pipeline.judge import metrics, sounds
from pipeline.models import gemma4_audio as audio
from pipeline.models.gemma4_audio import AudioConfig
from pipeline.reference.hearing import filled
from pipeline.runtime.sound import Hearing
from pipeline.tflite import weights
from pipeline.tflite.lazy import Blocks

HEARS = Hearing(rate=16_000, frame=640, hop=640)
WIDTH = 60
GEOMETRIES: tuple[dict[str, Any], ...] = (
    {},
    {"use_clipped_linears": False, "residual_weight": 0.3, "attention_logit_cap": 5.0, "conv_kernel_size": 3},
    {"attention_context_left": 9, "attention_chunk_size": 5, "num_attention_heads": 2, "rms_norm_eps": 1e-3},
    {"attention_context_left": 12, "attention_chunk_size": 16, "subsampling_conv_channels": [16, 4]},
)
"""Changes of the small tower: how far a row sees, and what else its configuration names."""
FRONT: dict[str, Any] = {
    "per_bin_mean": [0.1 * i for i in range(32)],
    "per_bin_stddev": [1 + 0.01 * i for i in range(32)],
    "input_scale_factor": 2.0,
    "preemphasis": 0.9,
    "mel_floor": 1e-2,
    "fft_overdrive": True,
    "min_frequency": 125.0,
    "max_frequency": 7600.0,
}
"""Another processor than the one by default."""


def fill(module: torch.nn.Module, stored: Mapping[str, torch.Tensor]) -> None:
    """Give a module its weights, kernels in TFLite's order."""
    laid = {}
    for name, own in module.state_dict().items():
        value = stored[name]
        if value.ndim:
            kernel = weights.in_order(Blocks.of(value.numpy()), tuple(own.shape))
            value = torch.from_numpy(np.ascontiguousarray(kernel.rows(0, own.shape[0])))
        laid[name] = value
    module.load_state_dict(laid)


@pytest.mark.parametrize(
    ("changes", "front"), [*((each, {}) for each in GEOMETRIES), ({}, FRONT)], ids=(*"0123", "front")
)
def test_the_modules_hear_what_hugging_face_hears(
    changes: dict[str, Any], front: dict[str, Any], tmp_path: Path
) -> None:
    settings = {**senses4.AUDIO, **changes}

    class Text:
        hidden_size = WIDTH

    own = Gemma4AudioConfig(**settings)
    tower, embedder = Gemma4AudioModel(own).eval(), Gemma4MultimodalEmbedder(own, Text()).eval()  # type: ignore[arg-type]
    senses4.shake(tower, 0)
    senses4.shake(embedder, 1)
    extractor = Gemma4AudioFeatureExtractor(feature_size=settings["subsampling_conv_channels"][0], **front)
    extractor.save_pretrained(tmp_path)
    config = AudioConfig.from_config({"audio_config": settings, "text_config": {"hidden_size": WIDTH}})
    encoder, adapter = audio.AudioEncoder(config, open_front4(tmp_path)).eval(), audio.AudioAdapter(config).eval()
    stored = {f"audio_tower.{name}": value for name, value in tower.state_dict().items()}
    stored |= {f"embed_audio.{name}": value for name, value in embedder.state_dict().items()}
    fill(encoder, stored)
    fill(adapter, stored)
    assert {name: tuple(value.shape) for name, value in stored.items()} == audio.tensors(config)
    short = [(name, sound) for name, sound in sounds.sounds().items() if len(sound) <= 4 * sounds.RATE]
    for name, sound in short[:: 3 if changes or front else 1]:
        taken = extractor([filled(sound)], return_tensors="pt")
        frames, mask = HEARS.frames(sound, 101)  # as many as the longest here needs
        with torch.no_grad():
            heard = tower(taken["input_features"], taken["input_features_mask"])
            wanted = embedder(inputs_embeds=heard.last_hidden_state)[heard.attention_mask].numpy()
            features = encoder(torch.from_numpy(frames), torch.from_numpy(mask))
            got = adapter(**features)["soft_tokens"][0].numpy()
        assert int(features["mask"].sum()) == len(wanted), name
        assert metrics.nmse(got[: len(wanted)], wanted) < 1e-8, (name, metrics.nmse(got[: len(wanted)], wanted))
