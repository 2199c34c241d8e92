"""The reference against Hugging Face called plainly, its determinism, and checkpoints that do not load whole."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from line import CAP, SMALL, Line, lasting, small_recipe
from safetensors.torch import load_file, save_file
from transformers import Gemma3nForCausalLM

from pipeline import fetch, golden
from pipeline.cluster import pool
from pipeline.core import log, manifest, memory
from pipeline.core.errors import IntegrityError, UsageError
from pipeline.core.recipe import PROJECT
from pipeline.core.recipe import load as load_recipe
from pipeline.core.stage import DEFAULT_MODEL
from pipeline.judge import corpus, kv_cache, metrics
from pipeline.judge.reference import Floats, Head, Reference
from pipeline.reference import shards, streaming
from pipeline.reference.devices import NMSE, choose
from pipeline.reference.golden import ask, is_streamed, make_cache_trace
from pipeline.reference.model import HuggingFace

POSITIONS = int(SMALL["positions = 2048"].split()[-1])
SHIPPED = PROJECT / DEFAULT_MODEL


@pytest.fixture(scope="module")
def plain() -> Gemma3nForCausalLM:
    """transformers as anybody would call it."""
    return Gemma3nForCausalLM.from_pretrained(SHIPPED, dtype=torch.float32, attn_implementation="eager").eval()


@pytest.fixture(scope="module")
def reference(judged: Line) -> Reference:
    return Reference(judged.root / "golden", Head.of_checkpoint(judged.root / "fetch" / "checkpoint", CAP))


def plain_logits(model: Gemma3nForCausalLM, ids: list[int]) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    with torch.inference_mode():
        return model(input_ids=torch.tensor([ids])).logits[0].numpy()


def test_stored_windows_give_the_logits_of_a_plain_call(reference: Reference, plain: Gemma3nForCausalLM) -> None:
    windows, positions, hidden = reference.corpus()
    assert windows.shape == (POSITIONS // 16, 32) and len(hidden) == len(positions) == POSITIONS
    assert (windows[:, 0] == 2).all()
    for row in (0, len(windows) - 1):
        judged = positions.window == row
        expected = plain_logits(plain, windows[row].tolist())[positions.length[judged] - 1]
        scores = metrics.compare(expected, reference.head.logits(hidden[judged]))
        assert len(expected) == 16 and scores.nmse.max() < 1e-10 and scores.top1.all()


def test_a_soft_cap_that_the_configuration_does_not_name_is_the_models(
    plain: Gemma3nForCausalLM, tmp_path: Path
) -> None:
    folder = changed_checkpoint(tmp_path / "m", lambda tensors: tensors)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert config.pop("final_logit_softcapping") == CAP
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    reference, ids = HuggingFace.load(folder, "cpu"), np.array([[2, 70, 900]], np.int32)
    head = Head.of_checkpoint(folder, reference.cap)
    logits = head.logits(reference.hidden(ids, np.ones_like(ids))[0])
    assert metrics.compare(plain_logits(plain, ids[0].tolist()), logits).nmse.max() < 1e-10


def test_padded_shapes_give_the_logits_of_the_tokens_alone(reference: Reference, plain: Gemma3nForCausalLM) -> None:
    cases = list(reference.shapes())
    assert len(cases) == (2 * 3 - 1) * 3  # three rows of 40 tokens have more attention than one row
    for name, ids, mask, hidden in cases:
        assert ids.shape == mask.shape and name.startswith(f"b{ids.shape[0]}_s{ids.shape[1]}_")
        logits = reference.head.logits(hidden)
        for row in range(len(ids)):
            alone = plain_logits(plain, ids[row][mask[row].astype(bool)].tolist())[-1:]
            assert metrics.compare(alone, logits[row : row + 1]).nmse.max() < 1e-9, f"{name}, row {row}"


def test_greedy_text_is_the_most_likely_token_at_every_step(reference: Reference, plain: Gemma3nForCausalLM) -> None:
    rows = reference.greedy()
    assert len(rows) == 4  # as many as the bundles are held against
    for row in rows:
        ids = list(row.prompt_ids)
        for token in row.continuation_ids:
            assert token == plain_logits(plain, ids)[-1].argmax()
            ids.append(token)


def test_prompts_are_of_different_scripts(reference: Reference) -> None:
    prompts = [row.prompt for row in reference.greedy()]
    assert len({golden.corpus._script(prompt) for prompt in prompts}) == 3


def test_facts_say_how_it_was_made_and_how_far_it_is_from_itself(judged: Line) -> None:
    facts = manifest.read(judged.root / "golden").facts
    assert (facts["dtype"], facts["attention"], facts["device"]) == ("float32", "eager", "cpu")
    floor: Any = facts["self_floor"]
    threads, rounded = floor["threads"], floor["bfloat16"]
    assert threads["kld"]["value"] < 1e-9 and threads["top1"]["value"] == 1.0
    assert 1e-9 < rounded["kld"]["low"] < rounded["kld"]["value"] < 1e-2
    assert 0.9 < rounded["top1"]["value"] <= 1.0 and 0.95 < rounded["perplexity_ratio"]["value"] < 1.05


def test_a_second_run_gives_the_same_bytes(judged: Line) -> None:
    folder = judged.root / "golden"
    names = ("cache.safetensors", "corpus.safetensors", "shapes.safetensors", "greedy.json")
    assert {file.name for file in folder.iterdir()} == {*names, "manifest.json", "run.json"}
    before = lasting(folder, *names)
    assert judged.run(golden.STAGE, "--device", "cpu") == 0
    assert lasting(folder, *names) == before


@pytest.fixture
def small_matrices(monkeypatch: pytest.MonkeyPatch) -> None:
    """The shipped model's matrices are streamed too, although they are small."""
    monkeypatch.setattr(streaming, "KEPT", 64)
    monkeypatch.setattr(streaming, "_HEAD_BLOCK", 10_000)


@pytest.mark.usefixtures("small_matrices")
def test_a_streamed_reference_says_the_same(judged: Line, tmp_path: Path) -> None:
    line = judged.copy(tmp_path / "artifacts", "fetch")
    assert line.run(golden.STAGE, "--device", "cpu", "--weights", "streamed") == 0
    assert manifest.read(line.root / "golden").facts["weights"] == "streamed"
    ours, theirs = (Reference(one.root / "golden", Head.of_checkpoint(SHIPPED, CAP)) for one in (line, judged))
    floor: Any = manifest.read(line.root / "golden").facts["self_floor"]
    assert floor["bfloat16"]["not_measured"].startswith("not measured: ")
    for mine, other in zip(
        (*ours.corpus(), *ours.cache().values()), (*theirs.corpus(), *theirs.cache().values()), strict=True
    ):
        assert np.array_equal(getattr(mine, "length", mine), getattr(other, "length", other))
    for mine, other in zip(ours.shapes(), theirs.shapes(), strict=True):
        assert mine[0] == other[0] and np.array_equal(mine[3], other[3])
    for mine, other in zip(ours.greedy(), theirs.greedy(), strict=True):
        assert mine.continuation_ids == other.continuation_ids and mine.text == other.text
        assert np.allclose(mine.log_likelihoods, other.log_likelihoods, rtol=0, atol=1e-5)
        assert np.allclose(mine.margins, other.margins, rtol=0, atol=1e-5)


@pytest.mark.usefixtures("small_matrices")
def test_a_streamed_matrix_is_in_memory_while_its_module_runs_and_not_after() -> None:
    model = HuggingFace.load(SHIPPED, "cpu", streamed=True).model
    seen: list[bool] = []
    projection = model.model.layers[1].mlp.up_proj
    projection.register_forward_hook(lambda module, *_: seen.append(module.weight.is_meta), prepend=True)
    model.model(input_ids=torch.tensor([[2, 5, 7]]))
    assert seen == [False] and projection.weight.is_meta
    held = sum(parameter.numel() for parameter in model.parameters() if not parameter.is_meta)
    assert held < sum(parameter.numel() for parameter in model.parameters()) / 10


def test_weights_that_do_not_fit_are_streamed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available", lambda: 10_000_000_000)
    assert not is_streamed("auto", "cpu", 1_000_000_000)
    assert is_streamed("auto", "cpu", 2_500_000_000)
    assert not is_streamed("loaded", "cpu", 2_500_000_000)
    with pytest.raises(UsageError, match="on the CPU only"):
        is_streamed("streamed", "cuda", 1)


def test_a_model_larger_than_the_gpu_s_memory_is_for_the_cpu(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (8 << 30, 24 << 30))
    assert choose("auto", 1_000_000_000) == "cuda" and not capfd.readouterr().err
    assert choose("cuda", 4_000_000_000) == "cpu"
    assert "17.6 GB for the reference, 8.6 GB are free; the CPU computes" in capfd.readouterr().err


def changed_checkpoint(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Path:
    """The shipped checkpoint with `change` made to its tensors."""
    shutil.copytree(SHIPPED, folder, ignore=shutil.ignore_patterns("corpus"))
    save_file(change(load_file(SHIPPED / "model.safetensors")), folder / "model.safetensors", {"format": "pt"})
    return folder


def as_conditional(folder: Path) -> Path:
    """The shipped model as the text tower of a `gemma3n` checkpoint, beside vision and audio weights."""

    def wrapped(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        renamed = {name.replace("model.", "model.language_model.", 1): value for name, value in tensors.items()}
        others = ("vision_tower.timm_model.stem", "audio_tower.conv", "embed_vision.norm", "embed_audio.norm")
        return {**renamed, **{f"model.{name}.weight": torch.ones(3) for name in others}}

    changed_checkpoint(folder, wrapped)
    text = json.loads((SHIPPED / "config.json").read_text(encoding="utf-8"))
    config = {"architectures": ["Gemma3nForConditionalGeneration"], "model_type": "gemma3n", "text_config": text}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def test_the_text_tower_of_a_conditional_checkpoint_is_the_same_model(tmp_path: Path) -> None:
    ids = np.arange(4, 40, dtype=np.int32).reshape(2, 18)
    folders = (SHIPPED, as_conditional(tmp_path / "conditional"))
    hidden, heads = zip(
        *((HuggingFace.load(f, "cpu").hidden(ids, np.ones_like(ids)), Head.of_checkpoint(f, CAP)) for f in folders),
        strict=True,
    )
    assert np.array_equal(hidden[0], HuggingFace.load(folders[1], "cpu", streamed=True).hidden(ids, np.ones_like(ids)))
    assert np.array_equal(*hidden)
    assert np.array_equal(heads[0].logits(hidden[0][0]), heads[1].logits(hidden[1][0]))


@pytest.mark.parametrize("streamed", [False, True])
def test_a_missing_tensor_is_refused_by_name(tmp_path: Path, streamed: bool) -> None:
    lost = "model.layers.1.mlp.up_proj.weight"
    folder = changed_checkpoint(tmp_path / "m", lambda t: {name: value for name, value in t.items() if name != lost})
    with pytest.raises(IntegrityError, match=lost):
        HuggingFace.load(folder, "cpu", streamed=streamed)


@pytest.mark.parametrize("streamed", [False, True])
def test_a_tensor_that_belongs_nowhere_is_refused_by_name(tmp_path: Path, streamed: bool) -> None:
    folder = changed_checkpoint(tmp_path / "m", lambda t: {**t, "model.layers.0.surprise.weight": torch.ones(2)})
    with pytest.raises(IntegrityError, match="unknown: .*surprise"):
        HuggingFace.load(folder, "cpu", streamed=streamed)


@pytest.mark.parametrize("streamed", [False, True])
def test_a_tensor_of_another_shape_is_refused(tmp_path: Path, streamed: bool) -> None:
    name = "model.norm.weight"
    folder = changed_checkpoint(tmp_path / "m", lambda t: {**t, name: t[name][:-1].clone()})
    with pytest.raises((IntegrityError, RuntimeError), match="size|shape"):
        HuggingFace.load(folder, "cpu", streamed=streamed)


def test_after_an_interrupt_it_goes_on_from_finished_shards(
    judged: Line, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line, ran, own = judged.copy(tmp_path / "artifacts", "fetch", "golden"), list[shards.Batch](), shards.Batch.run
    before = lasting(line.root / "golden", "cache.safetensors", "corpus.safetensors", "shapes.safetensors")

    def counted(self: shards.Batch, bar: log.Progress) -> bytes:
        ran.append(self)
        if len(ran) == 5:
            raise KeyboardInterrupt
        return own(self, bar)

    monkeypatch.setattr(shards.Batch, "run", counted)
    assert line.run(golden.STAGE, "--device", "cpu") == 130
    assert list((line.root / "golden").iterdir()) == []
    assert len(list((line.root / ".shards/golden").iterdir())) == len(
        {*ran[:4]}
    )  # one token has no padding to differ in
    assert line.run(golden.STAGE, "--device", "cpu") == 0
    assert len(ran) > 5 and not {*ran[:4]} & {*ran[5:]}, "what was finished is not run again"
    assert not (line.root / ".shards").exists()
    assert lasting(line.root / "golden", "cache.safetensors", "corpus.safetensors", "shapes.safetensors") == before


def test_its_own_cache_is_asked_where_an_fp32_bundle_is_held_against_it(
    judged: Line, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, model = load_recipe(judged.recipe), shards.Model(str(SHIPPED), "cpu", False)
    documents, asked = corpus.read_documents(PROJECT / recipe.corpus.verification), list[int]()
    own = HuggingFace.hidden_cached

    def counted(self: HuggingFace, ids: corpus.Tokens, count: int, bar: log.Progress) -> Floats:
        asked.append(count)
        return own(self, ids, count, bar)

    monkeypatch.setattr(HuggingFace, "hidden_cached", counted)
    found = {}
    for precisions in (("fp32", "int8"), ("int8",)):
        folder = tmp_path / "-".join(precisions)
        folder.mkdir()
        bundle = dataclasses.replace(recipe.bundle, precisions=precisions)
        with pool.opened("", tmp_path / "model", "golden", (), "reference") as handed:
            told = make_cache_trace(
                ask(model, handed, 1), documents, dataclasses.replace(recipe, bundle=bundle), folder
            )()
        pool.forget(tmp_path / "model", "golden")
        kept = Reference(folder, Head.of_checkpoint(SHIPPED, CAP)).cache()
        found[precisions] = kv_cache.Trace(schedules=kv_cache.schedules(bundle, told.sliding_window), **kept)
    both, alone = found.values()
    assert asked == [recipe.bundle.decode] and both.cached.shape[1] == recipe.bundle.decode
    assert alone.cached.shape == (2, 0, both.hidden.shape[2])
    assert np.array_equal(alone.expected()[0], both.expected()[0]), "what int8 is held against is the same"


def test_judging_on_calibration_text_is_refused(
    judged: Line, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    same = small_recipe(tmp_path / "r.toml", **{"corpus/calibration.txt": "corpus/verification.txt"})
    line = Line(artifacts=tmp_path / "artifacts", recipe=same)
    assert line.run(fetch.STAGE) == 0
    assert line.run(golden.STAGE) == 2
    assert "in both the verification and the calibration text" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_missing_gpu_is_said_and_not_worked_around(
    judged: Line, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = Line(artifacts=tmp_path / "artifacts", recipe=judged.recipe)
    assert line.run(fetch.STAGE) == 0
    assert line.run(golden.STAGE, "--device", "cuda") == 2
    assert "no usable CUDA device" in capsys.readouterr().err


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_a_gpu_gives_the_same_numbers_within_tolerance() -> None:
    ids = np.arange(4, 260, dtype=np.int32).reshape(2, 128)
    hidden = [
        HuggingFace.load(SHIPPED, choose(device)).hidden(ids, np.ones_like(ids)).astype(np.float64)
        for device in ("cpu", "cuda")
    ]
    assert ((hidden[1] - hidden[0]) ** 2).sum() / (hidden[0] ** 2).sum() < NMSE


def test_the_small_recipe_changes_only_how_much_is_judged() -> None:
    assert not any(word in line for line in SMALL for word in ("kld", "top1", "nmse", "scheme"))
