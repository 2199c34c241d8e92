"""Write the measured figures into the README, from what `make`, `make bench` and `nox -s large image` leave.

    python -m tools.figures

Reads `artifacts/tiny-gemma3n/verify/report.json` and `bench.json`, `large.json`, `image.json` and, if it is there,
`rival.json` in `bench/`; replaces what stands between the two markers.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from pipeline.core import log
from pipeline.core.recipe import PROJECT
from tools.bench_stages import together

README = PROJECT / "README.md"
REPORT = PROJECT / "artifacts" / "tiny-gemma3n" / "verify" / "report.json"
BENCH = PROJECT / "bench" / "bench.json"
LARGE = PROJECT / "bench" / "large.json"
IMAGE = PROJECT / "bench" / "image.json"
RIVAL = PROJECT / "bench" / "rival.json"
PICTURE = LARGE.with_suffix(".png")
BEGIN, END = "<!-- figures: written by tools/figures.py -->", "<!-- end of figures -->"
NAMES = {
    "fp32": "fp32",
    "fp16": "fp16 weights",
    "int8": "int8, dynamic",
    "int8-static": "int8, full integer",
    "int8-static16": "int8, full integer, 16-bit activations",
}


def quality(report: dict[str, Any]) -> list[str]:
    """The shipped model's files: size, and quality against what each is judged by."""
    grid = [report["variants"]["fp32"]["grid"][kernels] for kernels in ("xnnpack", "builtin")]
    rows = [
        f"The shipped model, {report['parameters']:,} parameters; `make` on {report['date']}, "
        f"{report['machine']['cores']} cores ({report['machine']['processor']}), torch {report['tools']['torch']}, "
        f"transformers {report['tools']['transformers']}, LiteRT {report['tools']['ai-edge-litert']}. "
        f"{report['positions']:,} held-out positions; fp32 is held against Hugging Face, "
        "the others against our fp32 file.",
        "",
        "| file | size | of fp32 | KLD (95 %) | top-1 | perplexity | integer products | S = 1 | S = 128 | S = 1,024 |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name in report["order"]:
        variant, speed = report["variants"][name], report["speed"][name]["xnnpack"]["latency"]
        scores = variant["against_fp32"] or variant["against_reference"]
        kld, share = scores["kld"], variant["integer_share"]
        rows.append(
            f"| {NAMES.get(name, name)} | {variant['size'] / 1e6:.2f} MB | {variant['size_ratio']:.3f} "
            f"| {kld['value']:.1e} ({kld['low']:.1e} to {kld['high']:.1e}) | {scores['top1']['value']:.2%} "
            f"| {scores['perplexity']:.2f} | {f'{share:.1%}' if share else '–'} "
            f"| {1000 * speed['1']:.2f} ms | {1000 * speed['128']:.1f} ms | {1000 * speed['1024']:.0f} ms |"
        )
    worst = max(grid, key=lambda result: result["nmse"])
    rows += [
        "",
        f"fp32 over {grid[0]['cases']} shapes (batch × sequence × padding; {grid[1]['cases']} of them also without "
        f"XNNPACK): worst logits NMSE {worst['nmse']:.1e}, top-1 {min(result['top1'] for result in grid):.0%}; "
        f"{report['variants']['fp32']['size_per_parameter']:.3f} bytes per parameter.",
    ]
    return rows


def speed(bench: dict[str, Any]) -> list[str]:
    """The larger random model: int8 against fp32, time and memory of the stages."""
    rows = [
        "",
        f"A random Gemma 3n with E2B's layer widths, {bench['layers']} layers, {bench['parameters'] / 1e6:.0f} M "
        f"parameters; `{bench['command']}` on {bench['date']}, {bench['machine']['threads']} threads "
        f"({bench['machine']['cpu']}). Both files timed in turns.",
        "",
        "| | " + " | ".join(f"S = {length}" for length in bench["latency_ms"]) + " |",
        "|---|" + "---|" * len(bench["latency_ms"]),
    ]
    for name in ("fp32", "int8"):
        rows.append(
            f"| {name} | " + " | ".join(f"{taken[name]:.1f} ms" for taken in bench["latency_ms"].values()) + " |"
        )
    ratios = [f"{taken['int8'] / taken['fp32']:.2f}" for taken in bench["latency_ms"].values()]
    rows += ["| int8 / fp32 | " + " | ".join(ratios) + " |", ""]
    stages = [
        f"{name} {stage['seconds']:.0f} s and {stage['peak_anonymous'] / 2**30:.2f} GiB"
        for name, stage in bench["stages"].items()
    ]
    rows.append(f"Stages on it, time and peak anonymous memory: {', '.join(stages)}.")
    return rows


BUNDLE_COLUMNS = (
    ("size", "size", 1e-6, ".1f", " MB"),
    ("prefill", "prefill_tokens_per_s", 1.0, ".0f", " tok/s"),
    ("decode", "decode_tokens_per_s", 1.0, ".1f", " tok/s"),
    ("first token", "first_token_s", 1.0, ".2f", " s"),
    ("load", "load_s", 1.0, ".2f", " s"),
    ("peak anonymous", "peak_anonymous", 2**-30, ".2f", " GiB"),
)
"""Heading, name in `bench.json`, factor, format and unit of what is measured of a bundle."""
WHO = {"ours": "this project", "stock": "litert-torch `export_hf`"}


def bundles(bench: dict[str, Any]) -> list[str]:
    """Gemma 3 270M's int8 bundle in LiteRT-LM, beside the stock exporter's; nothing where it was not measured."""
    found = bench.get("bundle")
    if not found:
        return []
    rows = [
        "",
        f"Gemma 3 270M, {found['parameters'] / 1e6:.0f} M parameters, as an int8 bundle in LiteRT-LM "
        f"{found['runtime']}, on the same machine: {found['prompt_tokens']} tokens in, {found['decode_tokens']} out, "
        f"cache of {found['cache']:,}; medians of {found['rounds']} rounds in turns.",
        "",
        f"| | {' | '.join(heading for heading, *_ in BUNDLE_COLUMNS)} | build | its peak anonymous | resident |",
        "|---|" + "---|" * (len(BUNDLE_COLUMNS) + 3),
    ]
    for name, row in found["bundles"].items():
        cells = [f"{row[key] * factor:{form}}{unit}" for _, key, factor, form, unit in BUNDLE_COLUMNS]
        build = found["builds"][name]
        cells += [f"{build['seconds']:.0f} s"]
        cells += [f"{build[key] / 2**30:.2f} GiB" for key in ("peak_anonymous", "peak_resident")]
        rows.append(f"| {WHO[name]} | {' | '.join(cells)} |")
    if "stock" in found["bundles"]:
        ours, stock = (found["bundles"][name] | {"build": found["builds"][name]} for name in ("ours", "stock"))
        cells = [f"{ours[key] / stock[key]:.2f}" for _, key, *_ in BUNDLE_COLUMNS]
        cells += [
            f"{ours['build'][key] / stock['build'][key]:.2f}" for key in ("seconds", "peak_anonymous", "peak_resident")
        ]
        rows.append(f"| ours / stock | {' | '.join(cells)} |")
    return rows


def rival(found: dict[str, Any]) -> list[str]:
    """Gemma 3 270M's int8 bundle beside llama.cpp's Q8_0 of the same checkpoint."""
    ours, theirs = found["files"]["ours"], found["files"]["llama.cpp"]
    rows = [
        "",
        "The same bundle beside llama.cpp's Q8_0 of the same checkpoint (the source in llama-cpp-python "
        f"{found['bindings']}, built for this processor); `nox -s rival` on {found['date']}, {found['threads']} "
        f"threads ({found['cpu']}). Quality against Hugging Face in fp32 on {ours['positions']:,} positions of "
        f"{ours['blocks']} held-out texts; speed with {found['prompt_tokens']} tokens in, {found['decode_tokens']} "
        f"out, medians of {found['rounds']} rounds in turns.",
        "",
        "| | size | KLD (95 %) | top-1 (95 %) | perplexity ratio (95 %) | prefill | decode |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in (("this project, int8", ours), ("llama.cpp, Q8_0", theirs)):
        cells = [f"{row['size'] / 1e6:.1f} MB"]
        cells += [
            _within(row[key], form) for key, form in (("kld", ".4f"), ("top1", ".1%"), ("perplexity_ratio", ".4f"))
        ]
        cells += [f"{row['prefill_tokens_per_s']:.0f} tok/s", f"{row['decode_tokens_per_s']:.1f} tok/s"]
        rows.append(f"| {name} | {' | '.join(cells)} |")
    ratios = [f"{ours['size'] / theirs['size']:.2f}", f"{ours['kld']['value'] / theirs['kld']['value']:.1f}", "", ""]
    ratios += [f"{ours[key] / theirs[key]:.2f}" for key in ("prefill_tokens_per_s", "decode_tokens_per_s")]
    return [*rows, f"| ours / llama.cpp | {' | '.join(ratios)} |"]


def _within(of: dict[str, float], form: str) -> str:
    return f"{of['value']:{form}} ({of['low']:{form}} to {of['high']:{form}})"


def large(found: dict[str, Any]) -> list[str]:
    """True E2B and E4B size: what each run took, beside its limits."""
    rows = [
        "",
        f"Random weights of true Gemma 3n E2B and E4B size, bf16; `{found['command']}` on {found['date']}, "
        f"{found['machine']['threads']} threads ({found['machine']['cpu']}). Each stage is a process of its own; "
        "memory is anonymous, of the largest.",
        "",
        "| run | stages | time | peak memory | written to disk | result |",
        "|---|---|---|---|---|---|",
    ]
    for name, stages in found["runs"].items():
        took = together(stages)
        size = sum(taken["size"] for stage, taken in stages.items() if stage != "fetch")
        memory, written = took["peak_anonymous"] / 2**30, took["written"] / 1e9
        rows.append(
            f"| {name} | {', '.join(stages)} | {took['seconds'] / 60:.1f} min | {memory:.2f} GiB | {written:.1f} GB "
            f"| {size / 1e9:.1f} GB |"
        )
    return [*rows, "", f"![memory over time, stage by stage]({PICTURE.relative_to(PROJECT)})"]


def image(found: dict[str, Any]) -> list[str]:
    """The container image: how long it takes to build and to work in, and how large it is."""
    return [
        "",
        f"The container image (CPU): {found['size'] / 1e9:.2f} GB, built in {found['build']:.0f} s; the main job in "
        f"it, offline, in {found['job'] / 60:.1f} min; `nox -s image` on {found['date']}, {found['cores']} cores.",
    ]


def main() -> int:
    """Replace the section; 2 if a file it needs is missing."""
    for file, command in (
        (REPORT, "make"),
        (BENCH, "make bench"),
        (LARGE, "nox -s large -- e2b e4b"),
        (IMAGE, "nox -s image"),
    ):
        if not file.is_file():
            log.line(f"error: {file.relative_to(PROJECT)} is missing; run `{command}` first")
            return 2
    found = (json.loads(file.read_text(encoding="utf-8")) for file in (REPORT, BENCH, LARGE, IMAGE))
    report, bench, runs, container = found
    beside = rival(json.loads(RIVAL.read_text(encoding="utf-8"))) if RIVAL.is_file() else []
    text = README.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    parts = (quality(report), speed(bench), bundles(bench), beside, large(runs), image(container))
    made = "\n".join([BEGIN, *(line for part in parts for line in part), END])
    README.write_text(before + made + after, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
