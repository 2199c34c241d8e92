"""The card says what was measured and made, in front matter that the Hub's own client reads back."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from huggingface_hub.repocard import metadata_load

from pipeline.core.errors import PublishError
from pipeline.core.judgement import Estimate, Script
from pipeline.core.stage import Context
from pipeline.release import card
from pipeline.release.card import Build, Check, Phone, Product, Sense, Subject
from pipeline.release.licence import Licence
from pipeline.release.subject import of_gpu

HUB = Subject(model="google/gemma-3n-E2B-it", revision="a" * 40, base_models=(), lineage=(), model_type="gemma3n")
FOLDER = Subject(model="tiny-gemma3n", revision="b" * 64, base_models=(), lineage=(), model_type="gemma3n_text")
TERMS = Licence(identifier="gemma", name="Gemma Terms of Use", link="https://ai.google.dev/gemma/terms")
CC0 = Licence(identifier="cc0-1.0", name="CC0", link="https://creativecommons.org/publicdomain/zero/1.0/")
STEPS = (
    Product(variant="fp32", source="fp32/step.tflite", file="m_fp32.tflite", precision="float32", size=4_000_000),
    Product(variant="int8", source="int8/step.tflite", file="m_int8.tflite", precision="int8, dynamic", size=1_040_000),
)
BUNDLES = tuple(
    Product(
        variant=f"bundle-{kind}", source=f"bundle/{kind}.litertlm", file=f"m_{kind}.litertlm", precision=kind, size=n
    )
    for kind, n in (("fp32", 5_000_000), ("int8", 1_500_000))
)
PRODUCTS = (*BUNDLES, *STEPS)
CHECKS = (
    Check(
        file="m_fp32.tflite", what="NMSE", against="Hugging Face", value="9.1e-11", limit="≤ 1e-06", detail="84 shapes"
    ),
    Check(file="m_int8.tflite", what="top-1", against="fp32", value="0.9871", limit="≥ 0.96", detail=""),
)
BUILD = Build(
    recipe="gemma3n",
    recipe_sha256="c" * 64,
    max_batch=8,
    max_sequence=2048,
    max_tokens=3969,
    commit="d" * 40,
    tools={"torch": "2.13.0", "ai-edge-litert": "2.3.0"},
    changes="weights were quantised.",
)


def made(subject: Subject = HUB, licence: Licence = TERMS, source: dict[str, Any] | None = None) -> str:
    return card.text(subject, licence, source or {}, PRODUCTS, CHECKS, BUILD, {})


def read_back(folder: Path, text: str) -> dict[str, Any]:
    file = folder / "README.md"
    file.write_text(text, encoding="utf-8")
    found = metadata_load(file)
    assert isinstance(found, dict)
    return found


def test_front_matter_of_a_model_from_the_hub(tmp_path: Path) -> None:
    assert read_back(tmp_path, made(source={"language": ["en", "zgh"], "datasets": ["private"]})) == {
        "language": ["en", "zgh"],
        "license": "gemma",
        "license_link": "https://ai.google.dev/gemma/terms",
        "base_model": ["google/gemma-3n-E2B-it"],
        "base_model_relation": "quantized",
        "library_name": "litert",
        "pipeline_tag": "text-generation",
        "tags": ["litert", "litert-lm", "tflite", "gemma3n", "float16", "int8"],
        **card._GATE,
    }


def test_a_folder_names_no_model_of_the_hub_as_its_base(tmp_path: Path) -> None:
    found = read_back(tmp_path, made(FOLDER, CC0))
    assert "base_model" not in found and "base_model_relation" not in found
    assert found["license"] == "cc0-1.0"


def test_a_folder_that_is_a_fine_tune_names_the_bases_of_its_card(tmp_path: Path) -> None:
    found = read_back(tmp_path, made(dataclasses.replace(FOLDER, base_models=("google/gemma-3n-E2B",))))
    assert (found["base_model"], found["base_model_relation"]) == (["google/gemma-3n-E2B"], "finetune")


def test_the_gate_of_the_source_goes_along(tmp_path: Path) -> None:
    gate = {"extra_gated_heading": "Access Gemma: please read", "extra_gated_prompt": "To access…\nagree"}
    assert gate.items() <= read_back(tmp_path, made(source=gate)).items()


def test_a_gate_is_proposed_for_gemma_alone(tmp_path: Path) -> None:
    gate = {"extra_gated_heading", "extra_gated_prompt", "extra_gated_button_content"}
    found = read_back(tmp_path, made(HUB, TERMS))
    assert gate <= found.keys() and "https://ai.google.dev/gemma/terms" in found["extra_gated_prompt"]
    assert not gate & read_back(tmp_path, made(FOLDER, CC0)).keys()


def test_the_command_asks_for_the_cache_that_the_files_have() -> None:
    asked = dataclasses.replace(BUILD, context="8192")
    for subject in (HUB, FOLDER):
        page = card.text(subject, TERMS, {}, PRODUCTS, CHECKS, asked, {})
        assert re.search(r"^make publish MODEL_ID=\S+.* CONTEXT=8192$", page, re.MULTILINE)
    assert "CONTEXT" not in made()


def test_the_command_asks_for_a_recipe_that_the_model_s_type_does_not_find() -> None:
    asked = dataclasses.replace(BUILD, asked="pipeline/recipes/gemma3_vision.toml")
    page = card.text(HUB, TERMS, {}, PRODUCTS, CHECKS, asked, {})
    assert re.search(r"^make publish MODEL_ID=\S+.* RECIPE=pipeline/recipes/gemma3_vision\.toml$", page, re.MULTILINE)
    assert "RECIPE" not in made()


def test_what_a_gpu_computed_is_told_and_asked_of_one_again() -> None:
    page = card.text(HUB, TERMS, {}, PRODUCTS, CHECKS, dataclasses.replace(BUILD, gpu=("golden", "moments")), {})
    assert re.search(r"^make publish MODEL_ID=\S+.* DEVICE=cuda$", page, re.MULTILINE)
    assert "same bytes, on a GPU of the same kind, which computed golden and moments:" in page
    assert "DEVICE" not in made() and "The same inputs give the same bytes:" in made()


@pytest.mark.parametrize(
    ("golden", "int8", "int4", "said"),
    [
        ("cpu", "cpu", "cpu", []),
        ("cuda", "cpu", "cpu", ["golden"]),
        ("cpu", "cpu", "cuda", ["moments"]),
        ("cuda", "cuda", "cpu", ["golden", "moments"]),
    ],
)
def test_a_gpu_s_part_is_what_the_stages_tell(golden: str, int8: str, int4: str, said: list[str]) -> None:
    devices = {"verify": golden, "int8": int8, "int4": int4}
    told = {name: SimpleNamespace(told=lambda kind, of=of: SimpleNamespace(device=of)) for name, of in devices.items()}
    assert [*of_gpu(cast(Context, SimpleNamespace(upstream=told)))] == said


def test_an_overridden_licence_is_explained() -> None:
    said = made(HUB, dataclasses.replace(TERMS, overrides="mit", reason="the base is Gemma"))
    assert "card says mit; whoever published these files says gemma: the base is Gemma" in " ".join(said.split())
    assert "whoever published" not in made()


def test_how_to_check_names_the_files_and_the_commands() -> None:
    text = made()
    for said in (
        "sha256sum -c SHA256SUMS",
        "PUBLIC_KEY=",
        "model.sig",
        "tensors.json",
        "sbom.cdx.json",
        "provenance.json",
    ):
        assert said in text


@pytest.mark.parametrize(("licence", "gemma"), [(TERMS, True), (CC0, False)])
def test_modification_is_stated_and_the_gemma_sentence_only_where_it_applies(licence: Licence, gemma: bool) -> None:
    text = made(FOLDER, licence)
    assert "**These files are modified.**" in text
    assert "weights were quantised." in text
    assert ("provided under and subject to the Gemma Terms of Use found at" in text) is gemma


def test_the_figures_and_their_limits_are_in_the_table() -> None:
    text = made()
    assert "### `m_fp32.tflite`" in text and "| NMSE | Hugging Face | 9.1e-11 | ≤ 1e-06 | 84 shapes |" in text
    assert "| top-1 | fp32 | 0.9871 | ≥ 0.96 |  |" in text
    assert "| `m_int8.tflite` | int8, dynamic | 1.0 MB |" in text


def test_a_bar_in_a_figure_does_not_break_the_table() -> None:
    odd = (Check(file="m", what="KL(p||q)", against="", value="1", limit="2", detail="3"),)
    text = card.text(HUB, TERMS, {}, PRODUCTS, odd, BUILD, {})
    assert r"| KL(p\|\|q) |  | 1 | 2 | 3 |" in text


def test_how_it_was_made_can_be_repeated() -> None:
    text = made()
    assert f"make publish MODEL_ID=google/gemma-3n-E2B-it REVISION={'a' * 40}" in text
    for said in ("c" * 64, "d" * 40, "ai-edge-litert 2.3.0, torch 2.13.0"):
        assert said in text
    assert "make publish MODEL_ID=path/to/tiny-gemma3n" in made(FOLDER)


def test_nothing_is_left_to_fill_in_and_two_cards_are_the_same() -> None:
    for subject in (HUB, FOLDER):
        text = made(subject)
        assert not re.search(r"\$\w", text)
        assert made(subject) == text


def test_examples_are_python_that_names_the_smallest_file_of_each_kind() -> None:
    examples = re.findall(r"```python\n(.*?)```", made(), flags=re.DOTALL)
    for example, call in zip(examples, ('Engine("m_int8.litertlm")', 'Interpreter("m_int8.tflite")'), strict=True):
        compile(example, "card", "exec")
        assert call in example


@pytest.mark.parametrize(("products", "absent"), [(STEPS, "litert_lm"), (BUNDLES, "serving_default")])
def test_only_files_that_are_there_are_explained(products: tuple[Product, ...], absent: str) -> None:
    text = card.text(HUB, TERMS, {}, products, CHECKS, BUILD, {})
    assert absent not in text and products[1].file in text


def test_front_matter_of_a_checkpoint_is_read(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("---\nlicense: mit\ntags: [a]\n---\n# Hi\n", encoding="utf-8")
    assert card.front_matter(tmp_path) == {"license": "mit", "tags": ["a"]}


@pytest.mark.parametrize("text", [None, "", "# only a page\n", "---\n---\n"])
def test_a_checkpoint_without_front_matter_has_none(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "README.md").write_text(text, encoding="utf-8")
    assert card.front_matter(tmp_path) == {}


@pytest.mark.parametrize("text", ["---\nlicense: [\n---\n", "---\n- a\n- b\n---\n", "---\nx: :\n  y: {\n---\n"])
def test_spoilt_front_matter_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "README.md").write_text(text, encoding="utf-8")
    with pytest.raises(PublishError, match="front matter"):
        card.front_matter(tmp_path)


def test_a_bundle_says_what_it_asks_of_a_phone() -> None:
    assert "What a phone needs" not in made()  # bundles of which nothing is known
    small = Phone(largest_section=1_200_000, cache=300_000, tokens=3969, activation_type="")
    large = Phone(largest_section=3 << 30, cache=300_000, tokens=3969, activation_type="fp32")
    products = [dataclasses.replace(item, phone=phone) for item, phone in zip(BUNDLES, (large, small), strict=True)]
    page = card.text(HUB, TERMS, {}, products, CHECKS, BUILD, {})
    rows = {row.split("`")[1]: row for row in page.splitlines() if row.startswith("| `m_") and "3969" in row}
    assert "1.8 MB, 300.0 kB of them cache" in rows["m_int8.litertlm"] and "(*)" not in rows["m_int8.litertlm"]
    assert "(*)" in rows["m_fp32.litertlm"] and "fp32 |" in rows["m_fp32.litertlm"]
    assert "entitlement" in page and "with ai-edge-litert 2.3.0; on no GPU" in page


def test_a_script_stands_beside_latin_where_there_is_enough_text() -> None:
    def script(positions: int, ratio: float | None) -> Script:
        kld: Estimate = {"value": 0.002, "low": 0.0017, "high": 0.0024}
        over: Estimate | None = {"value": ratio, "low": 0.9, "high": 1.6} if ratio else None
        return {"positions": positions, "kld": kld, "top1": kld, "kld_ratio": over}

    found = {"m_int8.litertlm": {"Latin": script(4000, None), "Tifinagh": script(64, 1.25), "CJK": script(63, 1.1)}}
    page = card.text(HUB, TERMS, {}, PRODUCTS, CHECKS, BUILD, found)
    assert "| `m_int8.litertlm` | Tifinagh | 64 | 0.002 (0.0017 to 0.0024) | 1.2 (0.9 to 1.6) |" in page
    assert "| Latin | 4000 |" in page and "CJK" not in page and "By script" not in made()


SENSES = (
    Sense(tower="vision", size=300_000_000, asks="pictures of 768 x 768 pixels", error=1e-3, inputs=26),
    Sense(tower="audio", size=700_000_000, asks="sounds of up to 30 s", error=0.0, inputs=23),
)


def that_takes(*towers: str) -> str:
    senses = tuple(sense for sense in SENSES if sense.tower in towers)
    products = [dataclasses.replace(item, senses=senses) for item in BUNDLES]
    return card.text(HUB, TERMS, {}, [*products, *STEPS], CHECKS, BUILD, {})


def test_a_bundle_that_sees_and_hears_says_so_and_how() -> None:
    page = that_takes("vision", "audio")
    row = "| `m_int8.litertlm` | vision: pictures of 768 x 768 pixels | 300.0 MB | 0.001 (30.0 dB) | 26 |"
    assert row in page and "| audio: sounds of up to 30 s | 700.0 MB | 0 (no error) | 23 |" in page
    assert not re.search(r"\$\w", page)
    example = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)[1]
    compile(example, "card", "exec")
    for said in ('"type": "image"', '"type": "audio"', "vision_backend=", "audio_backend=", 'Engine("m_int8.litertlm"'):
        assert said in example
    for said in (
        "visionBackend = Backend.CPU()",
        'Content.AudioFile("clip.wav")',
        "visionBackend: .cpu()",
        ".imageFile",
    ):
        assert said in page


def test_only_what_a_bundle_takes_is_shown() -> None:
    heard = that_takes("audio")
    assert "clip.wav" in heard and "What do you hear?" in heard
    assert "photo.png" not in heard and "vision_backend=" not in heard and "ImageFile" not in heard
    for said in ("see and hear", "Kotlin", "Swift", "photo", "clip.wav"):
        assert said not in made()
