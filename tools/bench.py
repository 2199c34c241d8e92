"""Measure what tests must not: speed, time and memory.

    make bench

Three parts. Their tables go to `bench/`, which `python -m tools.figures` writes into the documents; all that was seen
goes to `bench/raw/bench.json`:

* a random Gemma 3n with the layers of E2B: per stage seconds and peak memory, and the latency of int8 against fp32;
* Gemma 3 270M as an int8 bundle in LiteRT-LM, beside the stock exporter's of the same checkpoint, cache and prefill;
  its time to the first token with other prefill signatures, as `python -m tools.bench_prefill` alone, and how near its
  decoding is to what memory gives, as `python -m tools.bench_decode`;
* processor time of a build of the shipped model, beside that of an earlier commit, as `python -m tools.turns` alone.

What is compared is timed in turns in one run, so ratios mean something on a noisy machine. Checkpoint and stock
exporter come from packages in environments of their own; what pip can't get is left out, and said.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import statistics
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from pipeline.core import log, manifest, parallel, versions
from pipeline.core.host import processor
from pipeline.core.recipe import PROJECT
from pipeline.models.gemma3n import ARCHITECTURE
from pipeline.runtime.litert import StepModel
from tools import bench_decode, bench_prefill, bench_stages, bench_stock, figures, tables, turns
from tools.real_models import REAL_MODELS

STEP_STAGES = ("fetch", "graph", "fp32", "int8")
SEQUENCES = (1, 128, 512)
WIDE = {
    "model_type": "gemma3n_text",
    "architectures": ["Gemma3nForCausalLM"],
    "vocab_size": 16384,
    "vocab_size_per_layer_input": 16384,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 256,
    "hidden_size_per_layer_input": 256,
    "laurel_rank": 64,
    "sliding_window": 512,
    "num_kv_shared_layers": 1,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
"""The widths of Gemma 3n E2B; the vocabulary is cut, so that the layers and not the tables are measured."""


def make_checkpoint(folder: Path, layers: int, seed: int) -> Path:
    """A random checkpoint with `layers` layers, sliding and full attention in turn, in float16."""
    kinds = ["sliding_attention", "full_attention"] * layers
    sparsity = [0.95] + [0.0] * (layers - 1)
    config = WIDE | {
        "num_hidden_layers": layers,
        "layer_types": kinds[:layers],
        "activation_sparsity_pattern": sparsity,
    }
    random = np.random.default_rng(seed)
    tensors = {
        f"model.{name}": _values(random, shape).astype(np.float16)
        for name, shape in ARCHITECTURE(config).tensors().items()
    }
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    for file in (PROJECT / "examples" / "tiny-gemma3n").glob("tokenizer*"):
        shutil.copy(file, folder)
    return folder


def _values(random: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Norm weights around 1, matrices at a scale that keeps activations at theirs."""
    drawn = random.standard_normal(shape, dtype=np.float32)
    return 1 + 0.1 * drawn if len(shape) == 1 else drawn / math.sqrt(shape[-1])


def time_in_turns(files: Mapping[str, Path], sequence: int, rounds: int) -> dict[str, float]:
    """Median milliseconds of one run at batch 1 of each file, measured in turns."""
    models = {name: StepModel(path) for name, path in files.items()}
    ids = np.full((1, sequence), 2, dtype=np.int32)
    mask = np.ones_like(ids)
    times: dict[str, list[float]] = {name: [] for name in files}
    for model in models.values():
        model.logits(ids, mask)
    for _ in range(rounds):
        for name, model in models.items():
            started = time.perf_counter()
            model.logits(ids, mask)
            times[name].append(time.perf_counter() - started)
    return {name: 1000 * statistics.median(taken) for name, taken in times.items()}


def measure_steps(folder: Path, layers: int, rounds: int) -> dict[str, Any]:
    """Make the random model, take it through the stages, time the step graphs."""
    checkpoint = make_checkpoint(folder / "wide-gemma3n", layers, seed=0)
    stages = bench_stages.measure(STEP_STAGES, checkpoint, folder, bench_stages.RECIPES / "gemma3n.toml", "step")
    root = folder / checkpoint.name
    files = {name: root / name / "step.tflite" for name in ("fp32", "int8")}
    latency = {}
    for sequence in SEQUENCES:
        log.step(f"timing S = {sequence}")
        latency[str(sequence)] = time_in_turns(files, sequence, rounds)
    parameters = manifest.read(root / "fetch").facts["parameters"]
    return {"parameters": parameters, "layers": layers, "stages": stages, "latency_ms": latency}


def gemma3_checkpoint(folder: Path) -> Path | None:
    """Gemma 3 270M; None where it can't be had."""
    material = bench_stock.environment("material", folder)
    if material is None:
        return None
    checkpoint = folder / REAL_MODELS["gemma3"].folder
    subprocess.run([material, "-m", "tools.gemma3_checkpoint", checkpoint], check=True)
    return checkpoint


def run(folder: Path, layers: int, rounds: int, bundle_rounds: int) -> dict[str, Any]:
    """All parts, in the empty folder `folder`."""
    wide, checkpoint = measure_steps(folder, layers, rounds), gemma3_checkpoint(folder)
    (prefills := folder / "prefills").mkdir()
    (decoding := folder / "decoding").mkdir()
    return {
        **wide,
        "bundle": bench_stock.measure("gemma3", checkpoint, folder, bundle_rounds) if checkpoint else None,
        "prefill": bench_prefill.measure("gemma3", checkpoint, prefills) if checkpoint else None,
        "decode": bench_decode.measure("gemma3", checkpoint, decoding) if checkpoint else None,
        "machine": {"cpu": processor(), "threads": parallel.threads()},
        "versions": versions.installed(),
        "date": time.strftime("%Y-%m-%d"),
        "command": "make bench",
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=tables.RAW, help="where all results go (default: %(default)s)")
    parser.add_argument(
        "--layers", type=int, default=3, help="layers of the random model (default: %(default)s, 257 M parameters)"
    )
    parser.add_argument("--rounds", type=int, default=15, help="timed runs per file and length (default: %(default)s)")
    parser.add_argument("--bundle-rounds", type=int, default=5, help="the same per bundle (default: %(default)s)")
    arguments = parser.parse_args()
    scratch = arguments.out / "work"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    results = run(scratch.resolve(), arguments.layers, arguments.rounds, arguments.bundle_rounds)
    shutil.rmtree(scratch)
    (arguments.out / "bench.json").write_text(manifest.dump_json(results), encoding="utf-8")
    for length, taken in results["latency_ms"].items():
        ratio = taken["int8"] / taken["fp32"]
        log.line(f"S = {length}: fp32 {taken['fp32']:.1f} ms, int8 {taken['int8']:.1f} ms, ratio {ratio:.2f}")
    tables.write_all(figures.wide(results))
    if results["prefill"]:
        tables.write_all(figures.prefill(results["prefill"], results["command"]))
        tables.write_all(figures.decode(results["decode"], results["command"]))
    turns.report(turns.BEFORE, turns.TARGETS)
    log.line(f"written: {arguments.out / 'bench.json'} and tables in bench/; now `python -m tools.figures`")
