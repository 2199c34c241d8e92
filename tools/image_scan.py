"""Look into every layer of a container image for what must not be there.

    python -m tools.image_scan IMAGE [--secret TEXT]

Reads what `docker save` writes: the image's configuration and history, and each file of each layer, also one that a
later layer hides. Refused are private keys, access tokens, TEXT, files that hold credentials by their name, compilers,
and an image that runs as root but by an entry point that puts that off.
"""

from __future__ import annotations

import argparse
import io
import json
import re
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from pipeline.core import log

SECRETS = {
    "a private key": re.compile(rb"-----BEGIN [A-Z ]*PRIVATE KEY-----\s+(?:[\w-]+: .*\s+)*[A-Za-z0-9+/]{40}"),
    "a Hugging Face token": re.compile(rb"\bhf_[A-Za-z0-9]{34}\b"),
    "a GitHub token": re.compile(rb"\b(?:gh[pousr]_[A-Za-z0-9]{36}|github_pat_\w{60,90})\b"),
    "an AWS key": re.compile(rb"\bAKIA[0-9A-Z]{16}\b"),
}
CREDENTIALS = re.compile(
    r"(.*/)?(\.netrc|\.git-credentials|\.pypirc|\.env|id_(rsa|ecdsa|ed25519)|\.docker/config\.json)"
)
ENTRY = ["/app/tools/entry.sh"]
"""The entry point that goes on as the mounted folder's owner, without a capability: tools/bench_image.py looks."""
COMPILER = re.compile(r"(.*/)?bin/([\w-]+-gnu-)?(gcc|g\+\+|cc|c\+\+|cpp|clang|ld|as|nvcc|rustc|go)(-[\d.]+)?")
KNOWN = (
    (re.compile(r"usr/lib/[\w-]+/libgnutls\.so\.[\d.]+"), "a private key"),  # of its tests of itself
    (re.compile(r".*/transformers/testing_utils\.py"), "a Hugging Face token"),  # of the public tests, for a test Hub
)
"""What packages publish: no secret of anybody's."""
_BLOCK, _OVERLAP = 1 << 24, 1 << 12


def kinds_in(stream: IO[bytes], secret: bytes) -> set[str]:
    """What the content of a file holds that it must not."""
    rest, kinds = b"", set[str]()
    while block := stream.read(_BLOCK):
        window = rest + block
        kinds |= {kind for kind, pattern in SECRETS.items() if pattern.search(window)}
        kinds |= {"the build's secret"} if secret and secret in window else set()
        rest = window[-_OVERLAP:]
    return kinds


def faults_of_layer(layer: IO[bytes], secret: bytes) -> Iterator[str]:
    """What is wrong with the files of a layer."""
    with tarfile.open(fileobj=layer) as files:
        for member in files:
            name = member.name.removeprefix("./")
            if CREDENTIALS.fullmatch(name):
                yield f"{name} holds credentials, by its name"
            if COMPILER.fullmatch(name):
                yield f"{name} is a compiler"
            if content := files.extractfile(member) if member.isfile() else None:
                known = {kind for pattern, kind in KNOWN if pattern.fullmatch(name)}
                yield from (f"{name} holds {kind}" for kind in sorted(kinds_in(content, secret) - known))


def faults_of_config(text: bytes, secret: bytes) -> Iterator[str]:
    """What is wrong with an image's configuration and history."""
    settings: dict[str, Any] = json.loads(text)["config"]
    user = str(settings.get("User", "")).split(":")[0]
    if (not user.isdigit() or int(user) == 0) and settings.get("Entrypoint") != ENTRY:
        yield f"it runs as user {user or 'root'}, expected a number other than 0, or the entry point {ENTRY[0]}"
    for entry in settings.get("Env") or ():
        if re.match(r"\w*(TOKEN|SECRET|PASSWORD|CREDENTIAL)", entry):
            yield f"its environment sets {entry.split('=')[0]}"
    yield from (f"its configuration holds {kind}" for kind in sorted(kinds_in(io.BytesIO(text), secret)))


def faults(saved: Path, secret: str = "") -> list[str]:
    """What is wrong with an image.

    Args:
        saved: what `docker save` wrote.
        secret: text that the build was given and that must not be in it.

    Raises:
        ValueError: that is no image, or one without layers.
    """
    with tarfile.open(saved) as parts:

        def part(name: str) -> IO[bytes]:
            if stream := parts.extractfile(name):
                return stream
            raise ValueError(f"{saved} has no {name}")

        (image,) = json.load(part("manifest.json"))
        if not image["Layers"]:
            raise ValueError(f"{saved} has no layers")
        found = list(faults_of_config(part(image["Config"]).read(), secret.encode()))
        for layer in image["Layers"]:
            found += faults_of_layer(part(layer), secret.encode())
    return found


def scan(image: str, secret: str, env: Mapping[str, str] | None = None) -> list[str]:
    """What is wrong with `image`, of which the engine that `env` names has the layers."""
    with tempfile.TemporaryDirectory() as scratch:
        saved = Path(scratch) / "image.tar"
        subprocess.run(["docker", "save", "--output", saved, image], env=env, check=True)
        return faults(saved, secret)


def main(argv: Sequence[str] | None = None) -> int:
    """Print what is wrong; the exit code is 1 if anything is."""
    parser = argparse.ArgumentParser(prog="python -m tools.image_scan", description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("image")
    parser.add_argument("--secret", default="", help="text that the build was given")
    arguments = parser.parse_args(argv)
    found = scan(arguments.image, arguments.secret)
    for fault in found:
        log.line(f"error: {arguments.image}: {fault}")
    log.line(f"{arguments.image}: looked into every layer, {len(found)} faults")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
