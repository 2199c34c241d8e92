"""What says where published files come from, and lets anybody check them.

SHA256SUMS is for `sha256sum -c SHA256SUMS`. `provenance.json` is an in-toto statement (https://in-toto.io/Statement/v1)
about the model files with a SLSA predicate (https://slsa.dev/spec/v1.0/provenance): from which checkpoint, by which
recipe, code and versions they were made.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pipeline.core import manifest
from pipeline.core.errors import IntegrityError, PublishError
from pipeline.core.manifest import FileRecord, Manifest

NAME = "SHA256SUMS"
STATEMENT = "provenance.json"
BUILD_TYPE = "urn:hf-to-litert:build:1"
"""How the predicate's parameters are to be read: MODEL_ID, REVISION, RECIPE and GRAPHS of `make publish`."""


def write_sums(folder: Path, files: Iterable[Path]) -> Path:
    """Write the sums of `files`, all in `folder` or below it, and return the path of the new file.

    Raises:
        PublishError: a name holds a line break or a backslash, for which coreutils has a syntax of its own.
    """
    records = sorted((FileRecord.of(file, folder) for file in files), key=lambda record: record.path)
    for record in records:
        if set(record.path) & set("\n\r\\"):
            raise PublishError(f"{record.path!r} can't stand in {NAME}", remedy="rename the checkpoint's folder")
    target = folder / NAME
    manifest.write_atomically(target, "".join(f"{record.sha256}  {record.path}\n" for record in records))
    return target


def read_sums(folder: Path) -> dict[str, str]:
    """The sums in `folder`, sha256 by path.

    Raises:
        IntegrityError: the file is missing, or a line is not a sum, two spaces and a path.
    """
    file = folder / NAME
    if not file.is_file():
        raise IntegrityError(f"{file} does not exist", remedy="run `make publish` again")
    sums: dict[str, str] = {}
    for row in file.read_text(encoding="utf-8").splitlines():
        digest, _, path = row.partition("  ")
        if len(digest) != 64 or not path or path in sums:
            raise IntegrityError(f"{file} has a line that is no checksum: {row!r}", remedy="run `make publish` again")
        sums[path] = digest
    return sums


def check_sums(folder: Path) -> int:
    """Hold every file that SHA256SUMS lists against its sum and return how many there are.

    Raises:
        IntegrityError: names the first file that is missing or differs.
    """
    sums = read_sums(folder)
    for path, digest in sums.items():
        file = folder / path
        if not file.is_file():
            raise IntegrityError(
                f"{file} is missing", cause=f"it is listed in {NAME}", remedy="run `make publish` again"
            )
        if FileRecord.of(file, folder).sha256 != digest:
            raise IntegrityError(
                f"{file} does not have the sha256 in {NAME}",
                cause="it was changed after it was made",
                remedy="run `make publish` again",
            )
    return len(sums)


def statement(
    files: Mapping[str, str], stages: Mapping[str, Manifest], parameters: Mapping[str, Any], locks: Mapping[str, str]
) -> dict[str, Any]:
    """The in-toto statement about `files`.

    Args:
        files: sha256 of each model file, by its published name.
        stages: the manifests of the stages behind them; fetch and verify are among them.
        parameters: what the build was asked for, by the name of its setting.
        locks: sha256 of the hash-locked requirements, by file name.
    """
    fetched, last = stages["fetch"], stages["verify"]
    checkpoint = [
        {"name": record.path.removeprefix("fetch/checkpoint/"), "digest": {"sha256": record.sha256}}
        for record in fetched.outputs
    ]
    hub = "/" in fetched.model
    origin = {
        **({"uri": f"pkg:huggingface/{fetched.model}@{fetched.revision}"} if hub else {"name": fetched.model}),
        "digest": {"gitCommit" if hub else "sha256": fetched.revision},
    }
    dirty = any(made.source.dirty for made in stages.values())
    source = {"name": "source", "digest": {"gitCommit": last.source.commit}, "annotations": {"dirty": dirty}}
    return {
        "_type": "https://in-toto.io/Statement/v1",
        "subject": [{"name": name, "digest": {"sha256": digest}} for name, digest in sorted(files.items())],
        "predicateType": "https://slsa.dev/provenance/v1",
        "predicate": {
            "buildDefinition": {
                "buildType": BUILD_TYPE,
                "externalParameters": {**parameters, "recipe_sha256": last.recipe_sha256},
                "internalParameters": {"tools": dict(last.tools)},
                "resolvedDependencies": [
                    origin,
                    source,
                    *checkpoint,
                    *({"name": name, "digest": {"sha256": digest}} for name, digest in sorted(locks.items())),
                ],
            },
            "runDetails": {"builder": {"id": _builder(last)}},
        },
    }


def _builder(last: Manifest) -> str:
    return f"urn:hf-to-litert:image:{last.image_digest}" if last.image_digest else "urn:hf-to-litert:host"


def subjects(folder: Path) -> dict[str, str]:
    """The files that `provenance.json` in `folder` speaks of: sha256 by name.

    Raises:
        IntegrityError: it is missing or is no such statement.
    """
    file = folder / STATEMENT
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        if found["predicate"]["buildDefinition"]["buildType"] != BUILD_TYPE:
            raise ValueError("another buildType")
        return {entry["name"]: entry["digest"]["sha256"] for entry in found["subject"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise IntegrityError(f"{file} can't be read: {error!r}", remedy="get the folder anew") from error
