"""Decoders whose cache grows with the conversation: exact in both runtimes, through every growth."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import geometry
import numpy as np
import pytest
import torch
from geometry import BUNDLE

from pipeline.bundling import litertlm
from pipeline.bundling.metadata import of_checkpoint, tokenizer_json
from pipeline.checkpoint.reader import open_checkpoint
from pipeline.core import recipe
from pipeline.core.errors import UsageError
from pipeline.core.graph import Choice, _page
from pipeline.core.stage import DEFAULT_MODEL
from pipeline.judge import kv_cache
from pipeline.models import expected
from pipeline.quantize import readback
from pipeline.runtime import sections
from pipeline.runtime.litert import MappedRunner
from pipeline.runtime.litert_lm import LmRuntime
from pipeline.runtime.sections import DECODER, Conversation, Sections
from pipeline.search import ladder

GROWING = replace(BUNDLE, cache="dynamic", prefill=(33, 5), cache_length=700)
PLAIN = recipe.load(recipe.RECIPES / "plain.toml")
SMALL: dict[str, Any] = {
    "model_type": "qwen3",  # heads that share keys, and a width that is not theirs together
    "vocab_size": 2048,
    "hidden_size": 60,
    "head_dim": 12,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
}


@pytest.fixture(scope="module")
def model() -> Any:
    return geometry.plain_reference(SMALL, 3)


@pytest.fixture(scope="module")
def folder(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The fp32 sections, and the checkpoint beside them with the shipped model's tokenizer."""
    made: Path = tmp_path_factory.mktemp("growing")
    geometry.convert_decoder(geometry.save(model, made / "checkpoint"), GROWING, made)
    for file in Path(DEFAULT_MODEL).glob("*token*"):
        shutil.copy(file, made / "checkpoint")
    return made


@pytest.mark.parametrize("xnnpack", [True, False])
def test_it_is_exact_in_the_file(model: Any, folder: Path, xnnpack: bool) -> None:
    """Uneven prefills, two conversations of other lengths in turns, and one in a used cache."""
    play = geometry.in_file(folder, xnnpack=xnnpack)
    result = geometry.compare_conversations(play, model, GROWING, 3)
    assert result.cases >= 100 and result.nmse <= 1e-9 and result.top1 == 1, result


def test_int8_files_are_read_back(folder: Path, tmp_path: Path) -> None:
    """Products of a decoder whose shapes are chosen at run time are counted as well."""
    made = tmp_path / DECODER
    ladder.write(open_checkpoint(folder / "checkpoint"), folder / "bare-decoder.tflite", made, PLAIN.int8, None)
    found = readback.contents(made, "dynamic")
    assert found.integer_share and 0.5 < found.integer_share < 1 and (found.weights_int8_share or 0) > 0.99


def test_what_a_growth_loses_is_seen(model: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = sections._longer
    monkeypatch.setattr(sections, "_longer", lambda values, axis, more: kept(0 * values, axis, more))
    result = geometry.compare_conversations(geometry.in_file(folder), model, GROWING, 3)
    assert result.nmse > 1e-3


def test_repacked_weights_in_a_file_change_nothing(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cache is written where it was read: room made for it before a run is that of the shape before."""
    rooms, spoken = set[str](), []
    kept = MappedRunner._buffer

    def buffer(runner: MappedRunner, way: Any, name: str) -> Any:
        rooms.update([name] if way == "output" else [])
        return kept(runner, way, name)

    monkeypatch.setattr(MappedRunner, "_buffer", buffer)
    for opened in (Sections(folder), Sections(folder, weights=tmp_path / "weights")):
        first, second = Conversation(opened), Conversation(opened)
        first.prefill([2, *range(10, 50)])
        second.decode(2)  # in between: another length of the cache
        spoken.append(np.stack([first.decode(5), second.decode(6), first.decode(7)]))
    assert np.array_equal(spoken[0], spoken[1])
    assert rooms == {"logits"}


def test_litert_lm_says_what_hugging_face_does(model: Any, folder: Path) -> None:
    """Past many growths of its cache, and after a second prompt in one session."""
    described = of_checkpoint(folder / "checkpoint", GROWING)
    bundle = folder / "growing.litertlm"
    tokenizer = tokenizer_json(described.tokenizer, described.vocabulary)
    litertlm.write(described.metadata, tokenizer, {DECODER.removesuffix(".tflite"): folder / DECODER}, bundle)
    with LmRuntime(bundle, threads=1) as runtime, runtime.session(40, greedy=True) as session:
        read: list[int] = [] if runtime.start is None else [runtime.start]
        for prompt in ("Azul fellak", " d amaziɣ " * 30):
            session.prefill(prompt)
            said = "".join(session.decode())
            read += runtime.tokenize(prompt)
            right = _greedy(model, read, 40)
            assert session.speed().decode_tokens == 40
            assert said == runtime.detokenize(right)
            read += right
    assert len(read) > 150


def _greedy(model: Any, ids: list[int], count: int) -> list[int]:
    found, kept, new = list[int](), None, ids
    with torch.inference_mode():
        for _ in range(count):
            output = model(input_ids=torch.tensor([new]), past_key_values=kept, use_cache=True)
            kept, new = output.past_key_values, [int(output.logits[0, -1].argmax())]
            found += new
    return found


def test_a_conversation_can_be_as_long_as_the_cache() -> None:
    assert GROWING.max_tokens == 700 == replace(GROWING, cache="static").max_tokens + 32
    first, _ = kv_cache.schedules(GROWING, 0)
    assert first.length == 33 + 41 + GROWING.decode


def test_layers_with_a_window_are_refused_before_anything_is_made() -> None:
    shipped, config = recipe.load(recipe.DEFAULT), json.loads((Path(DEFAULT_MODEL) / "config.json").read_text())
    assert expected(shipped, "none", config).shapes
    with pytest.raises(UsageError, match="sliding window"):
        expected(replace(shipped, bundle=replace(shipped.bundle, cache="dynamic")), "none", config)
    assert expected(replace(PLAIN, bundle=replace(PLAIN.bundle, cache="dynamic")), "none", SMALL).shapes


def test_the_page_refuses_it() -> None:
    growing = replace(PLAIN, bundle=replace(PLAIN.bundle, cache="dynamic"))
    with pytest.raises(UsageError, match="whose cache grows"):
        _page(Choice(recipe=growing, graphs="bundle"))
