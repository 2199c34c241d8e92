"""Gemma 4 models that hear: the audio tower against Hugging Face, its sections in a bundle, and what LiteRT-LM says."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import senses4
import torch
from line import Line, shared, small_recipe
from safetensors.torch import load_file, save_file
from transformers import Gemma4ForConditionalGeneration
from transformers.models.gemma4 import Gemma4AudioConfig, Gemma4AudioFeatureExtractor
from transformers.models.gemma4.modeling_gemma4 import Gemma4AudioModel, Gemma4MultimodalEmbedder

from pipeline import bundle, fetch, fp32, golden, graph, towers
from pipeline.bundling import litertlm
from pipeline.bundling.replaced import with_decoder
from pipeline.checkpoint.chat import open_tokenizer
from pipeline.checkpoint.reader import open_checkpoint
from pipeline.checkpoint.sound import open_front4
from pipeline.core import facts, manifest
from pipeline.core.errors import FetchError, TowerError
from pipeline.core.recipe import RECIPES, Gate, load
from pipeline.judge import handed, hearing, media, metrics, mixed, sounds
from pipeline.judge.gates import Check, judge
from pipeline.judge.reference import Head
from pipeline.judge.sensing import Reference, judge_words
from pipeline.models import gemma4_audio as audio
from pipeline.models.gemma4_audio import AudioConfig
from pipeline.models.gemma4_tower import ClippedLinear
from pipeline.reference.hearing import filled
from pipeline.runtime.sections import Sections
from pipeline.runtime.sound import Hearing
from pipeline.tflite import weights
from pipeline.tflite.lazy import Blocks

HEARS = Hearing(rate=16_000, frame=640, hop=640)
WIDTH, TRUE = 60, 308_364_032
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


TAKE = ("--towers", "audio", "--graphs", "bundle")
FP32 = {'precisions = ["fp32", "int8"]': 'precisions = ["fp32"]'}
SOFT = "worst NMSE of what LiteRT-LM hands to the decoder, soft tokens, audio"


@pytest.fixture(scope="module")
def line(tmp_path_factory: pytest.TempPathFactory) -> Line:
    """A small Gemma 4 with ears, as far as bundles and what the reference says of it."""

    def make(line: Line) -> None:
        senses4.write_model(line.model)
        # The tower in int8 too, the text model in float32 alone.
        text = small_recipe(line.recipe.with_name("fp32.toml"), **source, **FP32)
        for stage in (fetch.STAGE, golden.STAGE, graph.STAGE, towers.STAGE, fp32.STAGE, bundle.STAGE):
            assert line.run(stage, *TAKE, recipe=None if stage is towers.STAGE else text) == 0

    source: dict[str, Any] = {"source": RECIPES / "gemma4.toml", "small": senses4.SMALL}
    return shared(tmp_path_factory, "ears4", make, model="ears4", **source)


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


DEFECTS: Mapping[str, Any] = {
    "none": {},
    "least value for what is added": {"front": {"added": False}},
    "another mel": {"front": {"mean": np.full(32, -5.0, np.float32), "deviation": np.full(32, 3.0, np.float32)}},
    "a row sees one more, as Gemma 3n's": {"numbers": {"seen": 12}},
    "rows see those behind them": {"causal": True},
    "keys without their scale": {"numbers": {"keys": 1.0}},
    "limits are not held": {"limits": True},
    "a layer's share": {"numbers": {"share": 1.0}},
    "distances from another row": {"numbers": {"distances": 12}},
    "the silent frame is heard": {"silent": True},
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_ears_with_a_defect_are_red(defect: str, line: Line, monkeypatch: pytest.MonkeyPatch) -> None:
    changes, front = DEFECTS[defect], replace(open_front4(line.model), **DEFECTS[defect].get("front", {}))
    if changes.get("numbers"):
        own = AudioConfig.numbers
        made = property(lambda self: replace(own.fget(self), **changes["numbers"]))  # type: ignore[attr-defined]
        monkeypatch.setattr(AudioConfig, "numbers", made)
    if "causal" in changes:
        monkeypatch.setattr(audio.Attention, "_causal", lambda _: torch.ones(12, 24))
    if "limits" in changes:
        monkeypatch.setattr(ClippedLinear, "forward", lambda self, x: self.linear(x))
    if "silent" in changes:
        windows = audio.AudioEncoder.windows
        monkeypatch.setattr(
            audio.AudioEncoder, "windows", lambda self, frames, valid: windows(self, frames.roll(1, 1), valid.roll(1))
        )
    config = AudioConfig.from_config(open_checkpoint(line.root / "fetch" / "checkpoint").config)
    stored = {name.removeprefix("model."): value for name, value in load_file(line.model / "model.safetensors").items()}
    encoder, adapter = audio.AudioEncoder(config, front).eval(), audio.AudioAdapter(config).eval()
    fill(encoder, stored)
    fill(adapter, stored)
    frames, mask = HEARS.frames(sounds.sounds()["speech, 3.3 s"], 101)
    wanted = told(line).soft["speech, 3.3 s"]
    with torch.no_grad():
        rows = adapter(**encoder(torch.from_numpy(frames), torch.from_numpy(mask)))["soft_tokens"][0].numpy()
    assert (metrics.nmse(rows[: len(wanted)], wanted) < 1e-8) == (defect == "none")


@pytest.mark.parametrize(
    "part", ["audio_tower.layers.1.self_attn.k_proj.output_max", "embed_audio.embedding_projection.weight"]
)
def test_a_tower_that_is_not_whole_is_refused_by_name(
    part: str, line: Line, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stored = load_file(line.model / "model.safetensors")
    own = [value for name, value in stored.items() if re.match(r"model\.(audio_tower|embed_audio)\.", name)]
    taken = manifest.read(line.root / "fetch").told(facts.Fetch)
    assert taken.towers == (facts.Taken(tower="audio", parameters=sum(value.numel() for value in own)),)
    model = tmp_path / "ears4"
    shutil.copytree(line.model, model)
    del stored[f"model.{part}"]
    save_file(stored, model / "model.safetensors", {"format": "pt"})
    broken = Line(artifacts=tmp_path / "artifacts", recipe=line.recipe, model=model)
    assert broken.run(fetch.STAGE, *TAKE) == 3
    assert f"audio tower that its config.json describes: 1 tensor is missing: {part}" in capsys.readouterr().err


def test_windows_that_the_runtime_does_not_give_are_refused(tmp_path: Path) -> None:
    Gemma4AudioFeatureExtractor().save_pretrained(tmp_path)
    file = tmp_path / "preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"frame_length_ms": 32.0}))
    with pytest.raises(FetchError, match="windows of 512, each 160 after the one before"):
        open_front4(tmp_path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"attention_context_right": 1}, "attention_context_right is not 0"),
        ({"attention_context_left": 1}, "no row would see any"),
        ({"hidden_act": "gelu"}, "hidden_act is gelu, expected silu"),
    ],
)
def test_what_the_modules_do_not_do_is_refused(change: dict[str, Any], said: str) -> None:
    with pytest.raises(TowerError, match=said):
        AudioConfig.from_config({"audio_config": change})


def test_the_configuration_is_read_as_transformers_reads_it() -> None:
    mine, theirs = AudioConfig.from_config({"audio_config": {}}), Gemma4AudioConfig()
    names = {field.name for field in fields(AudioConfig)} & set(theirs.to_dict())
    assert len(names) == 14
    told_of = {name: getattr(theirs, name) for name in names}
    assert {name: getattr(mine, name) for name in names} == told_of | {"subsampling_conv_channels": (128, 32)}
    shapes = audio.tensors(mine)
    assert sum(int(np.prod(shape)) for shape in shapes.values()) == TRUE


def test_in_int8_it_hears_nearly_the_same(line: Line, tmp_path: Path) -> None:
    """And answers behind it: the recipe's limits."""
    gate, towers_in_int8 = load(line.recipe).gates["audio-int8"], line.root / "towers" / "int8"
    heard = hearing.judge_tower("audio-int8", towers_in_int8, HEARS, told(line), Gate(snr=gate.snr), tmp_path)
    print([check.sentence() for check in heard.checks])
    assert all(check.passed for check in heard.checks), [check.sentence() for check in heard.checks]
    with media.given(None, HEARS, tmp_path) as given:
        made = mixed.vectors(towers_in_int8, given, tmp_path)
        sections = Sections(line.root / "fp32")
        figure = mixed.divergence("audio-int8", sections, made, told(line), head_of(line), 64)
    (check,) = judge("audio-int8", Gate(kld=gate.kld), [figure])
    print(check.sentence(), check.detail)
    assert check.passed, check.sentence()
    assert figure.value > 0, "else it is not int8"


def head_of(line: Line) -> Head:
    """What makes logits of the reference's states."""
    cap = manifest.read(line.root / "golden").told(facts.Golden).final_logit_softcapping
    return Head.of_checkpoint(line.root / "fetch" / "checkpoint", cap)


def told(line: Line) -> Reference:
    return Reference.stored(line.root / "golden", "audio")


def test_sections_hear_what_hugging_face_hears(line: Line, tmp_path: Path) -> None:
    gate = load(line.recipe).gates["audio-fp32"]
    reference = told(line)
    checks = hearing.judge_tower("audio-fp32", line.root / "towers" / "fp32", HEARS, reference, gate, tmp_path).checks
    print([check.sentence() for check in checks])
    assert all(check.passed for check in checks), [check.sentence() for check in checks]
    assert all((check.value or 0.0) < 1e-8 for check in checks)
    assert len(reference.soft) >= 20
    moved = {name: np.roll(rows, 1, axis=0) for name, rows in reference.soft.items()}
    shifted = replace(reference, soft=moved)
    sections = line.root / "towers" / "fp32"
    assert not hearing.judge_tower("audio-fp32", sections, HEARS, shifted, gate, tmp_path).checks[0].passed


def test_the_reference_is_transformers_whole_model(line: Line) -> None:
    """Its own class, from samples to the last token, but for the end's per-layer inputs; the reference joins parts."""
    whole = Gemma4ForConditionalGeneration.from_pretrained(line.model, attn_implementation="eager").eval()
    extractor = Gemma4AudioFeatureExtractor.from_pretrained(line.model)
    table = whole.model.language_model.embed_tokens_per_layer.weight
    with torch.no_grad():
        table[senses4.END] = table[0]  # as LiteRT-LM has it
    for row in told(line).answers[:3]:
        ((_, name),) = row.media
        ids = torch.tensor([row.prompt])
        places = (ids < 0).nonzero()[:, 1]
        ids[0, places] = senses4.SOUND
        ids[0, places[-1]] = senses4.END
        taken = extractor([filled(sounds.sounds()[name])], return_tensors="pt")
        made = whole.generate(
            input_ids=ids,
            input_features=taken["input_features"],
            input_features_mask=taken["input_features_mask"],
            max_new_tokens=len(row.tokens),
            do_sample=False,
        )
        assert made[0, ids.shape[1] :].tolist() == row.tokens


@pytest.mark.parametrize("defect", ["", "moved", "without its end"])
def test_logits_behind_sounds_are_hugging_faces(defect: str, line: Line, tmp_path: Path) -> None:
    """Through the sections and the cache; soft tokens moved by one and no end are red."""
    spoil = {"moved": lambda rows: np.roll(rows, 1, axis=0), "without its end": lambda rows: rows * (rows != rows[-1])}
    with media.given(None, HEARS, tmp_path) as given:
        made = mixed.vectors(line.root / "towers" / "fp32", given, tmp_path)
        checks = mixed.judge_logits(
            "audio-fp32",
            Sections(line.root / "fp32"),
            lambda kind, name: spoil.get(defect, lambda rows: rows)(made(kind, name)),
            told(line),
            head_of(line),
            64,
            Gate(nmse=1e-6),
        )
    print(checks[0].sentence())
    assert all(check.passed for check in checks) != bool(defect), [check.sentence() for check in checks]
    assert defect or (checks[0].value or 1.0) < 1e-8


def test_the_runtime_says_what_hugging_face_says(line: Line, tmp_path: Path) -> None:
    reference, made = told(line), line.root / "bundle" / "fp32.litertlm"
    with media.given(None, HEARS, tmp_path) as given:
        words, said = judge_words(made, given, reference.answers, tmp_path, "audio")
    assert [(row.text, row.same) for row in said] == [(row.text, True) for row in reference.answers]
    assert words.passed, words.detail
    assert len({row.text for row in reference.answers}) > 1, "else any sound would do"
    assert litertlm.hears(made) == HEARS
    assert manifest.read(line.root / "bundle").part("fp32", facts.Bundle).hears == facts.Hears(**vars(HEARS))


def handed_over(line: Line, scratch: Path, **changes: Any) -> dict[str, Check]:
    checkpoint = line.root / "fetch" / "checkpoint"
    with media.given(None, HEARS, scratch) as given:
        setting = handed.Setting(
            towers={"audio": told(line)},
            medium=given,
            tokenizer=open_tokenizer(checkpoint),
            vocabulary=2048,
            per_layer=handed.per_layer_inputs(open_checkpoint(checkpoint)),
            large=False,
        )
        pack = partial(with_decoder, line.root / "bundle" / "fp32.litertlm")
        found = handed.judge_handed("bundle-fp32", replace(setting, **changes), pack, scratch)
    return {check.name: check for check in found.checks}


def test_the_runtime_hands_over_what_hugging_face_embeds(
    line: Line, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sounds of all lengths, with per-layer inputs and what is seen."""
    monkeypatch.setattr(handed, "_LENGTHS", 99)
    checks = handed_over(line, tmp_path)
    print([check.sentence() for check in checks.values()], checks[SOFT].detail)
    assert all(check.passed for check in checks.values()), [check.sentence() for check in checks.values()]
    assert int(checks[SOFT].detail.split()[0]) >= 12
    assert (checks[SOFT].value or 1.0) < 1e-8
