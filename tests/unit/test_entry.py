"""The image's entry point, run here: whom it becomes, what it refuses, where signals go. `nox -s image` runs it too."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.core.recipe import PROJECT

ENTRY = PROJECT / "tools" / "entry.sh"
# No engine starts it below another make, whose settings a make of its own would obey: as in `make test`.
OUTSIDE = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}


def enter(artifacts: Path, *words: str, **settings: str) -> subprocess.CompletedProcess[str]:
    """Run the entry point without a terminal."""
    environment = {**OUTSIDE, "ARTIFACTS": str(artifacts), **settings}
    return subprocess.run([ENTRY, *words], env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True)


def makefile(folder: Path, recipe: str) -> tuple[str, ...]:
    """Words by which make, the real one, runs `recipe`."""
    (folder / "Makefile").write_text(f"SHELL := /bin/bash\nall:\n\t@{recipe}\n")
    return ("-f", str(folder / "Makefile"), "all")


def test_help_needs_no_folder(tmp_path: Path) -> None:
    for words in (("help",), ("/app/tools/entry.sh", "help")):
        done = enter(tmp_path / "absent", *words)
        assert done.returncode == 0 and "MODEL_ID" in done.stdout, done.stderr


@pytest.mark.parametrize("words", [("int8",), (), ("help", "int8"), ("-n",)])
def test_without_a_folder_it_says_how_to_mount_one(tmp_path: Path, words: tuple[str, ...]) -> None:
    absent = tmp_path / "absent"
    for done in (enter(absent, *words), enter(tmp_path, *words, f"ARTIFACTS={absent}")):
        assert done.returncode == 2 and done.stdout == ""
        assert f"there is no folder {absent} to write to" in done.stderr
        assert f'-v "$PWD/artifacts:{absent}"' in done.stderr


def test_a_folder_that_is_closed_is_refused(tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o555)
    done = enter(closed, "int8")
    assert done.returncode == 2 and f"{closed} can't be written to" in done.stderr, done.stderr
    assert list(closed.iterdir()) == []


def test_root_goes_on_without_a_capability(tmp_path: Path) -> None:
    done = enter(tmp_path, *makefile(tmp_path, "grep -E 'Cap(Eff|Bnd)|NoNewPrivs' /proc/self/status"))
    found = dict(line.split() for line in done.stdout.splitlines())
    assert found["CapEff:"] == "0" * 16
    if os.geteuid() == 0:
        assert found["CapBnd:"] == "0" * 16 and found["NoNewPrivs:"] == "1"


def test_words_arrive_as_they_were_given_and_codes_come_back(tmp_path: Path) -> None:
    said = "it's a `b` $$(c) *"
    done = enter(tmp_path, *makefile(tmp_path, "printf '%s' \"$$SAID\"; exit 3"), f"SAID={said}")
    assert done.stdout == said.replace("$$", "$")
    assert done.returncode == 2  # make's own, whatever its recipe's was
    named = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}  # the image has a python, a host may not
    assert enter(tmp_path, "python", "-c", "raise SystemExit(7)", **named).returncode == 7


def test_dask_is_as_patient_in_the_image_as_here(tmp_path: Path) -> None:
    told = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    asked = ("python", "-c", "import os; print(os.environ['DASK_DISTRIBUTED__COMM__TIMEOUTS__TCP'])")
    here = (PROJECT / "pipeline" / "cluster" / "dask.py").read_text(encoding="utf-8")
    assert f'"distributed.comm.timeouts.tcp", "{enter(tmp_path, *asked, **told).stdout.strip()}"' in here
    assert enter(tmp_path, *asked, **told, DASK_DISTRIBUTED__COMM__TIMEOUTS__TCP="9s").stdout == "9s\n"


def stand_in(folder: Path) -> dict[str, str]:
    """A python that says how it was called, in place of the image's."""
    (folder / "bin").mkdir()
    python = folder / "bin" / "python"
    python.write_text('#!/bin/sh\necho "$PYTHONPATH|$OMP_WAIT_POLICY|$*"\n')
    python.chmod(0o755)
    return {"PATH": f"{folder / 'bin'}:{os.environ['PATH']}"}


def test_a_worker_and_a_scheduler_are_started_from_it(tmp_path: Path) -> None:
    python, own = stand_in(tmp_path), tmp_path / ".tmp"
    done = enter(tmp_path, "worker", "tcp://host:8786", "--nworkers", "4", TMPDIR="/proc", **python)
    words = f"tcp://host:8786 --nworkers 4 --local-directory {own}"
    assert done.stdout == f"{PROJECT}|PASSIVE|-m dask worker --nthreads 1 --memory-limit 0 --no-dashboard {words}\n"
    done = enter(tmp_path / "absent", "worker", "tcp://host:8786", **python)
    assert done.returncode == 2 and "there is no folder" in done.stderr, "a worker shares the caller's"
    done = enter(tmp_path, "scheduler", "--port", "8786", **python)
    assert done.stdout.endswith("|-m dask scheduler --no-dashboard --port 8786\n")


@pytest.mark.parametrize("read_only", [False, True])
def test_without_a_tmp_it_takes_the_folder(tmp_path: Path, read_only: bool) -> None:
    settings = {"TMPDIR": "/proc"} if read_only else {}
    done = enter(tmp_path, *makefile(tmp_path, "echo $$HOME $${TMPDIR:-}"), HOME="/home", **settings)
    own = str(tmp_path / ".tmp")
    assert done.stdout.split() == ([own, own] if read_only else ["/home", *filter(None, [os.environ.get("TMPDIR")])])
    assert (tmp_path / ".tmp").is_dir() is read_only


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_it_alone_ends_what_make_runs(tmp_path: Path, sent: signal.Signals) -> None:
    """As Ctrl-C and `docker stop` send it; make would wait for its recipe, which no SIGINT reached."""
    pid = tmp_path / "pid"
    command = [ENTRY, *makefile(tmp_path, f"echo $$$$ >{pid}.part; mv {pid}.part {pid}; exec sleep 60")]
    environment = {**OUTSIDE, "ARTIFACTS": str(tmp_path)}
    process = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, start_new_session=True)
    until = time.monotonic() + 30
    while not pid.exists() and time.monotonic() < until:
        time.sleep(0.02)
    process.send_signal(sent)
    assert process.wait(timeout=20) not in (0, -sent)
    assert not Path(f"/proc/{pid.read_text().strip()}").exists()


@pytest.mark.parametrize("goal", ["test", "setup", "image"])
def test_what_needs_the_sources_is_refused_in_the_image(tmp_path: Path, goal: str) -> None:
    done = enter(tmp_path, goal, IN="image")
    assert done.returncode == 2 and f"the image can't `make {goal}`" in done.stderr
