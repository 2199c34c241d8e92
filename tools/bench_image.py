"""Build the image, run the main job in it, try its entry point, look into its layers; `bench/` gets a table of it.

    python -m tools.bench_image RESULTS [--lock cuda]

`nox -s image` runs it and compares RESULTS with the host's, `nox -s image_cuda` that with CUDA's torch, on the CPU. An
engine is started where none runs. The exit code is 1 if the image is larger than it may be or holds what it must not.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pipeline.core import log, stage
from pipeline.core.recipe import PROJECT
from tools import engine, figures, image_scan, tables

LARGEST = {"cpu": 2.0e9, "cuda": 6.0e9}
"""Bytes that the image of a lock may have, as the engine counts them."""
SOON = 8
"""Seconds; after ten, `docker stop` kills."""
SAME = ("outputs", "facts", "source", "tools")
"""What a stage's manifest has in common, whichever way the image was used."""
OWNER = 1234
"""Whose folder is mounted, where root runs this."""


def timed(env: Mapping[str, str], *command: str) -> float:
    """Run `command`; the seconds it took.

    Raises:
        CalledProcessError: it failed.
    """
    started = time.monotonic()
    subprocess.run(command, cwd=PROJECT, env=env, check=True)
    return time.monotonic() - started


def measure(env: Mapping[str, str], results: Path) -> dict[str, float | str]:
    """Build the image and run the main job in it, offline and read-only: seconds, and bytes of the image."""
    build = timed(env, "make", "image")
    job = timed(env, *in_image(env, "all", mounted=results))
    inspect = ("docker", "image", "inspect", "--format", "{{.Size}}", env["IMAGE"])
    size = int(subprocess.run(inspect, env=env, stdout=subprocess.PIPE, check=True).stdout)
    log.line(f"image: built in {build:.0f} s, main job in {job:.0f} s, {log.human_bytes(size)}")
    cores = os.cpu_count() or 1
    return {"date": time.strftime("%Y-%m-%d"), "cores": cores, "build": build, "job": job, "size": size}


def in_image(
    env: Mapping[str, str], *words: str, mounted: Path | None = None, options: Sequence[str] = ()
) -> list[str]:
    """The command that runs `words` in the image that `env` names, without a network and on a read-only root."""
    mount = ("-v", f"{mounted}:/artifacts") if mounted else ()
    return ["docker", "run", "--rm", "--network=none", "--read-only", *mount, *options, env["IMAGE"], *words]


def entry_faults(env: Mapping[str, str], results: Path) -> Iterator[str]:
    """What the entry point does otherwise than it must, `results` being what the main job left."""
    owner = results.stat().st_uid
    others = [file for file in results.rglob("*") if file.lstat().st_uid != owner]
    if others:
        yield f"{others[0]} does not belong to user {owner}, as the mounted folder does"

    def said(*words: str, **run: Any) -> tuple[int, str]:
        command = in_image(env, *words, **run)
        done = subprocess.run(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        return done.returncode, done.stdout

    who = (
        "python",
        "-c",
        "import os; print(os.getuid(), *(r for r in open('/proc/self/status') if r[:6] == 'CapEff'))",
    )
    tries = {
        "without words": (0, "make [target", said()),
        "without a folder": (2, "there is no folder /artifacts", said("int8")),
        "with somebody else's folder": (
            *(2, "can't be written to"),
            said("int8", mounted=results, options=("--user=4321:4321",)),
        ),
        "as the owner, without capabilities": (
            *(0, "int8"),
            said("plan", mounted=results, options=(f"--user={owner}:{owner}", "--cap-drop=ALL")),
        ),
        "as root, with a folder": (0, f"{owner} CapEff:\t{'0' * 16}\n", said(*who, mounted=results)),
        "as root, without one": (0, f"65534 CapEff:\t{'0' * 16}\n", said(*who)),
        "asked for what needs the sources": (2, "can't `make test`", said("test", mounted=results)),
    }
    for what, (code, text, (ended, output)) in tries.items():
        if ended != code or text not in output:
            yield f"{what} it ended with {ended}, expected {code} and {text!r}: {output.strip()[-400:]}"
    for sent in ("INT", "TERM"):
        yield from signal_faults(env, sent)


def signal_faults(env: Mapping[str, str], sent: str) -> Iterator[str]:
    """What is wrong with how the image ends at a signal, which the engine sends to its first process alone."""
    name = f"signalled-{secrets.token_hex(4)}"
    command = in_image(env, "python", "-c", "import time; print(flush=True); time.sleep(60)", options=("--name", name))
    with subprocess.Popen(command, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        started = time.monotonic()
        subprocess.run(["docker", "kill", f"--signal={sent}", name], env=env, stdout=subprocess.DEVNULL, check=True)
        process.wait()
    if time.monotonic() - started > SOON:
        yield f"SIG{sent} did not end it within {SOON} s"


def cluster_faults(env: Mapping[str, str]) -> Iterator[str]:
    """What is wrong with a scheduler and a worker in containers, by which another container makes golden."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    names = [f"{role}-{secrets.token_hex(4)}" for role in ("scheduler", "worker")]
    with tempfile.TemporaryDirectory() as scratch:
        mounted = ("--network=host", "--read-only", "-v", f"{scratch}:/artifacts")
        host, port = address.split(":")
        words = (["scheduler", "--host", host, "--port", port], ["worker", f"tcp://{address}"])
        try:
            for name, command in zip(names, words, strict=True):
                start = ["docker", "run", "--detach", "--name", name, *mounted, env["IMAGE"], *command]
                subprocess.run(start, env=env, stdout=subprocess.DEVNULL, check=True)
            asked = ["docker", "run", "--rm", *mounted, env["IMAGE"], "golden", f"CLUSTER=tcp://{address}"]
            done = subprocess.run(asked, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            told = [subprocess.run(["docker", "logs", name], env=env, capture_output=True).stderr for name in names]
        finally:
            subprocess.run(["docker", "rm", "--force", *names], env=env, capture_output=True)
    if done.returncode or f"shards run on 1 workers of tcp://{address}" not in done.stdout:
        said = "\n".join([done.stdout, *(text.decode(errors="replace")[-2000:] for text in told)])
        yield f"golden by a worker in it ended with {done.returncode}: {said}"


def ways_differ(env: Mapping[str, str], results: Path) -> Iterator[str]:
    """What a stage by `make IN=docker` made otherwise than the main job did."""
    with tempfile.TemporaryDirectory() as scratch:
        timed(env, "make", "fetch", "IN=docker", f"ARTIFACTS={scratch}")
        papers = [folder / "tiny-gemma3n" / "fetch" / "manifest.json" for folder in (Path(scratch), results)]
        one, other = (json.loads(file.read_text(encoding="utf-8")) for file in papers)
    yield from (f"its {key} in fetch is not `make IN=docker`'s" for key in SAME if one[key] != other[key])
    if other["source"] != asdict(stage.source()):
        yield f"it says that its source is {other['source']}, here it is {stage.source()}"


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and look; 1 if the image may not be so."""
    parser = argparse.ArgumentParser(prog="python -m tools.bench_image", description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("results", type=Path, help="where the main job in the image puts its files")
    parser.add_argument("--lock", choices=[*LARGEST], default="cpu", help="which torch it has (default: %(default)s)")
    arguments = parser.parse_args(argv)
    secret = f"build secret {secrets.token_hex(16)}"
    with tempfile.NamedTemporaryFile("w", suffix=".crt") as certificates:
        # A line that readers of certificates skip, by which the file is known again if it got into a layer.
        trusted = engine.CERTIFICATES.read_text(encoding="utf-8") if engine.CERTIFICATES.is_file() else ""
        certificates.write(f"{trusted}\n# {secret}\n")
        certificates.flush()
        os.environ["BUILD_CERTIFICATES"] = certificates.name
        arguments.results.mkdir(parents=True)
        if os.geteuid() == 0:
            os.chown(arguments.results, OWNER, OWNER)
        with engine.engine() as started:
            env = engine.with_flags(started, [f"--build-arg=LOCK={arguments.lock}"])
            env["IMAGE"] = "hf-to-litert" if arguments.lock == "cpu" else f"hf-to-litert-{arguments.lock}"
            found = measure(env, arguments.results.absolute())
            faults = [*entry_faults(env, arguments.results), *ways_differ(env, arguments.results)]
            faults += cluster_faults(env)
            faults += image_scan.scan(env["IMAGE"], secret, env)
    made = figures.image(found, arguments.lock)
    tables.write_all({name: tables.joined(tables.read(tables.BENCH / f"{name}.json"), made[name]) for name in made})
    largest = LARGEST[arguments.lock]
    faults += [f"it is larger than {log.human_bytes(largest)}"] if float(found["size"]) > largest else []
    for fault in faults:
        log.line(f"error: {arguments.lock} image: {fault}")
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())
