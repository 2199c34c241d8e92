"""Whether files may be published: verified, passed, under the recipe in use, and still the very same bytes."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pipeline.core import manifest
from pipeline.core.errors import IntegrityError, PublishError
from pipeline.core.manifest import Manifest
from pipeline.release.card import Check

JUDGEMENT = "judgement.json"
REPORTS = ("report.json", "report.html")


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


def judgement(folder: Path) -> Mapping[str, Any]:
    """The judgement in verify's `folder`, with the reports beside it.

    Raises:
        PublishError: a file is missing or can't be read, or a check did not pass.
    """
    for name in (JUDGEMENT, *REPORTS):
        if not (folder / name).is_file():
            raise PublishError(
                f"{folder / name} is missing",
                cause="it was removed after verify made it",
                remedy="run `make verify` again",
            )
    try:
        found: Mapping[str, Any] = json.loads((folder / JUDGEMENT).read_text(encoding="utf-8"))
        failed = [_sentence(check) for check in found["checks"] if check["passed"] is not True]
        passed = found["passed"] is True and bool(found["checks"])
    except (ValueError, KeyError, TypeError) as error:
        raise PublishError(
            f"{folder / JUDGEMENT} can't be read: {error!r}",
            cause="verify was killed, or is of another version",
            remedy="run `make verify` again",
        ) from error
    if failed or not passed:
        raise PublishError(
            f"verification failed: {'; '.join(failed) or 'not every check was made'}",
            cause="a file is not as good as the recipe demands",
            remedy=f"look at {folder / 'report.html'}, mend the cause, and run `make verify` again",
        )
    return found


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


def checks(judgement: Mapping[str, Any], names: Mapping[str, str]) -> list[Check]:
    """The judged figures of the published files; `names` maps variants to file names.

    Raises:
        PublishError: nothing was judged of one of the files.
    """
    found = [
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
        if not any(check.file == name for check in found):
            raise PublishError(
                f"nothing was checked of {variant}",
                cause="verify did not count it among the files that have to pass",
                remedy="run `make verify` again",
            )
    return found


def _figure(value: float | None) -> str:
    return "not known" if value is None else f"{value:.4g}"


def _limit(check: Mapping[str, Any]) -> str:
    sense = {"<=": "≤", ">=": "≥"}[check["direction"]]
    return "missing" if check["limit"] is None else f"{sense} {check['limit']:.4g}"


def _sentence(check: Mapping[str, Any]) -> str:
    return f"{check['variant']}: {check['name']} is {_figure(check['value'])}, the limit is {_limit(check)}"
