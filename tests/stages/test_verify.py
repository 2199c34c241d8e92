"""The verdict on the shipped model's files, and step graphs that must be refused (bundles: `test_bundle.py`)."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from line import CAP, Line, lasting, small_recipe
from transformers import AutoTokenizer

from pipeline import bundle as packing
from pipeline import golden, inspection, verify
from pipeline.core import manifest
from pipeline.core.errors import IntegrityError, UsageError
from pipeline.core.manifest import Facts
from pipeline.core.recipe import PROJECT
from pipeline.core.stage import Context, Outcome, Stage
from pipeline.judge import sqnr, step_runs
from pipeline.judge.gates import REFERENCE
from pipeline.judge.reference import Head, Reference
from pipeline.runtime.litert import StepModel, measure_speed
from pipeline.runtime.sections import Conversation, Sections
from pipeline.tflite.graph import Graph

STEP = "step.tflite"
BUNDLES = ("bundle-fp32", "bundle-int8")
FILES = {"judgement.json", "manifest.json", "report.html", "report.json", "run.json", "tensors.json"}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small recipe, timed at short texts only."""
    return small_recipe(tmp_path_factory.mktemp("recipe") / "r.toml", **{"max_sequence = 2048": "max_sequence = 128"})


BUILT = ("fp32", "fp16", "int8")


@pytest.fixture(scope="module")
def verified(built: Line, recipe: Path) -> Line:
    """The line after verify has passed; the int8 scheme that the recipe leaves out is not built here."""
    assert built.run(verify.STAGE, "--variants", *BUILT, recipe=recipe) == 0
    return built


@pytest.fixture
def judge(built: Line, recipe: Path, capsys: pytest.CaptureFixture[str]) -> Iterator[Callable[..., tuple[int, str]]]:
    """Judge the step graphs of `variants`; gives the exit code and what was printed. Clears verify's folder after."""

    def run(*variants: str, with_recipe: Path = recipe) -> tuple[int, str]:
        capsys.readouterr()
        code = built.run(verify.STAGE, "--graphs", "step", "--variants", *variants, recipe=with_recipe)
        return code, capsys.readouterr().err

    yield run
    shutil.rmtree(built.root / "verify", ignore_errors=True)


@pytest.fixture
def place(built: Line) -> Iterator[Callable[[str, bytes, Facts], None]]:
    """Put `content` as the step graph of a variant in place of what is there, as a finished stage with `facts`."""
    moved: dict[str, Path | None] = {}

    def put(name: str, content: bytes, facts: Facts) -> None:
        folder = built.root / name
        if name not in moved:
            moved[name] = folder.rename(built.root / f".{name}.kept") if folder.exists() else None

        def work(context: Context) -> Outcome:
            (context.folder / STEP).write_bytes(content)
            return Outcome(facts={"graphs": "step", **facts})

        assert built.run(Stage(name=name, summary="", work=work, needs_of=lambda *_: ("fetch",))) == 0

    yield put
    for name, kept in moved.items():
        shutil.rmtree(built.root / name)
        if kept:
            kept.rename(built.root / name)


def found(line: Line, name: str = "judgement.json") -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((line.root / "verify" / name).read_text(encoding="utf-8"))
    return loaded


def step(line: Line, variant: str = "fp32") -> Path:
    return line.root / variant / STEP


def spoilt(file: Path, factor: float = 1.2) -> bytes:
    """The file with 2,000 neighbouring float weights in its largest tensor's middle multiplied by `factor`."""
    data = bytearray(file.read_bytes())
    middle = len(data) // 2 // 16 * 16
    weights = np.frombuffer(data, dtype=np.float32, count=2000, offset=middle)
    assert 1e-4 < np.abs(weights).mean() < 10, "these bytes are no weights"
    data[middle : middle + weights.nbytes] = (weights * factor).tobytes()
    return bytes(data)


class TestAPass:
    def test_every_limit_of_the_recipe_is_judged(self, verified: Line) -> None:
        judgement = found(verified)
        assert judgement["passed"] is True and all(check["passed"] for check in judgement["checks"])
        names = {(check["variant"], check["name"]) for check in judgement["checks"]}
        for kernels in ("XNNPACK", "built-in kernels"):
            for figure in ("worst logits NMSE", "KLD", "top-1 agreement"):
                assert ("fp32", f"{figure} on the shape grid, {kernels}") in names
            for variant in ("fp16", "int8"):
                assert (variant, f"KLD on text, {kernels}") in names
                assert (variant, f"top-1 agreement on text, {kernels}") in names
        assert {("fp32", "bytes per parameter"), ("int8", "size / size of fp32")} <= names
        for way in ("without a cache", "with its cache"):
            for figure in ("worst logits NMSE", "KLD", "top-1 agreement"):
                assert ("bundle-fp32", f"{figure} through the cache, {way}") in names
        for figure in ("KLD", "top-1 agreement", "perplexity ratio"):
            assert ("bundle-int8", f"{figure} through the cache") in names
            assert ("int8", f"{figure} on text, XNNPACK") in names
        for held in ("greedy texts of LiteRT-LM that differ", "scores of LiteRT-LM that are off"):
            assert ("bundle-fp32", held) in names and ("bundle-int8", held) not in names
        for bundle in ("bundle-fp32", "bundle-int8"):
            for held in (
                "texts with other token ids in LiteRT-LM",
                "conversations rendered differently by LiteRT-LM",
                "stop tokens that LiteRT-LM does not know",
                "positions with logits that are not finite",
                "bytes per stored weight, scales included",
            ):
                assert (bundle, held) in names
        assert all(check["limit"] is not None and check["value"] is not None for check in judgement["checks"])

    def test_the_two_gates_have_their_own_references(self, verified: Line) -> None:
        for check in found(verified)["checks"]:
            if check["name"].startswith(("KLD", "top-1")):
                exact = check["variant"].startswith("bundle") or check["variant"] == "fp32"
                assert check["against"] == ("Hugging Face" if exact else "fp32")

    def test_fp32_is_exact_and_int8_is_not(self, verified: Line) -> None:
        variants = found(verified)["variants"]
        assert variants["fp32"]["against_reference"]["kld"]["value"] < 1e-9
        assert variants["fp32"]["against_reference"]["top1"]["value"] == 1.0
        assert variants["int8"]["against_fp32"]["kld"]["value"] > 1e-6

    def test_bundles_are_judged_through_the_cache_and_in_the_runtime(self, verified: Line) -> None:
        bundles = found(verified)["bundles"]
        assert set(bundles) == {"bundle-fp32", "bundle-int8"}
        exact, small = bundles["bundle-fp32"], bundles["bundle-int8"]
        assert exact["against_reference"]["nmse_max"] < 1e-9 and exact["against_cached"]["nmse_max"] < 1e-9
        assert exact["against_reference"]["top1"]["value"] == exact["against_cached"]["top1"]["value"] == 1.0
        assert small["against_reference"]["kld"]["low"] > 1e-6 and small["against_cached"] is None
        assert exact["divergence"]["identical"]["value"] == 1.0
        assert 0.9 < small["against_reference"]["perplexity_ratio"]["value"] < 1.1
        assert exact["positions"] == exact["against_cached"]["positions"] == 24 + (24 + 24) + 24
        assert small["positions"] == exact["positions"] + 930
        for bundle in (exact, small):
            assert bundle["token_ids"]["total"] >= 1000 and bundle["token_ids"]["wrong"] == 0
            assert bundle["prompts"]["total"] >= 8 and bundle["prompts"]["wrong"] == 0
            assert bundle["stop"]["total"] == 2
        assert len(exact["greedy"]["rows"]) == 4 and exact["greedy"]["same"] == 4
        assert exact["scored"] > 0 and exact["score_error"] < 1e-3
        assert exact["bytes_per_weight"] == 4.0 and small["bytes_per_weight"] < 1.06

    def test_the_text_is_predicted_better_than_by_chance(self, verified: Line) -> None:
        variants = found(verified)["variants"]
        assert 1 < variants["fp32"]["against_reference"]["reference_perplexity"] < 500
        for variant in variants.values():
            assert variant["against_reference"]["perplexity_ratio"]["value"] == pytest.approx(1, abs=0.05)

    def test_fp32_continues_as_hugging_face_does(self, verified: Line) -> None:
        rows = found(verified)["greedy"]
        assert len(rows) == 3
        for row in rows:
            assert row["files"]["fp32"]["same"] and row["files"]["fp32"]["text"] == row["reference"]

    def test_the_manifest_lists_what_does_not_change(self, verified: Line) -> None:
        folder = verified.root / "verify"
        made = manifest.read(folder)
        assert [record.path for record in made.outputs] == ["verify/judgement.json", "verify/tensors.json"]
        assert made.facts["passed"] is True and made.facts["fit"] == ["fp32", "fp16", "int8", *BUNDLES]
        assert {file.name for file in folder.iterdir()} == FILES
        read = {record.path for record in made.inputs}
        assert {f"{name}/{STEP}" for name in ("fp32", "fp16", "int8")} <= read
        assert {f"bundle/{name}.litertlm" for name in ("fp32", "int8")} <= read
        assert {f"{name}/decoder.tflite" for name in ("fp32", "int8")} <= read

    def test_every_tensor_of_every_judged_file_is_listed(self, verified: Line) -> None:
        listed = found(verified, "tensors.json")
        bundles = {f"bundle/{name}.litertlm" for name in ("fp32", "int8")}
        assert set(listed) == {f"{name}/{STEP}" for name in ("fp32", "fp16", "int8")} | bundles
        for path, rows in listed.items():
            whole = (verified.root / path).read_bytes()
            for row in rows:
                data = whole[row["offset"] :][: row["size"]]
                assert hashlib.sha256(data).hexdigest() == row["sha256"]
            assert sum(row["size"] for row in rows) > 0.5 * len(whole)
            assert len({row["section"] for row in rows}) == (3 if path in bundles else 1)

    def test_the_report_is_the_judgement_and_timings(self, verified: Line) -> None:
        judgement, report = found(verified), found(verified, "report.json")
        assert {key: report[key] for key in judgement} == judgement
        assert set(report) - set(judgement) == {"speed", "sequences", "machine", "date"}
        assert set(report["speed"]) == {"fp32", "fp16", "int8"}
        for speed in report["speed"].values():
            for kernels in ("xnnpack", "builtin"):
                assert set(speed[kernels]["latency"]) == {"1", "128"}
                assert all(seconds > 0 for seconds in speed[kernels]["latency"].values())
                assert speed[kernels]["load"] > 0
        page = (verified.root / "verify" / "report.html").read_text(encoding="utf-8")
        assert "Verified:" in page and "http" not in page.replace("http-equiv", "")

    def test_a_second_run_gives_the_same_bytes(self, verified: Line, recipe: Path) -> None:
        folder = verified.root / "verify"
        before = lasting(folder, "judgement.json")
        assert verified.run(verify.STAGE, "--variants", *BUILT, recipe=recipe) == 0
        assert lasting(folder, "judgement.json") == before


Judge = Callable[..., tuple[int, str]]
Place = Callable[[str, bytes, Facts], None]


def refused(line: Line, judge: Judge, *variants: str, says: str) -> dict[str, Any]:
    """Judging ends with exit code 8, says why, leaves the report for the reader and no manifest."""
    code, text = judge(*variants)
    assert code == 8, text
    assert says in text
    assert {file.name for file in (line.root / "verify").iterdir()} == FILES - {"manifest.json", "run.json"}
    assert "Verification failed" in (line.root / "verify" / "report.html").read_text(encoding="utf-8")
    judgement = found(line)
    assert judgement["passed"] is False
    return judgement


def failing(judgement: dict[str, Any], part: str = "checks") -> set[tuple[str, str]]:
    return {(check["variant"], check["name"]) for check in judgement[part] if not check["passed"]}


class TestARefusal:
    def test_an_int8_file_that_is_really_fp32(self, built: Line, judge: Judge, place: Place) -> None:
        place("int8", step(built).read_bytes(), {"scheme": "dynamic"})
        judgement = refused(built, judge, "fp32", "int8", says="size / size of fp32 is 1, the limit is <= 0.28")
        assert failing(judgement) == {("int8", "size / size of fp32")}

    def test_an_fp32_file_with_wrong_weights(self, built: Line, judge: Judge, place: Place) -> None:
        place("fp32", spoilt(step(built)), {})
        judgement = refused(built, judge, "fp32", says="fp32: worst logits NMSE on text")
        assert {name for _, name in failing(judgement)} >= {
            "worst logits NMSE on text",
            "KLD on text",
            "worst logits NMSE on the shape grid, XNNPACK",
            "worst logits NMSE on the shape grid, built-in kernels",
        }

    def test_a_wrong_fp32_file_does_not_make_a_right_one_look_wrong_for_free(
        self, built: Line, judge: Judge, place: Place
    ) -> None:
        place("fp32", spoilt(step(built), 3.0), {})
        failed = failing(refused(built, judge, "fp32", "fp16", says="fp32: "))
        assert ("fp32", "KLD on text") in failed

    def test_an_int8_file_that_is_worse_than_its_limit(self, built: Line, judge: Judge, tmp_path: Path) -> None:
        strict = small_recipe(
            tmp_path / "r.toml",
            **{
                "max_sequence = 2048": "max_sequence = 16",
                "[gates.int8-dynamic]\nkld = 0.01": "[gates.int8-dynamic]\nkld = 1e-9",
            },
        )
        code, text = judge("fp32", "int8", with_recipe=strict)
        assert code == 8 and "fail: int8: KLD on text, XNNPACK is" in text and "<= 1e-09 (against fp32)" in text
        loss = found(built)["losses"]["int8"]
        assert set(found(built)["losses"]) == {"int8"} and loss["says"] in text
        layers = [row["layer"] for row in loss["layers"]]
        assert layers == ["before the layers", *(f"layers.{layer}" for layer in range(8)), "after the layers"]
        assert all(20 < row["decibels"] < 60 for row in loss["layers"]) and loss["first"] is None
        page = (built.root / "verify" / "report.html").read_text(encoding="utf-8")
        assert "Where int8 loses quality" in page and "Signal to noise of every operator of int8" in page

    def test_too_few_positions_are_no_pass(self, built: Line, judge: Judge, tmp_path: Path) -> None:
        """The agreement of int8 is above this limit, its interval is not."""
        ratio = "\nperplexity_ratio_min = 0.993\nperplexity_ratio_max = 1.007\nsize_ratio = 0.28"
        agreed = {f"top1 = 0.96{ratio}": f"top1 = 0.985{ratio}"}
        strict = small_recipe(tmp_path / "r.toml", **{"max_sequence = 2048": "max_sequence = 16", **agreed})
        code, text = judge("fp32", "int8", with_recipe=strict)
        checks = {check["name"]: check for check in found(built)["checks"] if check["variant"] == "int8"}
        check = checks["top-1 agreement on text, XNNPACK"]
        assert check["low"] < check["limit"] < check["high"] and not check["passed"]
        assert code == 8 and "too few positions" in text and "judge more positions" in text
        assert check["status"] == "inconclusive" and found(built)["passed"] is False

    def test_a_file_whose_scheme_has_no_limits(self, built: Line, judge: Judge, place: Place) -> None:
        place("int8", step(built, "int8").read_bytes(), {})
        judgement = refused(built, judge, "fp32", "int8", says="the limit is missing from the recipe")
        assert failing(judgement) == {("int8", "limits in the recipe")}

    def test_a_figure_that_the_quantiser_did_not_state(self, built: Line, judge: Judge, place: Place) -> None:
        place("int8", step(built, "int8").read_bytes(), {"scheme": "static"})
        judgement = refused(built, judge, "fp32", "int8", says="share of multiply-adds in integer kernels is not known")
        assert ("int8", "share of multiply-adds in integer kernels") in failing(judgement)


class TestWhereItGoesWrong:
    def test_the_matrix_that_was_spoilt_is_named(self, built: Line, tmp_path: Path) -> None:
        (tmp_path / STEP).write_bytes(spoilt(step(built), -1.0))
        one, other = ({view.name(i): view.constant(i) for view in Graph.read(file).views() for i in constants(view)}
                      for file in (step(built), tmp_path / STEP))  # fmt: skip
        wrong = [name for name in one if not np.array_equal(one[name], other[name])]
        windows, _, _ = reference(built).corpus()
        trace = sqnr.trace(tmp_path / STEP, step(built), list(windows[:4]))
        assert [name.removesuffix(".weight") for name in wrong] == [trace.steepest.name.rstrip(";")]

    def test_the_command_looks_into_a_bundle_and_holds_graphs_against_each_other(
        self, built: Line, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert inspection.main([str(built.root / "bundle" / "int8.litertlm"), "--json"]) == 0
        told = json.loads(capsys.readouterr().out)
        assert [model["name"] for model in told["models"]] == [
            "tf_lite_prefill_decode", "tf_lite_embedder", "tf_lite_per_layer_embedder"
        ]  # fmt: skip
        assert told["metadata"]["maxNumTokens"] == 512 - 32 + 1 and "jinjaPromptTemplate" in told["metadata"]
        assert {signature["name"] for signature in told["models"][0]["signatures"]} == {
            "decode",
            "prefill_8",
            "prefill_32",
        }
        assert 8 < told["models"][0]["bits_per_weight"] < 8.5
        for file in (STEP, "decoder.tflite"):
            ours, theirs = (str(built.root / precision / file) for precision in ("int8", "fp32"))
            assert inspection.main([ours, "--against", theirs]) == 0
            assert "(the verification text in golden)" in capsys.readouterr().out

    def test_decoders_are_held_against_each_other_through_their_caches(self, built: Line) -> None:
        exact, small = (built.root / precision / "decoder.tflite" for precision in ("fp32", "int8"))
        sample = np.array([2, 40, 41, 300, 7, 512, 90, 17], np.int32)
        same = sqnr.compare(inspection.Decoder(exact), inspection.Decoder(exact), [sample, sample[:3]])
        assert same.tokens == 11 and {operator.decibels for operator in same.operators} == {sqnr.MOST}
        found = sqnr.compare(inspection.Decoder(small), inspection.Decoder(exact), [sample])
        assert found.tokens == 8 and 20 < found.operators[-1].decibels < 60 and found.first is None
        assert {f"layers.{number}" for number in range(8)} <= set(found.layers())

    def test_what_is_compared_is_what_the_sections_say(self, built: Line) -> None:
        folder = built.root / "fp32"
        decoder = inspection.Decoder(folder / "decoder.tflite")
        alone = Conversation(Sections(folder, xnnpack=False))
        signatures = decoder.interpreter.get_signature_runner("decode").get_output_details()
        logits = signatures["logits"]["index"]
        for token, _ in zip((2, 40, 41), decoder.replay(np.array([2, 40, 41], np.int32)), strict=True):
            np.testing.assert_allclose(decoder.value(logits).ravel(), alone.decode(token), atol=1e-4)

    def test_a_decoder_that_can_not_decode_is_refused(self, built: Line, tmp_path: Path) -> None:
        shutil.copy(step(built), tmp_path / "decoder.tflite")
        with pytest.raises(UsageError, match="has no signature `decode`"):
            inspection.Decoder(tmp_path / "decoder.tflite")


class TestTheUsersText:
    @pytest.fixture
    def chats(self, tmp_path: Path) -> Path:
        """Conversations of the verification text, two documents each."""
        lines = (PROJECT / "examples/tiny-gemma3n/corpus/verification.txt").read_text(encoding="utf-8").split("\n")
        turns = [({"role": "user", "content": one}, {"role": "assistant", "content": other})
                 for one, other in zip(lines[::2], lines[1::2], strict=False) if one and other]  # fmt: skip
        file = tmp_path / "chat.jsonl"
        file.write_text(
            "\n".join(json.dumps({"messages": turn}, ensure_ascii=False) for turn in turns), encoding="utf-8"
        )
        return file

    def test_conversations_are_judged_as_the_template_has_them(
        self, built: Line, recipe: Path, tmp_path: Path, chats: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        line = built.copy(tmp_path / "artifacts", "fetch", "fp32")
        assert line.run(golden.STAGE, "--device", "cpu", "--graphs", "step", "--eval", str(chats), recipe=recipe) == 0
        made = manifest.read(line.root / "golden").facts
        assert made["verification"] == "chat.jsonl" and made["windows"] == 32
        tokenizer = AutoTokenizer.from_pretrained(line.root / "fetch" / "checkpoint")
        windows, _, _ = reference(line).corpus()
        text = tokenizer.decode(windows[0])
        assert text.startswith("<bos><start_of_turn>user\n") and text.count("<bos>") == 1
        options = ("--graphs", "step", "--variants", "fp32")
        assert line.run(verify.STAGE, *options, "--eval", str(chats), recipe=recipe) == 0
        capsys.readouterr()
        assert line.run(verify.STAGE, *options, recipe=recipe) == 2
        assert "computed on another text" in capsys.readouterr().err

    def test_text_that_calibrated_is_refused(
        self, built: Line, recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        line = built.copy(tmp_path / "artifacts", "fetch")
        calibration = str(PROJECT / "examples/tiny-gemma3n/corpus/calibration.txt")
        assert line.run(golden.STAGE, "--device", "cpu", "--eval", calibration, recipe=recipe) == 2
        assert "in both the verification and the calibration text" in capsys.readouterr().err


def reference(line: Line) -> Reference:
    return Reference(line.root / "golden", Head.of_checkpoint(line.root / "fetch" / "checkpoint", CAP))


def constants(view: Graph) -> list[int]:
    return [tensor for tensor in range(len(view.main.tensors)) if view.is_constant(tensor)]


class TestTheAlternative:
    def test_it_may_miss_its_limits_and_is_marked(self, built: Line, judge: Judge, place: Place) -> None:
        place("int8-static", step(built).read_bytes(), {"scheme": "static", "step": {"size": 1, "integer_share": 0.0}})
        code, text = judge("fp32", "int8-static")
        assert code == 0, text
        assert "not fit to publish: int8-static: size / size of fp32 is 1" in text
        judgement = found(built)
        assert judgement["passed"] is True and not failing(judgement)
        assert failing(judgement, "alternative_checks") == {
            ("int8-static", "size / size of fp32"),
            ("int8-static", "share of multiply-adds in integer kernels"),
        }
        assert manifest.read(built.root / "verify").facts["not_fit"] == ["int8-static"]
        assert "not fit to publish" in (built.root / "verify" / "report.html").read_text(encoding="utf-8")


class TestWhatCannotBeJudged:
    def test_fp32_is_needed(self, built: Line, judge: Judge) -> None:
        code, text = judge("int8")
        assert code == 2 and "lacks fp32" in text

    def test_a_variant_that_was_not_built(self, built: Line, judge: Judge) -> None:
        code, text = judge("fp32", "int4")
        assert code == 4 and "stage int4 is not finished" in text

    def test_a_file_that_is_no_model(self, built: Line, judge: Judge, place: Place) -> None:
        place("fp16", step(built, "fp16").read_bytes()[:1000], {})
        code, text = judge("fp32", "fp16")
        assert code == 4 and "can't be loaded" in text


class TestStepModel:
    @pytest.fixture(scope="class")
    def reference(self, built: Line) -> Reference:
        return Reference(built.root / "golden", Head.of_checkpoint(built.root / "fetch" / "checkpoint", CAP))

    @pytest.mark.parametrize("xnnpack", [True, False])
    def test_padding_and_batch_do_not_matter(self, built: Line, *, xnnpack: bool) -> None:
        model = StepModel(step(built), xnnpack=xnnpack, threads=2)
        ids = np.array([[2, 40, 41, 42, 43]], dtype=np.int32)
        alone = model.logits(ids, np.ones_like(ids))
        padded, mask = np.zeros((2, 9), dtype=np.int32), np.zeros((2, 9), dtype=np.int32)
        padded[0, :5], mask[0, :5] = ids, 1
        padded[1, 4:], mask[1, 4:] = ids, 1
        np.testing.assert_allclose(model.logits(padded, mask), np.repeat(alone, 2, axis=0), atol=2e-4)

    def test_a_shape_that_was_left_and_taken_again_gives_the_same(self, built: Line) -> None:
        model = StepModel(step(built, "int8"))
        rows = [np.full(shape, 7, dtype=np.int32) for shape in ((1, 3), (4, 11), (1, 3))]
        first, _, again = (model.logits(ids, np.ones_like(ids)) for ids in rows)
        assert np.array_equal(first, again)

    def test_another_graph_is_refused(self, built: Line, tmp_path: Path) -> None:
        data = step(built).read_bytes().replace(b"attention_mask", b"attention_mess")
        (tmp_path / STEP).write_bytes(data)
        with pytest.raises(IntegrityError, match="is not a step graph"):
            StepModel(tmp_path / STEP)

    def test_a_part_of_a_panel_is_the_same_positions(self, reference: Reference) -> None:
        panel = step_runs.JudgedPositions.of(reference, batch=8, pad=0)
        part, chosen = panel.part(3)
        assert 0 < len(part.positions) < len(panel.positions)
        assert np.array_equal(part.targets, panel.targets[chosen])
        for batch in part.batches:
            for row, index in enumerate(batch.index):
                assert batch.attention_mask[row].sum() == panel.positions.length[chosen[index]]

    def test_continuing_ends_at_a_stop_token(self, built: Line) -> None:
        model = StepModel(step(built))
        ids = model.continue_greedily([2, 40, 41], 6, [])
        assert len(ids) == 6
        assert model.continue_greedily([2, 40, 41], 6, [ids[0]]) == ids[:1]

    def test_what_the_recipe_makes_is_judged_unless_variants_are_named(
        self, built: Line, recipe: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """As Make does it: the scheme that the recipe leaves out was left out of a call by hand, in silence."""
        capsys.readouterr()
        assert built.run(verify.STAGE, recipe=recipe) == 4
        assert "int8-static" in capsys.readouterr().err

    def test_timing_counts_each_length(self, built: Line) -> None:
        speed = measure_speed(step(built, "int8"), [1, 64], bos=2, xnnpack=True)
        assert speed.latency.keys() == {1, 64} and min(*speed.latency.values(), speed.load) > 0


def test_an_int8_bundle_is_judged_without_an_fp32_one(built: Line, tmp_path: Path) -> None:
    recipe = small_recipe(tmp_path / "r.toml", **{'precisions = ["fp32", "int8"]': 'precisions = ["int8"]'})
    line = built.copy(tmp_path / "artifacts", "fetch", "golden", "int8")
    for stage in (packing.STAGE, verify.STAGE):
        assert line.run(stage, "--graphs", "bundle", recipe=recipe) == 0
    judgement = found(line)
    assert set(judgement["bundles"]) == {"bundle-int8"}
    checks = {check["name"]: check for check in judgement["checks"]}
    assert checks["KLD through the cache"]["against"] == checks["top-1 agreement through the cache"]["against"]
    assert checks["KLD through the cache"]["against"] == REFERENCE
    assert "of 3 conversations" in checks["KLD through the cache"]["detail"]


def test_a_script_that_a_release_names_has_a_limit_of_its_own(
    built: Line, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def asking(script: str, limit: str) -> Path:
        changes = {
            'precisions = ["fp32", "int8"]': 'precisions = ["int8"]',
            "window = 128": f'window = 32\nscripts = ["{script}"]',
            "script_kld_ratio = 2.0 #": f"script_kld_ratio = {limit} #",
        }
        return small_recipe(tmp_path / f"{script}-{limit}.toml", **changes)

    line, options = built.copy(tmp_path, "fetch", "graph", "int8"), ("--graphs", "bundle")
    assert line.run(golden.STAGE, "--device", "cpu", *options, recipe=asking("Hebrew", "2.0")) == 2
    assert "the verification text has too little in Hebrew" in capfd.readouterr().err
    named = asking("Tifinagh", "9.0")
    for stage in (golden.STAGE, packing.STAGE, verify.STAGE):
        assert line.run(stage, *(("--device", "cpu") if stage is golden.STAGE else ()), *options, recipe=named) == 0
    own = found(line)["bundles"]["bundle-int8"]["scripts"]["Tifinagh"]
    told = [check for check in found(line)["checks"] if check["name"] == "KLD on Tifinagh / on Latin"]
    assert own["positions"] >= 64 and [check["value"] for check in told] == [own["kld_ratio"]["value"]]
    assert line.run(verify.STAGE, *options, recipe=asking("Tifinagh", "0.01")) == 8
    assert "KLD on Tifinagh / on Latin is" in capfd.readouterr().err


def test_agreement_counts_until_the_first_difference() -> None:
    assert step_runs.agreement([1, 2, 3], [1, 2, 4]) == 2
    assert step_runs.agreement([1, 2], [1, 2, 4]) == 2
    assert step_runs.agreement([], [1]) == 0
