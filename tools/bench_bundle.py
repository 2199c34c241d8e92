"""Measure `.litertlm` bundles in the real LiteRT-LM runtime, against each other.

    python -m tools.bench_bundle ours=a.litertlm stock=b.litertlm --rounds 5 --out bench/raw/bundle.json

Per bundle: tokens per second of prefill and of decode, seconds to the first token and to load, peak memory. Each
measurement is a process of its own, and the bundles come in turns, round after round, so that their ratios mean
something on a noisy machine. Figures are medians over the rounds; the JSON has every round's as well.

The first load of a bundle, when the runtime packs the weights and writes them to its cache, is a round of its own
before the others (`first`). The prompt has exactly as many tokens as asked, its start token included; a prefill
signature runs whole whatever it holds, so lengths that are multiples of it measure best. Decoding is greedy, whatever
sampler a bundle names, and must give as many tokens as asked. Load time is by the clock: the runtime's own figure adds
up phases that overlap.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pipeline.core import log, parallel
from pipeline.core.host import processor
from tools import watched

WORD = " a"
"""What prompts consist of: one token wherever it stands, and models go on with it rather than stop."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """What each process does: tokens in, tokens out, threads of the runtime."""

    prompt_tokens: int
    decode_tokens: int
    threads: int


def measure(bundle: Path, cache: Path, work: Work) -> dict[str, float]:
    """Load a bundle, run one prompt, decode; seconds, and tokens per second as the runtime counts them.

    Args:
        bundle: the `.litertlm` file.
        cache: the folder for the runtime's packed weights.
        work: how much to run.

    Raises:
        RuntimeError: the runtime can't load the bundle, or it took or gave another number of tokens than asked.
    """
    import litert_lm

    litert_lm.set_min_log_severity(litert_lm.LogSeverity.ERROR)
    started = time.perf_counter()
    backend = litert_lm.Backend.CPU(thread_count=work.threads)
    with litert_lm.Engine(str(bundle), backend=backend, cache_dir=str(cache), enable_benchmark=True) as engine:
        sampler = litert_lm.SamplerConfig(top_k=1)
        text = prompt(engine, work.prompt_tokens)
        # Closed before the engine, which complains of living sessions otherwise.
        with engine.create_session(
            apply_prompt_template=False, sampler_config=sampler, max_output_tokens=work.decode_tokens
        ) as session:
            loaded = time.perf_counter() - started
            session.run_prefill([text])
            session.run_decode()
            info = session.get_benchmark_info()
    counted = (info.last_prefill_token_count, info.last_decode_token_count)
    if counted != (work.prompt_tokens, work.decode_tokens):
        raise RuntimeError(f"{bundle}: {counted} tokens in and out, not {(work.prompt_tokens, work.decode_tokens)}")
    return {
        "load_s": loaded,
        "prefill_tokens_per_s": info.last_prefill_tokens_per_second,
        "decode_tokens_per_s": info.last_decode_tokens_per_second,
        "first_token_s": info.time_to_first_token_in_second,
    }


def prompt(engine: Any, tokens: int) -> str:
    """A text that the runtime reads as `tokens` tokens, the start token included.

    Raises:
        RuntimeError: the bundle's tokenizer has no single token for `WORD`.
    """
    text = WORD * (tokens - (engine.bos_token_id is not None))
    counted = len(engine.tokenize(text))
    if counted != len(text) // len(WORD):
        raise RuntimeError(f"{len(text) // len(WORD)} times {WORD!r} is {counted} tokens")
    return text


def measure_apart(bundle: Path, cache: Path, work: Work) -> dict[str, float]:
    """`measure` in a process of its own, and what memory that took in bytes.

    Raises:
        subprocess.CalledProcessError: it failed; it has said why.
    """
    with tempfile.TemporaryDirectory() as scratch:
        result = Path(scratch) / "result.json"
        task = {"bundle": str(bundle), "cache": str(cache), "result": str(result), "work": asdict(work)}
        took = watched.run([sys.executable, "-m", "tools.bench_bundle", "--task", json.dumps(task)])
        measured: dict[str, float] = json.loads(result.read_text(encoding="utf-8"))
    return measured | {"peak_resident": took.peak_resident, "peak_anonymous": took.peak_anonymous}


def run_task(task: Mapping[str, Any]) -> None:
    """What the process of `measure_apart` does."""
    measured = measure(Path(task["bundle"]), Path(task["cache"]), Work(**task["work"]))
    Path(task["result"]).write_text(json.dumps(measured), encoding="utf-8")


def in_turns(
    bundles: Mapping[str, Path], rounds: int, run: Callable[[Path, Path, int], dict[str, float]]
) -> dict[str, list[dict[str, float]]]:
    """What `run` gives of each bundle, its folder for packed weights, and the round; round 0 packs them."""
    taken: dict[str, list[dict[str, float]]] = {name: [] for name in bundles}
    with tempfile.TemporaryDirectory() as scratch:
        for number in range(rounds + 1):
            log.step(f"round {number} of {rounds}" if number else "first loads")
            for name, file in bundles.items():
                cache = Path(scratch) / name
                cache.mkdir(exist_ok=True)
                taken[name].append(run(file, cache, number))
    return taken


def compare(bundles: Mapping[str, Path], work: Work, rounds: int) -> dict[str, dict[str, Any]]:
    """Measure every bundle, in turns over `rounds` rounds: by name its size, medians, first round, rounds."""
    taken = in_turns(bundles, rounds, lambda file, cache, _: measure_apart(file, cache, work))
    return {
        name: {"size": bundles[name].stat().st_size, **medians(rows[1:]), "first": rows[0], "rounds": rows[1:]}
        for name, rows in taken.items()
    }


def medians(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The median of every figure."""
    return {name: statistics.median(row[name] for row in rows) for name in rows[0]}


def table(results: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The medians as lines: a header, then a bundle each, and last the first bundle over every other."""
    columns = {
        "prefill tok/s": ("prefill_tokens_per_s", 1.0, ".1f"),
        "decode tok/s": ("decode_tokens_per_s", 1.0, ".1f"),
        "first token s": ("first_token_s", 1.0, ".3f"),
        "load s": ("load_s", 1.0, ".2f"),
        "resident MB": ("peak_resident", 1e-6, ".0f"),
        "anonymous MB": ("peak_anonymous", 1e-6, ".0f"),
        "size MB": ("size", 1e-6, ".1f"),
    }
    first, *others = results
    width = max(len(f"{first} / {name}") for name in results)
    lines = [" ".join(["".ljust(width), *columns])]

    def add(name: str, cells: Sequence[str]) -> None:
        padded = [cell.rjust(len(column)) for cell, column in zip(cells, columns, strict=True)]
        lines.append(" ".join([name.ljust(width), *padded]))

    for name, row in results.items():
        add(name, [format(row[key] * scale, form) for key, scale, form in columns.values()])
    for name in others:
        ratios = [results[first][key] / results[name][key] for key, *_ in columns.values()]
        add(f"{first} / {name}", [format(ratio, ".2f") for ratio in ratios])
    return lines


def named_file(text: str) -> tuple[str, Path]:
    """`NAME=FILE` taken apart."""
    name, found, file = text.partition("=")
    if not found or not name or "/" in name or not Path(file).is_file():
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=FILE with a file that exists")
    return name, Path(file)


def main() -> None:
    """Measure the bundles that the command line names, write the JSON, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", nargs="+", type=named_file, metavar="NAME=FILE", help="a bundle and what to call it")
    parser.add_argument("--prompt-tokens", type=int, default=128, help="default: %(default)s")
    parser.add_argument("--decode-tokens", type=int, default=128, help="default: %(default)s")
    parser.add_argument(
        "--threads", type=int, default=parallel.threads(), help="default: OMP_NUM_THREADS, else one per core"
    )
    parser.add_argument("--rounds", type=int, default=5, help="measurements per bundle (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="the JSON file to write")
    arguments = parser.parse_args()
    work = Work(prompt_tokens=arguments.prompt_tokens, decode_tokens=arguments.decode_tokens, threads=arguments.threads)
    try:
        results = compare(dict(arguments.bundles), work, arguments.rounds)
    except subprocess.CalledProcessError:
        parser.exit(1, "A measurement failed; what it said is above.\n")
    for line in table(results):
        log.line(line)
    if arguments.out:
        written = {
            "bundles": results,
            **asdict(work),
            "cpu": processor(),
            "runtime": version("litert-lm-api"),
            "date": time.strftime("%Y-%m-%d"),
        }
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--task"]:
        run_task(json.loads(sys.argv[2]))
    else:
        main()
