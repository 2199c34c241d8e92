"""Run the jobs of a workflow here as CI would: `python -m tools.rehearse release`, `… ci --only lint types`.

Each job runs in a clean clone of the project's commit, its steps in order, in bash, with the environment that the
workflow gives: what it says of inputs, of other jobs' and steps' outputs, of the matrix. Of the actions, checkout is
that clone, artifacts lie in a folder, and an attestation is a look at what would be attested. A container engine is
started where none runs. A release is one of the shipped model, on a Hub server on the loopback, from plan to receipt.

Sigstore can't be had on the loopback: where a step says SIGN=keyless, it signs with a key instead.
"""

from __future__ import annotations

import argparse
import itertools
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from pipeline.core import log
from pipeline.core.recipe import PROJECT
from tools import engine

sys.path.insert(0, str(PROJECT / "tests" / "stages"))

from hub_server import HubServer  # noqa: E402 - tests' own

SHIPPED = PROJECT / "examples" / "tiny-gemma3n"
SOURCE, TARGET = "rehearsal/tiny-gemma3n", "rehearsal/tiny-litert"
KEYLESS = "SIGN=keyless"
Table = Mapping[str, Any]


@dataclass
class Rehearsal:
    """A workflow: its text, what it is given, and where it runs.

    `given` are the contexts that expressions read (inputs, github, vars), `environment` what a machine of CI has.
    """

    workflow: Table
    given: dict[str, Any]
    environment: dict[str, str]
    home: Path
    key: Path | None = None

    def run(self, only: Sequence[str]) -> None:
        """Every job after those that it needs; `only` are names of jobs or values of their matrix, by default all.

        Raises:
            SystemExit: a step failed.
        """
        done: dict[str, Table] = {}
        for name, job in ordered(self.workflow["jobs"]):
            if "if" in job and not self.value("${{ " + str(job["if"]) + " }}", {"needs": done}):
                continue
            outputs: dict[str, Any] = {}
            for matrix in combinations(job.get("strategy", {}).get("matrix", {})):
                if not only or {name, *map(str, matrix.values())} & set(only):
                    outputs |= self.job(name, job, {"needs": done, "matrix": matrix})
            done[name] = {"outputs": outputs}

    def job(self, name: str, job: Table, seen: dict[str, Any]) -> dict[str, Any]:
        """Run the steps of a job in a clean folder; its outputs."""
        title = " ".join([name, *map(str, seen["matrix"].values())])
        started, folder = time.monotonic(), Path(tempfile.mkdtemp(prefix=f"{name}-", dir=self.home))
        steps: dict[str, Table] = {}
        seen = {**seen, "steps": steps, "runner": {"temp": str(folder.with_suffix(".temp"))}}
        Path(seen["runner"]["temp"]).mkdir()
        for place, step in enumerate(job["steps"]):
            outputs = self.step(step, folder, {**self.workflow.get("env", {}), **job.get("env", {})}, seen)
            steps[step.get("id", str(place))] = {"outputs": outputs}
        log.line(f"rehearsed: {title}, {log.human_seconds(time.monotonic() - started)}")
        told = {key: self.value(text, seen) for key, text in job.get("outputs", {}).items()}
        shutil.rmtree(folder)
        return told

    def step(self, step: Table, folder: Path, environment: Table, seen: Table) -> dict[str, str]:
        """Run a step; its outputs."""
        if "uses" in step:
            self.action(
                step["uses"], {key: self.value(text, seen) for key, text in step.get("with", {}).items()}, folder
            )
            return {}
        said, temp = Path(seen["runner"]["temp"]) / "outputs", seen["runner"]["temp"]
        said.write_text("")
        told = {key: str(self.value(text, seen)) for key, text in {**environment, **step.get("env", {})}.items()}
        told = {key: {"True": "true", "False": "false"}.get(text, text) for key, text in told.items()}
        own = {"GITHUB_OUTPUT": str(said), "GITHUB_REF": self.given["github"]["ref"], "RUNNER_TEMP": temp}
        command = str(self.value(step["run"], seen)).replace(KEYLESS, f"SIGN_KEY={self.key}")
        log.line(f"rehearse: {step.get('name', command.splitlines()[0])}")
        shell = ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", command]
        done = subprocess.run(shell, cwd=folder, env={**self.environment, **told, **own}, stdin=subprocess.DEVNULL)
        if done.returncode:
            sys.exit(f"error: the step `{command.strip()}` ended with exit code {done.returncode}")
        return dict(line.split("=", 1) for line in said.read_text().splitlines())

    def action(self, uses: str, words: Table, folder: Path) -> None:
        """What stands in for an action."""
        name, store = uses.partition("@")[0], self.home / "artifacts"
        if name == "actions/checkout":
            engine.run("git", "clone", "--quiet", "--no-hardlinks", PROJECT, folder)
        elif name == "actions/upload-artifact":
            found = sorted(folder.glob(words["path"]))
            if not found:
                sys.exit(f"error: there is no {words['path']} to hand on")
            (store / words["name"]).mkdir(parents=True)
            for file in found:
                shutil.copy(file, store / words["name"])
        elif name == "actions/download-artifact":
            shutil.copytree(store / words["name"], words.get("path") or folder, dirs_exist_ok=True)
        elif name == "actions/attest":
            if "subject-checksums" in words and not (folder / words["subject-checksums"]).read_text().strip():
                sys.exit("error: there is nothing to attest")
        elif name != "actions/setup-python":
            sys.exit(f"error: nothing stands in for the action {name}")

    def value(self, text: object, seen: Table) -> Any:
        """A value of the workflow, with its expressions: names with dots, and `a || b`, are all that is known."""
        if not isinstance(text, str):
            return text
        known = {**self.given, **seen}
        whole = re.fullmatch(r"\$\{\{ ([^}]+) \}\}", text)
        if whole:
            return evaluated(whole[1], known)
        return re.sub(r"\$\{\{ ([^}]+) \}\}", lambda found: str(evaluated(found[1], known)), text)


def evaluated(expression: str, known: Table) -> Any:
    """The first of the alternatives that is something; what is not there is empty, as in CI."""
    for alternative in expression.split(" || "):
        found: Any = known
        for part in alternative.strip().split("."):
            found = found.get(part, "") if isinstance(found, Mapping) else ""
        if found:
            return found
    return ""


def ordered(jobs: Mapping[str, Table]) -> Iterator[tuple[str, Table]]:
    """The jobs, each after those that it needs."""
    left = dict(jobs)
    while left:
        for name, job in tuple(left.items()):
            needs = job.get("needs", [])
            if not left.keys() & {*([needs] if isinstance(needs, str) else needs)}:
                yield name, left.pop(name)


def combinations(matrix: Mapping[str, Sequence[object]]) -> list[dict[str, object]]:
    """Every combination of a matrix; one that is empty without any."""
    return [dict(zip(matrix, values, strict=True)) for values in itertools.product(*matrix.values())]


def main(argv: Sequence[str] | None = None) -> int:
    """Run a workflow; the exit code of the step that fails is told."""
    parser = argparse.ArgumentParser(prog="python -m tools.rehearse", description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("workflow", choices=sorted(file.stem for file in (PROJECT / ".github/workflows").glob("*.yml")))
    parser.add_argument("--only", nargs="*", default=[], help="names of jobs, or of what their matrix holds")
    arguments = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, lambda number, _frame: sys.exit(128 + number))  # so that the engine ends as well
    told = yaml.safe_load((PROJECT / ".github" / "workflows" / f"{arguments.workflow}.yml").read_text(encoding="utf-8"))
    with engine.engine() as env, HubServer() as hub, tempfile.TemporaryDirectory() as scratch:
        files = {file.name: file.read_bytes() for file in SHIPPED.iterdir() if file.is_file()}
        commit = hub.add(SOURCE, files)
        hub.add(TARGET, {})
        hub.tokens["rehearsed"], hub.writers["rehearsed"] = {SOURCE, TARGET}, {TARGET}
        hub.identities["job"] = "rehearsed"
        inputs = {"model": SOURCE, "revision": commit, "recipe": "gemma3n", "repository": TARGET}
        inputs |= {"graphs": "bundle", "tag": "rehearsed", "upload": True}
        key = Path(scratch) / "key.pem"
        engine.run("openssl", "ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", key)
        path = f"{Path(sys.executable).parent}:{env['PATH']}"
        machine = {**env, "PATH": path, "HF_ENDPOINT": hub.endpoint, "HF_OIDC_ID_TOKEN": "job", "CI": "true"}
        given = {"inputs": inputs, "github": {"ref": "refs/heads/main"}, "vars": {}}
        rehearsal = Rehearsal(told, given, machine, Path(scratch), key)
        rehearsal.run(arguments.only)
        if arguments.workflow == "release" and not arguments.only:
            log.line((Path(scratch) / "artifacts" / "receipt" / "receipt.json").read_text(encoding="utf-8"))
            log.line(f"{TARGET} holds {len(hub.repos[TARGET].commits[hub.repos[TARGET].refs['main']])} files")
    return 0


if __name__ == "__main__":
    sys.exit(main())
