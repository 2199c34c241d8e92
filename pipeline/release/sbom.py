"""The bill of materials in CycloneDX's format (https://cyclonedx.org): what the files are made of, and with.

No time and no serial number stand in it, so that it is the same bytes in every build.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.core.manifest import dump_json

if TYPE_CHECKING:
    from cyclonedx.model import HashType
    from cyclonedx.model.component import Component
    from cyclonedx.model.license import License

NAME = "sbom.cdx.json"
_PIN = re.compile(r"([a-z0-9-]+)==([^\s;\\]+)")
_LONGEST_NAME = 80  # characters; some packages put the whole text where its name belongs


@dataclass(frozen=True, kw_only=True)
class Package:
    """A locked package: the hashes are those of every file of it that the lock accepts."""

    name: str
    version: str
    hashes: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Model:
    """A model: Hub id or name, commit or content hash, sha256 of its files by name, and its licence if known."""

    name: str
    version: str
    files: Mapping[str, str]
    licence: str


def packages(lock: Path) -> list[Package]:
    """What a hash-locked requirements file pins."""
    found = []
    # A requirement and its hashes are one block; continuation lines are indented.
    for block in re.split(r"\n(?=[a-z0-9])", lock.read_text(encoding="utf-8")):
        if pin := _PIN.match(block):
            hashes = tuple(sorted(re.findall(r"--hash=sha256:([0-9a-f]{64})\b", block)))
            found.append(Package(name=pin[1], version=pin[2], hashes=hashes))
    return found


def text(base: Model, made: Model, locked: list[Package]) -> str:
    """The bill of `made`, which was converted from `base` with the `locked` packages; licences as far as installed."""
    from cyclonedx.model.bom import Bom
    from cyclonedx.model.component import Component, ComponentType, Pedigree
    from cyclonedx.output.json import JsonV1Dot6

    model = ComponentType.MACHINE_LEARNING_MODEL
    origin = _base(base)
    whole = Component(
        type=model,
        name=made.name,
        version=made.version,
        bom_ref=f"made:{made.name}",
        licenses=list(_licence(made.licence)),
        pedigree=Pedigree(ancestors=[Component(type=model, name=base.name, version=base.version, bom_ref="ancestor")]),
    )
    files = _files(made)
    tools = [_package(package) for package in locked]
    bom = Bom(components=[origin, *files, *tools])
    bom.metadata.component = whole
    bom.register_dependency(whole, files)
    for file in files:
        bom.register_dependency(file, [origin, *tools])
    written = json.loads(JsonV1Dot6(bom).output_as_string())
    # The library has no way to leave them out.
    del written["serialNumber"], written["metadata"]["timestamp"]
    return dump_json(written)


def _base(base: Model) -> Component:
    from cyclonedx.model.component import Component, ComponentType
    from packageurl import PackageURL

    owner, _, name = base.name.rpartition("/")
    return Component(
        type=ComponentType.MACHINE_LEARNING_MODEL,
        name=base.name,
        version=base.version,
        bom_ref=f"base:{base.name}",
        purl=PackageURL("huggingface", owner, name, base.version) if owner else None,
        licenses=list(_licence(base.licence)),
        components=_files(base),
    )


def _files(model: Model) -> list[Component]:
    from cyclonedx.model.component import Component, ComponentType

    return [
        Component(type=ComponentType.FILE, name=file, bom_ref=f"{model.name}/{file}", hashes=_hashes((digest,)))
        for file, digest in sorted(model.files.items())
    ]


def _package(package: Package) -> Component:
    from cyclonedx.model.component import Component, ComponentType
    from packageurl import PackageURL

    purl = PackageURL("pypi", None, package.name, package.version)
    return Component(
        type=ComponentType.LIBRARY,
        name=package.name,
        version=package.version,
        bom_ref=str(purl),
        purl=purl,
        hashes=_hashes(package.hashes),
        licenses=[licence for said in _installed(package.name) for licence in _licence(said)],
    )


def _hashes(digests: tuple[str, ...]) -> list[HashType]:
    from cyclonedx.model import HashAlgorithm, HashType

    return [HashType(alg=HashAlgorithm.SHA_256, content=digest) for digest in digests]


def _licence(said: str) -> Iterator[License]:
    from cyclonedx.contrib.license.factories import LicenseFactory

    if said:
        yield LicenseFactory().make_from_string(said)


def _installed(package: str) -> list[str]:
    """What the installed package says of its licence: its SPDX expression, its name, or its classifiers."""
    try:
        said = metadata.distribution(package).metadata
    except metadata.PackageNotFoundError:
        return []
    names = [name for key in ("License-Expression", "License") for name in said.get_all(key) or ()]
    name = names[0] if names else ""
    if name and "\n" not in name and len(name) <= _LONGEST_NAME:
        return [name]
    classifiers = (row for row in said.get_all("Classifier") or () if row.startswith("License :: "))
    return sorted({row.rsplit(" :: ", 1)[-1] for row in classifiers})
