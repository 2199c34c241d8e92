"""Whether files may be published: verified, passed, under the recipe in use, and still the very same bytes.

The stage asks this of the stages' folders before it fills `publish/`; the upload asks it again of `publish/` alone,
which may have come from another machine.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from pipeline.core import judgement as judged
from pipeline.core import manifest
from pipeline.core.errors import IntegrityError, PublishError
from pipeline.core.judgement import Judgement
from pipeline.core.manifest import FileRecord, Manifest, Source
from pipeline.release import card, provenance, signing
from pipeline.release.card import Check

JUDGEMENT = "judgement.json"
REPORTS = ("report.json", "report.html")
RECEIPT = "receipt.json"
NOT_UPLOADED = frozenset(signing.RUNNERS)
"""The runner's own files in `publish/`, and what the upload leaves there."""
MODELS = (".tflite", ".litertlm")
_BESIDE_SUMS = frozenset({provenance.NAME})
_AGAIN = "run `make publish` again"


@dataclass(frozen=True, kw_only=True)
class Release:
    """A filled `publish/` that may go up: its files by path, the name of its tag, and the sources that made it."""

    files: Mapping[str, FileRecord]
    tag: str
    sources: tuple[Source, ...]


def verified(root: Path) -> Manifest:
    """The manifest of a finished verify stage below `root`, the model's artefact folder.

    Raises:
        PublishError: verify is not finished, or failed.
    """
    folder = root / "verify"
    try:
        return manifest.read(folder)
    except IntegrityError as error:
        if (folder / JUDGEMENT).is_file():
            judgement(folder)
        raise PublishError(
            "nothing is published before verify has passed", cause=error.what, remedy="run `make verify` first"
        ) from error


def judged_stages(root: Path) -> tuple[str, ...]:
    """What publish and page read below `root`: fetch, the stages that verify read, and verify.

    Raises:
        PublishError: verify is not finished, or failed.
    """
    stages = {record.path.split("/", 1)[0] for record in verified(root).inputs}
    return ("fetch", *sorted(stages - {"fetch"}), "verify")


def judgement(folder: Path) -> Judgement:
    """The judgement in verify's `folder`, with the reports beside it.

    Raises:
        PublishError: a file is missing or can't be read, or a check did not pass.
    """
    _refuse_missing(folder, (JUDGEMENT, *REPORTS))
    return _passed(folder / JUDGEMENT, folder / "report.html")


def _refuse_missing(folder: Path, names: Iterable[str]) -> None:
    for name in names:
        if not (folder / name).is_file():
            raise PublishError(
                f"{folder / name} is missing",
                cause="it was removed after verify made it",
                remedy="run `make verify` again",
            )


def _passed(file: Path, page: Path) -> Judgement:
    """The checks in `file`, all of them passed; `page` shows them to people."""
    try:
        judgement: Judgement = json.loads(file.read_text(encoding="utf-8"))
        failed = [_sentence(check) for check in judgement["checks"] if check["passed"] is not True]
        passed = judgement["passed"] is True and bool(judgement["checks"])
    except (ValueError, KeyError, TypeError) as error:
        raise PublishError(
            f"{file} can't be read: {error!r}",
            cause="verify was killed, or is of another version",
            remedy="run `make verify` again",
        ) from error
    if failed or not passed:
        raise PublishError(
            f"verification failed: {'; '.join(failed) or 'not every check was made'}",
            cause="a file is not as good as the recipe demands",
            remedy=f"look at {page}, mend the cause, and run `make verify` again",
        )
    return judgement


def release(folder: Path) -> Release:
    """Read `folder`, a filled `publish/`, and make sure by its own papers that it may go up.

    Raises:
        PublishError: it is not finished, its report is missing or failed, a file is not the one that was judged or
            listed, or there is no licence.
    """
    if not (folder / provenance.NAME).is_file():
        raise PublishError(
            f"{folder} is not ready to be published",
            cause="`make publish` did not finish, or this is another folder",
            remedy="run `make publish`",
        )
    _refuse_missing(folder, REPORTS)
    _passed(folder / "report.json", folder / "report.html")
    _refuse_without_licence(folder)
    stages = _stages(folder)
    paths = sorted(file for file in folder.rglob("*") if file.is_file())
    found = manifest.describe(
        (file for file in paths if file.relative_to(folder).as_posix() not in NOT_UPLOADED), folder
    )
    files = {record.path: record for record in found}
    _refuse_unlisted(files, provenance.read_sums(folder))
    _refuse_unjudged(files, {record.sha256 for record in stages["verify"].inputs})
    return Release(
        files=files,
        tag=f"{stages['fetch'].revision[:12]}-{stages['verify'].recipe_sha256[:8]}",
        sources=tuple(made.source for made in stages.values()),
    )


def _stages(folder: Path) -> Mapping[str, Manifest]:
    """The stages' manifests in `folder`, by stage."""
    files = sorted((folder / "manifests").glob("*.json"))
    try:
        found = {file.stem: manifest.parse(file.read_text(encoding="utf-8")) for file in files}
        if not {"fetch", "verify"} <= found.keys():
            raise ValueError("a stage is missing")
    except ValueError as error:
        raise PublishError(f"{folder / 'manifests'} can't be read: {error}", remedy=_AGAIN) from error
    return found


def _refuse_without_licence(folder: Path) -> None:
    texts = (folder / name for name in ("LICENSE", "NOTICE"))
    if not all(file.is_file() and file.stat().st_size for file in texts) or not card.front_matter(folder).get(
        "license"
    ):
        raise PublishError(
            f"{folder} does not say under which licence it is",
            cause="LICENSE, NOTICE or the licence in README.md was removed",
            remedy=_AGAIN,
        )


def _refuse_unlisted(files: Mapping[str, FileRecord], sums: Mapping[str, str]) -> None:
    for path in sorted(files.keys() | sums.keys()):
        record = files.get(path)
        if path not in _BESIDE_SUMS and (record is None or record.sha256 != sums.get(path)):
            raise PublishError(
                f"{path} is not the file that {provenance.NAME} lists",
                cause="it was changed, added or removed after `make publish`",
                remedy=_AGAIN,
            )


def _refuse_unjudged(files: Mapping[str, FileRecord], judged: set[str]) -> None:
    models = [record for path, record in files.items() if path.endswith(MODELS)]
    for record in models:
        if record.sha256 not in judged:
            raise PublishError(
                f"{record.path} is not a file that was verified",
                cause="it was changed after `make verify`",
                remedy="run `make verify publish` again",
            )
    if not models:
        raise PublishError("there is no model file to publish", cause="they were removed", remedy=_AGAIN)


def refuse_dirty(sources: Iterable[Source]) -> None:
    """Only what a known commit of this project made is published.

    Raises:
        PublishError: a file of the project differed from its commit, or the commit is not known.
    """
    for source in sources:
        if source.dirty or not source.commit:
            raise PublishError(
                "the project's files differ from its commit" if source.commit else "the project's commit is not known",
                cause="something is changed and not committed, now or when a stage ran"
                if source.commit
                else "this is no git repository",
                remedy="commit or discard the changes (`git status`), then `make clean` and `make publish`",
            )


def refuse_other_recipe(verify: Manifest, recipe_sha256: str) -> None:
    """Limits count only if they are those of the recipe in use.

    Raises:
        PublishError: verify judged by another recipe.
    """
    if verify.recipe_sha256 != recipe_sha256:
        raise PublishError(
            "the files were verified under another recipe, maybe with other limits",
            cause="the recipe was edited, or another one chosen, after `make verify`",
            remedy="run `make verify` with this recipe",
        )


def refuse_other_bytes(upstream: Mapping[str, Manifest], files: Iterable[str]) -> None:
    """Each of `files` was verified, and whatever verify read is still what its stage's manifest lists.

    Raises:
        PublishError: names the first file that was not verified or has changed since.
    """
    judged = {record.path: record for record in upstream["verify"].inputs}
    current = {record.path: record for made in upstream.values() for record in made.outputs}
    for path in (*files, *judged):
        if path not in judged:
            raise PublishError(
                f"{path} was not verified", cause="verify ran without it", remedy="run `make verify` again"
            )
        if current.get(path) != judged[path]:
            raise PublishError(
                f"{path} is not the file that was verified",
                cause="its stage ran again after `make verify`",
                remedy="run `make verify` again",
            )


def checks(judgement: Judgement, names: Mapping[str, str]) -> list[Check]:
    """The judged figures of the published files; `names` maps variants to file names.

    Raises:
        PublishError: nothing was judged of one of the files.
    """
    stated = [
        Check(
            file=names[check["variant"]],
            what=check["name"],
            against=check["against"],
            value=_figure(check["value"]),
            limit=_limit(check),
            detail=check["detail"],
        )
        for check in judgement["checks"]
        if check["variant"] in names
    ]
    for variant, name in names.items():
        if not any(check.file == name for check in stated):
            raise PublishError(
                f"nothing was checked of {variant}",
                cause="verify did not count it among the files that have to pass",
                remedy="run `make verify` again",
            )
    return stated


def _figure(value: float | None) -> str:
    return "not known" if value is None else f"{value:.4g}"


def _limit(check: judged.Check) -> str:
    sense = {"<=": "≤", ">=": "≥"}[check["direction"]]
    return "missing" if check["limit"] is None else f"{sense} {check['limit']:.4g}"


def _sentence(check: judged.Check) -> str:
    return f"{check['variant']}: {check['name']} is {_figure(check['value'])}, the limit is {_limit(check)}"
