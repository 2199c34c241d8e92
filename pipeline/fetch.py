"""Stage fetch: the pinned checkpoint, refused before the download if it is not one that can be converted.

The configuration and the safetensors headers are read first (by range from a server), and whatever is wrong with the
model is said before anything large moves. Downloads wait in `artifacts/<model>/.download/<commit>/`, so that a killed
run goes on where it stopped, and become hard links in `fetch/checkpoint/`. A local folder becomes links to its files.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import shutil
import sys
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from pipeline.checkpoint.preflight import Source, plan
from pipeline.core import facts, log, options
from pipeline.core.errors import UsageError
from pipeline.core.manifest import describe, dump_json
from pipeline.core.recipe import PROJECT
from pipeline.core.stage import Context, Outcome, Stage, main
from pipeline.models import expected
from pipeline.release import download, licence
from pipeline.release.hub import Hub

DOWNLOADS = ".download"


@dataclass(frozen=True, kw_only=True)
class Options(options.Options):
    """Which state of a repository on the Hub."""

    revision: str = field(default="", metadata={"help": "branch, tag or commit on the Hub (default: the main branch)"})


def work(context: Context) -> Outcome:
    """Fetch the checkpoint that `--model-id` and `--revision` name into `fetch/checkpoint/`."""
    target = context.folder / "checkpoint"
    target.mkdir()
    revision = context.chosen(Options).revision
    if Path(context.model_id).is_dir():
        if revision:
            raise UsageError(f"{context.model_id} is a folder: it has no revisions", remedy="leave REVISION= out")
        return _from_folder(context, target)
    return _from_hub(context, revision, target)


def _from_folder(context: Context, target: Path) -> Outcome:
    """Link the needed files of a local folder; its revision is a hash over their names, sizes and contents."""
    folder = Path(context.model_id).resolve()
    chosen = plan(Source.of_folder(folder), partial(expected, context.recipe))
    inside = folder.is_relative_to(PROJECT) and target.resolve().is_relative_to(PROJECT)
    for name in chosen.names:
        # Relative links survive when the project is moved or mounted elsewhere as a whole.
        file = folder / name
        (target / name).symlink_to(os.path.relpath(file, target.resolve()) if inside else file)
    records = [vars(record) for record in describe((target / name for name in chosen.names), target)]
    revision = hashlib.sha256(dump_json(records).encode()).hexdigest()
    found = facts.Fetch(**vars(chosen.facts), **vars(licence.read_card(target)))
    return Outcome(model=folder.name, revision=revision, facts=found)


def _from_hub(context: Context, revision: str, target: Path) -> Outcome:
    """Download the needed files at one commit."""
    hub = Hub()
    repository = hub.resolve(context.model_id, revision)
    log.step(f"{repository.model_id} at commit {repository.revision}")
    where = f"{hub.endpoint}/{repository.model_id}"
    sizes = {name: file.size for name, file in repository.files.items() if "/" not in name}
    source = Source(where=where, sizes=sizes, read=lambda *part: hub.read(repository, *part), remote=True)
    chosen = plan(source, partial(expected, context.recipe))
    waiting = context.root / DOWNLOADS / repository.revision
    _drop_other_commits(waiting)
    download.check_disk(chosen.names, repository, waiting, context.root)
    for name in chosen.names:
        _place(hub.download(repository, name, waiting), target / name)
    plan(dataclasses.replace(Source.of_folder(target), where=where), partial(expected, context.recipe))
    found = facts.Fetch(**vars(chosen.facts), **vars(licence.read_card(target, hub.card)))
    return Outcome(model=repository.model_id, revision=repository.revision, facts=found)


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


def _tidy(context: Context) -> None:
    shutil.rmtree(context.root / DOWNLOADS, ignore_errors=True)


STAGE = Stage(
    name="fetch",
    summary="Fetch a checkpoint from the Hugging Face Hub or a folder, checked before and after.",
    work=work,
    options=Options,
    after=_tidy,
)

if __name__ == "__main__":
    sys.exit(main(STAGE))
