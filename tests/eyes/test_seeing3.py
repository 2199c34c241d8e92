"""Gemma 3 models that see: tower, sections, what LiteRT-LM hands over and says, against Hugging Face."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import seeing3
import torch
from line import Line, shared
from litert_lm_builder.runtime.proto import executor_metadata_pb2
from safetensors.torch import load_file, save_file
from transformers import Gemma3ForConditionalGeneration
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

from pipeline import bundle, fetch, fp32, golden, graph, int8, towers, verify
from pipeline.bundling import litertlm
from pipeline.bundling import towers as fit
from pipeline.bundling.metadata import of_checkpoint
from pipeline.bundling.replaced import with_decoder
from pipeline.checkpoint.chat import open_tokenizer
from pipeline.checkpoint.picture import open_look
from pipeline.checkpoint.reader import open_checkpoint
from pipeline.core import facts, manifest
from pipeline.core.errors import BundleError, TowerError, UsageError
from pipeline.core.recipe import RECIPES, Gate, load
from pipeline.judge import handed, media, mixed, seeing
from pipeline.judge.gates import Check
from pipeline.judge.pictures import write
from pipeline.judge.reference import Head
from pipeline.judge.sensing import Reference, judge_words
from pipeline.models import architecture_for, gemma3_vision
from pipeline.reference import seeing as reference_eyes
from pipeline.reference.answers import answer
from pipeline.reference.model import HuggingFace
from pipeline.reference.seeing import Eyes
from pipeline.runtime.picture import Sight
from pipeline.runtime.sections import Sections

TAKE = ("--towers", "vision", "--graphs", "bundle")
SEES = Sight(size=seeing3.SIZE)


@pytest.fixture(scope="session")
def line(tmp_path_factory: pytest.TempPathFactory) -> Line:
    """A small Gemma 3 with eyes, as far as bundles and what the reference says of it."""

    def make(line: Line) -> None:
        seeing3.write_model(line.model)
        for stage in (fetch.STAGE, golden.STAGE, graph.STAGE, towers.STAGE, fp32.STAGE, int8.STAGE, bundle.STAGE):
            assert line.run(stage, *TAKE) == 0

    source = RECIPES / "gemma3_vision.toml"
    return shared(tmp_path_factory, "eyes3", make, model="eyes3", source=source, small=seeing3.SMALL)


def bundle_of(line: Line) -> Path:
    return line.root / "bundle" / "fp32.litertlm"


def told(line: Line) -> Reference:
    return Reference.stored(line.root / "golden", "vision")


def test_sections_see_what_hugging_face_sees(line: Line, tmp_path: Path) -> None:
    gate = load(line.recipe).gates["vision-fp32"]
    checks = seeing.judge_tower("vision-fp32", line.root / "towers" / "fp32", SEES, told(line), gate, tmp_path).checks
    assert all(check.passed for check in checks), [check.sentence() for check in checks]
    assert all((check.value or 0.0) < 1e-10 for check in checks)
    assert len(told(line).soft) >= 20
    assert all(rows.shape == (seeing3.ROWS, 64) for rows in told(line).soft.values())


def test_the_reference_is_transformers_whole_model(line: Line, tmp_path: Path) -> None:
    """Its own class with its own masks, from pixels to the last token; the reference joins parts of it."""
    whole = Gemma3ForConditionalGeneration.from_pretrained(line.model, attn_implementation="eager").eval()
    processor, files = Gemma3ImageProcessorPil.from_pretrained(line.model), write(tmp_path)
    for row in told(line).answers[:3]:
        ((_, name),) = row.media
        ids = torch.tensor([[seeing3.PLACE if token < 0 else token for token in row.prompt]])
        fitted = processor(whole_picture(files[name]), return_tensors="pt")["pixel_values"]
        made = whole.generate(
            input_ids=ids,
            pixel_values=fitted,
            token_type_ids=(ids == seeing3.PLACE).long(),
            max_new_tokens=len(row.tokens),
            do_sample=False,
        )
        assert made[0, ids.shape[1] :].tolist() == row.tokens


def whole_picture(file: Path) -> np.ndarray:
    """The pixels that the encoder gets: what is of its size already no processor resizes."""
    return (SEES.given(file)["images"][0] * 255).round().astype(np.uint8)


def checks_of(line: Line, scratch: Path, *, whole: bool = True, moved: bool = False) -> list[Check]:
    cap = manifest.read(line.root / "golden").told(facts.Golden).final_logit_softcapping
    with media.given(SEES, None, scratch) as given:
        made = mixed.vectors(line.root / "towers" / "fp32", given, scratch)
        return mixed.judge_logits(
            "vision-fp32",
            Sections(line.root / "fp32", whole=whole),
            lambda kind, name: np.roll(made(kind, name), moved, axis=0),
            told(line),
            Head.of_checkpoint(line.root / "fetch" / "checkpoint", cap),
            64,
            Gate(nmse=1e-6),
        )


def test_logits_behind_pictures_are_hugging_faces(line: Line, tmp_path: Path) -> None:
    """Through the sections and the cache; a mask that hides what comes after and soft tokens moved by one are red."""
    right = checks_of(line, tmp_path)
    assert all(check.passed for check in right), [check.sentence() for check in right]
    assert (right[0].value or 1.0) < 1e-9
    assert not checks_of(line, tmp_path, whole=False)[0].passed
    assert not checks_of(line, tmp_path, moved=True)[0].passed


def test_the_runtime_says_what_hugging_face_says(line: Line, tmp_path: Path) -> None:
    reference = told(line)
    with media.given(SEES, None, tmp_path) as given:
        words, said = judge_words(bundle_of(line), given, reference.answers, tmp_path, "vision")
    assert [(row.text, row.same) for row in said] == [(row.text, True) for row in reference.answers]
    assert words.passed, words.detail
    assert len({row.text for row in reference.answers}) > 1, "else anything would do"


def test_a_conversation_goes_on_past_what_sliding_layers_keep(line: Line, tmp_path: Path) -> None:
    """A ring is told to the runtime as a local cache: as a global one it ends a conversation where the ring does."""
    ring = seeing3.TEXT["sliding_window"] + 64
    checkpoint = line.root / "fetch" / "checkpoint"
    reference = HuggingFace.load(checkpoint, "cpu")
    soft = told(line).soft["noise"]
    question = " ".join(["Tell me about the river, the sea and the sky."] * 12)
    row, _ = answer(reference, {"image": Eyes.load(checkpoint).sense}, question, [("image", "noise", soft)], 32)
    assert len(row.prompt) > 2 * ring
    with media.given(SEES, None, tmp_path) as given:
        words, said = judge_words(bundle_of(line), given, [row], tmp_path, "vision")
    assert words.passed and said[0].same, words.detail


def handed_over(line: Line, scratch: Path, made: Path, **changes: tuple[int, ...]) -> dict[str, Check]:
    checkpoint = line.root / "fetch" / "checkpoint"
    with media.given(SEES, None, scratch) as given:
        setting = handed.Setting(
            towers={"vision": told(line)},
            medium=given,
            tokenizer=open_tokenizer(checkpoint),
            vocabulary=2048,
            per_layer=handed.per_layer_inputs(open_checkpoint(checkpoint)),
            large=False,
            whole=load(line.recipe).bundle.prefill,
        )
        found = handed.judge_handed("bundle-fp32", replace(setting, **changes), partial(with_decoder, made), scratch)
    return {check.name: check for check in found.checks}


def test_the_runtime_hands_over_soft_tokens_that_see_their_picture(line: Line, tmp_path: Path) -> None:
    checks = handed_over(line, tmp_path, bundle_of(line))
    assert all(check.passed for check in checks.values()), [check.sentence() for check in checks.values()]
    soft = checks["worst NMSE of what LiteRT-LM hands to the decoder, soft tokens, vision"]
    assert (soft.value or 1.0) < 1e-10
    assert any("or of their picture" in name for name in checks)


def test_a_bundle_that_masks_pictures_as_text_is_red(
    line: Line, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As LiteRT-LM does where nothing tells it otherwise."""
    message = executor_metadata_pb2.ExecutorMetadata.FromString(
        litertlm.seeing_whole(line.root / "fp32/decoder.tflite")
    )
    assert len(message.llm_executor_metadata.state_buffers) == 2 * seeing3.TEXT["num_hidden_layers"]
    causal = executor_metadata_pb2.AttentionMaskType.ATTENTION_MASK_TYPE_CAUSAL

    def told_otherwise(decoder: Path) -> bytes:
        message = executor_metadata_pb2.ExecutorMetadata.FromString(own(decoder))
        message.llm_executor_metadata.attention_mask_settings.attention_mask_type = causal
        return message.SerializeToString()

    own = litertlm.seeing_whole
    monkeypatch.setattr(litertlm, "seeing_whole", told_otherwise)
    red = [name for name, check in handed_over(line, tmp_path, bundle_of(line)).items() if not check.passed]
    assert len(red) == 1 and "or of their picture" in red[0]


def test_verify_judges_it(line: Line) -> None:
    assert line.run(verify.STAGE, *TAKE) == 0
    judged = (line.root / "verify" / "report.json").read_text()
    for name in ("vision-fp32", "vision-int8", "worst logits NMSE through the cache", "that differ, vision"):
        assert name in judged


def test_what_the_bundle_says_of_itself(line: Line) -> None:
    assert litertlm.sees(bundle_of(line)) == SEES
    held = manifest.read(line.root / "bundle").part("fp32", facts.Bundle)
    assert held.sees == facts.Sees(size=seeing3.SIZE, whole=True)
    kinds = [section.kind for section in held.sections]
    assert kinds[2] == litertlm.EXECUTOR
    assert [section.model_type for section in held.sections[3:]] == [
        "tf_lite_prefill_decode",
        "tf_lite_embedder",
        "tf_lite_vision_encoder",
        "tf_lite_vision_adapter",
    ]


def test_an_adapter_with_a_row_behind_the_picture_is_refused(line: Line) -> None:
    """It would be seen by the soft tokens."""
    metadata = of_checkpoint(line.root / "fetch" / "checkpoint", load(line.recipe).bundle, "vision").metadata
    text = {name: line.root / "fp32" / f"{name}.tflite" for name in ("decoder", "embedder")}
    models = text | {file.stem: file for file in (line.root / "towers" / "fp32").glob("*.tflite")}
    fit.check(models, metadata)
    assert metadata.picture
    with pytest.raises(BundleError, match="vision_adapter gives"):
        fit.check(models, replace(metadata, picture=replace(metadata.picture, whole=False)))


def test_a_shorter_prefill_beside_the_long_one_would_read_pictures_in_parts(line: Line, tmp_path: Path) -> None:
    """A prompt of 39 tokens with a picture from the eighth on: 16 + 16 + 8, by the longest that it fills."""
    checks = handed_over(line, tmp_path, bundle_of(line), whole=(8, 16, 64))
    red = [name for name, check in checks.items() if not check.passed]
    assert len(red) == 1 and "or of their picture" in red[0]


@pytest.mark.parametrize("prefill", [(16,), (16, 64)])
def test_such_a_bundle_is_refused_and_long_prompts_are_spoken_of(prefill: tuple[int, ...], line: Line) -> None:
    checkpoint, sees = line.root / "fetch" / "checkpoint", load(line.recipe).bundle
    assert "by 64 tokens" in of_checkpoint(checkpoint, sees, "vision").metadata.remarks[-1]
    assert not of_checkpoint(checkpoint, sees).metadata.remarks
    with pytest.raises(BundleError, match="would be read in several calls"):
        of_checkpoint(checkpoint, replace(sees, prefill=prefill), "vision")


def test_a_prefill_holds_a_picture_and_what_a_chat_begins_with(line: Line, tmp_path: Path) -> None:
    """As many tokens as the reference's prompt with a picture and no question, in which LiteRT-LM reads it whole."""
    checkpoint, sees = line.root / "fetch" / "checkpoint", load(line.recipe).bundle
    senses = {"image": Eyes.load(checkpoint).sense}
    shown = [("image", "noise", told(line).soft["noise"])]
    alone = len(answer(HuggingFace.load(checkpoint, "cpu"), senses, "", shown, 1)[0].prompt)
    assert alone > seeing3.ROWS + 2
    assert of_checkpoint(checkpoint, replace(sees, prefill=(alone,)), "vision").metadata.picture
    assert all(check.passed for check in handed_over(line, tmp_path, bundle_of(line), whole=(alone,)).values())
    with pytest.raises(BundleError, match="would be read in several calls") as refused:
        of_checkpoint(checkpoint, replace(sees, prefill=(alone - 1,)), "vision")
    assert f"a prompt of {alone} tokens" in refused.value.cause
    assert refused.value.remedy == "say prefill = [64] there"


def test_without_timm_golden_does_not_speak_of_ears(
    line: Line, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reference_eyes, "BESIDE", tmp_path / "nowhere")
    with pytest.raises(UsageError) as refused:
        reference_eyes.look(line.model, {}, tmp_path)
    assert refused.value.remedy.endswith("or say TOWERS=none")


def test_every_tensor_of_the_true_tower_has_its_place() -> None:
    """Of Gemma 3 4B: 437 of SigLIP without its head, 417 million parameters, and two of the projector."""
    true = {
        "hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16,
        "image_size": 896, "patch_size": 14,
    }  # fmt: skip
    config = {"vision_config": true, "text_config": {"hidden_size": 2560}, "mm_tokens_per_image": 256}
    shapes = gemma3_vision.tensors(gemma3_vision.VisionConfig.from_config(config))
    own = [shape for name, shape in shapes.items() if name.startswith("vision_tower.")]
    assert (len(own), len(shapes)) == (437, 439)
    assert sum(int(np.prod(shape)) for shape in own) == 416_866_032
    tower = architecture_for({"model_type": "gemma3", **config}).towers()["vision"]
    products = tower.rows * sum(int(np.prod(shape)) for shape in shapes.values())
    # Of patches by weights, and of patches by patches twice.
    assert products == pytest.approx(4096 * 416_866_032 + 2 * 4096**2 * 1152 * 27, rel=0.01)


# What stays as it was, and what is refused.


def fetched(model: Path, tmp_path: Path, recipe: str, *options: str) -> int:
    made = Line(artifacts=tmp_path / "artifacts", recipe=RECIPES / recipe, model=model)
    return made.run(fetch.STAGE, *options)


def test_by_default_the_tower_stays_out_and_the_recipe_that_takes_it_is_named(
    line: Line, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fetched(line.model, tmp_path, "gemma3.toml") == 0
    said = capsys.readouterr().err
    assert "text only: tensors left out: 2 of multi_modal_projector, 53 of vision_tower" in said
    assert "RECIPE=pipeline/recipes/gemma3_vision.toml takes them" in said
    assert fetched(line.model, tmp_path / "2", "gemma3.toml", "--towers", "vision") == 2
    assert "do:    say RECIPE=pipeline/recipes/gemma3_vision.toml" in capsys.readouterr().err


def test_its_text_bundles_look_tokens_up_as_before() -> None:
    made = architecture_for(seeing3.model().config.to_dict())
    assert made.tables() == ()
    assert [table.name for table in made.with_embedder().tables()] == ["embedder"]
    assert "tokens" in made.decoder_inputs(1, 64, 8)
    assert "embeddings" in made.with_embedder().decoder_inputs(1, 64, 8)


def test_other_families_have_no_embedder(tmp_path: Path) -> None:
    plain = architecture_for({"model_type": "qwen3", "tie_word_embeddings": True})
    with pytest.raises(Exception, match="no decoder of this family is given embeddings"):
        plain.with_embedder()


@pytest.mark.parametrize("change", ["missing", "old names", "other act", "other heads"])
def test_names_and_wholeness_of_the_tower(
    change: str, line: Line, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One that is not whole is refused by name; as transformers 4 saved it, it is taken."""
    model = tmp_path / "eyes3"
    shutil.copytree(line.model, model)
    stored = load_file(model / "model.safetensors")
    layer = "vision_tower.encoder.layers.1.mlp.fc1.weight"
    if change == "missing":
        del stored[layer]
    if change == "old names":
        stored = {name.replace("vision_tower.", "vision_tower.vision_model."): each for name, each in stored.items()}
    if "other" in change:
        file = model / "config.json"
        config = json.loads(file.read_text())
        config["vision_config"] |= {"hidden_act": "relu"} if change == "other act" else {"num_attention_heads": 5}
        file.write_text(json.dumps(config))
    save_file(stored, model / "model.safetensors", {"format": "pt"})
    code = fetched(model, tmp_path, "gemma3_vision.toml", *TAKE)
    said = capsys.readouterr().err
    if change == "old names":
        assert code == 0
    elif change == "missing":
        assert code == 3 and f"1 tensor is missing: {layer}" in said
    elif change == "other act":
        assert code == 3 and "vision_config.hidden_act is relu, expected gelu_pytorch_tanh" in said
    else:
        assert code == 3 and "vision_config.hidden_size is 48, no multiple of its 5 heads" in said


def test_where_there_is_no_tower_it_is_said(line: Line, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As after a training that saved the text model alone: else a bundle that was to see would be blind, silently."""
    model = tmp_path / "eyes3"
    shutil.copytree(line.model, model)
    stored = load_file(model / "model.safetensors")
    text = {name: each for name, each in stored.items() if "language_model" in name}
    assert text and len(text) < len(stored)
    save_file(text, model / "model.safetensors", {"format": "pt"})
    assert fetched(model, tmp_path, "gemma3_vision.toml") == 0
    assert "text only: config.json describes vision, and no tensor of that is here" in capsys.readouterr().err
    assert fetched(model, tmp_path / "2", "gemma3.toml") == 0
    assert "config.json describes" not in capsys.readouterr().err


def test_pictures_in_crops_are_refused(line: Line, tmp_path: Path) -> None:
    """Gemma 3's processor can make several pictures of one ("pan and scan"), which is off by default."""
    told = json.loads((line.model / "preprocessor_config.json").read_text())
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(told | {"do_pan_and_scan": True}))
    with pytest.raises(TowerError, match="crops or pads"):
        open_look(tmp_path)


def test_the_recipe_is_the_text_models_but_for_what_pictures_need() -> None:
    text, sees = (load(RECIPES / f"{name}.toml") for name in ("gemma3", "gemma3_vision"))
    own = {"vision-fp32", "vision-fp16", "vision-int8"}
    told = {name: gate for name, gate in text.gates.items() if "int4" not in name}
    told["bundle-int8"] = replace(told["bundle-int8"], size_per_parameter=None)  # the table stands there twice
    assert {name: gate for name, gate in sees.gates.items() if name not in own} == told
    assert (sees.int8, sees.corpus, sees.shapes, sees.step) == (text.int8, text.corpus, text.shapes, text.step)
    assert sees.bundle == replace(text.bundle, prefill=(512,), optional=(), embedder=True)
    assert (text.towers.taken, sees.towers.taken) == ((), ("vision",))


def test_the_mask_is_what_tells(line: Line) -> None:
    """Two pictures side by side by text: each sees itself, not the other one."""
    rows = [*np.zeros((3, 64), np.float32)]
    sections, name = Sections(line.root / "fp32", whole=True), "prefill_64"
    seen: list[np.ndarray] = []
    own = sections._runners[name]

    class Kept:
        def __call__(self, **inputs: np.ndarray) -> dict[str, np.ndarray]:
            seen.append(inputs["mask"])
            return own(**inputs)

    sections._runners[name] = Kept()  # type: ignore[assignment]
    sections.run(name, [5, *rows, 6, *rows], 4, sections.empty_cache())
    allowed = (seen[0][0, 0] == 0)[:8, 4:12]
    expected = np.tril(np.ones((8, 8), bool))
    expected[1:4, 1:4] = expected[5:8, 5:8] = True
    assert (allowed == expected).all()
