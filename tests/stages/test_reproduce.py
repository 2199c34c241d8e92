"""Rebuilding a finished folder from its manifests: the same bytes, or the stage and the tensor that differ."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from line import Line
from safetensors.numpy import load_file, save_file

from pipeline import reproduce
from pipeline.core import manifest, rerun
from pipeline.core.errors import IntegrityError
from pipeline.core.manifest import FileRecord
from pipeline.tflite import difference
from pipeline.tflite.graph import Graph

Reproduce = Callable[..., tuple[int, str]]


@pytest.fixture
def again(capfd: pytest.CaptureFixture[str]) -> Reproduce:
    """Runs it; the exit code and what was printed, by the stages as well."""

    def run(line: Line) -> tuple[int, str]:
        capfd.readouterr()
        common = ["--model-id", str(line.model), "--artifacts", str(line.artifacts), "--recipe", str(line.recipe)]
        return reproduce.main(common), capfd.readouterr().err

    return run


def change(line: Line, path: str, edit: Callable[[Path], None]) -> None:
    """Edit a file of a finished stage, and its manifest so that it fits."""
    file = line.root / path
    edit(file)
    record = line.root / path.split("/", 1)[0] / manifest.NAME
    made = json.loads(record.read_text(encoding="utf-8"))
    made["outputs"] = [
        vars(FileRecord.of(file, line.root)) if entry["path"] == path else entry for entry in made["outputs"]
    ]
    record.write_text(json.dumps(made), encoding="utf-8")


def one_scale(file: Path) -> None:
    """A value of the first constant of three or more numbers in float32 is another one."""
    graph = Graph.read(file)
    tensor = next(
        i
        for i in range(len(graph.main.tensors))
        if graph.is_constant(i) and graph.type_of(i) == "FLOAT32" and graph.constant(i).size > 2
    )
    values = np.array(graph.constant(tensor))
    values.flat[1] += 1
    graph.set_constant(tensor, values)
    graph.write(file.with_suffix(".new"))  # the graph still reads the old one
    file.with_suffix(".new").replace(file)


def one_state(file: Path) -> None:
    tensors = load_file(file)
    tensors["hidden"][0, 0] += 1
    save_file(tensors, file)


def test_a_finished_folder_is_made_again_byte_for_byte(built: Line, tmp_path: Path, again: Reproduce) -> None:
    line = built.copy(tmp_path, "fetch", "golden")
    # Left by a build that took towers, before this one.
    (line.root / "towers").mkdir()
    made = json.loads((line.root / "golden" / manifest.NAME).read_text(encoding="utf-8"))
    left = json.dumps(made | {"stage": "towers", "inputs": [], "outputs": [], "facts": {}})
    (line.root / "towers" / manifest.NAME).write_text(left, encoding="utf-8")
    code, said = again(line)
    assert code == 0 and "of 2 stages have the same bytes" in said
    assert not (tmp_path / "reproduced").exists()


def test_every_stage_is_run_with_the_settings_in_its_manifest(built: Line) -> None:
    finished = {name: manifest.read(built.root / name) for name in ("fetch", "golden", "graph", "fp32", "int8")}
    given = rerun.Given()
    words = {name: rerun.words(name, finished, given) for name in finished}
    assert words["fetch"] == [] and words["fp32"] == ["--graphs", "all"]
    # The ladder's rung is told: measured again elsewhere, its figures could fall on the other side of a limit.
    assert words["int8"] == ["--graphs", "all", "--rung", "recipe"]
    assert words["golden"] == ["--graphs", "all", "--device", "cpu", "--weights", "loaded"]
    static = finished | {"int8-static": finished["int8"]}
    assert rerun.words("int8-static", static, given) == ["--graphs", "all", "--scheme", "static"]
    assert rerun.words("int8", finished, rerun.Given(calibration=Path("c")))[-2:] == ["--calibration", "c"]
    judged = dataclasses.replace(finished["fp32"], inputs=finished["fp32"].outputs + finished["int8"].outputs)
    expected = ["--graphs", "all", "--variants", "fp32", "int8"]
    assert rerun.words("verify", finished | {"verify": judged}, given) == expected
    hub = dataclasses.replace(finished["fetch"], model="org/name", revision="b" * 40)
    assert rerun.words("fetch", finished | {"fetch": hub}, given) == ["--revision", "b" * 40]


def test_what_differs_is_named(built: Line, tmp_path: Path, again: Reproduce) -> None:
    line = built.copy(tmp_path / "a", "fetch", "golden")
    change(line, "golden/corpus.safetensors", one_state)
    code, said = again(line)
    assert code == 4
    assert "golden/corpus.safetensors differs: tensor hidden, first at byte " in said
    assert (tmp_path / "a" / "reproduced").is_dir(), "the second folder is there to be looked at"


def test_the_tensor_of_a_graph_is_named(built: Line, tmp_path: Path) -> None:
    ours, theirs = (built.copy(tmp_path / name, "fp32") for name in ("a", "b"))
    assert difference.compare("fp32", ours.root, theirs.root) == 4
    change(ours, "fp32/decoder.tflite", one_scale)
    text = difference.where_different(ours.root / "fp32/decoder.tflite", theirs.root / "fp32/decoder.tflite")
    assert text.startswith("tensor ") and "first at byte" in text
    with pytest.raises(IntegrityError, match="fp32/decoder.tflite differs"):
        difference.compare("fp32", ours.root, theirs.root)


def test_other_versions_recipes_and_empty_folders_are_refused(built: Line, tmp_path: Path, again: Reproduce) -> None:
    code, said = again(Line(artifacts=tmp_path / "none", recipe=built.recipe))
    assert code == 2 and "holds no finished stage" in said
    line = built.copy(tmp_path / "a", "fetch")
    record = line.root / "fetch" / manifest.NAME
    made = json.loads(record.read_text(encoding="utf-8"))
    record.write_text(json.dumps(made | {"tools": {"torch": "1.0"}}), encoding="utf-8")
    code, said = again(line)
    assert code == 2 and "other versions: torch 1.0" in said
    record.write_text(json.dumps(made | {"recipe_sha256": "0" * 64}), encoding="utf-8")
    code, said = again(line)
    assert code == 2 and "under another recipe" in said
