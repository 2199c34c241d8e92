"""The one place that starts other programs."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path


def output(command: Sequence[str], *, cwd: Path | None = None, env: Mapping[str, str] | None = None) -> str | None:
    """Standard output of `command`, stripped, or None if it can't be started or fails."""
    try:
        # A list and no shell, here and below: no name in a command is ever text of a shell.
        done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def run(command: Sequence[str], *, cwd: Path | None = None, env: Mapping[str, str] | None = None) -> int:
    """Run `command`, which prints for itself, and return its exit code."""
    return subprocess.run(command, cwd=cwd, env=env, check=False).returncode
