"""Time to the first token by the length of the prompt, for bundles with other prefill signatures.

    python -m tools.bench_prefill gemma3 CHECKPOINT --work FOLDER --ladders 128 32,128 32,128,512

A prefill signature takes so many tokens and no others: LiteRT-LM cuts a prompt into pieces, each for the signature that
fits best, and fills up the last. Each call reads all weights, and attends to all of a static cache; a long signature
does that less often, and wastes more on a short prompt. Bundles have one cache, long enough for every prompt, and int8
weights that are rounded plainly, for GPTQ does nothing for time. Each round is a process of its own per bundle, in
turns; it reads every prompt once. Figures are medians over the rounds. The table goes to `bench/`, which `python -m
tools.figures` writes into the documents.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pipeline.core import log, parallel
from pipeline.core.host import processor
from tools import bench_bundle, bench_stages, figures, real_models, tables, watched
from tools.bench_bundle import medians, prompt
from tools.bench_stock import UNJUDGED
from tools.real_models import REAL_MODELS

LADDERS = ("128", "32,128", "32,128,512", "32,256,1024")
PROMPTS = (32, 256, 1024, 4096)
DECODED = 8
_STEP = 128
"""Cache lengths are multiples of this."""


def cache_length(ladders: Sequence[str], longest: int) -> int:
    """The cache that holds a prompt of `longest` tokens and an answer beside any of the ladders."""
    most = max(int(length) for ladder in ladders for length in ladder.split(","))
    return -(-(longest + DECODED + most) // _STEP) * _STEP


def build(name: str, checkpoint: Path, folder: Path, ladders: Sequence[str], cache: int) -> dict[str, Path]:
    """An int8 bundle of a real model per ladder, a list of lengths with commas, in the empty `folder`."""
    made = {}
    for ladder in ladders:
        same = {"prefill = [32, 128]": f"prefill = [{ladder}]", "cache_length = 4096": f"cache_length = {cache}"}
        changes = bench_stages.INT8_ALONE | UNJUDGED | same | {"gptq = true": "gptq = false"}
        recipe = bench_stages.changed_recipe(REAL_MODELS[name].recipe, folder, changes)
        bench_stages.measure(("fetch", "graph", "int8", "bundle"), checkpoint, folder, recipe, "bundle")
        made[ladder] = folder / f"{ladder}.litertlm"
        (folder / checkpoint.name / "bundle" / "int8.litertlm").replace(made[ladder])
    return made


def read_prompts(bundle: Path, cache: Path, prompts: Sequence[int], threads: int) -> dict[str, float]:
    """Load a bundle and read a prompt of each length: seconds to the first token, and the processor's, by length.

    Raises:
        RuntimeError: the runtime can't load the bundle, or it read another number of tokens.
    """
    import litert_lm

    litert_lm.set_min_log_severity(litert_lm.LogSeverity.ERROR)
    started, found = time.perf_counter(), dict[str, float]()
    backend, sampler = litert_lm.Backend.CPU(thread_count=threads), litert_lm.SamplerConfig(top_k=1)
    with litert_lm.Engine(str(bundle), backend=backend, cache_dir=str(cache), enable_benchmark=True) as engine:
        found["load_s"] = time.perf_counter() - started
        for tokens in prompts:
            with engine.create_session(
                apply_prompt_template=False, sampler_config=sampler, max_output_tokens=DECODED
            ) as session:
                before = time.process_time()
                session.run_prefill([prompt(engine, tokens)])
                found[f"processor_s {tokens}"] = time.process_time() - before
                session.run_decode()
                info = session.get_benchmark_info()
            if info.last_prefill_token_count != tokens:
                raise RuntimeError(f"{bundle}: {info.last_prefill_token_count} tokens were read, not {tokens}")
            found[f"first_token_s {tokens}"] = info.time_to_first_token_in_second
    return found


def _apart(bundle: Path, cache: Path, prompts: Sequence[int], threads: int) -> dict[str, float]:
    """`read_prompts` in a process of its own, and what memory that took in bytes."""
    with tempfile.TemporaryDirectory() as scratch:
        result = Path(scratch) / "result.json"
        task = {"bundle": str(bundle), "cache": str(cache), "prompts": list(prompts), "threads": threads}
        took = watched.run([sys.executable, "-m", "tools.bench_prefill", "--task", json.dumps(task), str(result)])
        measured: dict[str, float] = json.loads(result.read_text(encoding="utf-8"))
    return measured | {"peak_resident": took.peak_resident, "peak_anonymous": took.peak_anonymous}


def compare(bundles: Mapping[str, Path], prompts: Sequence[int], threads: int, rounds: int) -> dict[str, Any]:
    """Medians over rounds by bundle, and its size; the first load of each, which packs weights, comes before."""

    def run(file: Path, cache: Path, number: int) -> dict[str, float]:
        # Packed weights alone are asked of the first round: the shortest prompt will do.
        return _apart(file, cache, prompts if number else prompts[:1], threads)

    taken = bench_bundle.in_turns(bundles, rounds, run)
    return {name: {"size": bundles[name].stat().st_size, **medians(rows[1:])} for name, rows in taken.items()}


def measure(
    name: str,
    checkpoint: Path,
    folder: Path,
    ladders: Sequence[str] = LADDERS,
    prompts: Sequence[int] = PROMPTS,
    rounds: int = 3,
) -> dict[str, Any]:
    """Everything: bundles of a real model, in the empty `folder`, and what each takes for each prompt."""
    busy = os.getloadavg()[0]
    cache = cache_length(ladders, max(prompts))
    bundles = build(name, checkpoint, folder, ladders, cache)
    return {
        "model": name,
        "cache": cache,
        "prompts": list(prompts),
        "ladders": compare(bundles, prompts, parallel.threads(), rounds),
        "rounds": rounds,
        "threads": parallel.threads(),
        "cpu": processor(),
        "load_average": busy,
        "runtime": version("litert-lm-api"),
        "date": time.strftime("%Y-%m-%d"),
    }


def table(found: Mapping[str, Any]) -> list[str]:
    """Seconds to the first token and the processor's, by ladder and prompt, as aligned lines."""
    rows = [["prefill", *(f"{tokens:,}" for tokens in found["prompts"]), "load s", "anonymous MB", "size MB"]]
    for ladder, row in found["ladders"].items():
        first = [(row[f"first_token_s {tokens}"], row[f"processor_s {tokens}"]) for tokens in found["prompts"]]
        cells = [f"{seconds:.2f} s ({spent:.2f})" for seconds, spent in first]
        rest = [f"{row['load_s']:.2f}", f"{row['peak_anonymous'] / 1e6:.0f}", f"{row['size'] / 1e6:.1f}"]
        rows.append([ladder, *cells, *rest])
    return log.align(rows)


def main() -> int:
    """Build, measure, write the table; the exit code."""
    parser = real_models.command_line(__doc__, rounds=3)
    parser.add_argument("--ladders", nargs="+", default=LADDERS, help="lengths of prefills (default: %(default)s)")
    parser.add_argument("--prompts", nargs="+", type=int, default=PROMPTS, help="in tokens (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=tables.RAW / "prefill.json", help="default: %(default)s")
    arguments = parser.parse_args()
    checkpoint, rounds = arguments.checkpoint.resolve(), arguments.rounds
    found = real_models.measured(
        parser,
        arguments.work,
        lambda work: measure(arguments.model, checkpoint, work, arguments.ladders, arguments.prompts, rounds),
    )
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    tables.write_all(figures.prefill(found, f"python -m tools.bench_prefill {arguments.model} CHECKPOINT"))
    for line in table(found):
        log.line(line)
    return 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--task"]:
        told = json.loads(sys.argv[2])
        answer = read_prompts(Path(told["bundle"]), Path(told["cache"]), told["prompts"], told["threads"])
        Path(sys.argv[3]).write_text(json.dumps(answer), encoding="utf-8")
    else:
        sys.exit(main())
