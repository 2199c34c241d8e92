"""Measure what merging an adapter takes beside a plain fetch, at true E2B size.

    python -m tools.bench_adapter        (nox -s large_adapter; 30 GB of disk)

A random checkpoint of 4.5 billion parameters and a random adapter of rank 16 on all linear layers: each is fetched in a
process of its own, from folders and from the tests' Hub on loopback, where the base is downloaded. Writes
`bench/adapter.json`, and fails if a limit is missed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from pipeline.core import log, parallel
from pipeline.core.host import processor
from pipeline.core.recipe import PROJECT
from pipeline.models import architecture_for
from tools import tables, watched
from tools.bench_stages import GIB
from tools.make_random_checkpoint import GEOMETRIES, make
from tools.tables import Column, Measured, Row, Table, Value

RANK = 16
MEMORY, RATIO = (1.0, 0.6), (2.0, 1.3)
"""Peak anonymous GiB of the merge, and its time over a plain fetch's: must, aim."""
DISK = 30e9
HUB = ("owner/base", "me/lora")
SAID = {"peft_type": "LORA", "r": RANK, "lora_alpha": 32}
LEFT_OUT = ("embed_tokens", "router", "coefs", "norm")


def adapter(config: dict[str, object], folder: Path) -> Path:
    """The weights of a random adapter of rank 16 for every linear layer of a model, written to `folder`."""
    random = np.random.default_rng(0)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.from_numpy(random.normal(0, 0.02, shape).astype(np.float32))

    tensors = {}
    for name, shape in architecture_for(config).tensors().items():
        if len(shape) == 2 and not any(part in name for part in LEFT_OUT):
            module = f"base_model.model.model.{name.removesuffix('.weight')}"
            tensors[f"{module}.lora_A.weight"] = drawn(RANK, shape[1])
            tensors[f"{module}.lora_B.weight"] = drawn(shape[0], RANK)
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


@contextmanager
def on_hub(base: Path, lora: Path) -> Iterator[None]:
    """A Hub on loopback that holds both; what each file's hash is, is known before anybody asks."""
    sys.path.append(str(PROJECT / "tests" / "stages"))
    from hub_server import HubServer, Stored

    with HubServer() as server:
        for name, folder in zip(HUB, (base, lora), strict=True):
            server.add(
                name,
                {
                    file.name: Stored.of(file) if file.suffix == ".safetensors" else file.read_bytes()
                    for file in folder.iterdir()
                },
            )
        os.environ |= {"HF_ENDPOINT": server.endpoint, "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1"}
        yield


def fetched(model: str | Path, artifacts: Path) -> watched.Watched:
    """What fetch takes of `model`; what it made goes."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the Makefile has it
    command = [sys.executable, "-m", "pipeline.fetch", "--model-id", str(model), "--artifacts", str(artifacts)]
    took = watched.run(command)
    shutil.rmtree(artifacts)
    return took


def table(found: dict[str, watched.Watched]) -> Table:
    """The runs as a table."""
    columns = {
        "time": Column(unit="s", digits=".0f"),
        "processor time": Column(unit="s", digits=".0f"),
        "peak memory": Column(unit="GiB", digits=".2f"),
        "written to disk": Column(unit="GB", digits=".1f"),
    }
    rows = tuple(
        Row(
            name=name,
            values={
                "time": Value(value=took.seconds),
                "processor time": Value(value=took.processor_seconds),
                "peak memory": Value(value=took.peak_anonymous / GIB),
                "written to disk": Value(value=took.written / 1e9),
            },
        )
        for name, took in found.items()
    )
    plain, merged, downloaded, both = found
    return Table(
        title="An adapter merged while fetching",
        about="4.5 billion random parameters in bf16, and an adapter of rank 16 on all linear layers. In folders a "
        "plain fetch links and hashes the base; from a Hub on loopback it downloads it. Memory is anonymous.",
        place=10,
        columns=columns,
        measured=Measured(
            date=time.strftime("%Y-%m-%d"),
            command="`nox -s large_adapter`",
            machine=f"{parallel.threads()} threads ({processor()})",
        ),
        rows=rows,
        ratios=((merged, plain), (both, downloaded)),
    )


def main() -> int:
    """Run from the command line; 1 if a limit is missed, 10 if the disk is too small."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=tuple(GEOMETRIES), default="e2b", help="default: %(default)s")
    parser.add_argument("--made", type=Path, help="keep what is drawn there, and take it from there")
    arguments = parser.parse_args()
    tables.RAW.mkdir(parents=True, exist_ok=True)
    if shutil.disk_usage(tables.RAW).free < DISK:
        log.line(f"error: this needs {log.human_bytes(DISK)} of disk at once")
        return 10
    with tempfile.TemporaryDirectory(dir=tables.RAW) as scratch:
        kept, artifacts, size = arguments.made or Path(scratch), Path(scratch) / "artifacts", arguments.size
        base, lora = kept / "base", kept / "lora"
        if not lora.is_dir():
            make(GEOMETRIES[size], base)
            adapter(GEOMETRIES[size], lora)
        (lora / "adapter_config.json").write_text(json.dumps(SAID | {"base_model_name_or_path": str(base)}))
        found = {f"{name} ({size})": fetched(folder, artifacts) for name, folder in (("plain", base), ("merged", lora))}
        (lora / "adapter_config.json").write_text(json.dumps(SAID | {"base_model_name_or_path": HUB[0]}))
        with on_hub(base, lora):
            for name, model in zip(("downloaded", "downloaded and merged"), HUB, strict=True):
                found[f"{name} ({size})"] = fetched(model, artifacts)
    plain, merged, downloaded, both = found.values()
    tables.write_all({"adapter": table(found)})
    limits = (
        ("peak anonymous GiB", merged.peak_anonymous / GIB, MEMORY),
        ("times, folders", merged.seconds / plain.seconds, RATIO),
        ("times, Hub", both.seconds / downloaded.seconds, RATIO),
    )
    for what, value, (must, aim) in limits:
        log.line(f"{'ok' if value <= must else 'MISSED'}: {what}: {value:.2f} (must ≤ {must}, aim ≤ {aim})")
    return 0 if all(value <= must for _, value, (must, _) in limits) else 1


if __name__ == "__main__":
    sys.exit(main())
