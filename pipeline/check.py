"""check: hold a published folder against its own papers, as a stranger would, offline or from the Hub.

    make check FILES=folder
    make check FILES=owner/name@revision

Every file has the sum in SHA256SUMS and nothing else lies beside them; every model file is the one that `report.json`
judged, that `provenance.json` speaks of and that the manifests list; the report's own figures keep its limits.
"""

from __future__ import annotations

import argparse
import json
import operator
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from pipeline.core import log
from pipeline.core.errors import IntegrityError, UsageError
from pipeline.core.stage import guard
from pipeline.release import clearance, provenance
from pipeline.release.obtain import obtain

MODELS = (".tflite", ".litertlm")
_UNSIGNED = {provenance.NAME, *clearance.NOT_UPLOADED}
_HOLDS = {"<=": operator.le, ">=": operator.ge}


def check(folder: Path) -> dict[str, int]:
    """What was checked: numbers of files, of model files and of figures.

    Raises:
        IntegrityError: the first thing that is not as the papers say.
        UsageError: there is no such folder.
    """
    if not folder.is_dir():
        raise UsageError(f"{folder} is not a folder", remedy="set FILES= to a published folder")
    files = provenance.check_sums(folder)
    sums = provenance.read_sums(folder)
    found = {file.relative_to(folder).as_posix() for file in folder.rglob("*") if not file.is_dir()}
    if stray := sorted(found - sums.keys() - _UNSIGNED):
        _refuse(f"{stray[0]} is not listed in {provenance.NAME}")
    models = {name: digest for name, digest in sums.items() if name.endswith(MODELS)}
    report = _read(folder / "report.json")
    figures = _check_figures(report)
    _check_judged(models, report)
    if provenance.subjects(folder) != models:
        _refuse(f"{provenance.STATEMENT} speaks of other files than these")
    _check_manifests(folder / "manifests", models)
    return {"files": files, "model files": len(models), "figures": figures}


def _check_figures(report: Mapping[str, Any]) -> int:
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


def _check_judged(models: Mapping[str, str], report: Mapping[str, Any]) -> None:
    judged = {entry["sha256"] for part in ("variants", "bundles") for entry in report[part].values()}
    for name, digest in models.items():
        if digest not in judged:
            _refuse(f"{name} is not a file that report.json judged")


def _check_manifests(folder: Path, models: Mapping[str, str]) -> None:
    """The stage that made a model file lists it, verify read it, and all stages followed one recipe."""
    stages = {file.stem: _read(file) for file in sorted(folder.glob("*.json"))}
    if "verify" not in stages:
        _refuse("manifests/verify.json is missing")
    if len({made["recipe_sha256"] for made in stages.values()}) > 1:
        _refuse("the manifests are of different recipes")
    read = {record["sha256"] for record in stages["verify"]["inputs"]}
    made = {record["sha256"] for stage in stages.values() for record in stage["outputs"]}
    for name, digest in models.items():
        if digest not in read & made:
            _refuse(f"{name} is not listed in manifests/")


def _read(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise IntegrityError(f"{file} can't be read: {error}", remedy="get the folder anew") from error


def _refuse(fault: str) -> NoReturn:
    raise IntegrityError(
        fault, cause="the folder was changed after it was published, or put together by hand", remedy="do not use it"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run from the command line and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m pipeline.check", description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("files", help="a published folder, or owner/name@revision on the Hub")
    parser.add_argument("--downloads", type=Path, default=Path("artifacts/.check"), help="where the latter goes")
    arguments = parser.parse_args(argv)

    def work() -> None:
        folder = obtain(arguments.files, arguments.downloads)
        counted = check(folder)
        log.line(f"{folder}: as its papers say: {', '.join(f'{count} {what}' for what, count in counted.items())}")

    return guard(work)


if __name__ == "__main__":
    sys.exit(main())
