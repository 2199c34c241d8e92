#!/usr/bin/env python3
"""Run README's commands on a bare Debian 13 or Ubuntu 24.04: `fresh_host.py ubuntu-24.04 FOLDER TARGET…`, as root.

FOLDER becomes the root of a system as such a release's base image has it, with what README asks for (its own Python
with venv, make) and git, and a clone of the project in /project. Each TARGET is a `make` in it, with nothing of this
machine but its network, its certificates and pip's trust in them. The clone stays, to be looked at.

All of it runs in namespaces of its own: however it ends, it leaves no process and no mount.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import engine

PROJECT = Path(__file__).resolve().parents[1]
SUITES = {"debian-13": "trixie", "ubuntu-24.04": "noble"}
KEYRING = "usr/share/keyrings/ubuntu-archive-keyring.gpg"
"""Ubuntu's keys, as Debian 13 has them in a package: Debian 12 has none."""
NEEDED = "python3,python3-venv,make,git,ca-certificates"
"""README's, and git for the clone."""
KEPT = ("PIP_CERT", "PIP_DEFAULT_TIMEOUT", "OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE")
"""What of this machine's environment is about its network and its processor, which the system below shares."""
ALONE = "FRESH_HOST_ALONE"
"""Set where this runs in namespaces of its own."""


def main(words: Sequence[str]) -> int:
    """Make the system and run each target; the exit code of the first that fails."""
    if len(words) < 3 or words[0] not in SUITES:
        sys.exit(__doc__)
    if ALONE not in os.environ:
        return alone([sys.executable, __file__, *words])
    name, folder, targets = words[0], Path(words[1]).absolute(), words[2:]
    engine.install({engine.DEBOOTSTRAP: "mmdebstrap"})
    install(name, folder)
    for target in targets:
        started = time.monotonic()
        code = inside(folder, "make", "-C", "/project", target).returncode
        print(f"fresh_host: {name}: make {target}: {time.monotonic() - started:.0f} s, exit code {code}", flush=True)
        if code:
            return code
    return 0


def alone(command: Sequence[str]) -> int:
    """Run `command` in namespaces of its own: what it mounts and starts ends with it, and it with this process."""
    # At once, at whatever place it is: the kernel ends what is below.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    namespaces = [
        "setpriv",
        "--pdeathsig",
        "KILL",
        "unshare",
        "--mount",
        "--pid",
        "--fork",
        "--kill-child",
        "--mount-proc",
    ]
    return subprocess.run([*namespaces, *command], env={**os.environ, ALONE: "yes"}).returncode


def install(name: str, folder: Path) -> None:
    """The system in `folder`, and the project's committed sources in it."""
    folder.mkdir(parents=True, exist_ok=True)
    engine.run("mount", "--bind", folder, folder)  # its root is a mount point, as on a host: tests mount things
    engine.say(f"making {name} in {folder}")
    if name.startswith("ubuntu"):
        with tempfile.TemporaryDirectory() as scratch:
            Path(scratch).chmod(0o755)  # apt reads keys as a user of its own
            strap("trixie", Path(scratch) / "keys", "extract", "ubuntu-archive-keyring", engine.mirror())
            keys = f"--keyring={scratch}/keys/{KEYRING}"
            strap(SUITES[name], folder, "apt", NEEDED, keys, "--components=main,universe")
    else:
        strap(SUITES[name], folder, "apt", NEEDED, engine.mirror())
    if engine.CERTIFICATES.is_file():
        shutil.copyfile(engine.CERTIFICATES, folder / engine.CERTIFICATES.relative_to("/"))
    engine.run("git", "clone", "--quiet", "--no-hardlinks", PROJECT, folder / "project")
    for shared in ("dev", "sys", "proc"):
        engine.run("mount", "--rbind", f"/{shared}", folder / shared)


def strap(suite: str, folder: Path, variant: str, packages: str, *where: str) -> None:
    """Make `folder` of `packages` of a suite; `where` ends with the mirror, which mmdebstrap knows for Ubuntu."""
    options = [word for word in where if word.startswith("--")]
    mirrors = [word for word in where if not word.startswith("--")]
    options += [f"--variant={variant}", f"--include={packages}", "--mode=root", "--format=directory", "--quiet"]
    engine.run(engine.DEBOOTSTRAP, *options, suite, folder, *mirrors)


def inside(folder: Path, *command: str) -> subprocess.CompletedProcess[bytes]:
    """Run `command` in the system below `folder`."""
    kept = [f"{name}={os.environ[name]}" for name in KEPT if name in os.environ]
    path = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    clean = ["env", "-i", path, "HOME=/root", "LANG=C.UTF-8", *kept]
    return subprocess.run(["chroot", str(folder), *clean, *command], stdin=subprocess.DEVNULL)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
