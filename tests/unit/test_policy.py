"""Rules about the project's own files: locks, base images, actions, permissions, help."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.core.recipe import PROJECT

LOCKS = PROJECT / "locks"
NAMES = (
    "cpu",
    "cuda",
    "macos",
    "dev",
    "cluster",
    "uv",
    "publish",
    "sign",
    "tensorflow",
    "clients",
    "material",
    "stock",
    "rival",
    "peft",
    "qat",
    "vision",
)
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
    shared, sources = {"pipeline", "constraints"}, {"llama", "smollm2"}  # the latter: one file each, see noxfile.py
    assert {file.stem for file in LOCKS.glob("*.in")} - shared == set(NAMES)
    assert {file.stem for file in LOCKS.glob("*.txt")} - sources == set(NAMES)


def lock_faults(wanted: dict[str, str], lock: Path) -> list[str]:
    """What is wrong with a lock: pins that it lacks or has otherwise, lines without a hash or a pin."""
    found, text = list(blocks(lock)), lock.read_text(encoding="utf-8")
    locked = {package: version for package, version, _ in found}
    faults = [f"{package}=={version}" for package, version in wanted.items() if locked.get(package) is None]
    faults += [
        f"{package}=={wanted[package]}"
        for package in wanted.keys() & locked.keys()
        if wanted[package] not in ("", locked[package])
    ]
    faults += [f"{package} has no hash" for package, _, hashes in found if not hashes]
    stray = len([line for line in text.splitlines() if line and line[0] not in " #"]) - len(found)
    faults += ["a line that is no pin"] if stray or not found else []
    return faults + (["it names an index"] if "://" in re.sub(r"^ *#.*", "", text, flags=re.MULTILINE) else [])


@pytest.mark.parametrize("name", NAMES)
def test_locks_hold_what_their_inputs_ask_for_with_hashes_and_nothing_else(name: str) -> None:
    lock = LOCKS / f"{name}.txt"
    assert lock_faults(asked(LOCKS / f"{name}.in"), lock) == [], "run `nox -s lock`"
    assert "nox -s lock" in lock.read_text(encoding="utf-8").splitlines()[1]


@pytest.mark.parametrize(
    ("pattern", "planted", "fault"),
    [
        (r"(?s)\nnumpy==.*?(?=\n[a-z])", "", "numpy=="),
        (r"\nhuggingface-hub==\S+", "\nhuggingface-hub==0.0.1", "huggingface-hub=="),
        (r"(?s)(\nnumpy==\S+) \\.*?(?=\n    #)", r"\1", "numpy has no hash"),
        (r"\Z", "six>=1\n", "a line that is no pin"),
        (r"\Z", "--index-url https://index.test/simple\n", "it names an index"),
    ],
)
def test_a_lock_that_is_not_its_inputs_is_found(tmp_path: Path, pattern: str, planted: str, fault: str) -> None:
    lock, text = tmp_path / "cpu.txt", (LOCKS / "cpu.txt").read_text(encoding="utf-8")
    changed = re.sub(pattern, planted, text, count=1)
    assert changed != text
    lock.write_text(changed, encoding="utf-8")
    faults = lock_faults(asked(LOCKS / "cpu.in"), lock)
    assert [found for found in faults if found.startswith(fault)], faults


@pytest.mark.parametrize("name", ["cuda", "dev", "cluster", "publish"])
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


PIP_SAYS = r"""
global.cert='/certificates.crt'
global.extra-index-url='\nhttps://one.test/simple\nhttps://two.test/simple'
global.index-url='https://overruled.test/simple'
global.timeout='180'
:env:.find-links='/wheels /more'
:env:.index-url='https://index.test/simple'
"""


def set_up(folder: Path, lock: str, uv: int, machine: str = "Linux x86_64") -> tuple[str, str, str]:
    """Run `tools/setup.sh` with a Python whose pip records what it is asked for, and so does the uv that pip installs.

    What was said, what uv was asked for, and what pip was; nothing where it was not asked. uv ends with the code `uv`.
    On macOS, set-up has the programs that are there.
    """
    python, told = folder / "python", {name: folder / name for name in ("uv", "pip", "settings")}
    told["settings"].write_text(PIP_SAYS.strip() + "\n")
    (folder / "fake-uv").write_text(f'#!/bin/sh\necho "$UV_DEFAULT_INDEX $SSL_CERT_FILE $@" >{told["uv"]}\nexit {uv}\n')
    (folder / "fake-pip").write_text(
        f"""#!/bin/sh
case "$*" in
*--target*) mkdir -p "{folder}/env/.scratch/bin" && cp {folder}/fake-uv "{folder}/env/.scratch/bin/uv" ;;
config*) cat {told["settings"]} ;;
*) echo "$@" >{told["pip"]} ;;
esac
"""
    )
    python.write_text(
        f"""#!/bin/sh
if [ "$2" = venv ]; then
    mkdir -p "$3/bin"
    cp {folder}/fake-pip "$3/bin/pip"
    printf '#!/bin/sh\\necho Python 3.11\\n' >"$3/bin/python"
    chmod +x "$3/bin/pip" "$3/bin/python"
else
    echo 3.11
fi
"""
    )
    (folder / "uname").write_text(f'#!/bin/sh\necho "{machine}"\n')
    for file in (python, folder / "fake-uv", folder / "uname"):
        file.chmod(0o755)
    path = os.environ["PATH"]
    if machine.startswith("Darwin"):
        path = str(tools_of_macos(folder / "macos"))
    for file in (told["uv"], told["pip"]):
        file.unlink(missing_ok=True)
    command = [PROJECT / "tools" / "setup.sh", folder / "env", lock]
    environment = {**os.environ, "PYTHON": str(python), "PATH": f"{folder}:{path}"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stderr, *(told[name].read_text() if told[name].exists() else "" for name in ("uv", "pip"))


def tools_of_macos(folder: Path) -> Path:
    """The programs that set-up calls, by the names that macOS has."""
    folder.mkdir(exist_ok=True)
    names = {"shasum": "sha256sum", **{name: name for name in MACOS_HAS}}
    for name, ours in names.items():
        text = f'#!/bin/sh\n{"shift 2; " if name == "shasum" else ""}exec {shutil.which(ours)} "$@"\n'
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    return folder


MACOS_HAS = [
    "bash",
    "sh",
    "env",
    "dirname",
    "basename",
    "sed",
    "grep",
    "xargs",
    "cat",
    "rm",
    "cp",
    "mkdir",
    "chmod",
    "sort",
]


@pytest.mark.parametrize("asked_for", ["auto", "macos"])
def test_on_macos_set_up_installs_its_lock(tmp_path: Path, asked_for: str) -> None:
    said, uv, _ = set_up(tmp_path, asked_for, 0, "Darwin arm64")
    assert re.findall(r"-r (\S+)", uv) == ["locks/macos.txt", "locks/dev.txt"], said
    ready = (tmp_path / "env" / ".ready").read_text()
    digest = hashlib.sha256((LOCKS / "macos.txt").read_bytes()).hexdigest()
    assert ready.startswith(f"lock macos\n{digest}  locks/macos.txt\n")


def test_macos_gets_the_versions_of_linux_without_what_nvidia_s_gpus_need() -> None:
    here, there = pins("cuda"), pins("macos")
    assert there.items() <= here.items()
    assert all(re.match("nvidia-|cuda-|triton$", name) for name in here.keys() - there.keys())


@pytest.mark.parametrize("uv", [0, 2])
@pytest.mark.parametrize(("lock", "development"), [("publish", False), ("sign", False), ("cpu", True), ("cuda", True)])
def test_no_development_package_is_installed_where_something_may_be_published(
    tmp_path: Path, lock: str, development: bool, uv: int
) -> None:
    """Any package can run code at the start of Python, a `.pth` file's: beside the token none that is not needed."""
    said, *asked_for = set_up(tmp_path, lock, uv)
    for program in asked_for[: 2 if uv else 1]:
        assert "--require-hashes --only-binary=:all:" in program
        files = re.findall(r"-r (\S+)", program)
        assert files == [f"locks/{lock}.txt", *(["locks/dev.txt"] if development else [])]
    assert bool(asked_for[1]) == bool(uv)  # pip does what uv can't
    count = sum(len(pins(Path(file).stem)) for file in files)
    assert f"installing {count} locked packages" in said
    ready = (tmp_path / "env" / ".ready").read_text()
    assert ready.startswith(f"lock {lock}\n") and ("dev.txt" in ready) is development
    assert not (tmp_path / "env" / ".scratch").exists()
    assert set_up(tmp_path, lock, uv) == ("", "", "")  # it is there already


def test_uv_looks_where_pip_is_told_to(tmp_path: Path) -> None:
    _, uv, _ = set_up(tmp_path, "publish", 0)
    assert uv.startswith("https://index.test/simple /certificates.crt pip install ")
    for index in ("one", "two"):
        assert f" --extra-index-url https://{index}.test/simple " in uv
    assert " --find-links /wheels --find-links /more " in uv
    assert "overruled" not in uv and "180" not in uv


def dockerfile() -> str:
    return (PROJECT / "Dockerfile").read_text(encoding="utf-8")


def loose_bases(text: str) -> list[str]:
    """Images that a Dockerfile takes something from and that have no digest."""
    defaults = dict(re.findall(r"^ARG (\w+)=(\S+)", text, flags=re.MULTILINE))
    stages = set(re.findall(r"^FROM \S+ AS (\w+)", text, flags=re.MULTILINE))
    bases = re.findall(r"^FROM (?:--\S+ )*(\S+)", text, flags=re.MULTILINE)
    bases += re.findall(r"(?:--from=|,from=)([^\s,]+)", text)
    names = [re.sub(r"^\$\{?(\w+)\}?$", lambda match: defaults.get(match[1], ""), base) for base in bases]
    pinned = re.compile(r"[\w./-]+:[\w.-]+@sha256:[0-9a-f]{64}")
    return [name for name in names if name != "scratch" and name not in stages and not pinned.fullmatch(name)]


def test_every_base_image_has_a_digest() -> None:
    assert "FROM" in dockerfile() and loose_bases(dockerfile()) == []


@pytest.mark.parametrize(
    "planted",
    [
        "FROM python:3.11",
        "FROM --platform=linux/amd64 python@sha256:0a31",
        "FROM ${OTHER}",
        "COPY --from=busybox:1 /bin/sh /bin/sh",
        "RUN --mount=type=bind,from=busybox:1,target=/x true",
    ],
)
def test_a_base_without_a_digest_is_found(planted: str) -> None:
    assert len(loose_bases(f"{dockerfile()}\n{planted}\n")) == 1
    assert loose_bases(re.sub("@sha256:[0-9a-f]+", "", dockerfile())) == ["python:3.11-slim-bookworm"]


def install_faults(text: str) -> list[str]:
    """What makes an image run as root, or install what no lock names."""
    starts = re.findall(r"^(?:USER|ENTRYPOINT) .*", text, flags=re.MULTILINE)
    faults = [] if starts == ['ENTRYPOINT ["/app/tools/entry.sh"]'] else ["root"]  # which goes on as somebody else
    installs = re.findall(r"pip install(?:[^&]|&(?!&))*", text)
    faults += [command for command in installs if not {"--require-hashes", "--only-binary=:all:"} <= {*command.split()}]
    packages = " ".join(re.findall(r"apt-get install ([^&;]*)", text)).split()
    faults += ["apt"] if [word for word in packages if word[0] not in "-\\" and "=" not in word] else []
    return faults + (["syntax line"] if "# syntax" in text else [])  # with one, an offline build fails


def test_the_image_is_not_root_and_installs_with_hashes_alone() -> None:
    assert "pip install" in dockerfile() and install_faults(dockerfile()) == []


@pytest.mark.parametrize(
    "planted",
    [
        "USER root",
        "USER 0:0",
        "USER 65534",
        'ENTRYPOINT ["make"]',
        "RUN pip install six",
        "RUN apt-get install gcc",
        "# syntax=docker/dockerfile:1",
    ],
)
def test_root_or_an_install_without_hashes_is_found(planted: str) -> None:
    assert len(install_faults(f"{dockerfile()}\n{planted}\n")) == 1


DEPLOYED = [PROJECT / "Dockerfile", PROJECT / "Makefile", PROJECT / "noxfile.py", PROJECT / ".ci" / "run", *WORKFLOWS]
DEPLOYED += [PROJECT / "tools" / "engine.py"]
DEPLOYED += sorted((PROJECT / "tools").glob("*.sh")) + sorted((PROJECT / "locks").glob("*.in"))


def moving(text: str) -> list[str]:
    """Names of images, runners and actions that mean something else tomorrow."""
    return re.findall(r"\S*(?:[:@]latest|-latest|@main|@master)\b", text)


@pytest.mark.parametrize("file", DEPLOYED, ids=lambda file: file.name)
def test_nothing_is_taken_by_a_name_that_moves(file: Path) -> None:
    assert moving(file.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("planted", ["FROM a:latest", "runs-on: ubuntu-latest", "uses: actions/checkout@main"])
def test_a_name_that_moves_is_found(planted: str) -> None:
    assert moving(planted)


@pytest.mark.parametrize("digest", [f"sha256:{'5' * 64}", "", "sha256:5", f"sha256:{'5' * 64}\nx"])
def test_todays_digest_is_written_into_the_dockerfile_if_it_is_one(tmp_path: Path, digest: str) -> None:
    copy, registry = tmp_path / "Dockerfile", tmp_path / "docker"
    copy.write_text(dockerfile(), encoding="utf-8")
    registry.write_text(f"#!/bin/sh\n[ \"$4\" = python:3.11-slim-bookworm ] && printf '{digest}'\n")
    registry.chmod(0o755)
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "DOCKERFILE": str(copy)}
    done = subprocess.run([PROJECT / "tools" / "update_base.sh"], env=env, capture_output=True, text=True)
    good = re.fullmatch(r"sha256:\w{64}", digest)
    old = re.findall(r"sha256:[0-9a-f]{64}", dockerfile())
    assert len(old) == 1
    assert done.returncode == (0 if good else 1), done.stderr
    assert copy.read_text(encoding="utf-8") == dockerfile().replace(old[0], digest if good else old[0])


def test_builder_sees_listed_files_only() -> None:
    rules = (PROJECT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    rules = [rule for rule in rules if rule and not rule.startswith("#")]
    assert rules[0] == "*"
    assert not [rule for rule in rules if rule.startswith("!") and re.search(r"git|artifacts|venv|tests|^!\*", rule)]


def test_what_the_image_copies_is_there_and_let_through() -> None:
    """`COPY LICENSE*` is content with nothing."""
    rules = (PROJECT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    through = [rule.removeprefix("!") for rule in rules if rule.startswith("!")]
    copied = [
        word for row in re.findall(r"^COPY (?!--from)(.*) \S+$", dockerfile(), re.MULTILINE) for word in row.split()
    ]
    assert {"LICENSE", "README.md", "pipeline"} <= set(copied)
    for name in copied:
        assert (PROJECT / name).exists() and any(fnmatch(name, rule) for rule in through), name


def test_plain_pytest_takes_two_files_of_one_name(tmp_path: Path) -> None:
    """As tests/unit and tests/stages have them; without a mode that can, pytest ends at the second."""
    (tmp_path / "pyproject.toml").write_bytes((PROJECT / "pyproject.toml").read_bytes())
    for folder in ("unit", "stages"):
        (tmp_path / "tests" / folder).mkdir(parents=True)
        (tmp_path / "tests" / folder / "test_same.py").write_text("def test_it() -> None: ...\n")
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "2 tests collected" in done.stdout, done.stdout


def test_no_test_takes_from_another() -> None:
    """What they share stands in a file that is no test, or it would run twice and be found in neither."""
    for file in sorted((PROJECT / "tests").rglob("*.py")):
        taken = re.findall(
            r"^\s*(?:from|import) (test_\w+)|(sys\.path)", file.read_text(encoding="utf-8"), re.MULTILINE
        )
        assert not taken, file


def workflow_faults(text: str) -> list[str]:
    """What a workflow may not do."""
    uses = re.findall(r"uses: *(.*)", text)
    faults = [use for use in uses if not re.fullmatch(r"[\w./-]+@[0-9a-f]{40} # v[0-9.]+", use)]
    content = yaml.safe_load(text)
    faults += ["permissions at the top"] if content.get("permissions") != {} else []
    for name, job in content["jobs"].items():
        faults += [f"{name}: {key}" for key in ("permissions", "timeout-minutes") if key not in job]
        faults += [f"{name}: permissions"] if not isinstance(job.get("permissions", {}), dict) else []
        for step in job["steps"]:
            faults += [f"{name}: expression in a run block"] if "${{" in step.get("run", "") else []
            kept = step.get("with", {}).get("persist-credentials") is not False
            faults += [f"{name}: credentials"] if kept and "actions/checkout@" in step.get("uses", "") else []
    return faults


def workflow(name: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((PROJECT / ".github" / "workflows" / f"{name}.yml").read_text())
    return found


def test_there_are_workflows() -> None:
    assert [file.stem for file in WORKFLOWS] == ["ci", "image", "release", "reproduce", "update"]


@pytest.mark.parametrize("file", WORKFLOWS, ids=lambda file: file.name)
def test_a_workflow_does_only_what_it_must(file: Path) -> None:
    assert workflow_faults(file.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("pattern", "planted"),
    [
        (r"@[0-9a-f]{40} # v\S+", "@v7"),
        (r"( # v\S+)", ""),
        (r"\npermissions: {}", "\npermissions: write-all"),
        (r"\npermissions: {}.*", ""),
        (r"    timeout-minutes: \d+\n", ""),
        (r"    permissions:\n(?:      .*\n)+", ""),
        (r"    permissions:\n(?:      .*\n)+", "    permissions: read-all\n"),
        (r"run: make setup", 'run: make setup "${{ github.ref }}"'),
        (r"persist-credentials: false", "persist-credentials: true"),
        (r"        with:\n          persist-credentials: false\n", ""),
    ],
)
def test_what_a_workflow_may_not_do_is_found(pattern: str, planted: str) -> None:
    text = (PROJECT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8")
    changed = re.sub(pattern, planted, text, count=1)
    assert changed != text
    assert workflow_faults(changed)


def writes(name: str) -> dict[str, set[str]]:
    """What each job of a workflow may write, if anything."""
    jobs = workflow(name)["jobs"]
    granted = {job: {key for key, kind in what["permissions"].items() if kind != "read"} for job, what in jobs.items()}
    return {job: grants for job, grants in granted.items() if grants}


def test_jobs_write_only_where_they_must() -> None:
    assert writes("ci") == writes("reproduce") == {}
    assert writes("release") == {"attest": {"attestations", "id-token"}, "publish": {"id-token"}}
    proposes = {"contents", "pull-requests"}
    assert writes("image") == {"push": {"packages", "attestations", "id-token"}, "propose": proposes}
    assert writes("update") == {"propose": proposes}


def test_no_workflow_holds_a_secret() -> None:
    for file in WORKFLOWS:
        assert "secrets." not in file.read_text(encoding="utf-8"), "publishing needs none: the Hub trusts the workflow"


def test_a_job_that_may_write_runs_no_code_of_the_project_but_the_upload() -> None:
    for name, job in (("release", "attest"), ("update", "propose"), ("image", "push"), ("image", "propose")):
        commands = " ".join(step.get("run", "") for step in workflow(name)["jobs"][job]["steps"])
        if job == "propose":
            script = (PROJECT / "tools" / "propose.sh").read_text(encoding="utf-8").split("set -euo pipefail\n")[1]
            commands = commands.replace("tools/propose.sh", script)
        assert commands and not re.search(r"\b(make|nox|python|pip|tools/)", commands)
    publish = workflow("release")["jobs"]["publish"]
    assert publish["environment"] == "huggingface" and publish["needs"] == ["plan", "build", "attest"]
    commands = [step["run"] for step in publish["steps"] if "run" in step]
    assert all("LOCK=publish" in command for command in commands if "make" in command), "no torch beside the token"


def test_what_is_built_is_handed_over_by_digest() -> None:
    jobs = workflow("release")["jobs"]
    for name in ("verify", "attest", "publish"):
        runs = [step.get("run", "") for step in jobs[name]["steps"]]
        first = next(run for run in runs if "handover.tar" in run)
        assert first.startswith('echo "$SHA256  handover.tar" | sha256sum --check --strict\n')
        assert jobs[name]["env"]["SHA256"] == "${{ needs.build.outputs.sha256 }}"


def test_images_are_judged_and_looked_into_before_they_are_handed_on_by_digest() -> None:
    jobs = workflow("image")["jobs"]
    commands = [step.get("run", "") for step in jobs["build"]["steps"]]
    order = ("make image", "docker run --rm --network none --read-only", "tools.image_scan", "docker save")
    places = [next(place for place, command in enumerate(commands) if part in command) for part in order]
    assert places == sorted(places)
    push = [step.get("run", "") for step in jobs["push"]["steps"]]
    first = next(command for command in push if command)
    assert first.startswith('echo "$SHA256  image.tar.zst" | sha256sum --check --strict\n')
    assert jobs["push"]["env"]["SHA256"] == "${{ needs.build.outputs[matrix.lock] }}"
    assert jobs["push"]["strategy"] == jobs["build"]["strategy"]
    assert set(jobs["build"]["outputs"]) == set(jobs["push"]["strategy"]["matrix"]["lock"]) == {"cpu", "cuda"}


def test_ci_calls_sessions_that_exist() -> None:
    sessions = re.findall(
        r"^def (\w+)\(session", (PROJECT / "noxfile.py").read_text(encoding="utf-8"), flags=re.MULTILINE
    )
    ci = yaml.safe_load((PROJECT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8"))
    assert set(ci["jobs"]["check"]["strategy"]["matrix"]["session"]) <= set(sessions)


def test_ci_script_runs_the_readmes_test_command() -> None:
    assert "make test" in (PROJECT / "README.md").read_text(encoding="utf-8")
    assert "\nmake test\n" in (PROJECT / ".ci" / "run").read_text(encoding="utf-8")
