"""Places and digests of constants: what stands at a place is the tensor, in plain files, large ones and bundles."""

from __future__ import annotations

import hashlib
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_graph import Model

from pipeline.bundling import constants, contents, litertlm, metadata
from pipeline.core import manifest
from pipeline.core.errors import BundleError
from pipeline.tflite import writer
from pipeline.tflite.graph import Graph

Arrays = dict[str, np.ndarray[Any, Any]]
SHAPES = st.lists(st.integers(1, 9), max_size=3).map(tuple)
TYPES = st.sampled_from([np.float32, np.float16, np.int8, np.int32])


@st.composite
def arrays(draw: st.DrawFn) -> Arrays:
    """A few constants, each with values of its own."""
    made: Arrays = {}
    for number, (shape, dtype) in enumerate(draw(st.lists(st.tuples(SHAPES, TYPES), min_size=1, max_size=5))):
        values = np.random.default_rng(number).integers(-99, 99, shape)
        made[f"w{number} ⵣ"] = np.asarray(values, dtype)
    return made


def write(values: Arrays, file: Path) -> Path:
    graph = Graph.empty()
    for name, array in values.items():
        graph.add_constant(array, name)
    graph.write(file)
    return file


def expected(values: Arrays) -> dict[str, tuple[tuple[int, ...], str, str]]:
    return {
        name: (array.shape, array.dtype.name.upper(), hashlib.sha256(array.tobytes()).hexdigest())
        for name, array in values.items()
    }


def found(rows: list[dict[str, Any]]) -> dict[str, tuple[tuple[int, ...], str, str]]:
    return {row["name"]: (row["shape"], row["type"], row["sha256"]) for row in rows}


@settings(max_examples=20)
@given(arrays(), st.sampled_from([2**30, 0]))
def test_each_constant_is_found_where_it_stands(values: Arrays, limit: int) -> None:
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        patch.setattr(writer, "_INLINE_LIMIT", limit)
        file = write(values, Path(folder) / "model.tflite")
        rows = constants.digests({"key": file})["key"]
        assert found(rows) == expected(values)
        whole = file.read_bytes()
        for row in rows:
            assert hashlib.sha256(whole[row["offset"] :][: row["size"]]).hexdigest() == row["sha256"]
        assert [row["offset"] for row in rows] == sorted(row["offset"] for row in rows)


@pytest.mark.parametrize("limit", [2**30, 0], ids=["inline", "behind"])
def test_sections_of_a_bundle_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    monkeypatch.setattr(writer, "_INLINE_LIMIT", limit)
    names = {"decoder": "tf_lite_prefill_decode", "embedder": "tf_lite_embedder"}
    names["per_layer_embedder"] = "tf_lite_per_layer_embedder"
    values = {name: {"w": np.arange(place, 300, dtype=np.float32)} for place, name in enumerate(names)}
    models = {name: write(values[name], tmp_path / f"{name}.tflite") for name in names}
    told = metadata.Metadata(model_type="gemma3n", sections=tuple(names), start=2, stop=(1,), max_tokens=64)
    litertlm.write(told, "{}", models, tmp_path / "model.litertlm")
    rows = constants.digests({"key": tmp_path / "model.litertlm"})["key"]
    for name, section in names.items():
        assert found([row for row in rows if row["section"] == section]) == expected(values[name])
    assert len(rows) == len(names)


@pytest.mark.parametrize("limit", [2**30, 0], ids=["inline", "behind"])
def test_a_divided_model_is_read_as_the_one_that_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    monkeypatch.setattr(writer, "_INLINE_LIMIT", limit)
    Model().graph.write(whole := tmp_path / "decoder.tflite")
    told = metadata.Metadata(model_type="gemma3", sections=("decoder",), start=2, stop=(1,), max_tokens=64)
    room = whole.stat().st_size - 4000  # of 20 kB; the table, 5,120 bytes of them, is what leaves it
    sections = litertlm.write(told, "{}", {"decoder": whole}, bundle := tmp_path / "x.litertlm", room, must=True)
    assert [(each.kind, each.model_type) for each in sections[2:]] == [
        (litertlm.MODEL, "tf_lite_prefill_decode"),
        (litertlm.WEIGHTS, "tf_lite_prefill_decode"),
    ]
    assert max(each.size for each in sections[2:]) <= room
    given, made = (constants.digests({"": file})[""] for file in (whole, bundle))
    assert {(row["name"], row["sha256"]) for row in made} == {(row["name"], row["sha256"]) for row in given}
    (read,), (model,) = contents.read(bundle).models, contents.read(whole).models
    assert read.constants == model.constants and read.signatures == model.signatures
    assert [file.name for file in tmp_path.iterdir() if file not in (whole, bundle)] == []


def test_what_can_not_be_divided_stays_whole_or_is_refused(tmp_path: Path) -> None:
    Model().graph.write(whole := tmp_path / "decoder.tflite")
    told = metadata.Metadata(model_type="gemma3", sections=("decoder",), start=2, stop=(1,), max_tokens=64)
    assert len(litertlm.write(told, "{}", {"decoder": whole}, tmp_path / "x.litertlm", 5000)) == 3
    (tmp_path / "x.litertlm").unlink()
    with pytest.raises(BundleError, match=r"decoder.tflite has .* too much for two sections of 5.0 kB") as caught:
        litertlm.write(told, "{}", {"decoder": whole}, tmp_path / "x.litertlm", 5000, must=True)
    assert "section_limit" in (caught.value.remedy or "")
    assert [file.name for file in tmp_path.iterdir()] == ["decoder.tflite"]


@given(st.binary(max_size=99), st.integers(0, 120), st.integers(0, 120), st.integers(1, 50))
def test_a_part_is_hashed_in_blocks(data: bytes, start: int, size: int, block: int) -> None:
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        patch.setattr(manifest, "_BLOCK", block)
        (file := Path(folder) / "file").write_bytes(data)
        assert manifest.sha256_of_part(file, start, size) == hashlib.sha256(data[start : start + size]).hexdigest()
