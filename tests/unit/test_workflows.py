"""What the workflows' steps run, with the environment that they give: scripts, held to what other jobs then read."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.core.recipe import PROJECT
from pipeline.release import images
from tools.rehearse import Rehearsal

WORKFLOWS = sorted((PROJECT / ".github" / "workflows").glob("*.yml"))
LONGEST = 3
"""Lines of a `run:` block; what is longer is a script, which something here runs."""


def jobs(name: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((PROJECT / ".github" / "workflows" / f"{name}.yml").read_text())["jobs"]
    return found


def run_step(
    folder: Path, name: str, job: str, script: str, values: dict[str, str], checkout: Path | None = None, **own: str
) -> tuple[subprocess.CompletedProcess[str], dict[str, str]]:
    """Run the step of a workflow whose command begins with `script` in `folder`: how it ended, and its outputs.

    It sees what the job and the step name in their environment, with `values`, and GitHub's own variables among these;
    `own` is where the test puts what is elsewhere in a checkout. In a `checkout` of its own it runs that one's script,
    and `folder` has programs for it.
    """
    (step,) = [step for step in jobs(name)[job]["steps"] if step.get("run", "").startswith(script)]
    given = {*jobs(name)[job].get("env", {}), *step.get("env", {})}
    assert given == {key for key in values if not key.startswith(("GITHUB_", "RUNNER_"))}
    outputs = folder / "outputs"
    outputs.touch()
    path = f"{folder}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {"PATH": path, "HOME": str(folder), "GITHUB_OUTPUT": str(outputs), **values, **own}
    command = ["bash", "-e", "-c", step["run"] if checkout else step["run"].replace(script, str(PROJECT / script), 1)]
    done = subprocess.run(command, cwd=checkout or folder, env=environment, capture_output=True, text=True)
    said = dict(line.split("=", 1) for line in outputs.read_text().splitlines())
    outputs.unlink()
    return done, said


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
    return run_step(clone, "update", "propose", "tools/propose.sh", given)[0]


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
    assert done.returncode == 0 and "nothing to propose" in done.stdout
    assert not (clone.parent / "asked").exists()


PUSHED = {"CPU": f"ghcr.io/me/it@sha256:{'c' * 64}", "CUDA": f"ghcr.io/me/it@sha256:{'d' * 64}"}


@pytest.fixture
def released(tmp_path: Path) -> Path:
    """A clone with the code of the project, at a commit that images were made of, and programs in place of others.

    `python` has no packages, as on a machine of CI; `docker` and `gh` note what they are asked.
    """
    git(tmp_path, "init", "--quiet", "--bare", "--initial-branch=main", "origin.git")
    git(tmp_path, "clone", "--quiet", "origin.git", "checkout")
    folder = tmp_path / "checkout"
    for name in ("pipeline", "tools", "releases"):
        shutil.copytree(PROJECT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("README.md", "Dockerfile", "Makefile", ".gitignore"):
        shutil.copy(PROJECT / name, folder / name)
    (folder / "releases" / "images.txt").write_text("# none\n")
    stub = f'echo "${{0##*/}} $@" >>{tmp_path}/asked\n[ "$1 $2" != "pr view" ]'
    for name, text in {"python": f'exec {sys.executable} -S "$@"', "docker": stub, "gh": stub}.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    subprocess.run([tmp_path / "python", "-m", "tools.images"], cwd=folder, check=True)
    committed(folder, "first")
    git(folder, "push", "--quiet", "origin", "main")
    return folder


def committed(folder: Path, message: str) -> str:
    git(folder, "add", ".")
    git(folder, "commit", "--quiet", "--message", message)
    return git(folder, "rev-parse", "HEAD")


def image_of(checkout: Path, workflow: str = "release", job: str = "build") -> tuple[str, str]:
    """The image that a workflow takes of what is checked out, and what is said."""
    given = jobs(workflow)[job].get("env", {})
    done, outputs = run_step(
        checkout.parent, workflow, job, "tools/published_image.sh", {key: "" for key in given}, checkout
    )
    assert done.returncode == 0, done.stderr
    return outputs["image"], done.stdout


def named(checkout: Path, commit: str, **pushed: str) -> subprocess.CompletedProcess[str]:
    given = {**PUSHED, **pushed, "GITHUB_SHA": commit}
    return run_step(checkout.parent, "image", "name", "python -m tools.images", given, checkout)[0]


def test_pushed_images_are_named_and_then_taken_for_their_source(released: Path) -> None:
    """From push to pull: the list and README, the proposal, and what a release and its weekly rebuild build in."""
    commit, asked = git(released, "rev-parse", "HEAD"), released.parent / "asked"
    image, said = image_of(released)
    assert image == "" and "::notice::no published image holds the source" in said and not asked.exists()
    assert named(released, commit).returncode == 0
    patch = (released / "images.patch").rename(released.parent / "images.patch")
    git(released, "checkout", "--quiet", ".")
    given = {"BRANCH": "images", "GH_TOKEN": "t", "RUNNER_TEMP": str(released.parent)}
    done, _ = run_step(released.parent, "image", "propose", "tools/propose.sh", given, released)
    assert done.returncode == 0, done.stderr
    assert asked.read_text().splitlines()[-1] == "gh pr create --fill --head images"
    changed = git(released.parent / "origin.git", "show", "--name-only", "--format=", "images").split()
    assert changed == ["README.md", "releases/images.txt"] and patch.stat().st_size
    assert all(name in (released / "README.md").read_text() for name in PUSHED.values())

    assert image_of(released)[0] == PUSHED["CPU"]
    assert asked.read_text().splitlines()[-1] == f"docker pull --quiet {PUSHED['CPU']}"
    (released / "pipeline" / "fetch.py").write_text("other\n")
    later = committed(released, "other code")
    assert image_of(released)[0] == ""
    newer = {"CPU": PUSHED["CPU"].replace("c", "e"), "CUDA": PUSHED["CUDA"].replace("d", "f")}
    assert named(released, later, **newer).returncode == 0
    (released / "images.patch").unlink()
    committed(released, "newer images")
    assert image_of(released)[0] == newer["CPU"]
    git(released, "worktree", "add", "--quiet", "--detach", "released", commit)
    assert image_of(released, "reproduce", "rebuild")[0] == PUSHED["CPU"], "an older release has its own"


def test_an_image_that_can_not_be_pulled_is_built(released: Path) -> None:
    """As one that nobody made public, or that was deleted."""
    assert named(released, git(released, "rev-parse", "HEAD")).returncode == 0
    assert image_of(released)[0] == PUSHED["CPU"]
    (released.parent / "docker").write_text("#!/bin/sh\necho denied >&2\nexit 1\n")
    image, said = image_of(released)
    assert image == "" and f"::warning::{PUSHED['CPU']} can't be pulled" in said


def test_images_that_are_listed_are_not_listed_again(released: Path) -> None:
    """By a workflow that somebody runs again: the newest stays last."""
    commit = git(released, "rev-parse", "HEAD")
    newer = {"CPU": PUSHED["CPU"].replace("c", "e"), "CUDA": PUSHED["CUDA"].replace("d", "f")}
    for pushed in (PUSHED, newer):
        assert named(released, commit, **pushed).returncode == 0
    before = (released / "releases" / "images.txt").read_text()
    assert named(released, commit).returncode == 0
    assert (released / "releases" / "images.txt").read_text() == before


@pytest.mark.parametrize("word", ["GITHUB_SHA", "CPU"])
def test_what_is_no_image_by_digest_is_not_named(released: Path, word: str) -> None:
    commit = git(released, "rev-parse", "HEAD")
    done = named(released, **{"commit": commit, **({"CPU": "it:v1"} if word == "CPU" else {"commit": "v1"})})
    assert done.returncode != 0 and "no commit and two images by digest" in done.stderr
    assert git(released, "status", "--porcelain") == ""


def source_of(checkout: Path, commit: str) -> subprocess.CompletedProcess[str]:
    """The step of the weekly rebuild that gets the source of what was published, as its papers name it."""
    manifests = checkout / "published" / "manifests"
    manifests.mkdir(parents=True, exist_ok=True)
    (manifests / "verify.json").write_text(json.dumps({"source": {"commit": commit}}))
    given = jobs("reproduce")["rebuild"]["env"]
    values = {key: "" for key in given}
    return run_step(checkout.parent, "reproduce", "rebuild", "tools/released_source.sh", values, checkout)[0]


def test_a_source_that_is_not_in_the_history_is_not_run_and_it_is_said(released: Path) -> None:
    first = git(released, "rev-parse", "HEAD")
    git(released, "checkout", "--quiet", "-b", "beside")
    (released / "Makefile").write_text("# of a tag beside main\n")
    beside = committed(released, "beside")
    git(released, "checkout", "--quiet", "main")
    for commit in (beside, "0" * 40):
        done = source_of(released, commit)
        assert done.returncode != 0 and not (released / "released").exists()
        assert f"::error::what was published was built from {commit}, which is no ancestor of" in done.stdout
    assert source_of(released, first).returncode == 0
    assert git(released / "released", "rev-parse", "HEAD") == first


def test_an_image_is_of_a_source_if_all_that_is_in_it_is_the_same() -> None:
    """But for README.md, which names the image itself."""
    recipe = (PROJECT / "Dockerfile").read_text(encoding="utf-8")
    held = images.HELD.read_text(encoding="utf-8").splitlines()
    copied = {word for line in re.findall(r"^COPY (.*) \S+", recipe, re.MULTILINE) for word in line.split()}
    installed = {f"locks/{name}.txt" for name in re.findall(r"/locks/(\w+)\.txt", recipe)}
    used = set(re.findall(r"/(tools/\w+\.py)", recipe))
    wanted = {"Dockerfile", ".dockerignore", *copied, *installed, *used, "locks/cpu.txt", "locks/cuda.txt"}
    assert {*held} == wanted - {"README.md"}


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
