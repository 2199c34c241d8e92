"""What the benchmarks see becomes tables: the figures that are shown, their units, and the day of each."""

from __future__ import annotations

from typing import Any
from xml.etree import ElementTree

import pytest

from tools import bench_decode, bench_prefill, bench_stock, figures, tables

ABOUT = {"machine": {"cpu": "AMD EPYC", "threads": 2}, "date": "2026-11-29"}


def took(seconds: float, memory: float, **more: float) -> dict[str, float]:
    return {
        "seconds": seconds, "processor_seconds": 1.5 * seconds, "peak_anonymous": memory * 2**30,
        "peak_resident": 2**30, "read": 0, "written": 2e9, "size": 1e9, **more,
    }  # fmt: skip


def bench(**more: Any) -> dict[str, Any]:
    return {
        **ABOUT,
        "command": "make bench",
        "layers": 3,
        "parameters": 257_000_000,
        "latency_ms": {"1": {"fp32": 31.04, "int8": 7.6}, "128": {"fp32": 331.0, "int8": 102.0}},
        "stages": {"fetch": took(4.2, 0.23), "int8": took(8, 0.32)},
        **more,
    }


def bundle(*names: str) -> dict[str, Any]:
    speed = {"size": 278.4e6, "prefill_tokens_per_s": 300, "decode_tokens_per_s": 40, "first_token_s": 0.4}
    speed |= {"load_s": 1.7, "peak_anonymous": 2**29}
    rows = {name: dict(speed, prefill_tokens_per_s=300 / place) for place, name in enumerate(names, start=1)}
    about = {
        "model": "gemma3",
        "parameters": 268e6,
        "cache": 4096,
        "prompt_tokens": 128,
        "decode_tokens": 128,
        "rounds": 5,
    }
    return {
        **about,
        "model": "gemma3",
        "runtime": "0.18.1",
        "bundles": rows,
        "builds": {name: took(250, 0.85) for name in names},
        "built": 2,
    }


def test_the_wide_model_has_a_row_each_their_ratio_and_its_stages() -> None:
    found = figures.wide(bench(bundle=None))
    assert [*found] == ["wide_speed", "wide_stages"]
    assert tables.markdown(found["wide_speed"])[2:] == [
        "| fp32 | 31.0 ms | 331.0 ms |",
        "| int8 | 7.6 ms | 102.0 ms |",
        "| int8 / fp32 | 0.24 | 0.31 |",
    ]
    assert tables.markdown(found["wide_stages"])[2:] == [
        "| fetch | 4 s | 6 s | 0.23 GiB |",
        "| int8 | 8 s | 12 s | 0.32 GiB |",
    ]
    assert tables.origins(found["wide_speed"]) == ["Measured by `make bench` on 2026-11-29, 2 threads (AMD EPYC)."]


def test_bundles_have_a_ratio_where_the_stock_exporters_was_made() -> None:
    alone = figures.wide(bench(bundle=bundle("ours")))["bundle_stock"]
    assert [row.name for row in alone.rows] == ["this project"] and not alone.ratios
    both = tables.markdown(figures.wide(bench(bundle=bundle("ours", "stock")))["bundle_stock"])
    assert both[2].startswith(
        "| this project | 278.4 MB | 300 tok/s | 40.0 tok/s | 0.40 s | 1.70 s | 0.50 GiB | 250 s |"
    )
    assert both[4].startswith("| this project / litert-torch `export_hf` | 1.00 | 2.00 | 1.00 |")


def test_prefill_ladders_have_the_time_of_each_prompt_over_the_first_ladders() -> None:
    def ladder(factor: float) -> dict[str, float]:
        told = {"first_token_s 32": 0.1, "first_token_s 1024": 4.0, "processor_s 32": 0.2, "processor_s 1024": 8.0}
        rest = {"load_s": 2.0, "peak_anonymous": 2.0**30, "size": 278e6}
        return {name: value * factor for name, value in told.items()} | rest

    found = {
        **{"model": "gemma3", "prompts": [32, 1024], "cache": 5248, "rounds": 3, "threads": 2, "cpu": "AMD EPYC"},
        **{"load_average": 2.6, "runtime": "0.18.1", "date": "2026-11-30"},
        "ladders": {"128": ladder(1), "32,128,512": ladder(0.5)},
    }
    (table,) = figures.prefill(found, "make bench").values()
    assert tables.markdown(table)[0] == (
        "| | 32 tokens | 1,024 tokens | 32, processor | 1,024, processor | load | peak anonymous | size |"
    )
    assert tables.markdown(table)[2:] == [
        "| [128] | 0.10 s | 4.00 s | 0.20 s | 8.00 s | 2.00 s | 1.00 GiB | 278.0 MB |",
        "| [32, 128, 512] | 0.05 s | 2.00 s | 0.10 s | 4.00 s | 2.00 s | 1.00 GiB | 278.0 MB |",
        "| [32, 128, 512] / [128] | 0.50 | 0.50 | 0.50 | 0.50 | 1.00 | 1.00 | 1.00 |",
    ]
    assert "load 3 at the start" in tables.origins(table)[0]


def test_decoding_stands_beside_what_memory_gives() -> None:
    def row(precision: str, context: int, weights: int, rate: float) -> dict[str, object]:
        told = {"precision": precision, "context": context, "weights": weights, "cache": 50e6}
        return told | {"decode_tokens_per_s": rate, "bandwidth": 20e9}

    found = {
        **{"model": "gemma3", "decoded": 64, "rounds": 3, "threads": 2, "cpu": "AMD EPYC"},
        **{"load_average": 2.6, "runtime": "0.18.1", "date": "2026-11-30"},
        "rows": {
            "fp32, 4096": row("fp32", 4096, 10**9, 10),
            "int8, 4096": row("int8", 4096, 250 * 10**6, 40),
            "int8, 32768": row("int8", 32768, 250 * 10**6, 30),
        },
    }
    (table,) = figures.decode(found, "make bench").values()
    assert tables.markdown(table)[2:5] == [
        "| fp32, 4,096 tokens | 1000.0 MB | 50.0 MB | 10.0 tok/s | 20.0 GB/s | 10.0 GB/s | 0.50 | 0.53 |",
        "| int8, 4,096 tokens | 250.0 MB | 50.0 MB | 40.0 tok/s | 20.0 GB/s | 10.0 GB/s | 0.50 | 0.60 |",
        "| int8, 32,768 tokens | 250.0 MB | 50.0 MB | 30.0 tok/s | 20.0 GB/s | 7.5 GB/s | 0.38 | 0.45 |",
    ]
    assert tables.markdown(table)[5].startswith("| int8, 32,768 tokens / int8, 4,096 tokens | 1.00 | 1.00 | 0.75 |")


def test_memory_gives_something() -> None:
    assert 1e8 < bench_decode.bandwidth(1) < 1e13


@pytest.mark.parametrize(
    ("ladders", "longest", "length"), [(["128"], 112, 256), (["32,128"], 120, 256), (["32,128", "1024"], 4096, 5248)]
)
def test_a_cache_holds_the_longest_prompt_and_the_answer_beside_any_ladder(
    ladders: list[str], longest: int, length: int
) -> None:
    assert bench_prefill.cache_length(ladders, longest) == length


def test_rivals_are_drawn_by_size_quality_and_speed() -> None:
    found = tables.read_all()
    svg = figures.documents(found, figures.README.read_text(encoding="utf-8"))[tables.BENCH / "bundle_rival.svg"]
    drawn = ElementTree.fromstring(svg)  # noqa: S314 - our own text
    names = [each.text for each in drawn.iter("{http://www.w3.org/2000/svg}text") if each.get("class") == "name"]
    rows = {row.name: row.values for row in found["bundle_rival"].rows}
    assert sorted(names) == sorted(f"{name} · {values['decode'].value:.1f} tok/s" for name, values in rows.items())
    assert len(list(drawn.iter("{http://www.w3.org/2000/svg}circle"))) == len(rows)


def test_a_run_of_an_earlier_day_keeps_its_day() -> None:
    runs = {"e2b int8": {"fetch": took(60, 0.2), "int8": took(210, 1.0)}, "e4b int8": {"int8": took(270, 1.0)}}
    dates = {"e2b int8": "2026-11-24", "e4b int8": "2026-11-29"}
    (table,) = figures.large({**ABOUT, "command": "nox -s large -- e4b", "runs": runs, "dates": dates}).values()
    assert tables.markdown(table)[2] == "| e2b int8 (fetch, int8) | 4.5 min | 6.8 min | 1.00 GiB | 4.0 GB | 1.0 GB |"
    ways = tables.origins(table)
    assert len(ways) == 2 and "e2b int8 (fetch, int8): " in ways[0] and "on 2026-11-24" in ways[0]
    assert "on 2026-11-29" in ways[1]


def test_rows_that_were_not_measured_again_stay_with_how_they_were() -> None:
    def table(date: str, *names: str) -> tables.Table:
        runs = {name: {"int8": took(60, 1)} for name in names}
        about = {**ABOUT, "date": date, "command": "nox -s large", "runs": runs, "dates": dict.fromkeys(names, date)}
        return figures.large(about)["large"]

    found = tables.joined(table("2026-11-24", "e2b int8", "e4b int8"), table("2026-11-29", "gemma4 int8", "e2b int8"))
    assert [row.name.split()[0] for row in found.rows] == ["e4b", "gemma4", "e2b"]
    assert [(row.measured or found.measured).date for row in found.rows] == ["2026-11-24", "2026-11-29", "2026-11-29"]


def test_an_image_is_one_row() -> None:
    found = {"date": "2026-11-29", "cores": 2, "build": 41.2, "job": 420.0, "size": 1.99e9}
    (table,) = figures.image(found).values()
    assert tables.markdown(table)[2] == "| CPU image | 1.99 GB | 41 s | 7.0 min |"
    (both,) = (tables.joined(table, other) for other in figures.image({**found, "size": 6.5e9}, "cuda").values())
    assert tables.markdown(both)[2:] == ["| CPU image | 1.99 GB | 41 s | 7.0 min |", "| CUDA image | 6.50 GB | – | – |"]
    assert ["image_cuda" in way for way in tables.origins(both)] == [False, True]


def score(value: float) -> dict[str, float]:
    return {"value": value, "low": 0.9 * value, "high": 1.1 * value}


def test_the_shipped_models_files_are_held_against_what_they_were_judged_by() -> None:
    grid = {
        "xnnpack": {"cases": 84, "nmse": 1.3e-12, "top1": 1.0},
        "builtin": {"cases": 72, "nmse": 1e-13, "top1": 1.0},
    }
    scores = {
        name: {"kld": score(kld), "top1": score(0.5), "perplexity": 27.7} for name, kld in (("a", 1e-3), ("b", 2e-3))
    }
    fp32 = {
        "size": 9.49e6,
        "size_ratio": 1.0,
        "integer_share": 0,
        "against_fp32": None,
        "against_reference": scores["a"],
    }
    int8 = {"size": 2.62e6, "size_ratio": 0.276, "integer_share": 0.867, "against_fp32": scores["b"]}
    latency = {"xnnpack": {"latency": {"1": 0.00035, "128": 0.0086, "1024": 0.113}}}
    report = {
        **ABOUT,
        "machine": {"cores": 2, "processor": "AMD EPYC"},
        "tools": {"torch": "2.13.0", "transformers": "5.23.0", "ai-edge-litert": "2.3.0"},
        "parameters": 2_335_920,
        "positions": 2048,
        "order": ["fp32", "int8"],
        "speed": {"fp32": latency, "int8": latency},
        "variants": {
            "fp32": fp32 | {"grid": grid, "size_per_parameter": 4.061},
            "int8": int8 | {"against_reference": scores["a"]},
        },
    }
    found = figures.shipped(report)
    speed = "0.35 ms | 8.6 ms | 113 ms |"
    assert tables.markdown(found["shipped_files"])[2:] == [
        f"| fp32 | 9.49 MB | 1.000 | 1.0e-03 nats (9.0e-04 to 1.1e-03) | 50.00% | 27.70 | – | {speed}",
        f"| int8, dynamic | 2.62 MB | 0.276 | 2.0e-03 nats (1.8e-03 to 2.2e-03) | 50.00% | 27.70 | 86.7% | {speed}",
    ]
    assert tables.markdown(found["shipped_shapes"])[2:] == [
        "| xnnpack | 84 | 1.3e-12 | 100% |",
        "| builtin | 72 | 1.0e-13 | 100% |",
    ]
    assert "LiteRT 2.3.0" in tables.origins(found["shipped_files"])[0]


def test_of_several_builds_the_middle_one_counts() -> None:
    """An even number has two: of these the faster, beside which less ran."""
    for seconds, middle in (([3.0], 3.0), ([9.0, 2.0], 2.0), ([7.0, 1.0, 4.0], 4.0)):
        assert bench_stock._middle(seconds, lambda each: each) == middle
