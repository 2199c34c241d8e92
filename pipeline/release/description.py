"""Release descriptions: which model goes where, made how, in a few lines of TOML that are reviewed.

A description names a commit of the source model. Until that is known it says `revision = "main"`: enough to plan and
for a dry run, refused for an upload.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pipeline.core import toml
from pipeline.core.errors import UsageError
from pipeline.core.recipe import PROJECT, Graphs

KIND = toml.Kind(
    name="release description", setting="RELEASE", example="releases/v2-gemma-3n-4b-tmz-ft-vllm-merged.toml"
)
OPEN = "main"
"""The revision of a release whose commit is not known yet."""
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_NAME = re.compile(r"[A-Za-z0-9][\w.-]*", re.ASCII)


@dataclass(frozen=True, kw_only=True)
class Release:
    """One release: `model` at `revision`, by `recipe` (a name in pipeline/recipes/), to the repository `target`.

    `tag` is what the published commit is called there; `graphs` as in the recipe, for another choice than the recipe's.
    `rung` is that of int8's ladder in the manifest of the build that was reviewed: its bytes are then made everywhere.
    """

    model: str
    revision: str
    recipe: str
    target: str
    tag: str
    graphs: Graphs | None = None
    rung: str = ""

    @property
    def is_pinned(self) -> bool:
        """Whether the revision is a commit: the same bytes tomorrow."""
        return bool(_COMMIT.fullmatch(self.revision))

    def settings(self) -> dict[str, str]:
        """The settings of `make` that say the same."""
        return {
            "MODEL_ID": self.model,
            "REVISION": self.revision,
            "RECIPE": f"pipeline/recipes/{self.recipe}.toml",
            "GRAPHS": self.graphs or "",
            "RUNG": self.rung,
            "HF_REPO": self.target,
            "TAG": self.tag,
        }


def describe(file: Path | None, given: Mapping[str, str]) -> Release:
    """The release that `file` describes, or that `given` alone does.

    Args:
        file: a description, or none.
        given: values by key; they fill what the description leaves open, and may not contradict it.

    Raises:
        UsageError: the description can't be read, is wrong, or says something else than `given`.
    """
    table = toml.parse(toml.read(file, KIND), file, KIND) if file else {}
    where = f"{KIND.name} {file}" if file else KIND.name
    try:
        for key, value in given.items():
            if table.get(key, OPEN) not in (OPEN, value):
                raise ValueError(f"`{key}` is {table[key]!r} there and can't be {value!r}")
        release = toml.build(Release, {**table, **given}, "release")
        assert isinstance(release, Release)
        _check(release)
    except ValueError as error:
        raise UsageError(f"{where}: {error}", remedy=f"compare it with {KIND.example}") from error
    return release


def refuse_open(release: Release) -> None:
    """Demand a commit.

    Raises:
        UsageError: the revision is not one.
    """
    if not release.is_pinned:
        raise UsageError(
            f"{release.model} is to be released at {release.revision!r}, which moves",
            cause="the description was written before the commit was known",
            remedy="write the commit that fetch prints into `revision`, and have that line reviewed",
        )


def _check(release: Release) -> None:
    """Refuse values that no Hub, recipe or tag can have."""
    for field, pattern in (("model", _REPOSITORY), ("target", _REPOSITORY), ("recipe", _NAME), ("tag", _NAME)):
        value = dataclasses.asdict(release)[field]
        if not pattern.fullmatch(value):
            raise ValueError(f"`release.{field}` is {value!r}")
    if not release.is_pinned and release.revision != OPEN:
        raise ValueError(f"`release.revision` is {release.revision!r}, expected a commit of 40 digits or {OPEN!r}")
    if release.tag in (OPEN, "latest") or _COMMIT.fullmatch(release.tag):
        raise ValueError(f"`release.tag` is {release.tag!r}, expected a name that never moves, like 'v1'")
    if release.target == release.model:
        raise ValueError("`release.target` is the source model itself")
    if not (PROJECT / release.settings()["RECIPE"]).is_file():
        raise ValueError(f"`release.recipe` is {release.recipe!r}, which is not in pipeline/recipes/")
