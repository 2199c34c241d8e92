"""Models that see: the vision tower against Hugging Face, its sections in a bundle, and what LiteRT-LM answers."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import ears
import numpy as np
import pytest
import torch
from line import Line, small_recipe
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn import functional
from whole import END, HEARS, KINDS, PLACES, SEES, TAKE, bundle_of, changed, sections, told

from pipeline import fetch, verify
from pipeline.bundling import litertlm
from pipeline.bundling import towers as fit
from pipeline.bundling.metadata import Metadata, of_checkpoint
from pipeline.checkpoint.picture import open_look
from pipeline.checkpoint.reader import open_checkpoint
from pipeline.core import facts, manifest
from pipeline.core.errors import BundleError, FetchError, UsageError
from pipeline.core.recipe import PROJECT, Gate, Towers, load
from pipeline.core.stage import DEFAULT_RECIPE
from pipeline.judge import hearing, media, mixed, seeing
from pipeline.judge.gates import Check, Measurement, judge
from pipeline.judge.metrics import nmse
from pipeline.judge.pictures import pictures, write
from pipeline.judge.reference import Head
from pipeline.judge.sensing import Reference, judge_words
from pipeline.judge.sounds import sounds
from pipeline.models import gemma3n_vision as vision
from pipeline.models.gemma3n_vision import VisionConfig
from pipeline.quantize import rows, senses
from pipeline.reference.seeing import Eyes
from pipeline.release import card
from pipeline.runtime.picture import Sight
from pipeline.runtime.sections import Sections, Token
from pipeline.tflite.graph import Graph, Origin
from tools.bench_senses import named


def test_sections_see_what_hugging_face_sees(line: Line, tmp_path: Path) -> None:
    gate = load(line.recipe).gates["vision-fp32"]
    checks = seeing.judge_tower("vision-fp32", line.root / "towers" / "fp32", SEES, told(line), gate, tmp_path).checks
    assert all(check.passed for check in checks), [check.sentence() for check in checks]
    assert all((check.value or 0.0) < 1e-10 for check in checks)
    assert len(told(line).soft) >= 20
    assert all(rows.shape == (257, 128) for rows in told(line).soft.values())


@pytest.mark.parametrize("tower", KINDS)
def test_the_runtime_says_what_hugging_face_says(tower: str, line: Line, tmp_path: Path) -> None:
    """About pictures, sounds, and two pictures with a sound."""
    reference = Reference.stored(line.root / "golden", tower)
    with media.given(SEES, HEARS, tmp_path) as given:
        words, said = judge_words(bundle_of(line), given, reference.answers, tmp_path, tower)
        others = [replace(row, text=row.text + "!") for row in reference.answers]
        assert not judge_words(bundle_of(line), given, others, tmp_path, tower)[0].passed
    assert [(row.text, row.same) for row in said] == [(row.text, True) for row in reference.answers]
    assert words.passed, words.detail
    kinds = {tuple(kind for kind, _ in row.media) for row in reference.answers}
    assert tower == "audio" or ("image", "image", "audio") in kinds
    assert len({row.text for row in reference.answers}) > 1, "else anything would do"


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_it_names_what_it_sees_and_hears(precision: str, line: Line) -> None:
    """Pictures and sounds that nobody trained on, in English and in Tifinagh: `training.json` says how many of 160."""
    right = named(line.root / "bundle" / f"{precision}.litertlm", 4)
    asked = [good for answers in right.values() for good in answers]
    assert len(asked) == 44
    assert sum(asked) >= 22, right


def test_verify_judges_eyes_and_ears(line: Line) -> None:
    assert line.run(verify.STAGE, *TAKE) == 0
    report = json.loads((line.root / "verify" / "report.json").read_text())
    judged = json.dumps(report)
    assert PLACES in judged
    told = ("fp32", "int8")
    assert judged.count('"worst logits NMSE through the cache"') >= 2
    assert judged.count('"KLD behind pictures and sounds, text model in fp32"') >= 2
    for name in (
        *(f"{tower}-{each}" for tower in KINDS for each in told),
        *(f"that differ, {tower}" for tower in KINDS),
    ):
        assert name in judged


class OtherToken(Sections):
    """Sections that take another token's per-layer inputs where a medium stands."""

    def _embed(self, tokens: Sequence[Token], shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
        others = super()._embed([5 if isinstance(token, np.ndarray) else token for token in tokens], shapes)
        return super()._embed(tokens, shapes) | {"per_layer_embeddings": others["per_layer_embeddings"]}


def head_of(line: Line) -> Head:
    """What makes logits of the reference's states."""
    cap = manifest.read(line.root / "golden").told(facts.Golden).final_logit_softcapping
    return Head.of_checkpoint(line.root / "fetch" / "checkpoint", cap)


@pytest.mark.parametrize("defect", ["", "moved", "without its end", "per layer"])
def test_logits_behind_pictures_and_a_sound_are_hugging_faces(defect: str, line: Line, tmp_path: Path) -> None:
    """Through the sections and the cache; soft tokens moved by one, no end, other per-layer inputs are red."""
    spoil = {"moved": lambda rows: np.roll(rows, 1, axis=0), "without its end": lambda rows: rows * (rows != rows[-1])}
    reference = told(line)
    few = replace(reference, answers=reference.answers[:2], states=reference.states[:2])
    assert len(few.answers[1].media) == 3
    with media.given(SEES, HEARS, tmp_path) as given:
        made = mixed.vectors(line.root / "towers" / "fp32", given, tmp_path)
        checks = mixed.judge_logits(
            "vision-fp32",
            (OtherToken if defect == "per layer" else Sections)(line.root / "fp32"),
            lambda kind, name: spoil.get(defect, lambda rows: rows)(made(kind, name)),
            few,
            head_of(line),
            32,
            Gate(nmse=1e-6),
        )
    print(checks[0].sentence())
    assert all(check.passed for check in checks) != bool(defect), [check.sentence() for check in checks]
    assert defect or (checks[0].value or 1.0) < 1e-9


@pytest.mark.parametrize("defect", ["", "columns"])
@pytest.mark.parametrize("tower", KINDS)
def test_what_a_tower_in_8_bits_costs_at_the_texts_end(tower: str, defect: str, line: Line, tmp_path: Path) -> None:
    """Nearly nothing; soft tokens whose columns stand the other way round are red."""
    name = f"{tower}-int8"
    with media.given(SEES, HEARS, tmp_path) as given:
        made = mixed.vectors(line.root / "towers" / "int8", given, tmp_path)
        figure = mixed.divergence(
            name,
            Sections(line.root / "fp32"),
            lambda kind, each: made(kind, each)[:, ::-1] if defect else made(kind, each),
            Reference.stored(line.root / "golden", tower),
            head_of(line),
            32,
        )
    (check,) = judge(name, Gate(kld=load(line.recipe).gates[name].kld), [figure])
    print(check.sentence(), check.detail)
    assert check.passed != bool(defect), check.sentence()


def test_what_the_bundle_says_of_itself(line: Line) -> None:
    made = bundle_of(line)
    assert (litertlm.sees(made), litertlm.hears(made)) == (SEES, HEARS)
    held = manifest.read(line.root / "bundle").part("fp32", facts.Bundle)
    assert (held.sees, held.hears) == (facts.Sees(size=SEES.size), facts.Hears(**vars(HEARS)))
    taken = manifest.read(line.root / "fetch").told(facts.Fetch)
    assert [tower.tower for tower in taken.towers] == ["vision", "audio"]
    assert not taken.left_out


def test_every_tensor_of_the_true_tower_has_its_place() -> None:
    """548 of timm's own `mobilenetv5_300m_enc` (1.0.31), 294 million parameters, and six of the embedder."""
    shapes = vision.tensors(VisionConfig.from_config({"vision_config": {}}))
    own = [shape for name, shape in shapes.items() if name.startswith("vision_tower.")]
    assert (len(own), len(shapes)) == (548, 552)
    assert sum(int(np.prod(shape)) for shape in own) == 294_126_912


# Defects put back: each is seen.


def described(line: Line) -> Metadata:
    return of_checkpoint(line.root / "fetch" / "checkpoint", load(line.recipe).bundle, "vision,audio").metadata


def test_an_end_row_of_the_text_table_is_red(line: Line, tmp_path: Path) -> None:
    """litert-torch 0.10.0 takes that one, which is another vector and no error."""
    text = load_file(line.model / "model.safetensors")["model.language_model.embed_tokens.weight"].float()
    right = told(line).soft["noise"][-1]
    assert nmse(text[END].numpy() * 128**0.5, right) > 0.1
    others = {name: np.concatenate([rows[:-1], text[END : END + 1].numpy()]) for name, rows in told(line).soft.items()}
    stock = replace(told(line), soft=others)
    checks = seeing.judge_tower(
        "vision-fp32", line.root / "towers" / "fp32", SEES, stock, Gate(nmse=1e-6), tmp_path
    ).checks
    assert not checks[0].passed
    reference = Eyes.load(line.root / "fetch" / "checkpoint")
    with torch.inference_mode():
        assert nmse(reference.embedder(input_ids=torch.tensor([[END]]))[0, 0].numpy(), right) == 0.0


def test_soft_tokens_moved_by_one_are_red(line: Line, tmp_path: Path) -> None:
    moved = {name: np.roll(rows, 1, axis=0) for name, rows in told(line).soft.items()}
    shifted = replace(told(line), soft=moved)
    assert (
        not seeing.judge_tower("vision-fp32", line.root / "towers" / "fp32", SEES, shifted, Gate(nmse=1e-6), tmp_path)
        .checks[0]
        .passed
    )


@pytest.mark.parametrize(
    ("name", "defect"),
    [
        ("channel order", lambda image: image[..., ::-1].copy()),
        ("mean and scale", lambda image: image * 2 - 1),
        ("bytes", lambda image: image * np.float32(255)),
        ("lying", lambda image: image.swapaxes(1, 2).copy()),
    ],
)
def test_other_pixels_are_red(name: str, defect: Callable[[Any], Any], line: Line, tmp_path: Path) -> None:
    file = write(tmp_path)["face"]
    encoder, adapter = (
        seeing.runner(line.root / "towers" / "fp32" / f"vision_{part}.tflite", tmp_path)
        for part in ("encoder", "adapter")
    )
    features = encoder(images=defect(SEES.given(file)["images"]))["features"]
    assert nmse(adapter(soft_tokens=features)["mm_embedding"][0], told(line).soft["face"]) > 1e-4, name


def test_pillows_own_resize_is_red(line: Line, tmp_path: Path) -> None:
    """And so is the runtime's, which is farther away: why `make run` resizes by itself."""
    file = write(tmp_path)["photograph, large"]
    eyes = seeing.Eyes(line.root / "towers" / "fp32", SEES, tmp_path)
    with Image.open(file) as picture:
        other = picture.convert("RGB").resize((SEES.size, SEES.size), Image.Resampling.BILINEAR)
    other.save(tmp_path / "other.png")
    wanted = told(line).soft["photograph, large"]
    assert nmse(eyes.see(tmp_path / "other.png"), wanted) > 1e-9 > 100 * nmse(eyes.see(file), wanted)


@pytest.mark.parametrize("tensor", ["layer_scale.gamma", "conv_stem.conv.weight", "attn.key.norm.weight"])
def test_a_dropped_or_lying_weight_is_red(tensor: str, line: Line, tmp_path: Path) -> None:
    """A layer scale of ones, kernels of 3 x 3 over three channels as torch has them, whose shape is TFLite's too."""
    config, look = open_checkpoint(line.root / "fetch" / "checkpoint").config, open_look(line.model)
    stored = {name.removeprefix("model."): value for name, value in load_file(line.model / "model.safetensors").items()}
    encoder = vision.VisionEncoder(VisionConfig.from_config(config), look).eval()
    adapter = vision.VisionAdapter(VisionConfig.from_config(config), np.zeros(128, np.float32)).eval()
    pixels = torch.from_numpy(SEES.given(write(tmp_path)["face"])["images"])

    def seen(*spoilt: str) -> Any:
        for module in (encoder, adapter):
            values = {}
            for name, own in module.state_dict().items():
                value = stored[name]
                if spoilt and name.endswith(spoilt):
                    value = torch.ones_like(value) if value.ndim == 1 else value.transpose(1, 3)
                elif value.ndim == 4:
                    value = value.permute(0, 2, 3, 1) if own.shape[0] == value.shape[0] else value.permute(1, 2, 3, 0)
                values[name] = value.reshape(own.shape) if spoilt and name.endswith(spoilt) else value
            module.load_state_dict(values)
        with torch.inference_mode():
            return adapter(encoder(pixels)["features"])["mm_embedding"][0, :256].numpy()

    wanted = told(line).soft["face"][:256]
    assert nmse(seen(), wanted) < 1e-10
    assert nmse(seen(tensor), wanted) > 1e-6


def narrower(made: Graph) -> None:
    for tensor in made.main.tensors:
        if list(tensor.shape)[-1:] == [128]:
            tensor.shape = [*list(tensor.shape)[:-1], 64]


def without_the_end(made: Graph) -> None:
    made.main.tensors[int(made.main.outputs[0])].shape = [1, 256, 128]


@pytest.mark.parametrize("defect", [narrower, without_the_end])
def test_another_adapter_is_refused(defect: Callable[[Graph], None], line: Line, tmp_path: Path) -> None:
    """LiteRT-LM answers with wrong words, and exit code 0."""
    models = sections(line)
    models["vision_adapter"] = changed(models["vision_adapter"], defect, tmp_path / "vision_adapter.tflite")
    with pytest.raises(BundleError, match="vision_adapter gives"):
        fit.check(models, described(line))
    fit.check(sections(line), described(line))


def test_another_size_in_the_metadata_is_refused(line: Line) -> None:
    picture = described(line).picture
    assert picture
    for change, said in (({"size": 224}, "vision_encoder takes"), ({"tokens": 64}, "vision_encoder makes")):
        other = replace(described(line), picture=replace(picture, **change))
        with pytest.raises(BundleError, match=said):
            fit.check(sections(line), other)


def test_a_missing_adapter_is_refused(line: Line, tmp_path: Path) -> None:
    models = {name: file for name, file in sections(line).items() if name != "vision_adapter"}
    with pytest.raises(BundleError, match="vision_adapter, which is missing"):
        litertlm.write(described(line), "{}", models, tmp_path / "x.litertlm")


# Towers in fewer bits.


def narrowed(
    line: Line, tower: str, precision: str, folder: Path, keep: tuple[str, ...], spoil: Callable[[Graph], None]
) -> list[Check]:
    """The checks on a tower in fewer bits, `spoil`ed before it is written, by the recipe's limits."""
    count = size = 0
    for file in (line.root / "towers" / "fp32").glob(f"{tower}_*.tflite"):
        made = Graph.read(file)
        for tensor, entry in enumerate(made.main.tensors):
            if made.is_constant(tensor) and made.name(tensor).endswith(".weight"):
                made.origins[int(entry.buffer)] = Origin(made.name(tensor))
        senses.narrow(made, precision, Towers(keep_float16=keep))
        spoil(made)
        made.prune()
        held = senses.weights(made)
        count, size = count + held[0], size + held[1]
        made.write(folder / file.name)
    name = f"{tower}-{precision}"
    gate = replace(load(line.recipe).gates[name], kld=None)
    soft = Reference.stored(line.root / "golden", tower)
    figures = [Measurement(metric="bytes_per_weight", name="bytes per weight", value=size / count)]
    if tower == "vision":
        return seeing.judge_tower(name, folder, SEES, soft, gate, folder, figures).checks
    return hearing.judge_tower(name, folder, HEARS, soft, gate, folder, figures).checks


def scales_moved(made: Graph) -> None:
    """Each output by the scale of the next."""
    for tensor, entry in enumerate(made.main.tensors):
        if scales := made.scales(tensor):
            entry.quantization.scale = np.roll(scales.scale, 1)


def spectrogram_in_int8(made: Graph) -> None:
    for operator in made.operators():
        weight = int(operator.inputs[1]) if len(operator.inputs) > 1 else -1
        if made.code(operator) == "FULLY_CONNECTED" and made.is_constant(weight) and made.type_of(weight) == "FLOAT32":
            made.set_constant(weight, *rows.quantise_rows(made.blocks(weight)))
            made.opcode("FULLY_CONNECTED", rows.LINEAR_VERSION)


EARLY = load(PROJECT / DEFAULT_RECIPE).towers.keep_float16[:2]
AS_IT_IS: Callable[[Graph], None] = lambda _: None  # noqa: E731


@pytest.mark.parametrize(
    ("tower", "precision", "keep", "spoil", "holds"),
    [
        ("vision", "fp16", (), AS_IT_IS, True),
        ("audio", "fp16", (), AS_IT_IS, True),
        ("vision", "int8", EARLY, AS_IT_IS, True),
        ("vision", "int8", (), AS_IT_IS, True),
        ("vision", "int8", (".",), AS_IT_IS, False),
        ("vision", "int8", EARLY, scales_moved, False),
        ("audio", "int8", (), AS_IT_IS, True),
        ("audio", "int8", (), spectrogram_in_int8, False),
    ],
)
def test_towers_in_fewer_bits_keep_their_limits_unless_spoilt(
    tower: str,
    precision: str,
    keep: tuple[str, ...],
    spoil: Callable[[Graph], None],
    holds: bool,
    line: Line,
    tmp_path: Path,
) -> None:
    checks = narrowed(line, tower, precision, tmp_path, keep, spoil)
    assert all(check.passed for check in checks) == holds, [check.sentence() for check in checks]


def test_precisions_that_are_judged_one_after_the_other_share_no_weights(line: Line, tmp_path: Path) -> None:
    folder = tmp_path / "fp16"
    folder.mkdir()
    narrowed(line, "vision", "fp16", folder, (), lambda _: None)
    gate = load(line.recipe).gates["vision-fp32"]
    checks = seeing.judge_tower("vision-fp32", line.root / "towers" / "fp32", SEES, told(line), gate, folder).checks
    assert all((check.value or 0.0) < 1e-10 for check in checks), [check.sentence() for check in checks]


@pytest.mark.parametrize("tower", KINDS)
def test_the_stage_and_the_bundle_hold_them(tower: str, line: Line, tmp_path: Path) -> None:
    told = manifest.read(line.root / "towers")
    assert {*told.facts} == {f"{each}-{precision}" for each in KINDS for precision in ("fp32", "int8")}
    whole_, few = (told.part(f"{tower}-{precision}", facts.Tower) for precision in ("fp32", "int8"))
    assert few.stored == whole_.stored
    assert few.weight_bytes <= 0.28 * whole_.weight_bytes == 0.28 * 4 * whole_.stored
    made = manifest.read(line.root / "bundle")
    sizes = {
        precision: {part.model_type: part.size for part in made.part(precision, facts.Bundle).sections}
        for precision in ("fp32", "int8")
    }
    kind = f"tf_lite_{tower}_{'encoder' if tower == 'vision' else 'encoder_hw'}"
    assert sizes["int8"][kind] == few.sizes[f"{tower}_encoder"] < sizes["fp32"][kind]


# What can't be converted is refused in a sentence.


def copied(line: Line, tmp_path: Path, **config: object) -> Line:
    model = tmp_path / "eyes"
    shutil.copytree(line.model, model)
    file = model / "config.json"
    table = json.loads(file.read_text())
    file.write_text(json.dumps(table | {"vision_config": {**table["vision_config"], **config}}))
    return Line(artifacts=tmp_path / "artifacts", recipe=line.recipe, model=model)


def test_a_tower_that_is_not_whole_is_refused_by_name(
    line: Line, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = copied(line, tmp_path)
    tensors = load_file(broken.model / "model.safetensors")
    part = "vision_tower.timm_model.msfa.norm.weight"
    del tensors[f"model.{part}"]
    save_file(tensors, broken.model / "model.safetensors", {"format": "pt"})
    assert broken.run(fetch.STAGE, *TAKE) == 3
    assert f"vision tower that its config.json describes: 1 tensor is missing: {part}" in capsys.readouterr().err
    assert broken.run(fetch.STAGE, "--towers", "audio", "--graphs", "bundle") == 0, "its ears are whole"


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"architecture": "resnet50"}, "vision_config.architecture is resnet50"),
        ({"model_args": {"drop_rate": 0.1}}, "model_args has drop_rate"),
        ({"model_args": {"block_args": [[{"block_type": "er", "out_chs": 8, "stride": 2}]] * 3}}, "not four stages"),
        ({"model_args": {"block_args": [[{"block_type": "ir", "out_chs": 8, "stride": 2}]]}}, "can't do the block"),
    ],
)
def test_another_tower_is_refused(
    config: dict[str, Any], said: str, line: Line, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert copied(line, tmp_path, **config).run(fetch.STAGE, *TAKE) == 3
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"resample": 3}, "has resample 3"),
        ({"size": {"height": 256, "width": 512}}, "does not make squares"),
        ({"do_resize": False}, "does not make squares"),
    ],
)
def test_another_processor_is_refused(settings: dict[str, Any], said: str, line: Line, tmp_path: Path) -> None:
    file = tmp_path / "preprocessor_config.json"
    file.write_text(json.dumps(json.loads((line.model / file.name).read_text()) | settings))
    with pytest.raises(FetchError, match=said):
        open_look(tmp_path)
    with pytest.raises(FetchError, match="takes n x 256"):
        VisionConfig.from_config({}).check(224)


def test_a_processor_that_normalises_is_in_the_graph(line: Line, tmp_path: Path) -> None:
    file = tmp_path / "preprocessor_config.json"
    normal = {"do_normalize": True, "image_mean": [0.5, 0.4, 0.3], "image_std": [0.5, 0.25, 0.2]}
    file.write_text(json.dumps(json.loads((line.model / file.name).read_text()) | normal))
    look, plain = open_look(tmp_path), open_look(line.model)
    assert not plain.changes
    assert look.changes
    assert np.allclose(0.7 * look.factor + look.shift, (0.7 - np.array([0.5, 0.4, 0.3])) / np.array([0.5, 0.25, 0.2]))


# Pictures on their way to the runtime.


@pytest.mark.parametrize("shape", [(700, 1000), (3, 5), (1, 1), (257, 255), (1201, 256), (2000, 31)])
def test_pictures_are_resized_to_the_bit_as_torch_does(shape: tuple[int, int]) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    batch = torch.from_numpy(pixels).permute(2, 0, 1)[None]
    for size in (256, 768):
        wanted = functional.interpolate(batch, size=(size, size), mode="bilinear", antialias=True)
        assert (Sight(size=size).fitted(pixels) == wanted[0].permute(1, 2, 0).numpy()).all()


def test_files_that_are_no_pictures_are_refused(tmp_path: Path) -> None:
    whole_file = pictures()["photograph"]
    for name, data in (("text", b"no picture"), ("empty", b""), ("cut", whole_file[: len(whole_file) // 2])):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(UsageError, match="is no picture"):
            SEES.read(tmp_path / name)
    with pytest.raises(UsageError, match="does not exist"):
        SEES.read(tmp_path / "nowhere.png")
    with pytest.raises(UsageError, match="is no picture|does not exist"):
        SEES.read(tmp_path)
    Image.new("1", (12_000, 12_000)).save(tmp_path / "large.png")
    with pytest.raises(UsageError, match=r"too large: 12000 x 12000 pixels"):
        SEES.read(tmp_path / "large.png")


def test_make_run_shows_a_file(line: Line, tmp_path: Path) -> None:
    photo = tmp_path / "it's a photo.png"
    photo.write_bytes(pictures()["photograph"])
    command = [sys.executable, "-m", "pipeline.chat", str(bundle_of(line)), "--max-tokens", "12"]

    def said(*words: str, typed: str = "") -> tuple[int, str, str]:
        done = subprocess.run([*command, *words], cwd=PROJECT, input=typed, capture_output=True, text=True, timeout=120)
        return done.returncode, done.stdout, done.stderr

    code, answer, _ = said("--prompt", "What is the sea?", "--image", str(photo))
    assert code == 0
    assert answer.strip()
    code, typed, help_ = said(typed=f"/image {photo}\nWhat is the sea?\n")
    assert (code, typed) == (0, answer), "shown at the terminal it is the same picture"
    assert "goes with what you say next" in help_
    (tmp_path / "no.png").write_text("no picture")
    code, answer, help_ = said("--prompt", "x", "--image", str(tmp_path / "no.png"))
    assert (code, answer) == (2, "")
    assert "is no picture" in help_


def test_the_cards_example_runs(line: Line, tmp_path: Path) -> None:
    senses = tuple(card.Sense(tower=tower, size=1, asks="", error=None, inputs=1) for tower in KINDS)
    file = str(bundle_of(line))
    page = card._media(card.Product(variant="", source="", file=file, precision="float32", size=1, senses=senses))
    (example,) = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    (tmp_path / "photo.png").write_bytes(SEES.read(write(tmp_path)["photograph"]))
    (tmp_path / "clip.wav").write_bytes(HEARS.packed(HEARS.fitted(sounds()["chord"])))
    done = subprocess.run([sys.executable, "-c", example], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-500:]
    assert done.stdout.strip()
    assert "{" not in done.stdout, "words, not an object"


def test_without_timm_golden_says_how_to_get_it(
    line: Line, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from pipeline.reference import seeing as reference

    monkeypatch.setattr(reference, "BESIDE", tmp_path / "nowhere")
    with pytest.raises(UsageError, match="needs timm") as refused:
        reference.look(line.model, write(tmp_path), tmp_path)
    assert refused.value.remedy.endswith("or say TOWERS=audio, or none")


def test_a_model_that_only_hears_does_not_see(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    blind = Line(
        artifacts=tmp_path / "artifacts",
        recipe=small_recipe(tmp_path / "s.toml"),
        model=ears.write_model(tmp_path / "ears"),
    )
    assert blind.run(fetch.STAGE, *TAKE) == 2
    assert "the model has no vision tower that can be converted" in capsys.readouterr().err
