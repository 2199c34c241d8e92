"""The bill of materials: valid by CycloneDX's schema, whole, and the same bytes each time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator

from pipeline.core.recipe import PROJECT
from pipeline.core.versions import locked
from pipeline.release import sbom
from pipeline.release.sbom import Model

HUB = Model(name="google/gemma-3n-E2B-it", version="a" * 40, files={"model.safetensors": "b" * 64}, licence="gemma")
FOLDER = Model(name="tiny", version="c" * 64, files={"model.safetensors": "b" * 64}, licence="cc0-1.0")
NAMELESS = Model(name="tiny", version="c" * 64, files={}, licence="")
MADE = Model(
    name="google--gemma-3n-E2B-it",
    version="d" * 64,
    files={"m_int8.tflite": "e" * 64, "m_fp32.tflite": "f" * 64},
    licence="gemma",
)
LOCKS = [PROJECT / "locks" / f"{name}.txt" for name in ("cpu", "cuda", "macos")]


def bill(base: Model = HUB, lock: Path = LOCKS[0]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(sbom.text(base, MADE, sbom.packages(lock)))
    return found


@pytest.mark.parametrize("lock", LOCKS, ids=lambda lock: lock.stem)
@pytest.mark.parametrize("base", [HUB, FOLDER, NAMELESS], ids=["hub", "folder", "nameless"])
def test_it_is_valid_and_the_same_bytes_each_time(base: Model, lock: Path) -> None:
    text = sbom.text(base, MADE, sbom.packages(lock))
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None
    assert sbom.text(base, MADE, list(reversed(sbom.packages(lock)))) == text
    assert "serialNumber" not in text and "timestamp" not in text


def test_the_validator_would_find_a_fault() -> None:
    spoilt = bill() | {"components": [{"name": "no type"}]}
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(json.dumps(spoilt)) is not None


@pytest.mark.parametrize("lock", LOCKS, ids=lambda lock: lock.stem)
def test_every_locked_package_is_in_it_with_its_hashes(lock: Path) -> None:
    listed = {item["name"]: item for item in bill(lock=lock)["components"] if item["type"] == "library"}
    assert {name: item["version"] for name, item in listed.items()} == locked(lock)
    text = lock.read_text(encoding="utf-8")
    assert sum(len(item["hashes"]) for item in listed.values()) == text.count("--hash=sha256:")
    assert listed["numpy"]["purl"] == f"pkg:pypi/numpy@{listed['numpy']['version']}"
    assert all(item["hashes"] for item in listed.values())


def test_licences_are_those_that_installed_packages_declare() -> None:
    listed = {item["name"]: item.get("licenses", []) for item in bill()["components"]}
    assert listed["jinja2"] and listed["huggingface-hub"] == [{"license": {"id": "Apache-2.0"}}]
    assert all(len(str(said)) < 300 for said in listed.values())


def test_base_and_files_are_in_it(lock: Path = LOCKS[0]) -> None:
    found = bill()
    items = {item["name"]: item for item in found["components"]}
    assert items["google/gemma-3n-E2B-it"]["purl"] == f"pkg:huggingface/google/gemma-3n-E2B-it@{'a' * 40}"
    assert items["google/gemma-3n-E2B-it"]["components"][0]["hashes"] == [{"alg": "SHA-256", "content": "b" * 64}]
    assert items["m_int8.tflite"]["hashes"] == [{"alg": "SHA-256", "content": "e" * 64}]
    assert found["metadata"]["component"]["licenses"] == [{"license": {"name": "gemma"}}]
    depends = {row["ref"]: row.get("dependsOn", []) for row in found["dependencies"]}
    for file in MADE.files:
        assert "base:google/gemma-3n-E2B-it" in depends[f"{MADE.name}/{file}"]
    assert "purl" not in {item["name"]: item for item in bill(FOLDER)["components"]}["tiny"]
