#!/usr/bin/env python3
"""Run a command with a container engine: `engine.py make publish IN=docker`.

Where an engine answers, the command just runs. Where none does, as on a bare virtual machine, one is installed
(Debian's docker.io), started in a scratch folder without a bridge, given a base image made by mmdebstrap instead of
pulled, and ended again. That needs root on Debian 12. The command then finds in its environment what `make image`
needs to know: DOCKER_HOST, and IMAGE_FLAGS with the base, the host's certificates (BUILD_CERTIFICATES names others) and
pip's find-links folder.

It fails, and says why, if the engine does not come up: nothing is skipped.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

BASE = "local/python-base:bookworm"
WHEELS = "local/wheels:here"
SUITE = "bookworm"
CERTIFICATES = Path("/etc/ssl/certs/ca-certificates.crt")
START_SECONDS = 60
# Debian's client: it understands BuildKit without a plug-in, others on the path may not.
CLIENT, DAEMON, DEBOOTSTRAP = Path("/usr/bin/docker"), Path("/usr/sbin/dockerd"), Path("/usr/bin/mmdebstrap")
PACKAGES = {DAEMON: "docker.io", CLIENT: "docker.io", DEBOOTSTRAP: "mmdebstrap"}


def say(text: str) -> None:
    """Print what is done."""
    print(f"engine: {text}", file=sys.stderr, flush=True)


def run(*command: str | Path, env: Mapping[str, str] | None = None) -> None:
    """Run `command`; its output goes to standard error.

    Raises:
        SystemExit: it failed.
    """
    done = subprocess.run([str(part) for part in command], env=env, stdout=sys.stderr, stdin=subprocess.DEVNULL)
    if done.returncode:
        sys.exit(f"error: `{' '.join(map(str, command))}` failed with exit code {done.returncode}")


def answers(env: Mapping[str, str]) -> bool:
    """Whether an engine answers."""
    client = shutil.which("docker", path=env["PATH"])
    return bool(client) and subprocess.run([str(client), "info"], env=env, capture_output=True).returncode == 0


def install(packages: Mapping[Path, str]) -> None:
    """Install Debian's packages whose file, the key, is missing."""
    missing = sorted({package for file, package in packages.items() if not file.exists()})
    if not missing:
        return
    if os.geteuid() != 0 or not shutil.which("apt-get"):
        sys.exit(
            "error: no container engine answers and none can be started\n"
            f"  cause: {' and '.join(missing)} must be installed, which takes root on Debian\n"
            "  do:    start Docker, or run this as root on Debian 12"
        )
    say(f"installing {' and '.join(missing)}")
    quiet = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    run("apt-get", "update", "-qq", env=quiet)
    run("apt-get", "install", "-qq", "--yes", "--no-install-recommends", *missing, env=quiet)


def mirror() -> str:
    """The Debian mirror that this machine's apt uses for the base's suite."""
    form = "$(ORIGIN) $(CODENAME) $(REPO_URI)"
    rows = subprocess.run(["apt-get", "indextargets", "--format", form], capture_output=True, text=True, check=True)
    found = [row.split()[2] for row in rows.stdout.splitlines() if row.startswith(f"Debian {SUITE} ")]
    if not found:
        sys.exit(f"error: apt on this machine has no source for Debian {SUITE}, from which the base image is made")
    return found[0]


@contextmanager
def daemon(home: Path, env: Mapping[str, str]) -> Iterator[None]:
    """An engine that keeps everything in `home`, until the block ends."""
    (home / "config.json").write_text("{}", encoding="utf-8")
    options = [f"--config-file={home}/config.json", f"--data-root={home}/data", f"--exec-root={home}/exec"]
    options += [f"--pidfile={home}/pid", f"--host={env['DOCKER_HOST']}", "--bridge=none"]
    options += ["--iptables=false", "--ip6tables=false", "--storage-driver=overlay2"]
    journal = home / "dockerd.log"
    with journal.open("wb") as stream:
        process = subprocess.Popen([DAEMON, *options], stdout=stream, stderr=stream, start_new_session=True)
    try:
        deadline = time.monotonic() + START_SECONDS
        while not answers(env):
            if process.poll() is not None or time.monotonic() > deadline:
                tail = "\n".join(journal.read_text(errors="replace").splitlines()[-15:])
                sys.exit(
                    f"error: the container engine did not come up within {START_SECONDS} s; its last words:\n{tail}"
                )
            time.sleep(0.5)
        yield
    finally:
        process.terminate()
        try:
            process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        unmount(home)


def unmount(home: Path) -> None:
    """Unmount what an engine leaves mounted below `home`, which could not be removed else."""
    mounts = [row.split()[1] for row in Path("/proc/mounts").read_text().splitlines()]
    for point in sorted((mount for mount in mounts if mount.startswith(f"{home}/")), reverse=True):
        subprocess.run(["umount", "--lazy", point], check=False)


def make_base(home: Path) -> Path:
    """Make a root file system with Debian's Python 3.11 and make, as small as the official slim image's."""
    say(f"making a base image from Debian {SUITE}")
    tar = home / "base.tar"
    run(
        *(DEBOOTSTRAP, "--quiet", "--variant=minbase", "--mode=root", "--format=tar"),
        *("--include=python3,python3-venv,ca-certificates,make", SUITE, tar, mirror()),
        env={"SOURCE_DATE_EPOCH": "315532800", **os.environ},
    )
    return tar


def secret() -> list[str]:
    """The option of `docker build` with the certificates to trust while it installs, which no layer may hold."""
    certificates = Path(os.environ.get("BUILD_CERTIFICATES") or CERTIFICATES)
    return [f"--secret=id=ca,src={certificates}"] if certificates.is_file() else []


def build_flags(home: Path, env: Mapping[str, str]) -> list[str]:
    """Options of `docker build` that stand in for a registry and for this machine's pip and certificate settings."""
    flags = ["--network=host", f"--build-arg=BASE={BASE}", *secret()]
    wheels = Path(os.environ.get("PIP_FIND_LINKS") or "/nowhere")
    if wheels.is_dir():
        run("tar", "--create", f"--file={home}/wheels.tar", f"--directory={wheels}", ".")
        run(CLIENT, "import", home / "wheels.tar", WHEELS, env=env)
        (home / "wheels.tar").unlink()
        flags += [f"--build-arg=WHEELS={WHEELS}", "--build-arg=TORCH_INDEX="]
    return flags


def with_flags(env: Mapping[str, str], flags: Sequence[str]) -> dict[str, str]:
    """`env` with `flags` in front of its IMAGE_FLAGS."""
    return {**env, "IMAGE_FLAGS": " ".join([*flags, env.get("IMAGE_FLAGS", "")]).strip()}


@contextmanager
def engine() -> Iterator[dict[str, str]]:
    """The environment in which `docker` works; an engine started for it ends with the block."""
    env = dict(os.environ)
    if answers(env):
        say("using the one that is running")
        yield with_flags(env, secret())
        return
    install(PACKAGES)
    home = Path(tempfile.mkdtemp(prefix="engine-"))
    env |= {"DOCKER_HOST": f"unix://{home}/docker.sock", "PATH": f"{CLIENT.parent}:{env['PATH']}", "NETWORK": "host"}
    env.pop("DOCKER_CONTEXT", None)
    say(f"starting one in {home}")
    try:
        with daemon(home, env):
            base = make_base(home)
            run(CLIENT, "import", base, BASE, env=env)
            base.unlink()
            yield with_flags(env, build_flags(home, env))
    finally:
        shutil.rmtree(home)
        say("ended")


def main(command: Sequence[str]) -> int:
    """Run `command` with an engine and return its exit code."""
    if not command:
        sys.exit(__doc__)
    signal.signal(signal.SIGTERM, lambda number, _frame: sys.exit(128 + number))  # so that the engine ends as well
    with engine() as env:
        return subprocess.run(command, env=env).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
