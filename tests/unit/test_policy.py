"""Rules about the project's own files: locks, base images, actions, permissions, help."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.core.recipe import PROJECT

LOCKS = PROJECT / "locks"
NAMES = ("cpu", "cuda", "dev", "publish", "sign", "tensorflow", "material", "stock")
WORKFLOWS = sorted((PROJECT / ".github" / "workflows").glob("*.yml"))
PIN = re.compile(r"^([A-Za-z0-9_.-]+)==([^\s\\;]+)")


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def asked(file: Path) -> dict[str, str]:
    """Package → version (empty if not pinned) that an .in file and those it includes ask for; -c lines don't ask."""
    wanted: dict[str, str] = {}
    for line in file.read_text(encoding="utf-8").splitlines():
        if line.startswith("-r "):
            wanted |= asked(file.parent / line.split()[1])
        elif line and not line.startswith(("#", "-c ")):
            name, _, version = line.partition("==")
            wanted[canonical(name.partition("[")[0])] = version
    return wanted


def blocks(lock: Path) -> Iterator[tuple[str, str, list[str]]]:
    """Name, version and sha256 hashes of each requirement of a lock."""
    for block in re.split(r"\n(?=[A-Za-z0-9])", lock.read_text(encoding="utf-8")):
        if pin := PIN.match(block):
            yield canonical(pin[1]), pin[2], re.findall(r"--hash=sha256:([0-9a-f]{64})\b", block)


def pins(name: str) -> dict[str, str]:
    return {package: version for package, version, _ in blocks(LOCKS / f"{name}.txt")}


def test_every_input_has_its_lock_and_the_other_way_round() -> None:
    shared = {"pipeline", "constraints"}
    assert (
        {file.stem for file in LOCKS.glob("*.in")} - shared == set(NAMES) == {file.stem for file in LOCKS.glob("*.txt")}
    )


@pytest.mark.parametrize("name", NAMES)
def test_lock_holds_what_its_input_asks_for(name: str) -> None:
    locked = pins(name)
    for package, version in asked(LOCKS / f"{name}.in").items():
        assert package in locked, f"run `nox -s lock`: {package} is in {name}.in, not in {name}.txt"
        assert version in ("", locked[package]), f"run `nox -s lock`: {name}.txt has {package} {locked[package]}"


@pytest.mark.parametrize("name", NAMES)
def test_every_locked_requirement_has_a_hash_and_nothing_else_is_in_the_lock(name: str) -> None:
    text = (LOCKS / f"{name}.txt").read_text(encoding="utf-8")
    requirements = [line for line in text.splitlines() if line and line[0] not in " #"]
    found = list(blocks(LOCKS / f"{name}.txt"))
    assert requirements and len(found) == len(requirements)
    assert all(hashes for _, _, hashes in found)
    assert "nox -s lock" in text.splitlines()[1]
    assert "://" not in re.sub(r"^ *#.*", "", text, flags=re.MULTILINE), "a lock names no index"


@pytest.mark.parametrize("name", ["cuda", "dev", "publish"])
def test_locks_agree_on_what_they_share_with_the_cpu_lock(name: str) -> None:
    cpu, other = pins("cpu"), pins(name)
    differ = {package for package in cpu.keys() & other.keys() if cpu[package] != other[package]}
    assert differ <= {"torch"}
    assert len(cpu.keys() & other.keys()) > 3


def test_cpu_and_cuda_are_two_builds_of_one_torch() -> None:
    cpu, cuda = pins("cpu"), pins("cuda")
    assert cpu["torch"] == cuda["torch"] + "+cpu"
    assert not [package for package in cpu if package.startswith(("nvidia-", "triton", "cuda-"))]
    assert [package for package in cuda if package.startswith("nvidia-")]


def test_what_publishes_has_no_torch() -> None:
    assert not {"torch", "jax", "litert-torch", "transformers"} & pins("publish").keys()


def dockerfile() -> str:
    return (PROJECT / "Dockerfile").read_text(encoding="utf-8")


def test_every_base_image_has_a_digest() -> None:
    defaults = dict(re.findall(r"^ARG (\w+)=(\S+)", dockerfile(), flags=re.MULTILINE))
    stages = set(re.findall(r"^FROM \S+ AS (\w+)", dockerfile(), flags=re.MULTILINE))
    bases = re.findall(r"^FROM (\S+)", dockerfile(), flags=re.MULTILINE)
    bases += re.findall(r"^COPY .*--from=(\S+)", dockerfile(), flags=re.MULTILINE)
    assert bases
    for base in bases:
        name = re.sub(r"^\$\{(\w+)\}$", lambda match: defaults[match[1]], base)
        assert name == "scratch" or name in stages or re.fullmatch(r"\S+:\S+@sha256:[0-9a-f]{64}", name), base


def test_the_image_is_not_root_and_installs_with_hashes() -> None:
    assert re.findall(r"^USER (\d+)", dockerfile(), flags=re.MULTILINE)[-1] != "0"
    installs = re.findall(r"pip install(?:[^&]|&(?!&))*", dockerfile())
    assert installs and all("--require-hashes" in command for command in installs)
    assert "# syntax" not in dockerfile(), "a syntax line makes an offline build fail"


def test_builder_sees_listed_files_only() -> None:
    rules = (PROJECT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    rules = [rule for rule in rules if rule and not rule.startswith("#")]
    assert rules[0] == "*"
    assert not [rule for rule in rules if rule.startswith("!") and re.search(r"git|artifacts|venv|tests|^!\*", rule)]


def steps(workflow: Path) -> Iterator[dict[str, Any]]:
    for job in yaml.safe_load(workflow.read_text(encoding="utf-8"))["jobs"].values():
        yield from job.get("steps", ())


def test_there_are_workflows() -> None:
    assert WORKFLOWS


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda file: file.name)
def test_actions_are_pinned_by_commit_and_say_which_version(workflow: Path) -> None:
    uses = re.findall(r"uses: *(.*)", workflow.read_text(encoding="utf-8"))
    for action in uses:
        assert action.startswith("./") or re.fullmatch(r"[\w./-]+@[0-9a-f]{40} # v[0-9.]+", action), action


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda file: file.name)
def test_workflow_grants_nothing_at_the_top_and_each_job_says_what_it_needs(workflow: Path) -> None:
    content = yaml.safe_load(workflow.read_text(encoding="utf-8"))
    assert content["permissions"] == {}
    for name, job in content["jobs"].items():
        assert isinstance(job["permissions"], dict), name
        assert "timeout-minutes" in job or "uses" in job, name


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda file: file.name)
def test_no_expression_in_a_run_block_and_no_credentials_left_by_checkout(workflow: Path) -> None:
    for step in steps(workflow):
        assert "${{" not in step.get("run", "")
        if step.get("uses", "").startswith("actions/checkout@"):
            assert step["with"]["persist-credentials"] is False


def test_ci_calls_sessions_that_exist() -> None:
    sessions = re.findall(
        r"^def (\w+)\(session", (PROJECT / "noxfile.py").read_text(encoding="utf-8"), flags=re.MULTILINE
    )
    ci = yaml.safe_load((PROJECT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8"))
    assert set(ci["jobs"]["check"]["strategy"]["matrix"]["session"]) <= set(sessions)


def test_ci_script_runs_the_readmes_test_command() -> None:
    assert "make test" in (PROJECT / "README.md").read_text(encoding="utf-8")
    assert "\nmake test\n" in (PROJECT / ".ci" / "run").read_text(encoding="utf-8")
