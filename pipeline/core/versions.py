"""Which versions of the toolchain are installed, and whether they are the locked ones."""

from __future__ import annotations

import platform
import re
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

from pipeline.core import log
from pipeline.core.errors import UsageError
from pipeline.core.manifest import Manifest

SHOWN = ("torch", "transformers", "litert-torch", "ai-edge-quantizer", "ai-edge-litert")
RECORDED = (
    *SHOWN,
    "litert-converter",
    "litert-lm-api",
    "litert-lm-builder",
    "huggingface-hub",
    "safetensors",
    "numpy",
)


def installed(packages: tuple[str, ...] = RECORDED) -> dict[str, str]:
    """Versions of `packages` that are installed, and Python's; a package that is absent is left out."""
    versions = {"python": platform.python_version()}
    for package in packages:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions


def locked(lock: Path) -> dict[str, str]:
    """Versions that a requirements-style lock pins."""
    # Up to white space or a marker; hashes follow on lines of their own.
    return dict(re.findall(r"^([a-z0-9-]+)==([^\s;\\]+)", lock.read_text(encoding="utf-8"), flags=re.MULTILINE))


def check(versions: Mapping[str, str], lock: Path) -> None:
    """Make sure that what is installed is what the lock pins; local build tags such as `+cpu` don't count.

    Without the lock a warning is all there can be.

    Raises:
        UsageError: names each package that differs.
    """
    if not lock.is_file():
        log.warn(f"{lock} does not exist: the versions of the toolchain are not checked")
        return
    pins = locked(lock)
    wrong = [
        f"{package} is {version.split('+')[0]}, the lock says {pins[package]}"
        for package, version in versions.items()
        # The CPU and the CUDA build of one torch differ in what follows the plus.
        if package in pins and version.split("+")[0] != pins[package].split("+")[0]
    ]
    if wrong:
        raise UsageError(
            "; ".join(wrong),
            cause="the environment was changed by hand or the lock moved on",
            remedy="run `make clean-env setup` to rebuild .venv from the lock",
        )


def line(versions: Mapping[str, str]) -> str:
    """One line for people, e.g. `python 3.11.7, torch 2.13.0, …`."""
    return ", ".join(f"{name} {versions[name]}" for name in ("python", *SHOWN) if name in versions)


def require_same(finished: Mapping[str, Manifest], recipe_sha256: str, root: Path) -> None:
    """Make sure that the `finished` stages in `root` were made under this recipe, with what is installed.

    Raises:
        UsageError: names what is different, or says that nothing is finished.
    """
    if "fetch" not in finished:
        raise UsageError(f"{root} holds no finished stage", remedy="run `make` first, with the same MODEL_ID")
    present = installed()
    for name, made in finished.items():
        if made.recipe_sha256 != recipe_sha256:
            raise UsageError(f"stage {name} was made under another recipe", remedy="set RECIPE= to that one")
        changed = [f"{tool} {version}" for tool, version in made.tools.items() if present.get(tool) != version]
        if changed:
            raise UsageError(
                f"stage {name} was made with other versions: {', '.join(changed)}",
                remedy="check out the commit in its manifest, and run `make setup`",
            )
