"""Filling the folder that is published: model files by link, papers by copy, checksums last."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

from pipeline.core import log, manifest
from pipeline.core.errors import PublishError
from pipeline.core.manifest import FileRecord
from pipeline.release import provenance

_LICENCE = re.compile(r"(licen[cs]e|notice|use_policy|usage_policy)[\w.-]*", re.IGNORECASE)
_TOKENIZER = re.compile(r"tokenizer[\w.-]*|special_tokens_map\.json|added_tokens\.json|chat_template\.\w+")


def place_model(source: Path, target: Path) -> Path:
    """Put a model file in place, as a hard link where the file system allows it, and return `target`."""
    try:
        target.hardlink_to(source.resolve())
    except OSError:  # across file systems, or on one without hard links
        shutil.copyfile(source, target)
    return target


def place_reports(verify: Path, names: Iterable[str], target: Path) -> None:
    """Copy verify's reports."""
    for name in names:
        shutil.copyfile(verify / name, target / name)


def place_manifests(root: Path, stages: Iterable[str], target: Path) -> None:
    """Copy the manifests of `stages` below `root` to `target/manifests/<stage>.json`."""
    (target / "manifests").mkdir()
    for stage in stages:
        shutil.copyfile(root / stage / manifest.NAME, target / "manifests" / f"{stage}.json")


def place_tokenizer(checkpoint: Path, target: Path) -> None:
    """Copy what turns text into token ids and back; without it the model files can't be tried."""
    for file in sorted(checkpoint.iterdir()):
        if _TOKENIZER.fullmatch(file.name):
            shutil.copyfile(file, target / file.name)


def place_licence_files(checkpoint: Path, target: Path) -> tuple[str, ...]:
    """Copy the checkpoint's own licence files to `target/checkpoint/` and return their paths in `target`."""
    files = sorted(file for file in checkpoint.iterdir() if _LICENCE.fullmatch(file.name))
    for file in files:
        (target / "checkpoint").mkdir(exist_ok=True)
        shutil.copyfile(file, target / "checkpoint" / file.name)
    return tuple(f"checkpoint/{file.name}" for file in files)


def papers(folder: Path, models: Iterable[str], measured: Iterable[str]) -> dict[str, str]:
    """Sha256 by path of all that is in `folder` but the `models` and what was `measured`."""
    left_out = {folder / name for name in (*models, *measured)}
    files = (file for file in folder.rglob("*") if file.is_file() and file not in left_out)
    return {record.path: record.sha256 for record in (FileRecord.of(file, folder) for file in files)}


def seal(folder: Path, judged: Mapping[str, str]) -> list[Path]:
    """Write SHA256SUMS over all that is in `folder` and return the files, the sums among them.

    Args:
        folder: the filled folder.
        judged: sha256 by name of the files that were verified.

    Raises:
        PublishError: a file in `judged` is not the one that was verified.
    """
    files = [file for file in folder.rglob("*") if file.is_file()]
    sums = provenance.read_sums(provenance.write_sums(folder, files).parent)
    for name, digest in judged.items():
        if sums.get(name) != digest:
            raise PublishError(
                f"{name} is not the file that was verified",
                cause="it changed while it was put in place",
                remedy="run `make publish` again",
            )
    return sorted([*files, folder / provenance.NAME])


def show(folder: Path, files: Iterable[Path]) -> None:
    """Print what would be uploaded."""
    sizes = {file.relative_to(folder).as_posix(): file.stat().st_size for file in files}
    for name, size in sizes.items():
        log.line(f"  {log.human_bytes(size):>9}  {name}")
    log.line(f"dry run: would upload {len(sizes)} files, {log.human_bytes(sum(sizes.values()))}; nothing was sent")
