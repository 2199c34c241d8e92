"""How a command runs in the project's image: on a read-only file system and without rights.

It has a network only where it downloads or uploads. The user's folders are mounted where they are.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

_HARDENED = ("--read-only", "--tmpfs", "/tmp", "--cap-drop", "ALL", "--security-opt", "no-new-privileges")
_PASSED = ("PYTHONHASHSEED", "OMP_NUM_THREADS", "OMP_WAIT_POLICY")
# Secrets go by name, so that no list of processes shows a value; what a CI job shows for itself goes to uploads alone.
_TOKEN = ("HF_TOKEN", "HF_ENDPOINT")
_IDENTITY = (
    *("HF_OIDC_RESOURCE", "HF_OIDC_ID_TOKEN", "GITHUB_ACTIONS"),
    *("ACTIONS_ID_TOKEN_REQUEST_URL", "ACTIONS_ID_TOKEN_REQUEST_TOKEN"),
)
# Evaluated by the shell that runs the command: as whom. Which source it is made of the image says itself.
_WHOSE = '--user "$(id -u):$(id -g)"'
INSIDE = "env -u HF_TOKEN HF_HUB_OFFLINE=1"
"""Before a command that needs no Hub, where Make itself runs in the image."""


def command(name: str, said: Mapping[str, str], mounts: Sequence[str], *, online: bool) -> str:
    """The start of a shell's command line, up to the image, by which `name` runs.

    Args:
        name: a stage or command.
        said: Make's settings.
        mounts: what it reads, as options of `docker run`.
        online: whether it may talk to the Hub.
    """
    image, artifacts = shlex.quote(said["IMAGE"]), os.path.abspath(said["ARTIFACTS"])
    digest = f"-e IMAGE_DIGEST=\"$(docker image inspect --format '{{{{.Id}}}}' {image})\""
    shown = [f"{path}:{path}:ro" for path in map(_absolute, (said["FILE"], said["AGAINST"])) if path]
    terminal = ["-it"] if name == "chat" else []
    gpus = ["--gpus", "all"] if said["DEVICE"] == "cuda" else []
    parts = [
        shlex.join(["docker", "run", "--rm", *terminal, *_HARDENED]),
        _WHOSE,
        shlex.join([*gpus, *_environment(_PASSED)]),
        digest,
        shlex.join([*_network(name, said, online), "-v", f"{artifacts}:{artifacts}"]),
        shlex.join([word for mount in shown for word in ("-v", mount)]),
        shlex.join(mounts),
        image,
    ]
    return " ".join(filter(None, parts))


def _network(name: str, said: Mapping[str, str], online: bool) -> list[str]:
    if not online:
        return ["--network", "none", "-e", "HF_HUB_OFFLINE=1"]
    # An identity that reads, for a user and not for a repository, is shown by what downloads as well.
    reads = "/" not in (os.environ.get("HF_OIDC_RESOURCE") or "/")
    shown = name == "upload" or (reads and name in ("fetch", "plan"))
    return ["--network", said["NETWORK"], *_environment((*_TOKEN, *(_IDENTITY if shown else ())))]


def _environment(names: Iterable[str]) -> list[str]:
    return [word for name in names for word in ("-e", name)]


def _absolute(path: str) -> str:
    return str(Path.cwd() / path) if path else ""
