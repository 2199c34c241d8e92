"""What says where published files come from, and lets anybody check them.

SHA256SUMS is for `sha256sum -c SHA256SUMS`. `provenance.json` is an in-toto statement (https://in-toto.io/Statement/v1)
about the model files with a SLSA predicate (https://slsa.dev/spec/v1.0/provenance): from which checkpoint, by which
recipe, code and versions they were made, and which papers came with them. `tensors.json` says where each tensor of a
model file stands, and its sha256.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from pipeline.core import manifest
from pipeline.core.errors import IntegrityError, PublishError
from pipeline.core.facts import Fetch
from pipeline.core.manifest import FileRecord, Manifest

NAME = "SHA256SUMS"
STATEMENT = "provenance.json"
TENSORS = "tensors.json"
_SHA256 = re.compile(r"[0-9a-f]{64}")
BUILD_TYPE = "urn:hf-to-litert:build:1"
"""How the predicate's parameters are to be read: MODEL_ID, REVISION, BASE, RECIPE, GRAPHS, TOWERS, RUNG of
`make publish`."""


def write_sums(folder: Path, files: Iterable[Path]) -> Path:
    """Write the sums of `files`, all in `folder` or below it, and return the path of the new file.

    Raises:
        PublishError: a name holds a line break or a backslash, for which coreutils has a syntax of its own.
    """
    records = sorted((FileRecord.of(file, folder) for file in files), key=lambda record: record.path)
    for record in records:
        # coreutils escapes such names and marks the line, which readers of the plain form take for a damaged one.
        if set(record.path) & set("\n\r\\"):
            raise PublishError(f"{record.path!r} can't stand in {NAME}", remedy="rename the checkpoint's folder")
    return list_sums(folder, {record.path: record.sha256 for record in records})


def list_sums(folder: Path, sums: Mapping[str, str]) -> Path:
    """Write `sums`, sha256 by path, and return the path of the new file."""
    target = folder / NAME
    manifest.write_atomically(target, _written(sums))
    return target


def _written(sums: Mapping[str, str]) -> str:
    return "".join(f"{digest}  {path}\n" for path, digest in sorted(sums.items()))


def _inside(path: str) -> bool:
    """Whether `path` names a file in the folder or below it."""
    # The list may come from elsewhere, and what it names is opened.
    return bool(path) and not path.startswith("/") and ".." not in path.split("/")


def read_sums(folder: Path) -> dict[str, str]:
    """The sums in `folder`, sha256 by path.

    Raises:
        IntegrityError: the file is missing, or is not as `write_sums` writes it, to the byte.
    """
    file = folder / NAME
    if not file.is_file():
        raise IntegrityError(f"{file} does not exist", remedy="run `make publish` again")
    try:
        text = file.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise IntegrityError(f"{file} is no text: {error}", remedy="run `make publish` again") from error
    sums: dict[str, str] = {}
    for row in text.removesuffix("\n").split("\n"):
        digest, _, path = row.partition("  ")
        if not _SHA256.fullmatch(digest) or not _inside(path) or path in sums:
            raise IntegrityError(f"{file} has a line that is no checksum: {row!r}", remedy="run `make publish` again")
        sums[path] = digest
    # One form only: two lists with the same sums would have two hashes, and one could hide behind the other.
    if text != _written(sums):
        raise IntegrityError(
            f"{file} is not as it was written", cause="lines were moved or added", remedy="run `make publish` again"
        )
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
    files: Mapping[str, str],
    stages: Mapping[str, Manifest],
    parameters: Mapping[str, object],
    locks: Mapping[str, str],
    papers: Mapping[str, str],
) -> dict[str, object]:
    """The in-toto statement about `files`.

    Args:
        files: sha256 of each model file, by its published name.
        stages: the manifests of the stages behind them; fetch and verify are among them.
        parameters: what the build was asked for, by the name of its setting.
        locks: sha256 of the hash-locked requirements, by file name.
        papers: sha256 of what is published beside the model files, by name.
    """
    fetched, last = stages["fetch"], stages["verify"]
    checkpoint = [
        {"name": record.path.removeprefix("fetch/checkpoint/"), "digest": {"sha256": record.sha256}}
        for record in fetched.outputs
    ]
    origins = [_origin(fetched.model, fetched.revision)]
    if merged := fetched.told(Fetch).adapter:
        origins.append(_origin(merged.base, merged.base_revision))
    dirty = any(made.source.dirty for made in stages.values())
    source = {"name": "source", "digest": {"gitCommit": last.source.commit}, "annotations": {"dirty": dirty}}
    external: dict[str, object] = {**parameters, "recipe_sha256": last.recipe_sha256}
    return {
        "_type": "https://in-toto.io/Statement/v1",
        "subject": _resources(files),
        "predicateType": "https://slsa.dev/provenance/v1",
        "predicate": {
            "buildDefinition": {
                "buildType": BUILD_TYPE,
                "externalParameters": external,
                "internalParameters": {"tools": dict(last.tools)},
                "resolvedDependencies": [
                    *origins,
                    source,
                    *checkpoint,
                    *_resources(locks),
                ],
            },
            "runDetails": {"builder": {"id": _builder(last)}, "byproducts": _resources(papers)},
        },
    }


def _origin(model: str, revision: str) -> dict[str, object]:
    """A model by its commit on the Hub, or a folder by the hash of its contents."""
    if "/" in model:
        return {"uri": f"pkg:huggingface/{model}@{revision}", "digest": {"gitCommit": revision}}
    return {"name": model, "digest": {"sha256": revision}}


def _resources(digests: Mapping[str, str]) -> list[dict[str, object]]:
    """Resource descriptors, in order of their names."""
    return [{"name": name, "digest": {"sha256": digest}} for name, digest in sorted(digests.items())]


def _builder(last: Manifest) -> str:
    return f"urn:hf-to-litert:image:{last.image_digest}" if last.image_digest else "urn:hf-to-litert:host"


def subjects(folder: Path) -> tuple[dict[str, str], dict[str, str]]:
    """What `provenance.json` in `folder` speaks of: sha256 by name of the model files, and of the papers beside them.

    Raises:
        IntegrityError: it is missing or is no such statement.
    """
    file = folder / STATEMENT
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        predicate = found["predicate"]
        if predicate["buildDefinition"]["buildType"] != BUILD_TYPE:
            raise ValueError("another buildType")
        listed = (found["subject"], predicate["runDetails"]["byproducts"])
        models, papers = ({entry["name"]: entry["digest"]["sha256"] for entry in entries} for entries in listed)
        return models, papers
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise IntegrityError(f"{file} can't be read: {error!r}", remedy="get the folder anew") from error


def tensors(listed: Path, names: Mapping[str, str]) -> dict[str, object]:
    """The tensors of the published files; `names` maps a file's path in the model's folder to its published name.

    Raises:
        PublishError: `listed`, verify's list, is missing or lacks one of the files.
    """
    try:
        found = json.loads(listed.read_text(encoding="utf-8"))
        return {name: found[path] for path, name in names.items()}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise PublishError(
            f"{listed} does not list every file: {error!r}",
            cause="verify ran without one of them, or is of another version",
            remedy="run `make verify` again",
        ) from error


def check_tensors(folder: Path, models: Iterable[str]) -> int:
    """Hold every tensor that `tensors.json` lists against its sha256 and return how many there are.

    Whether names, shapes and types are true takes a reader of flatbuffers; places and bytes don't.

    Raises:
        IntegrityError: names the first tensor that differs, or a file that is not listed.
    """
    try:
        listed = json.loads((folder / TENSORS).read_text(encoding="utf-8"))
        rows = [(name, row) for name in sorted(listed) for row in listed[name]]
        if sorted(listed) != sorted(models) or not rows:
            raise ValueError("it lists other files than these")
        for name, row in rows:
            file, start, size = folder / name, row["offset"], row["size"]
            # Hashing would end at the end of the file, and the rest could be anything.
            if start + size > file.stat().st_size:
                raise ValueError(f"tensor {row['name']!r} of {name} would end behind the file")
            if manifest.sha256_of_part(file, start, size) != row["sha256"]:
                raise ValueError(f"tensor {row['name']!r} of {name} has another sha256")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise IntegrityError(
            f"{folder / TENSORS} does not hold: {error}", cause="one of the two was changed", remedy="do not use it"
        ) from error
    return len(rows)
