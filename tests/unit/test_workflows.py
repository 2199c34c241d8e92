"""What the workflows' steps run, with the environment that they give: scripts, held to what other jobs then read."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.core.recipe import PROJECT
from tools.rehearse import Rehearsal

WORKFLOWS = sorted((PROJECT / ".github" / "workflows").glob("*.yml"))
LONGEST = 3
"""Lines of a `run:` block; what is longer is a script, which something here runs."""


def jobs(name: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((PROJECT / ".github" / "workflows" / f"{name}.yml").read_text())["jobs"]
    return found


def run_step(
    folder: Path, name: str, job: str, script: str, values: dict[str, str], **own: str
) -> tuple[subprocess.CompletedProcess[str], dict[str, str]]:
    """Run the step of a workflow whose command begins with `script` in `folder`: how it ended, and its outputs.

    It sees what the job and the step name in their environment, with `values`, and GitHub's own variables among these;
    `own` is where the test puts what is elsewhere in a checkout.
    """
    (step,) = [step for step in jobs(name)[job]["steps"] if step.get("run", "").startswith(script)]
    given = {*jobs(name)[job].get("env", {}), *step.get("env", {})}
    assert given == {key for key in values if not key.startswith(("GITHUB_", "RUNNER_"))}
    outputs = folder / "outputs"
    outputs.touch()
    path = f"{folder}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {"PATH": path, "HOME": str(folder), "GITHUB_OUTPUT": str(outputs), **values, **own}
    command = ["bash", "-e", "-c", step["run"].replace(script, str(PROJECT / script), 1)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    return done, dict(line.split("=", 1) for line in outputs.read_text().splitlines())


ASKED = {"RELEASE": "", "MODEL": "", "REVISION": "", "RECIPE": "", "GRAPHS": "", "REPOSITORY": "", "TAG": ""}
MAIN = "refs/heads/main"


def test_a_release_is_planned_with_all_that_the_next_jobs_read(tmp_path: Path) -> None:
    (release,) = (PROJECT / "releases").glob("*.toml")
    asked = {**ASKED, "RELEASE": release.stem, "UPLOAD": "false", "GITHUB_REF": "refs/heads/other"}
    done, outputs = run_step(tmp_path, "release", "plan", "tools/release_plan.sh", asked)
    assert done.returncode == 0, done.stderr
    read = re.findall(r"steps\.settings\.outputs\.(\w+)", json.dumps(jobs("release")["plan"]["outputs"]))
    assert set(read) == set(outputs) and outputs["MODEL_ID"].endswith("/v2-gemma-3n-4b-tmz-ft-vllm-merged")


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"GITHUB_REF": "refs/heads/other"}, "the Hub trusts branch main alone, this is refs/heads/other"),
        ({"GITHUB_REF": MAIN}, "is to be released at 'main', which moves"),
        ({"GITHUB_REF": MAIN, "RELEASE": "", "MODEL": "me/$(touch PWNED)", "REVISION": "c" * 40}, "error: "),
    ],
)
def test_an_upload_that_may_not_be_ends_before_it_begins(tmp_path: Path, asked: dict[str, str], said: str) -> None:
    (release,) = (PROJECT / "releases").glob("*.toml")
    given = {**ASKED, "RELEASE": release.stem, "UPLOAD": "true", **asked}
    done, outputs = run_step(tmp_path, "release", "plan", "tools/release_plan.sh", given)
    assert done.returncode != 0 and said in done.stdout + done.stderr, done.stdout + done.stderr
    assert outputs == {} and not list(tmp_path.glob("PWNED"))


def test_what_is_handed_on_is_the_folder_and_its_papers(tmp_path: Path) -> None:
    root = tmp_path / "artifacts" / "me--model"
    for name in (".inputs/fp32", "publish/README.md", "verify/report.json", "verify/manifest.json", "verify/run.json"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)
    (root / "fp32").mkdir()
    for name in ("manifest.json", "run.json", "step.tflite"):
        (root / "fp32" / name).write_text(name)
    given = {"MODEL_ID": "me/model", "REVISION": "", "RECIPE": "", "GRAPHS": "", "RUNG": ""}
    done, outputs = run_step(tmp_path, "release", "build", "tools/release_pack.sh", given)
    assert done.returncode == 0, done.stderr
    tar = tmp_path / "handover.tar"
    assert outputs == {"sha256": hashlib.sha256(tar.read_bytes()).hexdigest()}
    with tarfile.open(tar) as packed:
        names = {member.name for member in packed if member.isfile()}
    expected = {str(file.relative_to(tmp_path / "artifacts")) for file in root.rglob("*") if file.is_file()}
    assert names == expected - {"me--model/fp32/step.tflite"}


@pytest.mark.parametrize("commits", [("main",), ("main", "c" * 40)])
def test_what_names_a_commit_is_rebuilt(tmp_path: Path, commits: tuple[str, ...]) -> None:
    (release,) = (PROJECT / "releases").glob("*.toml")
    for place, commit in enumerate(commits):
        text = re.sub('revision = "main".*', f'revision = "{commit}"', release.read_text(encoding="utf-8"))
        (tmp_path / f"{place}.toml").write_text(text, encoding="utf-8")
    done, outputs = run_step(tmp_path, "reproduce", "find", "tools/releases_named.sh", {}, RELEASES=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert json.loads(outputs["releases"]) == [f"{tmp_path}/1.toml"] * (len(commits) - 1)
    assert ("::notice::" in done.stdout) is (len(commits) == 1)


def git(folder: Path, *words: str) -> str:
    identity = ("-c", "user.name=a", "-c", "user.email=a@b")
    return subprocess.run(
        ["git", *identity, *words], cwd=folder, capture_output=True, text=True, check=True
    ).stdout.strip()


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A clone of a small project, with a `gh` that notes what it is asked, and knows no pull request."""
    folder = tmp_path / "clone"
    git(tmp_path, "init", "--quiet", "--bare", "origin.git")
    git(tmp_path, "clone", "--quiet", "origin.git", "clone")
    (folder / "locks").mkdir()
    for name in ("Dockerfile", "locks/cpu.txt", "Makefile"):
        (folder / name).write_text("old\n")
    git(folder, "add", ".")
    git(folder, "commit", "--quiet", "--message", "first")
    (folder / "gh").write_text(f'#!/bin/sh\necho "$@" >>{tmp_path}/asked\n[ "$1" != pr ] || [ "$2" != view ]\n')
    (folder / "gh").chmod(0o755)
    return folder


def proposed(clone: Path, patch: str) -> subprocess.CompletedProcess[str]:
    (clone.parent / "update.patch").write_text(patch)
    given = {"BRANCH": "update", "GH_TOKEN": "t", "RUNNER_TEMP": str(clone.parent)}
    return run_step(clone, "update", "propose", "tools/update_propose.sh", given)[0]


def test_an_update_is_proposed_in_locks_and_dockerfile_alone(clone: Path) -> None:
    for name in ("Dockerfile", "locks/cpu.txt", "Makefile"):
        (clone / name).write_text("new\n")
    patch = git(clone, "diff") + "\n"
    git(clone, "checkout", "--quiet", ".")
    done = proposed(clone, patch)
    assert done.returncode == 0, done.stderr
    changed = git(clone.parent / "origin.git", "show", "--name-only", "--format=%an", "update").split()
    assert changed == ["github-actions[bot]", "Dockerfile", "locks/cpu.txt"]
    asked = (clone.parent / "asked").read_text().splitlines()
    assert asked[0] == "auth setup-git" and asked[-1] == "pr create --fill --head update"


def test_no_update_is_no_proposal(clone: Path) -> None:
    done = proposed(clone, "")
    assert done.returncode == 0 and "nothing to update" in done.stdout
    assert not (clone.parent / "asked").exists()


@pytest.mark.parametrize("file", WORKFLOWS, ids=lambda file: file.name)
def test_what_is_longer_than_some_lines_is_a_script(file: Path) -> None:
    runs = [step.get("run", "") for job in jobs(file.stem).values() for step in job["steps"]]
    assert [run for run in runs if len(run.splitlines()) > LONGEST] == []


REHEARSED = """
env: {EVERYWHERE: here}
jobs:
  last:
    needs: [first, each]
    if: inputs.upload
    steps:
      - uses: actions/download-artifact@0
        with: {name: made}
      - run: test "$(cat made)" = "one-${{ needs.first.outputs.said }}" && test "$EVERYWHERE" = here && touch "$LEFT"
        env: {LEFT: "${{ inputs.left }}"}
  never:
    if: inputs.nothing
    steps:
      - run: exit 1
  first:
    outputs: {said: "${{ steps.say.outputs.word }}"}
    steps:
      - id: say
        run: echo "word=$WORD" >>"$GITHUB_OUTPUT"
        env: {WORD: "${{ inputs.none || inputs.word }}"}
  each:
    needs: first
    strategy: {matrix: {name: [one, two]}}
    env: {NAME: "${{ matrix.name }}"}
    steps:
      - uses: actions/setup-python@0
      - run: test "$NAME" = one || exit 0; echo "$NAME-${{ needs.first.outputs.said }}" >made
      - uses: actions/upload-artifact@0
        with: {name: made, path: mad*}
"""


def rehearsal(home: Path, text: str) -> Rehearsal:
    inputs = {"upload": True, "word": "two", "left": str(home / "left")}
    return Rehearsal(yaml.safe_load(text), {"inputs": inputs, "github": {"ref": MAIN}}, dict(os.environ), home)


def test_a_rehearsal_hands_on_what_jobs_hand_on(tmp_path: Path) -> None:
    rehearsal(tmp_path, REHEARSED.replace("[one, two]", "[one]")).run([])
    assert (tmp_path / "left").exists()
    assert sorted(file.suffix for file in tmp_path.iterdir() if file.name not in ("left", "artifacts")) == [".temp"] * 3


def test_a_rehearsal_ends_where_a_step_fails_or_nothing_is_handed_on(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="there is no mad"):
        rehearsal(tmp_path, REHEARSED.replace("[one, two]", "[two]")).run([])
    with pytest.raises(SystemExit, match="ended with exit code 1"):
        rehearsal(tmp_path, REHEARSED.replace("inputs.nothing", "inputs.upload")).run(["never"])
    with pytest.raises(SystemExit, match="nothing stands in for the action docker/build"):
        rehearsal(tmp_path, "jobs: {a: {steps: [{uses: docker/build@1}]}}").run([])


def test_every_action_of_the_workflows_that_are_rehearsed_has_something_in_its_place() -> None:
    used = {
        step["uses"]
        for name in ("ci", "release")
        for job in jobs(name).values()
        for step in job["steps"]
        if "uses" in step
    }
    known = ("checkout", "setup-python", "upload-artifact", "download-artifact", "attest")
    assert {name.partition("@")[0] for name in used} <= {f"actions/{name}" for name in known}
