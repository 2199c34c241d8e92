"""Stage fetch: the pinned checkpoint, refused before the download if it is not one that can be converted.

The configuration and the safetensors headers are read first (by range from a server), and whatever is wrong with the
model is said before anything large moves. Downloads wait in `artifacts/<model>/.download/<commit>/`, so that a killed
run goes on where it stopped, and become hard links in `fetch/checkpoint/`. A local folder becomes links to its files.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub.repocard import metadata_load

from pipeline.convert import checkpoint, intake
from pipeline.convert.intake import Plan, Source, plan
from pipeline.core import log, memory
from pipeline.core.errors import ResourceError, UsageError
from pipeline.core.manifest import Facts, FileRecord, dump_json
from pipeline.core.recipe import PROJECT, Recipe, load
from pipeline.core.stage import Context, Outcome, Stage, main
from pipeline.models import architecture_for
from pipeline.release.hub import Hub, Repository

DOWNLOADS = ".download"
RECIPES = PROJECT / "pipeline" / "recipes"


def work(context: Context) -> Outcome:
    """Fetch the checkpoint that `--model-id` and `--revision` name into `fetch/checkpoint/`."""
    target = context.folder / "checkpoint"
    target.mkdir()
    revision: str = context.arguments.revision
    if Path(context.model_id).is_dir():
        if revision:
            raise UsageError(f"{context.model_id} is a folder: it has no revisions", remedy="leave REVISION= out")
        return _from_folder(context, target)
    return _from_hub(context, revision, target)


def _expected(recipe: Recipe, config: Mapping[str, Any]) -> tuple[Mapping[str, tuple[int, ...]], intake.Canonical]:
    architecture = architecture_for(config)
    _check_recipe(recipe, config["model_type"])
    return architecture.tensors(config), lambda name: architecture.canonical(name, config)


def _check_recipe(recipe: Recipe, model_type: str) -> None:
    """Refuse a recipe that is for other models: its limits would judge this one wrongly.

    Raises:
        UsageError: with the recipe that fits.
    """
    if model_type not in recipe.model_types:
        fitting = [file for file in sorted(RECIPES.glob("*.toml")) if model_type in load(file).model_types]
        names = " or ".join(f"RECIPE={file.relative_to(PROJECT)}" for file in fitting)
        raise UsageError(
            f"the checkpoint is of type {model_type}, recipe {recipe.name} is for {', '.join(recipe.model_types)}",
            remedy=f"say {names}" if names else f"write a recipe that has {model_type!r} among its model_types",
        )


def _from_folder(context: Context, target: Path) -> Outcome:
    """Link the needed files of a local folder; its revision is a hash over their names, sizes and contents."""
    folder = Path(context.model_id).resolve()
    sizes = {file.name: file.stat().st_size for file in folder.iterdir() if file.is_file()}
    source = Source(where=str(folder), sizes=sizes, read=lambda *part: checkpoint.read_part(folder, *part))
    chosen = plan(source, partial(_expected, context.recipe))
    inside = folder.is_relative_to(PROJECT) and target.resolve().is_relative_to(PROJECT)
    for name in chosen.names:
        # Relative links survive when the project is moved or mounted elsewhere as a whole.
        file = folder / name
        (target / name).symlink_to(os.path.relpath(file, target.resolve()) if inside else file)
    records = [vars(FileRecord.of(target / name, target)) for name in chosen.names]
    revision = hashlib.sha256(dump_json(records).encode()).hexdigest()
    return Outcome(model=folder.name, revision=revision, facts={**chosen.facts, **_card(target)})


def _from_hub(context: Context, revision: str, target: Path) -> Outcome:
    """Download the needed files at one commit."""
    hub = Hub()
    repository = hub.resolve(context.model_id, revision)
    log.step(f"{repository.model_id} at commit {repository.revision}")
    where = f"{hub.endpoint}/{repository.model_id}"
    sizes = {name: file.size for name, file in repository.files.items() if "/" not in name}
    source = Source(where=where, sizes=sizes, read=lambda *part: hub.read(repository, *part))
    chosen = plan(source, partial(_expected, context.recipe))
    waiting = context.root / DOWNLOADS / repository.revision
    _drop_other_commits(waiting)
    _check_disk(chosen, repository, waiting, context.root)
    for name in chosen.names:
        _place(hub.download(repository, name, waiting), target / name)
    checkpoint.open_checkpoint(target)
    return Outcome(model=repository.model_id, revision=repository.revision, facts={**chosen.facts, **_card(target)})


def _check_disk(chosen: Plan, repository: Repository, waiting: Path, root: Path) -> None:
    """Refuse what does not fit on the disk; say so if the float32 file will not."""
    there = sum(file.stat().st_size for file in waiting.iterdir()) if waiting.is_dir() else 0
    needed = sum(repository.files[name].size for name in chosen.names) - there
    free = shutil.disk_usage(root).free
    log.step(f"to download: {log.human_bytes(needed)}; free on the disk: {log.human_bytes(free)}")
    if needed > free:
        raise ResourceError(
            f"the checkpoint needs {log.human_bytes(needed)}, the disk has {log.human_bytes(free)} left",
            remedy="free some space, or set ARTIFACTS= to a folder on another disk",
        )
    full = 4 * chosen.parameters
    if needed + full > free:
        log.warn(f"the disk will not hold a float32 file besides ({log.human_bytes(full)})")
    free_memory = memory.available()
    if free_memory is not None and full > free_memory:
        log.warn(f"stage golden will need {log.human_bytes(full)} of memory, {log.human_bytes(free_memory)} are free")


def _drop_other_commits(waiting: Path) -> None:
    """Remove what earlier runs downloaded for other commits."""
    for folder in waiting.parent.glob("*"):
        if folder != waiting:
            shutil.rmtree(folder)


def _place(file: Path, target: Path) -> None:
    """Link a downloaded file into place; it stays where it waited until the stage is finished."""
    try:
        target.hardlink_to(file)
    except OSError:  # a file system without hard links: a kill from here on costs this file
        file.replace(target)


def _card(folder: Path) -> Facts:
    """The licence and the base models that the README's front matter names, empty where it names none."""
    file = folder / "README.md"
    try:
        card = metadata_load(file) if file.is_file() else None
    except (ValueError, yaml.YAMLError):
        log.warn("the front matter of README.md can't be read: licence and base model are unknown")
        card = None
    card = card or {}
    base = card.get("base_model") or []
    licence = card.get("license") or ""
    name = card.get("license_name") or ""
    return {
        "licence": str(name if name and licence == "other" else licence),
        "base_models": [str(item) for item in (base if isinstance(base, list) else [base])],
    }


def _tidy(context: Context) -> None:
    shutil.rmtree(context.root / DOWNLOADS, ignore_errors=True)


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--revision", default="", help="branch, tag or commit on the Hub (default: the main branch)")


STAGE = Stage(
    name="fetch",
    summary="Fetch a checkpoint from the Hugging Face Hub or a folder, checked before and after.",
    work=work,
    add_arguments=_add_arguments,
    after=_tidy,
)

if __name__ == "__main__":
    sys.exit(main(STAGE))
