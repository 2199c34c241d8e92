#!/usr/bin/env python3
"""Build the image twice and compare digests: `image_twice.py`, as root on Debian or Ubuntu.

The second build is of a copy of the sources at another path, whose files have other times, and its clock is a day and
two hours ahead. buildah builds, in a chroot and without a daemon: it sets all times to one, which Debian's BuildKit is
too old for. On Debian 12 the base image is made, as for tools/engine.py; elsewhere it is the Dockerfile's.
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
BUILDAH = Path("/usr/bin/buildah")
CLOCK = Path("/usr/lib/x86_64-linux-gnu/faketime/libfaketime.so.1")
PACKAGES = {BUILDAH: "buildah", CLOCK: "libfaketime", engine.DEBOOTSTRAP: "mmdebstrap"}
EPOCH = "315532800"
AHEAD = 26 * 3600
BASE = "localhost/python-base:bookworm"
LEFT_OUT = shutil.ignore_patterns(".git", ".venv*", ".nox", "artifacts", "bench")


def main() -> int:
    """Print both digests; the exit code is 1 if they differ."""
    signal.signal(signal.SIGTERM, lambda number, _frame: sys.exit(128 + number))  # so that nothing stays behind
    engine.install(PACKAGES)
    home = Path(tempfile.mkdtemp(prefix="twice-"))
    try:
        base = make_base(home)
        digests = [build(home, PROJECT, base, ahead=0), build(home, copy(home), base, ahead=AHEAD)]
    finally:
        engine.unmount(home)
        shutil.rmtree(home)
    print(f"{digests[0]}\n{digests[1]}: {'the same' if digests[0] == digests[1] else 'different'}")
    return int(digests[0] != digests[1])


def buildah(home: Path, *arguments: str | Path) -> str:
    """What buildah prints; it keeps everything in `home`."""
    command = [BUILDAH, "--root", home / "store", "--runroot", home / "run", *arguments]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.strip()


def make_base(home: Path) -> list[str]:
    """The options that name the base image."""
    if f"VERSION_CODENAME={engine.SUITE}\n" not in Path("/etc/os-release").read_text():
        return []
    tar = engine.make_base(home)
    container = buildah(home, "from", "scratch")
    buildah(home, "add", "--quiet", container, tar, "/")
    buildah(home, "commit", "--quiet", "--rm", "--timestamp", EPOCH, container, BASE)
    tar.unlink()
    return ["--build-arg", f"BASE={BASE}"]


def copy(home: Path) -> Path:
    """The sources at another path, with other times."""
    target = home / "elsewhere" / "sources"
    shutil.copytree(PROJECT, target, ignore=LEFT_OUT)
    for file in target.rglob("*"):
        os.utime(file, (1e9, 1e9))
    return target


def build(home: Path, sources: Path, base: Sequence[str], ahead: int) -> str:
    """Build `sources` with a clock that is `ahead` seconds ahead; the digest of the image's manifest."""
    started, volumes = time.monotonic(), []
    for source, target in mounts(home, ahead).items():
        volumes += ["--volume", f"{source}:{target}:ro"]
    options = ["--isolation", "chroot", "--network", "host", "--no-cache", "--timestamp", EPOCH, *volumes, *base]
    if os.environ.get("PIP_FIND_LINKS"):
        options += ["--build-arg", "TORCH_INDEX="]
    name = f"localhost/image:{ahead}"
    buildah(home, "bud", "--quiet", *options, "--tag", name, "--file", sources / "Dockerfile", sources)
    engine.say(f"built {sources} in {time.monotonic() - started:.0f} s")
    buildah(home, "push", "--quiet", "--digestfile", home / "digest", name, f"oci:{home}/pushed:image")
    buildah(home, "rmi", name)
    shutil.rmtree(home / "pushed")
    return (home / "digest").read_text().strip()


def mounts(home: Path, ahead: int) -> dict[Path, str]:
    """What the build sees of this machine: certificates, pip's wheels, and the clock that every program in it loads."""
    preload, setting = home / "ld.so.preload", home / "faketimerc"
    preload.write_text("/opt/clock.so\n")
    setting.write_text(f"+{ahead}\n")
    seen = {CLOCK: "/opt/clock.so", preload: "/etc/ld.so.preload", setting: "/etc/faketimerc"}
    seen |= {engine.CERTIFICATES: str(engine.CERTIFICATES)} if engine.CERTIFICATES.is_file() else {}
    wheels = Path(os.environ.get("PIP_FIND_LINKS") or "/nowhere")
    return seen | ({wheels: "/wheels"} if wheels.is_dir() else {})


if __name__ == "__main__":
    sys.exit(main())
