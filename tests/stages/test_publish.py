"""publish: what would be uploaded, byte for byte the same every time, and every reason to refuse.

The stages before it are stood in for by small stages run through the real runner, so that manifests, checksums and
folders are real; only the model files are a few bytes, which publish does not open.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub.repocard import metadata_load
from release_line import BUNDLES, CHAIN, STAGES, STEPS, Line, judgement, reseal

from pipeline import check, publish
from pipeline.core import manifest, rerun
from pipeline.core.stage import Context
from pipeline.release import provenance
from pipeline.release.preflight import MODELS


@pytest.fixture(scope="module")
def unverified(tmp_path_factory: pytest.TempPathFactory) -> Line:
    """Everything before verify, with other bytes in each variant; to be copied."""
    made = Line(tmp_path_factory.mktemp("unverified"))
    made.fetch()
    for name in STAGES:
        made.variant(name, name.encode() * (400 if name == "fp32" else 100))
    return made


@pytest.fixture(scope="module")
def verified(unverified: Line, tmp_path_factory: pytest.TempPathFactory) -> Line:
    """The same after verify; to be copied."""
    made = Line(tmp_path_factory.mktemp("verified"))
    shutil.copytree(unverified.root, made.root)
    assert made.verify() == 0
    return made


@pytest.fixture
def line(unverified: Line, tmp_path: Path) -> Line:
    """Everything before verify."""
    shutil.copytree(unverified.root, Line(tmp_path).root)
    return Line(tmp_path)


@pytest.fixture
def ready(verified: Line, tmp_path: Path) -> Line:
    """Everything before publish."""
    shutil.copytree(verified.root, Line(tmp_path).root)
    return Line(tmp_path)


def names(folder: Path) -> list[str]:
    """What would be uploaded."""
    files = (file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())
    return sorted(set(files) - {"manifest.json", "run.json"})


def refused(line: Line, capsys: pytest.CaptureFixture[str]) -> str:
    """Publish is refused with code 9 and leaves nothing that looks finished; returns what was said."""
    capsys.readouterr()
    assert line.publish() == 9
    assert not (line.folder / "manifest.json").exists()
    said = capsys.readouterr().err
    assert "error: " in said and "\n  cause: " in said and "\n  do:    " in said
    return said


def test_the_folder_holds_exactly_what_would_be_uploaded(ready: Line, capsys: pytest.CaptureFixture[str]) -> None:
    assert ready.publish() == 0
    assert names(ready.folder) == sorted(
        [
            "LICENSE",
            "NOTICE",
            "README.md",
            "SHA256SUMS",
            "checkpoint/LICENSE",
            *(f"manifests/{name}.json" for name in ("fetch", *STAGES, "verify")),
            "provenance.json",
            "report.html",
            "report.json",
            "sbom.cdx.json",
            "tensors.json",
            "tiny-gemma3n_fp16.tflite",
            "tiny-gemma3n_fp32.litertlm",
            "tiny-gemma3n_fp32.tflite",
            "tiny-gemma3n_int8.litertlm",
            "tiny-gemma3n_int8.tflite",
            "tokenizer.model",
            "tokenizer_config.json",
        ]
    )
    said = capsys.readouterr().err
    assert "dry run: would upload 24 files" in said
    assert "nothing was sent" in said
    for name in names(ready.folder):
        assert re.search(rf"^ .*B  {re.escape(name)}$", said, flags=re.MULTILINE)


def test_model_files_are_the_verified_ones_and_take_no_room_of_their_own(ready: Line) -> None:
    assert ready.publish() == 0
    steps = {f"{kind}.tflite": f"{kind}/step.tflite" for kind in ("fp32", "fp16", "int8")}
    bundles = {f"{kind}.litertlm": f"bundle/{kind}.litertlm" for kind in BUNDLES}
    for published, made in (steps | bundles).items():
        assert (ready.folder / f"tiny-gemma3n_{published}").samefile(ready.root / made)


def test_without_hard_links_model_files_are_copies(ready: Line, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_links(*_: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(Path, "hardlink_to", no_links)
    assert ready.publish() == 0
    published, made = ready.folder / "tiny-gemma3n_int8.tflite", ready.root / "int8" / "step.tflite"
    assert not published.samefile(made)
    assert published.read_bytes() == made.read_bytes()


def test_every_file_is_in_the_sums_and_they_hold(ready: Line) -> None:
    assert ready.publish() == 0
    assert sorted(provenance.read_sums(ready.folder)) == sorted(set(names(ready.folder)) - {"SHA256SUMS"})
    provenance.check_sums(ready.folder)
    done = subprocess.run(["sha256sum", "-c", "--quiet", "SHA256SUMS"], cwd=ready.folder, check=False)
    assert done.returncode == 0


def test_the_manifest_leaves_out_what_holds_timings(ready: Line) -> None:
    assert ready.publish() == 0
    listed = {record.path.removeprefix("publish/") for record in manifest.read(ready.folder).outputs}
    assert listed == set(names(ready.folder)) - {"SHA256SUMS", "report.json", "report.html"}


def test_two_runs_give_the_same_bytes(ready: Line) -> None:
    def everything() -> dict[str, bytes]:
        return {name: (ready.folder / name).read_bytes() for name in [*names(ready.folder), "manifest.json"]}

    assert ready.publish() == 0
    before = everything()
    assert ready.publish() == 0
    assert everything() == before


def test_the_card_has_the_figures_the_licence_and_the_languages(ready: Line) -> None:
    assert ready.publish() == 0
    front = metadata_load(ready.folder / "README.md")
    assert front is not None
    assert front["license"] == "cc0-1.0"
    assert front["language"] == ["en", "zgh"]
    page = (ready.folder / "README.md").read_text(encoding="utf-8")
    assert "| KLD on the corpus | fp32 | 0.001235 | ≤ 0.01 | 2048 positions |" in page
    assert "int8-static" not in page
    assert "| `tiny-gemma3n_int8.tflite` | int8, dynamic, step graph | 411 B |" in page
    assert "| `tiny-gemma3n_int8.litertlm` | int8, dynamic, bundle for LiteRT-LM | 613 B |" in page


def test_a_model_under_the_gemma_terms_goes_with_terms_and_notice(tmp_path: Path) -> None:
    line = Line(
        tmp_path,
        model="google/gemma-3n-E2B-it",
        licence="gemma",
        tags=[],
        licence_files=("LICENSE.md", "USE_POLICY.md"),
    )
    line.fetch()
    for name in STAGES:
        line.variant(name, name.encode())
    assert (line.verify(), line.publish()) == (0, 0)
    notice = (line.folder / "NOTICE").read_text(encoding="utf-8")
    assert notice.startswith("Gemma is provided under and subject to the Gemma Terms of Use found at")
    assert "modified" in notice and "google/gemma-3n-E2B-it" in notice
    licence = (line.folder / "LICENSE").read_text(encoding="utf-8")
    assert "https://ai.google.dev/gemma/terms" in licence
    assert "checkpoint/LICENSE.md, checkpoint/USE_POLICY.md" in licence
    assert (line.folder / "checkpoint" / "LICENSE.md").read_text(encoding="utf-8") == "the owner's words"
    assert (line.folder / "google--gemma-3n-E2B-it_fp32.tflite").is_file()


def test_a_checkpoint_without_licence_files_needs_no_folder_for_them(tmp_path: Path) -> None:
    line = Line(tmp_path, licence_files=())
    line.fetch()
    for name in STAGES:
        line.variant(name, name.encode())
    assert (line.verify(), line.publish()) == (0, 0)
    assert not (line.folder / "checkpoint").exists()


def test_refused_before_verify(line: Line, capsys: pytest.CaptureFixture[str]) -> None:
    said = refused(line, capsys)
    assert "nothing is published before verify has passed" in said
    assert "make verify" in said


def test_refused_after_verify_failed_with_the_figure_that_failed(
    line: Line, capsys: pytest.CaptureFixture[str]
) -> None:
    line.passed = False
    assert line.verify() == 8
    assert "verification failed: int8: KLD on the corpus is 0.5, the limit is ≤ 0.01" in refused(line, capsys)


@pytest.mark.parametrize(
    "spoilt",
    [
        judgement(passed=False),
        {**judgement(), "passed": False},
        {**judgement(), "passed": "yes"},
        {"passed": True, "checks": []},
        {"passed": True, "checks": [{**judgement()["checks"][0], "passed": None}]},
        {"passed": True, "checks": [{**judgement()["checks"][0], "passed": False, "value": None, "limit": None}]},
    ],
    ids=["failed check", "failed", "not a verdict", "no checks", "skipped", "not measured"],
)
def test_a_finished_verify_that_did_not_pass_is_refused(
    line: Line, capsys: pytest.CaptureFixture[str], spoilt: dict[str, Any]
) -> None:
    def write(context: Context) -> None:
        (context.folder / "judgement.json").write_text(json.dumps(spoilt), encoding="utf-8")

    assert line.verify(write=write) == 0
    assert "verification failed" in refused(line, capsys)


def test_refused_when_nothing_was_checked_of_a_product(line: Line, capsys: pytest.CaptureFixture[str]) -> None:
    def write(context: Context) -> None:
        found = judgement()
        found["checks"] = [check for check in found["checks"] if check["variant"] != "fp16"]
        (context.folder / "judgement.json").write_text(json.dumps(found), encoding="utf-8")

    assert line.verify(write=write) == 0
    assert "nothing was checked of fp16" in refused(line, capsys)


@pytest.mark.parametrize("text", ["", "[]", '{"passed": true}', '{"passed": true, "checks": [{}]}'])
def test_a_judgement_that_cannot_be_read_is_refused(line: Line, capsys: pytest.CaptureFixture[str], text: str) -> None:
    def write(context: Context) -> None:
        (context.folder / "judgement.json").write_text(text, encoding="utf-8")

    assert line.verify(write=write) == 0
    assert "judgement.json can't be read" in refused(line, capsys)


@pytest.mark.parametrize("name", ["report.json", "report.html"])
def test_refused_without_a_report(ready: Line, capsys: pytest.CaptureFixture[str], name: str) -> None:
    (ready.root / "verify" / name).unlink()
    assert f"{name} is missing" in refused(ready, capsys)


@pytest.mark.parametrize("kind", STAGES)
def test_refused_when_a_file_was_made_again_after_verify(
    ready: Line, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    ready.variant(kind, b"other bytes")
    file = "fp32.litertlm" if kind == "bundle" else "step.tflite"
    assert f"{kind}/{file} is not the file that was verified" in refused(ready, capsys)


def test_refused_when_the_checkpoint_was_fetched_again_as_something_else(
    ready: Line, capsys: pytest.CaptureFixture[str]
) -> None:
    ready.licence = "mit"
    ready.fetch()
    assert "fetch/checkpoint/README.md is not the file that was verified" in refused(ready, capsys)


def test_refused_when_a_product_was_left_out_of_verify(line: Line, capsys: pytest.CaptureFixture[str]) -> None:
    assert line.verify(("fp32", "int8", "bundle")) == 0
    assert "fp16/step.tflite was not verified" in refused(line, capsys)


@pytest.mark.parametrize(
    ("graphs", "stages", "endings"), [("step", STEPS, {".tflite"}), ("bundle", ("bundle",), {".litertlm"})]
)
def test_only_the_graphs_that_are_wanted_are_published(
    line: Line, graphs: str, stages: tuple[str, ...], endings: set[str]
) -> None:
    assert line.verify(stages) == 0
    assert line.run(publish.STAGE, "--graphs", graphs) == 0
    models = {file.suffix for file in line.folder.glob("tiny-gemma3n_*")}
    assert models == endings


def test_a_file_edited_in_place_is_damage_and_not_a_matter_of_opinion(ready: Line) -> None:
    (ready.root / "int8" / "step.tflite").write_bytes(b"patched")
    assert ready.publish() == 4
    assert not (ready.folder / "manifest.json").exists()


def test_refused_when_the_recipe_changed_after_verify(
    ready: Line, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    looser = tmp_path / "looser.toml"
    looser.write_text(ready.recipe.read_text(encoding="utf-8") + "\n# looser\n", encoding="utf-8")
    ready.recipe = looser
    assert "verified under another recipe" in refused(ready, capsys)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"licence": ""}, "names no licence"),
        ({"licence": "home-made"}, "is not one of gemma"),
        ({"licence": "apache-2.0", "base_models": ["google/gemma-3n-E2B-it"]}, "is under the Gemma Terms of Use"),
        ({"licence": "apache-2.0", "base_models": ["a/b"], "lineage": CHAIN}, "c/d is under the Gemma Terms of Use"),
        ({"licence": "apache-2.0", "tags": []}, "does not say what it was made from"),
    ],
)
def test_refused_when_the_licence_is_missing_or_contradicts_the_chain(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], said: str
) -> None:
    line = Line(tmp_path, **changes)
    line.fetch()
    for name in STAGES:
        line.variant(name, name.encode())
    assert line.verify() == 0
    assert said in refused(line, capsys)


def test_an_overridden_licence_goes_on_and_is_said_everywhere(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = Line(tmp_path, licence="apache-2.0", base_models=["google/gemma-3n-E2B-it"])
    line.fetch()
    for name in STAGES:
        line.variant(name, name.encode())
    assert line.verify() == 0
    assert "LICENCE_OVERRIDE" in refused(line, capsys)
    override = "gemma: the fine-tune keeps its base's terms"
    assert line.run(publish.STAGE, "--licence-override", override) == 0
    front = metadata_load(line.folder / "README.md")
    assert front is not None and front["license"] == "gemma" and front["extra_gated_prompt"]
    reason = "card says apache-2.0; whoever published these files says gemma: the fine-tune keeps its base's terms"
    for name in ("README.md", "LICENSE"):
        assert reason in (line.folder / name).read_text(encoding="utf-8")
    said = json.loads((line.folder / "provenance.json").read_text(encoding="utf-8"))
    assert said["predicate"]["buildDefinition"]["externalParameters"]["LICENCE_OVERRIDE"] == override
    made = manifest.read(line.folder)
    assert rerun.words("publish", {"publish": made}, rerun.Given()) == ["--licence-override", override]
    assert (line.folder / "NOTICE").read_text(encoding="utf-8").startswith("Gemma is provided under")


def test_a_refusal_leaves_no_half_filled_folder_that_looks_finished(
    ready: Line, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ready.publish() == 0
    shutil.rmtree(ready.root / "verify")
    assert ready.publish() == 9
    assert "nothing is published" in capsys.readouterr().err


def test_provenance_names_every_model_file_and_what_it_was_made_from(ready: Line) -> None:
    assert ready.publish() == 0
    said = json.loads((ready.folder / "provenance.json").read_text(encoding="utf-8"))
    sums = provenance.read_sums(ready.folder)
    models = {name: digest for name, digest in sums.items() if name.endswith(MODELS)}
    papers = sums.keys() - models.keys() - {"provenance.json", "report.json", "report.html"}
    assert provenance.subjects(ready.folder) == (models, {name: sums[name] for name in papers})
    assert len(models) == 5 and "manifests/verify.json" in papers
    definition = said["predicate"]["buildDefinition"]
    assert definition["externalParameters"]["MODEL_ID"] == "tiny-gemma3n"
    assert definition["externalParameters"]["REVISION"] == "a" * 40
    assert definition["externalParameters"]["RUNG"] == "rotate"  # without it another machine could take another one
    sources = {entry.get("name"): entry["digest"] for entry in definition["resolvedDependencies"]}
    assert {"source", "model.safetensors", "locks/cpu.txt", "locks/cuda.txt"} <= sources.keys()
    assert sources["model.safetensors"]["sha256"] == hashlib.sha256(b"model.safetensors").hexdigest()
    assert definition["internalParameters"]["tools"]["torch"]


@pytest.fixture
def published(ready: Line) -> Path:
    """A published folder without the runner's files, as it would be downloaded; its files are its own."""
    assert ready.publish() == 0
    copy = ready.artifacts / "copy"
    shutil.copytree(ready.folder, copy, ignore=shutil.ignore_patterns("run.json"))
    (copy / "manifest.json").unlink()
    return copy


def test_a_published_folder_is_as_its_papers_say(published: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert check.main([str(published)]) == 0
    assert "23 files, 5 model files, 15 tensors, 5 figures" in capsys.readouterr().err
    assert check.main([str(published / "not-there")]) == 2


@pytest.mark.parametrize("place", [0.0, 0.5, 1.0])
def test_one_changed_byte_in_any_file_is_found(published: Path, place: float) -> None:
    for name in provenance.read_sums(published):
        file = published / name
        whole = file.read_bytes()
        at = round(place * (len(whole) - 1))
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        assert check.main([str(published)]) == 4, name
        file.write_bytes(whole)
    assert check.main([str(published)]) == 0


def test_files_that_are_swapped_dropped_or_added_are_found(published: Path) -> None:
    fp16, int8 = (published / f"tiny-gemma3n_{kind}.tflite" for kind in ("fp16", "int8"))
    kept = {file: file.read_bytes() for file in (fp16, int8)}
    int8.write_bytes(kept[fp16])
    fp16.write_bytes(kept[int8])
    assert check.main([str(published)]) == 4
    reseal(published)
    assert check.main([str(published)]) == 4, "provenance.json says which is which"
    for file, data in kept.items():
        file.write_bytes(data)
    fp16.unlink()
    reseal(published)
    assert check.main([str(published)]) == 4
    fp16.write_bytes(kept[fp16])
    (published / "more.tflite").write_bytes(b"more")
    assert check.main([str(published)]) == 4
    reseal(published)
    assert check.main([str(published)]) == 4


@pytest.mark.parametrize(
    "edit",
    [
        lambda report: report.update(passed=False),
        lambda report: report.update(checks=[]),
        lambda report: report["checks"][0].update(value=0.5),
        lambda report: report["checks"][0].update(limit=None),
        lambda report: report["checks"][0].update(passed=False),
        lambda report: report["variants"].clear(),
    ],
)
def test_a_report_that_does_not_hold_is_found(published: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    file = published / "report.json"
    report = json.loads(file.read_text(encoding="utf-8"))
    edit(report)
    file.write_text(json.dumps(report), encoding="utf-8")
    reseal(published)
    assert check.main([str(published)]) == 4


@pytest.mark.parametrize("name", ["verify", "int8"])
def test_manifests_that_do_not_list_a_file_are_found(published: Path, name: str) -> None:
    file = published / "manifests" / f"{name}.json"
    made = json.loads(file.read_text(encoding="utf-8"))
    for record in made["inputs"] + made["outputs"]:
        record["sha256"] = "0" * 64
    file.write_text(json.dumps(made), encoding="utf-8")
    reseal(published)
    assert check.main([str(published)]) == 4
