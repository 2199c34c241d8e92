"""What a build of the shipped model takes, before and now: processor time of each stage, in turns on one machine.

    python -m tools.turns COMMIT [--targets graph verify] [--wide]

`--wide`: what judging a model of E4B's widths takes, of ten layers with random weights: golden and verify of its int8
bundle, by the shipped recipe cut as in bench_large; 25 minutes and 25 GB of disk.

A target of Make's after the other and in turns, so that what else the machine does falls on both. Processor time is
that of all processes that a target starts. A source whose lock is this project's is built in its environment; one with
another lock gets an environment of its own first, which no figure counts: a stage refuses packages that its lock does
not name.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path

from pipeline.core import log, parallel
from pipeline.core.host import processor
from pipeline.core.recipe import PROJECT
from tools import make_random_checkpoint, tables
from tools.bench_large import CHANGES
from tools.make_random_checkpoint import GEOMETRIES
from tools.tables import Column, Measured, Row, Table, Value

TARGETS = ("fetch", "golden", "graph", "fp32", "fp16", "int8", "int8-static", "bundle", "verify", "publish")
BEFORE = "a482e11"
"""The source of which `make` took 16 minutes."""
WIDE, UNJUDGED = "e4b-10", (("fetch",), ("graph",), ("int8",), ("bundle",))
JUDGED = (("golden", "--weights", "streamed"), ("verify",))
"""The model of E4B's widths, its stages without figures, and those with."""
_COLUMNS = ("before", "now")
TABLE = ("Processor time of a build of the shipped model", 10, "`python -m tools.turns`")
WIDE_TABLE = ("Processor time of judging a model of E4B's widths", 12, "`python -m tools.turns --wide`")
"""Title, place on the page, command."""


def clone(commit: str, folder: Path) -> Path:
    """The project as it was at `commit`, in `folder`.

    Raises:
        subprocess.CalledProcessError: the repository has no such commit.
    """
    subprocess.run(["git", "clone", "--quiet", "--no-checkout", PROJECT, folder], check=True)
    subprocess.run(["git", "checkout", "--quiet", commit], cwd=folder, check=True)
    give_environment(folder, PROJECT / ".venv")
    return folder


def give_environment(source: Path, ours: Path) -> None:
    """Let `source` have the environment `ours` if that was made from its lock, else one that its own set-up makes.

    Args:
        source: a clone of the project, without `.venv`.
        ours: an environment as `tools/setup.sh` leaves it: `.ready` has `lock NAME`, then the files' SHA-256.

    Raises:
        subprocess.CalledProcessError: its packages can't be installed; its set-up has said why.
    """
    first, *files = (ours / ".ready").read_text(encoding="utf-8").splitlines()
    lock = first.removeprefix("lock ")
    held = (source / "locks" / f"{lock}.txt").read_bytes()
    if f"{sha256(held).hexdigest()}  locks/{lock}.txt" in files:
        (source / ".venv").symlink_to(ours)
        return
    log.step(f"an environment from the locks of {source.name}")
    subprocess.run([source / "tools" / "setup.sh", source / ".venv", lock], check=True)


def make(source: Path, target: str, artifacts: Path) -> float:
    """Processor seconds of `make target` in `source`, with the environment as it is.

    Raises:
        subprocess.CalledProcessError: it failed; it has said why.
    """
    return _run(source, ["make", "--old-file=.venv/.ready", target, f"ARTIFACTS={artifacts}"])


def _run(source: Path, command: Sequence[str | Path]) -> float:
    before = _children()
    environment = os.environ | {"PYTHONPATH": ""}  # the source's own modules, and no others
    subprocess.run(command, cwd=source, env=environment, check=True)
    return _children() - before


def _children() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def measure(commit: str, targets: Sequence[str]) -> dict[str, tuple[float, float]]:
    """Processor seconds of each target at `commit` and now."""
    found: dict[str, tuple[float, float]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        sources = clone(commit, folder / "before"), clone("HEAD", folder / "now")
        for target in targets:
            log.step(f"{target}, before and now")
            before, now = (make(source, target, source / "artifacts") for source in sources)
            found[target] = before, now
    return found


def measure_wide(commit: str) -> dict[str, tuple[float, float]]:
    """Processor seconds of golden and verify of a model of E4B's widths at `commit` and now."""
    found: dict[str, tuple[float, float]] = {}
    (PROJECT / "artifacts").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=PROJECT / "artifacts") as scratch:  # too much for many a /tmp
        folder = Path(scratch)
        sources = clone(commit, folder / "before"), clone("HEAD", folder / "now")
        checkpoint = make_random_checkpoint.make(GEOMETRIES[WIDE], folder / WIDE)
        for stage, *options in (*UNJUDGED, *JUDGED):
            before, now = (_stage(source, checkpoint, stage, options) for source in sources)
            found[stage] = before, now
    return {stage: found[stage] for stage, *_ in JUDGED}


def _stage(source: Path, checkpoint: Path, name: str, options: Sequence[str]) -> float:
    recipe = source / "cut.toml"
    text = (source / "pipeline" / "recipes" / "gemma3n.toml").read_text(encoding="utf-8")
    for line, other in CHANGES.items():
        text = text.replace(line, other)
    recipe.write_text(text, encoding="utf-8")
    where: list[str | Path] = ["--model-id", checkpoint, "--artifacts", source / "artifacts"]
    where += ["--recipe", recipe, "--graphs", "bundle"]
    return _run(source, [source / ".venv" / "bin" / "python", "-m", f"pipeline.{name}", *where, *options])


def table(commit: str, found: Mapping[str, tuple[float, float]], title: str, place: int, command: str) -> Table:
    """The figures as a table of the page: each target, and all together."""
    columns = {name: Column(unit="s", digits=".1f") for name in _COLUMNS} | {"now / before": Column(digits=".2f")}
    sums = tuple(sum(pair[place] for pair in found.values()) for place in (0, 1))
    rows = {**found, "together": sums}
    return Table(
        title=title,
        about=f"At commit {commit} and now, a target after the other and in turns; processes of their own included.",
        place=place,
        columns=columns,
        measured=Measured(
            date=time.strftime("%Y-%m-%d"),
            command=command,
            machine=f"{parallel.threads()} threads ({processor()})",
        ),
        rows=tuple(
            Row(
                name=name,
                values={
                    "before": Value(value=before),
                    "now": Value(value=now),
                    "now / before": Value(value=now / before),
                },
            )
            for name, (before, now) in rows.items()
        ),
    )


def report(commit: str, targets: Sequence[str], *, wide: bool = False) -> None:
    """Measure and say it; of all targets, and of the wide model, the table goes to `bench/`."""
    found = measure_wide(commit) if wide else measure(commit, targets)
    made = table(commit, found, *(WIDE_TABLE if wide else TABLE))
    for row in made.rows:
        log.line(
            f"{row.name:12} " + "  ".join(made.columns[key].text(value.value) for key, value in row.values.items())
        )
    if wide or tuple(targets) == TARGETS:
        tables.write_all({"turns_wide" if wide else "turns": made})


def main() -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commit", nargs="?", default=BEFORE, help="what to hold this source against (%(default)s)")
    parser.add_argument("--targets", nargs="+", default=list(TARGETS), help="default: all, in order")
    parser.add_argument("--wide", action="store_true", help="golden and verify of a model of E4B's widths instead")
    arguments = parser.parse_args()
    report(arguments.commit, arguments.targets, wide=arguments.wide)
    return 0


if __name__ == "__main__":
    sys.exit(main())
