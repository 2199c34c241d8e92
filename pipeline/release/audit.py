"""An audit: a published folder is held against its own papers, file by file and figure by figure."""

from __future__ import annotations

import hashlib
import json
import operator
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NoReturn, TypeVar

from pipeline.core.errors import IntegrityError, UsageError
from pipeline.core.judgement import Judgement
from pipeline.core.manifest import dump_json, parse
from pipeline.release import provenance, signing
from pipeline.release.preflight import JUDGEMENT, MODELS, REPORTS
from pipeline.release.signing import Trust

Parsed = TypeVar("Parsed")

_HOLDS = {"<=": operator.le, ">=": operator.ge}
_MEASURED = ("date", "machine", "sequences", "speed")
"""What verify adds to its judgement to make the report."""


def check(folder: Path, trust: Trust | None = None, signer: str = sys.executable) -> dict[str, int]:
    """What was checked: numbers of files, of model files, of tensors and of figures.

    Raises:
        IntegrityError: the first thing that is not as the papers say.
        UsageError: there is no such folder, or it is not clear whose signature is to be accepted.
    """
    if not folder.is_dir():
        raise UsageError(f"{folder} is not a folder", remedy="set FILES= to a published folder")
    files = provenance.check_sums(folder)
    sums = provenance.read_sums(folder)
    found = {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_symlink() or file.is_file()}
    if stray := sorted(found - sums.keys() - {provenance.NAME, *signing.RUNNERS}):
        _refuse(f"{stray[0]} is not listed in {provenance.NAME}")
    try:
        counted = _check_papers(folder, sums)
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
        _refuse(f"the papers are not of the form that they have: {error!r}")
    if trust:
        signing.verify(folder, trust, signer)
    return {"files": files, **counted}


def _check_papers(folder: Path, sums: Mapping[str, str]) -> dict[str, int]:
    models = {name: digest for name, digest in sums.items() if name.endswith(MODELS)}
    report: Judgement = _read(folder / "report.json", json.loads)
    figures = _check_figures(report)
    _check_judged(models, report)
    _check_provenance(folder, models, sums)
    _check_manifests(folder / "manifests", models, report)
    tensors = provenance.check_tensors(folder, models)
    return {"model files": len(models), "tensors": tensors, "figures": figures}


def _check_figures(report: Judgement) -> int:
    """Every required figure keeps its limit, whatever the report says of that."""
    checks = report.get("checks")
    if not checks or report.get("passed") is not True:
        _refuse("report.json does not say that the files passed")
    for row in checks:
        value, limit = row["value"], row["limit"]
        kept = value is not None and limit is not None and _HOLDS[row["direction"]](value, limit)
        if not kept or row["passed"] is not True:
            _refuse(f"report.json: {row['variant']}: {row['name']} is {value}, the limit is {row['direction']} {limit}")
    return len(checks)


def _check_judged(models: Mapping[str, str], report: Judgement) -> None:
    judged = {entry["sha256"] for part in (report["variants"], report["bundles"]) for entry in part.values()}
    for name, digest in models.items():
        if digest not in judged:
            _refuse(f"{name} is not a file that report.json judged")


def _check_provenance(folder: Path, models: Mapping[str, str], sums: Mapping[str, str]) -> None:
    """The statement speaks of these very files, and of nothing else."""
    told, papers = provenance.subjects(folder)
    if told != models:
        _refuse(f"{provenance.STATEMENT} speaks of other model files than these")
    beside = sums.keys() - models.keys() - {provenance.STATEMENT, signing.NAME, *REPORTS}
    for name in sorted(beside | papers.keys()):
        if papers.get(name) != sums.get(name):
            _refuse(f"{name} is not the one that {provenance.STATEMENT} lists")


def _check_manifests(folder: Path, models: Mapping[str, str], report: Judgement) -> None:
    """The stage that made a model file lists it, verify read it and judged so, and all stages followed one recipe."""
    stages = {file.stem: _read(file, parse) for file in sorted(folder.glob("*.json"))}
    if "verify" not in stages:
        _refuse("manifests/verify.json is missing")
    if len({stage.recipe_sha256 for stage in stages.values()}) > 1:
        _refuse("the manifests are of different recipes")
    read = {record.sha256 for record in stages["verify"].inputs}
    sums = {record.path: record.sha256 for stage in stages.values() for record in stage.outputs}
    for name, digest in models.items():
        if digest not in read & set(sums.values()):
            _refuse(f"{name} is not listed in manifests/")
    judgement = dump_json({key: value for key, value in report.items() if key not in _MEASURED})
    if hashlib.sha256(judgement.encode()).hexdigest() != sums.get(f"verify/{JUDGEMENT}"):
        _refuse("report.json does not say what verify found")


def _read(file: Path, parse: Callable[[str], Parsed]) -> Parsed:
    try:
        return parse(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise IntegrityError(f"{file} can't be read: {error}", remedy="get the folder anew") from error


def _refuse(fault: str) -> NoReturn:
    raise IntegrityError(
        fault, cause="the folder was changed after it was published, or put together by hand", remedy="do not use it"
    )
