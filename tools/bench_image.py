"""Build the image, run the main job in it, look into its layers; time and size go to `bench/image.json`.

    python tools/engine.py python -m tools.bench_image RESULTS [--secret TEXT]

`nox -s image` runs it and compares RESULTS with the host's. The exit code is 1 if the image is larger than it may be or
holds what it must not.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from pipeline.core import log, manifest
from pipeline.core.recipe import PROJECT
from tools import image_scan

IMAGE = "hf-to-litert"
FIGURES = PROJECT / "bench" / "image.json"
LARGEST = 3.0e9
"""Bytes that the CPU image may have, as the engine counts them."""


def timed(*command: str) -> float:
    """Run `command`; the seconds it took.

    Raises:
        CalledProcessError: it failed.
    """
    started = time.monotonic()
    subprocess.run(command, cwd=PROJECT, check=True)
    return time.monotonic() - started


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and look; 1 if the image may not be so."""
    parser = argparse.ArgumentParser(prog="python -m tools.bench_image", description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("results", type=Path, help="where the main job in the image puts its files")
    parser.add_argument("--secret", default="", help="text of the build's secret, which must be in no layer")
    arguments = parser.parse_args(argv)
    build = timed("make", "image", f"IMAGE={IMAGE}")
    job = timed("make", "publish", "IN=docker", f"IMAGE={IMAGE}", f"ARTIFACTS={arguments.results}")
    inspect = ("docker", "image", "inspect", "--format", "{{.Size}}", IMAGE)
    size = int(subprocess.run(inspect, stdout=subprocess.PIPE, check=True).stdout)
    found = {"date": time.strftime("%Y-%m-%d"), "cores": os.cpu_count(), "build": build, "job": job, "size": size}
    FIGURES.parent.mkdir(exist_ok=True)
    manifest.write_atomically(FIGURES, manifest.dump_json(found))
    log.line(f"image: built in {build:.0f} s, main job in {job:.0f} s, {log.human_bytes(size)}")
    if size > LARGEST:
        log.line(f"error: the image has {log.human_bytes(size)}, the limit is {log.human_bytes(LARGEST)}")
    return image_scan.main([IMAGE, "--secret", arguments.secret]) or int(size > LARGEST)


if __name__ == "__main__":
    sys.exit(main())
