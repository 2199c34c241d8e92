"""Models that hear: the audio tower against Hugging Face, its sections in a bundle, and what LiteRT-LM answers."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ears
import numpy as np
import pytest
import torch
from line import Line, small_recipe
from safetensors.torch import load_file, save_file

from pipeline import bundle, fetch, fp32, golden, graph, towers
from pipeline.bundling import litertlm
from pipeline.bundling import towers as fit
from pipeline.bundling.metadata import Metadata, of_checkpoint
from pipeline.checkpoint.reader import open_checkpoint
from pipeline.checkpoint.sound import open_front
from pipeline.core import facts, manifest, rerun
from pipeline.core.errors import BundleError, ExportError, UsageError
from pipeline.core.recipe import PROJECT, Gate, load
from pipeline.judge import hearing, media, metrics, sounds
from pipeline.judge.sensing import Reference, judge_words
from pipeline.models import gemma3n_audio as audio
from pipeline.models.gemma3n_audio import AudioConfig
from pipeline.quantize import readback
from pipeline.reference.hearing import Ears
from pipeline.runtime.litert_lm import Dialogue, LmRuntime, Medium
from pipeline.runtime.sound import Hearing
from pipeline.runtime.terminal import Senses
from pipeline.tflite import weights
from pipeline.tflite.graph import Graph
from pipeline.tflite.lazy import Blocks

HEARS = Hearing(rate=16_000, frame=512, hop=160)
TAKE = ("--towers", "audio", "--graphs", "bundle")
WIDTH = 48
GEOMETRIES: tuple[dict[str, Any], ...] = (
    {},
    {"conf_attention_context_left": 9, "conf_attention_chunk_size": 5, "conf_num_attention_heads": 2},
    {"conf_attention_context_left": 12, "conf_attention_chunk_size": 8, "conf_conv_kernel_size": 3},
    {"conf_reduction_factor": 2, "conf_residual_weight": 0.3, "conf_attention_logit_cap": 5.0, "hidden_size": 32},
)
"""Changes of the small tower: how far a row sees, and what else its configuration names."""
FRONT: dict[str, Any] = {
    "per_bin_mean": [0.1 * i for i in range(128)],
    "per_bin_stddev": [1 + 0.01 * i for i in range(128)],
    "input_scale_factor": 2.0,
    "preemphasis": 0.9,
    "mel_floor": 1e-3,
}
"""Another processor than the one by default."""


@pytest.fixture(scope="module")
def line(tmp_path_factory: pytest.TempPathFactory) -> Line:
    """The shipped model with ears, as far as an fp32 bundle and what the reference says of it."""
    folder = tmp_path_factory.mktemp("hears")
    precisions = {'precisions = ["fp32", "int8"]': 'precisions = ["fp32"]'}
    recipe = small_recipe(folder / "small.toml", **precisions)
    made = Line(artifacts=folder / "artifacts", recipe=recipe, model=ears.write_model(folder / "ears"))
    for stage in (fetch.STAGE, golden.STAGE, graph.STAGE, towers.STAGE, fp32.STAGE, bundle.STAGE):
        assert made.run(stage, *TAKE) == 0
    return made


def differ(line: Line, told: Reference, scratch: Path) -> bool:
    """Whether LiteRT-LM answers otherwise than `told`."""
    with media.given(None, HEARS, scratch) as given:
        return not judge_words(line.root / "bundle" / "fp32.litertlm", given, told.answers, scratch, "audio")[0].passed


def fill(module: torch.nn.Module, stored: Mapping[str, torch.Tensor]) -> None:
    """Give a module its weights, kernels in TFLite's order."""
    own = {name: tensor.shape for name, tensor in module.state_dict().items()}
    laid = {
        name: weights.in_order(Blocks.of(stored[name].numpy()), tuple(shape)).rows(0, shape[0])
        for name, shape in own.items()
    }
    module.load_state_dict({name: torch.from_numpy(np.ascontiguousarray(rows)) for name, rows in laid.items()})


@pytest.mark.parametrize(("changes", "front"), [*((each, {}) for each in GEOMETRIES), ({}, FRONT)], ids=str)
def test_the_modules_hear_what_hugging_face_hears(
    changes: dict[str, Any], front: dict[str, Any], tmp_path: Path
) -> None:
    settings = {**ears.SMALL, **changes}
    tower, embedder = ears.ears(settings, WIDTH)
    extractor = ears.Gemma3nAudioFeatureExtractor(**front)
    extractor.save_pretrained(tmp_path)
    config = AudioConfig.from_config({"audio_config": settings, "text_config": {"hidden_size": WIDTH}})
    encoder, adapter = audio.AudioEncoder(config, open_front(tmp_path)).eval(), audio.AudioAdapter(config).eval()
    stored = {name.removeprefix("model."): value for name, value in ears.tensors(tower, embedder).items()}
    fill(encoder, stored)
    fill(adapter, stored)
    assert {name: tuple(value.shape) for name, value in stored.items()} == audio.tensors(config)
    for name, sound in sounds.sounds().items():
        if len(sound) > 4 * sounds.RATE:
            continue
        taken = extractor(sound, return_tensors="pt")
        frames, mask = HEARS.frames(sound, config.frames)
        with torch.no_grad():
            heard = tower(taken["input_features"], ~taken["input_features_mask"])
            wanted = embedder(inputs_embeds=heard.last_hidden_state)[0].numpy()
            features = encoder(torch.from_numpy(frames), torch.from_numpy(mask))
            got = adapter(**features)["soft_tokens"][0].numpy()
        assert int(features["mask"].sum()) == len(wanted), name
        assert metrics.nmse(got[: len(wanted)], wanted) < 1e-8, name


def test_sections_and_runtime_say_what_hugging_face_says(line: Line, tmp_path: Path) -> None:
    told = Reference.stored(line.root / "golden", "audio")
    gate = load(line.recipe).gates["audio-fp32"]
    checks = hearing.judge_tower("audio-fp32", line.root / "towers" / "fp32", HEARS, told, gate, tmp_path).checks
    assert all(check.passed for check in checks), [check.sentence() for check in checks]
    assert all((check.value or 0.0) < 1e-8 for check in checks)
    made = line.root / "bundle" / "fp32.litertlm"
    assert not differ(line, told, tmp_path)
    assert len({row.text for row in told.answers}) > 1, "else any sound would do"
    assert litertlm.hears(made) == HEARS
    assert manifest.read(line.root / "bundle").part("fp32", facts.Bundle).hears == facts.Hears(**vars(HEARS))


def test_another_tower_and_other_words_are_red(line: Line, tmp_path: Path) -> None:
    """The gates see what a defect would do: a soft token moved by one, a word more."""
    told = Reference.stored(line.root / "golden", "audio")
    moved = {name: np.roll(rows, 1, axis=0) if len(rows) > 1 else rows + 1 for name, rows in told.soft.items()}
    shifted = dataclasses.replace(told, soft=moved)
    checks = hearing.judge_tower(
        "audio-fp32", line.root / "towers" / "fp32", HEARS, shifted, Gate(nmse=1e-6), tmp_path
    ).checks
    assert not checks[0].passed
    shorter = dataclasses.replace(told, soft={name: rows[:-1] for name, rows in told.soft.items()})
    checks = hearing.judge_tower(
        "audio-fp32", line.root / "towers" / "fp32", HEARS, shorter, Gate(nmse=1e-6), tmp_path
    ).checks
    assert not checks[-1].passed
    others = [dataclasses.replace(row, text=row.text + "!") for row in told.answers]
    assert differ(line, dataclasses.replace(told, answers=others), tmp_path)


@pytest.mark.parametrize("defect", ["none", "mel", "mask", "pre-emphasis"])
def test_ears_with_a_defect_are_red(defect: str, line: Line, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mel that is normalised as LiteRT-LM's own, a row that sees those before it that it must not, another front."""
    front = open_front(line.model)
    if defect == "mel":
        front = dataclasses.replace(front, mean=np.full(128, -5.0, np.float32), deviation=np.full(128, 3.0, np.float32))
    if defect == "pre-emphasis":
        front = dataclasses.replace(front, cosine=front.cosine[:, ::-1].copy())
    if defect == "mask":
        every = torch.ones(audio.AudioConfig.from_config({}).conf_attention_chunk_size, 24)
        monkeypatch.setattr(audio.Attention, "_causal", lambda _: every)
    config = AudioConfig.from_config(open_checkpoint(line.root / "fetch" / "checkpoint").config)
    stored = {name.removeprefix("model."): value for name, value in load_file(line.model / "model.safetensors").items()}
    encoder, adapter = audio.AudioEncoder(config, front).eval(), audio.AudioAdapter(config).eval()
    fill(encoder, stored)
    fill(adapter, stored)
    frames, mask = HEARS.frames(sounds.sounds()["speech, 3.3 s"], config.frames)
    wanted = Reference.stored(line.root / "golden", "audio").soft["speech, 3.3 s"]
    with torch.no_grad():
        made = adapter(**encoder(torch.from_numpy(frames), torch.from_numpy(mask)))["soft_tokens"][0].numpy()
    assert (metrics.nmse(made[: len(wanted)], wanted) < 1e-8) == (defect == "none")


def test_the_vector_behind_a_sound_is_of_the_towers_own_table(line: Line) -> None:
    """litert-torch 0.10.0 takes the text model's, which is another vector and no error."""
    own = Graph.read(line.root / "towers" / "fp32" / "end_of_audio.tflite")
    (row,) = [own.constant(int(tensor)) for tensor in own.main.operators[0].inputs if own.shape(int(tensor))[-1] > 1]
    reference = Ears.load(line.root / "fetch" / "checkpoint")
    with torch.inference_mode():
        wanted = reference.embedder(input_ids=torch.tensor([[ears.END]])).numpy()
    assert row.shape == wanted.shape
    assert metrics.nmse(row, wanted) < 1e-12


@pytest.mark.parametrize("part", ["audio_tower.conformer.1.norm.weight", "embed_audio.embedding.weight"])
def test_a_tower_that_is_not_whole_is_refused_by_name(
    part: str, line: Line, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "ears"
    shutil.copytree(line.model, model)
    tensors = load_file(model / "model.safetensors")
    del tensors[f"model.{part}"]
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    broken = Line(artifacts=tmp_path / "artifacts", recipe=line.recipe, model=model)
    assert broken.run(fetch.STAGE, *TAKE) == 3
    assert f"audio tower that its config.json describes: 1 tensor is missing: {part}" in capsys.readouterr().err
    assert broken.run(fetch.STAGE, "--graphs", "bundle") == 0, "the text model is whole"


def test_a_text_model_has_no_tower_to_take(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = Line(artifacts=tmp_path, recipe=small_recipe(tmp_path / "small.toml"))
    assert text.run(fetch.STAGE, *TAKE) == 2
    assert "the model has no audio tower that can be converted" in capsys.readouterr().err


def test_without_its_processor_a_model_is_refused(
    line: Line, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "ears"
    shutil.copytree(line.model, model)
    (model / "preprocessor_config.json").unlink()
    assert Line(artifacts=tmp_path / "artifacts", recipe=line.recipe, model=model).run(fetch.STAGE, *TAKE) == 3
    assert "has no preprocessor_config.json" in capsys.readouterr().err


def test_towers_are_taken_when_they_are_asked_for(
    line: Line, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = dataclasses.replace(line, artifacts=tmp_path)
    assert plain.run(fetch.STAGE, "--graphs", "bundle") == 0
    said = capsys.readouterr().err
    assert "text only: tensors left out" in said
    assert "can't be converted yet" not in said, "but they could"
    left, taken = (manifest.read(each.root / "fetch").told(facts.Fetch) for each in (plain, line))
    assert {part.part for part in left.left_out} == {"audio_tower", "embed_audio"}
    assert not left.towers
    assert not taken.left_out
    tower, embedder = ears.ears(ears.SMALL, 128)
    count = sum(tensor.numel() for tensor in ears.tensors(tower, embedder).values())
    assert taken.towers == (facts.Taken(tower="audio", parameters=count),)
    assert not (plain.root / "fetch" / "checkpoint" / "preprocessor_config.json").exists()


def test_an_adapter_that_trained_the_tower_is_refused_with_it(
    line: Line, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Adapters are merged into the text model alone: the bundle would hear by the base's ears, without a word."""
    sizes = {"language_model.layers.0.self_attn.q_proj": 128, "audio_tower.conformer.0.attention.post": 64}
    parts = {
        f"base_model.model.model.{module}.lora_{part}.weight": torch.ones((4, size) if part == "A" else (size, 4))
        for module, size in sizes.items()
        for part in "AB"
    }
    table = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "bias": "none", "target_modules": ["q_proj", "post"]}
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "adapter_config.json").write_text(json.dumps(table))
    save_file(parts, tmp_path / "lora" / "adapter_model.safetensors")
    tuned = Line(artifacts=tmp_path / "artifacts", recipe=line.recipe, model=tmp_path / "lora")
    assert tuned.run(fetch.STAGE, *TAKE, "--base", str(line.model)) == 3
    assert "outside the text model" in capsys.readouterr().err
    assert tuned.run(fetch.STAGE, "--graphs", "bundle", "--base", str(line.model)) == 0


def test_reproduce_tells_the_stages_of_the_towers(line: Line) -> None:
    finished = {name: manifest.read(line.root / name) for name in ("fetch", "golden", "graph", "towers", "bundle")}
    told = {name: "--towers audio" in " ".join(rerun.words(name, finished, rerun.Given())) for name in finished}
    assert told == {"fetch": True, "golden": True, "graph": False, "towers": True, "bundle": True}


def test_a_template_without_a_place_for_sounds_is_refused(line: Line, tmp_path: Path) -> None:
    model = tmp_path / "ears"
    shutil.copytree(line.root / "fetch" / "checkpoint", model)
    (model / "chat_template.jinja").unlink()
    shutil.copy(ears.TINY / "chat_template.jinja", model)
    with pytest.raises(BundleError, match="no <audio_soft_token> where a message has a sound"):
        of_checkpoint(model, load(line.recipe).bundle, "audio")


def changed(file: Path, change: Callable[[Graph], None], out: Path) -> Path:
    made = Graph.read(file)
    change(made)
    made.write(out)
    return out


def narrower(made: Graph) -> None:
    for tensor in made.main.tensors:
        if list(tensor.shape)[-1:] == [128]:
            tensor.shape = [*list(tensor.shape)[:-1], 64]


@pytest.mark.parametrize(
    ("section", "said"),
    [("audio_adapter", "audio_adapter gives"), ("end_of_audio", "end_of_audio gives")],
)
def test_sections_of_another_width_are_refused(section: str, said: str, line: Line, tmp_path: Path) -> None:
    """LiteRT-LM answers with wrong words, and exit code 0."""
    models = sections(line)
    models[section] = changed(models[section], narrower, tmp_path / f"{section}.tflite")
    with pytest.raises(BundleError, match=said):
        fit.check(models, described(line))


def test_frames_that_the_encoder_does_not_take_are_refused(line: Line) -> None:
    for change in ({"frame": 400}, {"frames": 2992}):
        with pytest.raises(BundleError, match="audio_encoder takes"):
            sound = dataclasses.replace(described(line).sound, **change)
            fit.check(sections(line), dataclasses.replace(described(line), sound=sound))
    fit.check(sections(line), described(line))


def test_a_missing_adapter_is_refused(line: Line, tmp_path: Path) -> None:
    made = of_checkpoint(line.root / "fetch" / "checkpoint", load(line.recipe).bundle, "audio")
    models = {name: file for name, file in sections(line).items() if name != "audio_adapter"}
    with pytest.raises(BundleError, match="audio_adapter, which is missing"):
        litertlm.write(made.metadata, "{}", models, tmp_path / "x.litertlm")


def sections(line: Line) -> dict[str, Path]:
    text = {name: line.root / "fp32" / f"{name}.tflite" for name in ("decoder", "embedder", "per_layer_embedder")}
    return text | {name: line.root / "towers" / "fp32" / f"{name}.tflite" for name in audio.SECTIONS}


def described(line: Line) -> Metadata:
    return of_checkpoint(line.root / "fetch" / "checkpoint", load(line.recipe).bundle, "audio").metadata


def test_a_conversation_goes_on_after_a_sound(line: Line) -> None:
    """What was heard is heard again in every turn: without it the answers are others."""
    given = sounds.sounds()
    wav = Medium(kind="audio", data=HEARS.packed(HEARS.fitted(given["speech, 3.3 s"])))
    with LmRuntime(line.root / "bundle" / "fp32.litertlm", senses=["audio"]) as runtime:
        answers = []
        for first in ([wav], []):
            with Dialogue(runtime, 24, greedy=True) as talk:
                turns = ["".join(talk.answer("What is the sea?", first)), "".join(talk.answer("Who are you?"))]
                answers.append(turns)
    assert answers[0] != answers[1]
    assert all(turn for turns in answers for turn in turns)


def test_make_run_plays_a_file(line: Line, tmp_path: Path) -> None:
    wav = tmp_path / "it's a sound.wav"
    wav.write_bytes(HEARS.packed(sounds.sounds()["chord"]))
    file = line.root / "bundle" / "fp32.litertlm"
    command = [sys.executable, "-m", "pipeline.chat", str(file), "--max-tokens", "12"]

    def said(*words: str, typed: str = "") -> tuple[int, str, str]:
        done = subprocess.run([*command, *words], cwd=PROJECT, input=typed, capture_output=True, text=True, timeout=120)
        return done.returncode, done.stdout, done.stderr

    code, answer, _ = said("--prompt", "What is the sea?", "--audio", str(wav))
    assert code == 0
    assert answer.strip()
    code, typed, told = said(typed=f"/audio {wav}\nWhat is the sea?\n")
    assert (code, typed) == (0, answer), "played at the terminal it is the same sound"
    assert "goes with what you say next" in told
    (tmp_path / "no.wav").write_text("no sound")
    code, answer, told = said("--prompt", "x", "--audio", str(tmp_path / "no.wav"))
    assert (code, answer) == (2, "")
    assert "is no WAV file" in told


def test_the_configuration_is_read_as_transformers_reads_it(line: Line) -> None:
    config = open_checkpoint(line.root / "fetch" / "checkpoint").config
    mine, theirs = AudioConfig.from_config(config), ears.Gemma3nAudioConfig()
    empty = AudioConfig.from_config({"audio_config": {}})
    names = {field.name for field in dataclasses.fields(AudioConfig)} - {
        "soft_tokens", "text_hidden_size", "boa_token_id", "audio_token_id", "eoa_token_id"
    }  # fmt: skip
    assert {name: getattr(empty, name) for name in names} == {name: getattr(theirs, name) for name in names}
    assert mine.hidden_size == ears.SMALL["hidden_size"]
    with pytest.raises(Exception, match="sscp_conv_stride_size"):
        AudioConfig.from_config({"audio_config": {"sscp_conv_stride_size": [[1, 1], [2, 2]]}})


def test_a_bundle_without_ears_says_so(tmp_path: Path, line: Line) -> None:
    with pytest.raises(UsageError, match="does not hear") as refused:
        Senses().read("audio", tmp_path / "x.wav")
    assert "TOWERS=audio" not in refused.value.remedy, "the model may have none, or another RECIPE= takes it"
    assert json.loads((line.root / "golden" / "audio.json").read_text())[0]["tokens"]


def test_an_encoder_that_gives_no_numbers_is_refused(line: Line, tmp_path: Path) -> None:
    """As it is run at the end of stage towers, in XNNPACK."""
    made = Graph.read(line.root / "towers" / "fp32" / "audio_encoder.tflite")
    file = tmp_path / "audio_encoder.tflite"
    made.write(file)
    readback.round_trip(file, ExportError, tmp_path / "packed")
    floats = (place for place in range(len(made.main.tensors)) if made.type_of(place) == "FLOAT32")
    weight = [place for place in floats if made.is_constant(place) and len(made.shape(place)) > 1][-1]
    made.set_constant(weight, np.full(made.shape(weight), np.nan, np.float32))
    made.write(file)
    with pytest.raises(ExportError, match="not finite"):
        readback.round_trip(file, ExportError, tmp_path / "packed anew")
