"""Build the image, run the main job in it, look into its layers; time and size become a table in `bench/`.

    python -m tools.bench_image RESULTS

`nox -s image` runs it and compares RESULTS with the host's. An engine is started where none runs. The exit code is 1 if
the image is larger than it may be or holds what it must not.
"""

from __future__ import annotations

import argparse
import os
import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from pipeline.core import log
from pipeline.core.recipe import PROJECT
from tools import engine, figures, image_scan, tables

IMAGE = "hf-to-litert"
LARGEST = 3.0e9
"""Bytes that the CPU image may have, as the engine counts them."""


def timed(env: Mapping[str, str], *command: str) -> float:
    """Run `command`; the seconds it took.

    Raises:
        CalledProcessError: it failed.
    """
    started = time.monotonic()
    subprocess.run(command, cwd=PROJECT, env=env, check=True)
    return time.monotonic() - started


def measure(env: Mapping[str, str], results: Path) -> dict[str, float | str]:
    """Build the image and run the main job in it: seconds, and bytes of the image."""
    build = timed(env, "make", "image", f"IMAGE={IMAGE}")
    job = timed(env, "make", "publish", "IN=docker", f"IMAGE={IMAGE}", f"ARTIFACTS={results}")
    inspect = ("docker", "image", "inspect", "--format", "{{.Size}}", IMAGE)
    size = int(subprocess.run(inspect, env=env, stdout=subprocess.PIPE, check=True).stdout)
    log.line(f"image: built in {build:.0f} s, main job in {job:.0f} s, {log.human_bytes(size)}")
    cores = os.cpu_count() or 1
    return {"date": time.strftime("%Y-%m-%d"), "cores": cores, "build": build, "job": job, "size": size}


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and look; 1 if the image may not be so."""
    parser = argparse.ArgumentParser(prog="python -m tools.bench_image", description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("results", type=Path, help="where the main job in the image puts its files")
    arguments = parser.parse_args(argv)
    secret = f"build secret {secrets.token_hex(16)}"
    with tempfile.NamedTemporaryFile("w", suffix=".crt") as certificates:
        # A line that readers of certificates skip, by which the file is known again if it got into a layer.
        trusted = engine.CERTIFICATES.read_text(encoding="utf-8") if engine.CERTIFICATES.is_file() else ""
        certificates.write(f"{trusted}\n# {secret}\n")
        certificates.flush()
        os.environ["BUILD_CERTIFICATES"] = certificates.name
        with engine.engine() as env:
            found = measure(env, arguments.results)
            faults = image_scan.scan(IMAGE, secret, env)
    tables.write_all(figures.image(found))
    faults += [f"it is larger than {log.human_bytes(LARGEST)}"] if float(found["size"]) > LARGEST else []
    for fault in faults:
        log.line(f"error: {IMAGE}: {fault}")
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())
