"""Gemma 4 models that see pictures of any proportions: tower, sections, what LiteRT-LM hands over and says."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import seeing4
import torch
from line import Line, shared
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Gemma4ForConditionalGeneration
from transformers.models.gemma4.image_processing_pil_gemma4 import get_aspect_ratio_preserving_size

from pipeline import bundle, fetch, fp32, golden, graph, int8, towers, verify
from pipeline.bundling import litertlm
from pipeline.bundling import towers as fit
from pipeline.bundling.metadata import of_checkpoint
from pipeline.bundling.replaced import with_decoder
from pipeline.checkpoint.chat import open_tokenizer
from pipeline.checkpoint.picture import open_patches
from pipeline.checkpoint.reader import open_checkpoint
from pipeline.core import facts, manifest, senses
from pipeline.core.errors import BundleError, PipelineError, TowerError, UsageError
from pipeline.core.facts import Patches
from pipeline.core.recipe import RECIPES, Gate, load
from pipeline.judge import handed, media, mixed, seeing
from pipeline.judge.gates import Check
from pipeline.judge.metrics import nmse
from pipeline.judge.pictures import write
from pipeline.judge.reference import Head
from pipeline.judge.sensing import Reference, judge_words
from pipeline.models import architecture_for, expected, gemma4_vision
from pipeline.models.gemma4_vision import VisionConfig, VisionEncoder
from pipeline.models.towers import text_row
from pipeline.models.transformer import Rotation
from pipeline.reference.answers import answer
from pipeline.reference.model import HuggingFace
from pipeline.reference.seeing import Eyes
from pipeline.runtime.litert_lm import Kind, Medium
from pipeline.runtime.picture import Sight, extent
from pipeline.runtime.sections import Sections

TAKE = ("--towers", "vision", "--graphs", "bundle")
SEES = Sight(patches=seeing4.PATCHES)
SHAPES = ((480, 640), (640, 480), (31, 512), (512, 31), (48, 48), (300, 700), (1201, 1733), (3, 4000), (1, 1))


@pytest.fixture(scope="session")
def line(tmp_path_factory: pytest.TempPathFactory) -> Line:
    """A small Gemma 4 with eyes, as far as bundles and what the reference says of it."""

    def make(line: Line) -> None:
        seeing4.write_model(line.model)
        for stage in (fetch.STAGE, golden.STAGE, graph.STAGE, towers.STAGE, fp32.STAGE, int8.STAGE, bundle.STAGE):
            assert line.run(stage, *TAKE) == 0

    return shared(tmp_path_factory, "eyes4", make, model="eyes4", source=RECIPES / "gemma4.toml", small=seeing4.SMALL)


def bundle_of(line: Line) -> Path:
    return line.root / "bundle" / "fp32.litertlm"


def told(line: Line) -> Reference:
    return Reference.stored(line.root / "golden", "vision")


def test_sections_see_what_hugging_face_sees(line: Line, tmp_path: Path) -> None:
    gate = load(line.recipe).gates["vision-fp32"]
    checks = seeing.judge_tower("vision-fp32", line.root / "towers" / "fp32", SEES, told(line), gate, tmp_path).checks
    assert all(check.passed for check in checks), [check.sentence() for check in checks]
    assert all((check.value or 0.0) < 1e-10 for check in checks if "NMSE" in check.name)
    lengths = {len(rows) for rows in told(line).soft.values()}
    assert len(told(line).soft) >= 20 and len(lengths) > 5 and max(lengths) <= seeing4.PATCHES.tokens


def test_the_reference_is_transformers_whole_model(line: Line, tmp_path: Path) -> None:
    """Its own class, from patches to the last token, but for what LiteRT-LM does otherwise; the reference joins parts.

    The runtime gives what ends a picture the per-layer inputs of token 0.
    """
    whole = Gemma4ForConditionalGeneration.from_pretrained(line.model, attn_implementation="eager").eval()
    with torch.no_grad():
        inputs = whole.model.language_model.embed_tokens_per_layer.weight
        inputs[seeing4.END] = inputs[0]
    files = write(tmp_path)
    for row in [row for row in told(line).answers if len(row.media) == 1][:3]:
        ((_, name),) = row.media
        ids = torch.tensor([[seeing4.PLACE if token < 0 else token for token in row.prompt]])
        ids[0, row.prompt.index(-1) + len(told(line).soft[name])] = seeing4.END
        given = {key: torch.from_numpy(values) for key, values in SEES.given(files[name]).items()}
        made = whole.generate(
            input_ids=ids,
            pixel_values=given["images"],
            image_position_ids=given["positions_xy"].long(),
            mm_token_type_ids=(ids == seeing4.PLACE).long(),
            max_new_tokens=len(row.tokens),
            do_sample=False,
        )
        assert made[0, ids.shape[1] :].tolist() == row.tokens


def checks_of(line: Line, scratch: Path, *, moved: bool = False) -> list[Check]:
    cap = manifest.read(line.root / "golden").told(facts.Golden).final_logit_softcapping
    with media.given(SEES, None, scratch) as given:
        made = mixed.vectors(line.root / "towers" / "fp32", given, scratch)
        return mixed.judge_logits(
            "vision-fp32",
            Sections(line.root / "fp32"),
            lambda kind, name: np.roll(made(kind, name), moved, axis=0),
            told(line),
            Head.of_checkpoint(line.root / "fetch" / "checkpoint", cap),
            64,
            Gate(nmse=1e-6),
        )


def test_logits_behind_pictures_are_hugging_faces(line: Line, tmp_path: Path) -> None:
    """Through the sections and the cache; soft tokens moved by one are red."""
    right = checks_of(line, tmp_path)
    assert all(check.passed for check in right), [check.sentence() for check in right]
    assert (right[0].value or 1.0) < 1e-9
    assert not checks_of(line, tmp_path, moved=True)[0].passed


def test_the_runtime_says_what_hugging_face_says(line: Line, tmp_path: Path) -> None:
    reference = told(line)
    with media.given(SEES, None, tmp_path) as given:
        words, said = judge_words(bundle_of(line), given, reference.answers, tmp_path, "vision")
    assert [(row.text, row.same) for row in said] == [(row.text, True) for row in reference.answers]
    assert words.passed, words.detail
    assert len({row.text for row in reference.answers}) > 1, "else anything would do"
    assert any(len(row.media) == 2 for row in reference.answers)


def handed_over(line: Line, scratch: Path, change: Callable[[Medium], Medium] = lambda medium: medium) -> list[Check]:
    checkpoint = line.root / "fetch" / "checkpoint"
    with media.given(SEES, None, scratch) as given:

        def medium(kind: Kind, name: str) -> Medium:
            return change(given(kind, name))

        setting = handed.Setting(
            towers={"vision": told(line)},
            medium=medium,
            tokenizer=open_tokenizer(checkpoint),
            vocabulary=2048,
            per_layer=handed.per_layer_inputs(open_checkpoint(checkpoint)),
            large=False,
        )
        return handed.judge_handed("bundle-fp32", setting, partial(with_decoder, bundle_of(line)), scratch).checks


def test_the_runtime_hands_over_soft_tokens_of_pictures_of_all_proportions(line: Line, tmp_path: Path) -> None:
    checks = handed_over(line, tmp_path)
    assert all(check.passed for check in checks), [check.sentence() for check in checks]
    assert (checks[0].value or 1.0) < 1e-10 and "soft tokens, vision" in checks[0].name


def test_a_picture_without_its_number_is_enlarged_by_the_runtime(line: Line, tmp_path: Path) -> None:
    """To the most soft tokens, once more, if there is room: the count of a wide picture is then another."""
    red = [check.name for check in handed_over(line, tmp_path, lambda it: replace(it, tokens=0)) if not check.passed]
    assert any("soft tokens" in name for name in red)


def test_verify_judges_it(line: Line) -> None:
    assert line.run(verify.STAGE, *TAKE) == 0
    judged = (line.root / "verify" / "report.json").read_text()
    for name in ("vision-fp32", "vision-int8", "worst logits NMSE through the cache", "that differ, vision"):
        assert name in judged


def test_what_the_bundle_says_of_itself(line: Line) -> None:
    assert litertlm.sees(bundle_of(line)) == SEES
    held = manifest.read(line.root / "bundle").part("fp32", facts.Bundle)
    assert held.sees == facts.Sees(size=0, patches=seeing4.PATCHES)
    assert [section.model_type for section in held.sections[2:]] == [
        "tf_lite_prefill_decode",
        "tf_lite_embedder",
        "tf_lite_per_layer_embedder",
        "tf_lite_vision_encoder",
        "tf_lite_vision_adapter",
        "tf_lite_end_of_vision",
    ]


@pytest.mark.parametrize("change", [Patches(size=16, pool=3, tokens=140), Patches(size=12, pool=4, tokens=70)])
def test_sections_that_do_not_fit_what_is_said_are_refused(change: Patches, line: Line) -> None:
    """LiteRT-LM 0.18.1 checks none of it."""
    metadata = of_checkpoint(line.root / "fetch" / "checkpoint", load(line.recipe).bundle, "vision").metadata
    models = {file.stem: file for part in ("fp32", "towers/fp32") for file in (line.root / part).glob("*.tflite")}
    fit.check(models, metadata)
    assert metadata.picture
    with pytest.raises(BundleError, match="vision_encoder takes"):
        fit.check(models, replace(metadata, picture=replace(metadata.picture, patches=change)))


# In PyTorch, where each defect takes a second


@pytest.fixture(scope="module")
def theirs() -> Any:
    return seeing4.model().model


def error(theirs: Any) -> float:
    """The worst NMSE of soft tokens, ours against theirs: of a wide picture, and of one with places of padding."""
    config = VisionConfig.from_config(theirs.config.to_dict())
    encoder = VisionEncoder(config, seeing4.PATCHES)
    adapter = gemma4_vision.VisionAdapter(config)
    state = theirs.state_dict()
    table = "vision_tower.patch_embedder.position_embedding_table"
    state[table] = state[table][:, : seeing4.PATCHES.longest].flatten(0, 1)
    for module in (encoder, adapter):
        module.load_state_dict({name: state[name] for name in module.state_dict()})
    worst = 0.0
    for down, across in ((6, 21), (24, 24)):
        draw = torch.Generator().manual_seed(down)
        images = torch.zeros(1, seeing4.PATCHES.count, 768)
        images[:, : down * across] = torch.rand(down * across, 768, generator=draw)
        places = torch.full((1, seeing4.PATCHES.count, 2), -1)
        grid = torch.meshgrid(torch.arange(across), torch.arange(down), indexing="xy")
        places[0, : down * across] = torch.stack(grid, -1).reshape(-1, 2)
        with torch.inference_mode():
            found = encoder(images, places.int())
            ours = adapter(found["features"])["mm_embedding"][found["mask"]]
            wanted = theirs.get_image_features(images, places, return_dict=True).pooler_output[0]
        worst = max(worst, nmse(ours.numpy(), wanted.numpy()) if ours.shape == wanted.shape else np.inf)
    return worst


def test_without_a_defect_the_tower_is_transformers(theirs: Any) -> None:
    assert error(theirs) < 1e-10


def _seen_by_all(self: Any, x: Tensor, across: Tensor, down: Tensor, there: Tensor) -> Tensor:
    return OWN["forward"](self, x, across, down, torch.ones_like(there))


OWN: dict[str, Any] = {"forward": gemma4_vision.Encoder.forward, "at": Rotation.at}


@pytest.mark.parametrize(
    ("what", "place", "name", "wrong"),
    [
        ("patches see padding", gemma4_vision.Encoder, "forward", _seen_by_all),
        ("limits dropped", gemma4_vision.ClippedLinear, "forward", lambda self, x: self.linear(x)),
        ("axes swapped", gemma4_vision.PatchEmbedder, "_of", lambda self, places: _swapped(self, places)),
        ("rotary base", Rotation, "at", lambda places, theta, size: OWN["at"](places, 1e4, size)),
        ("one axis alone turns", gemma4_vision, "_turned", lambda x, rotations: _once(x, rotations)),
        ("heads' keys in another order", gemma4_vision, "_apart", lambda x: [*reversed(OWN["apart"](x))]),
    ],
)
def test_a_defect_of_the_tower_is_red(
    what: str, place: Any, name: str, wrong: Any, theirs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(place, name, wrong)
    assert error(theirs) > 1e-6, what


OWN["apart"] = gemma4_vision._apart


def _swapped(self: Any, places: Tensor) -> Tensor:
    other = torch.where(places < self.longest, places + self.longest, places - self.longest)
    return gemma4_vision.lookup(other.reshape(-1), self.position_embedding_table)[None]


def _once(x: Tensor, rotations: tuple[Rotation, Rotation]) -> Tensor:
    half = x.shape[-1] // 2
    return torch.cat([rotations[0].apply(x[..., :half]), x[..., half:]], dim=-1)


@pytest.mark.parametrize("change", [{"standardize": False}, {"rms_norm_eps": 1e-2}])
def test_a_setting_that_is_not_read_is_red(
    change: dict[str, Any], theirs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = VisionConfig.from_config
    monkeypatch.setattr(VisionConfig, "from_config", lambda config: replace(right(config), **change))
    assert error(theirs) > 1e-6


# Pictures


@pytest.mark.parametrize("tokens", [70, 280, 1120])
def test_extents_are_transformers(tokens: int) -> None:
    draw = np.random.default_rng(0)
    drawn = [tuple(map(int, 2 ** draw.uniform(0, 13, 2))) for _ in range(2000)]
    patches = Patches(size=16, pool=3, tokens=tokens)
    for height, width in (*SHAPES, *drawn):
        wanted = get_aspect_ratio_preserving_size(height, width, 16, patches.count, 3)
        assert extent(height, width, patches) == wanted
        assert wanted[0] * wanted[1] <= patches.count * 256


@pytest.mark.parametrize("shape", SHAPES)
def test_pictures_are_resized_to_the_bit_as_torch_does(shape: tuple[int, int]) -> None:
    draw = np.random.default_rng(sum(shape))
    pixels = draw.integers(0, 256, (*shape, 3), np.uint8)
    wanted = torch.nn.functional.interpolate(
        torch.from_numpy(pixels).permute(2, 0, 1)[None],
        get_aspect_ratio_preserving_size(*shape, 16, seeing4.PATCHES.count, 3),
        mode="bicubic",
        antialias=True,
    )
    assert (SEES.fitted(pixels) == wanted[0].permute(1, 2, 0).numpy()).all()


# What is refused


def fetched(model: Path, tmp_path: Path) -> int:
    made = Line(artifacts=tmp_path / "artifacts", recipe=RECIPES / "gemma4.toml", model=model)
    return made.run(fetch.STAGE, *TAKE)


@pytest.mark.parametrize("change", ["missing", "hidden_activation", "vision"])
def test_towers_that_are_not_whole_or_not_known(
    change: str, line: Line, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "eyes4"
    shutil.copytree(line.model, model)
    stored, layer = load_file(model / "model.safetensors"), "vision_tower.encoder.layers.1.mlp.up_proj.input_max"
    config = json.loads((model / "config.json").read_text())
    if change == "missing":
        del stored[f"model.{layer}"]
    elif change == "vision":
        config["text_config"]["use_bidirectional_attention"] = "vision"
    else:
        config["vision_config"][change] = "silu"
    (model / "config.json").write_text(json.dumps(config))
    save_file(stored, model / "model.safetensors", {"format": "pt"})
    assert fetched(model, tmp_path) == 3
    said = capsys.readouterr().err
    assert {
        "missing": f"1 tensor is missing: {layer}",
        "hidden_activation": "vision_config.hidden_activation is silu, expected gelu_pytorch_tanh",
        "vision": "soft tokens are to see their whole picture in sliding layers alone",
    }[change] in said
    assert "TOWERS=none" in said


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"resample": 2}, "resample 2, expected 3"),
        ({"do_resize": False}, "do_resize False"),
        ({"patch_size": 14}, "14"),
        ({"max_soft_tokens": 100}, "transformers refuses the image processor .*100"),
    ],
)
def test_a_processor_that_does_otherwise_is_refused(
    change: dict[str, Any], says: str, line: Line, tmp_path: Path
) -> None:
    told = json.loads((line.model / "preprocessor_config.json").read_text())
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(told | change))
    config = VisionConfig.from_config(json.loads((line.model / "config.json").read_text()))
    with pytest.raises(TowerError, match=says):
        config.check(open_patches(tmp_path))


@pytest.mark.parametrize("change", [{"use_bidirectional_attention": "vision"}, {"hidden_size_per_layer_input": 0}])
def test_what_no_picture_can_go_into_is_taken_as_text(change: dict[str, Any], line: Line) -> None:
    """Unless its eyes are asked for: then with what to say instead, which is not the recipe that is said already."""
    config = json.loads((line.model / "config.json").read_text())
    config["text_config"].update(change, num_kv_shared_layers=0)
    assert senses.described(json.loads((line.model / "config.json").read_text())) and not senses.described(config)
    assert expected(load(RECIPES / "gemma4.toml"), "none", config).towers == {}
    with pytest.raises(PipelineError) as told:
        expected(load(RECIPES / "gemma4.toml"), "vision", config)
    assert told.value.remedy and "TOWERS=none" in told.value.remedy and "RECIPE" not in told.value.remedy


def test_an_end_that_is_no_token_is_refused(line: Line) -> None:
    checkpoint = open_checkpoint(line.root / "fetch" / "checkpoint")
    with pytest.raises(TowerError, match="token 2048 ends a picture or a sound, and the model has 2048 tokens"):
        text_row(checkpoint, 2048)


def test_a_template_that_drops_pictures_is_told_by_the_reference(line: Line) -> None:
    checkpoint = line.root / "fetch" / "checkpoint"
    sense = replace(Eyes.load(checkpoint).sense, place=2015)
    with pytest.raises(UsageError, match="the chat template says .* 0 times for 1 media of kind image"):
        answer(HuggingFace.load(checkpoint, "cpu"), {"image": sense}, "?", [("image", "x", np.zeros((1, 1)))], 1)


def test_every_tensor_of_the_true_tower_has_its_place() -> None:
    """Of E2B: 16 layers of 768 whose layers hold limits, and one matrix of the embedder."""
    config = {"vision_config": seeing4.TRUE, "text_config": {"hidden_size": 1536}, "model_type": "gemma4"}
    shapes = gemma4_vision.tensors(VisionConfig.from_config(config))
    with torch.device("meta"):
        made = Gemma4ForConditionalGeneration(
            Gemma4ForConditionalGeneration.config_class(vision_config=seeing4.TRUE, text_config={"hidden_size": 1536})
        ).model
    own = {
        f"{part}.{name}": tuple(tensor.shape)
        for part in ("vision_tower", "embed_vision")
        for name, tensor in made.get_submodule(part).state_dict().items()
    }
    assert shapes == own
    tower = architecture_for(config).towers()["vision"]
    assert tower.rows > 2520
