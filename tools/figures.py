"""Write the measured figures into the documents: `docs/measured.md`, and README's one table and its times.

    python -m tools.figures                                    # from bench/*.json
    python -m tools.figures --report artifacts/tiny-gemma3n/verify/report.json

`make bench` and `nox -s large rival stock image` leave their tables in `bench/`; with `--report` those of the shipped
model are made of what `make` judged. A test holds the documents to these files, byte for byte.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipeline.core import log
from pipeline.core.recipe import PROJECT
from pipeline.report import plots
from tools import tables
from tools.bench_stages import together
from tools.real_models import DEFAULT, REAL_MODELS, TIMED
from tools.tables import Column, Measured, Row, Table, Value

README = PROJECT / "README.md"
PAGE = PROJECT / "docs" / "measured.md"
HEADLINE, TIMES = "bundle_rival", "first_make"
"""The tables that README shows: one as it is, one as a sentence."""
NAMES = {
    "fp32": "fp32",
    "fp16": "fp16 weights",
    "int8": "int8, dynamic",
    "int8-static": "int8, full integer",
    "int8-static16": "int8, full integer, 16-bit activations",
}
INTRODUCTION = """# Measured

<!-- Written by `python -m tools.figures` from bench/*.json. Edit those, or measure anew. -->

Other work ran beside all of this at times: ratios within a table hold, times are upper bounds. KLD is the mean KL
divergence in nats over the whole vocabulary; brackets hold 95 % intervals. What was tried on the way to the recipes
stands in [experiments.md](experiments.md).
"""


def documents(found: Mapping[str, Table], readme: str) -> dict[Path, str]:
    """The documents with the figures of `found`, by path; `readme` is README's text so far.

    Raises:
        ValueError: README has not exactly one place for each of its two.
    """
    plotted = {name: _with_plot(name, table) for name, table in found.items()}
    page = "\n".join([INTRODUCTION, *("\n".join(tables.section(table)) + "\n" for table in plotted.values())])
    parts = {"headline": headline(found[HEADLINE]), "times": times(found[TIMES])}
    for name, lines in parts.items():
        readme = tables.replaced(readme, name, "\n".join(lines))
    plots_ = {tables.BENCH / table.picture: plot(table) for table in plotted.values() if table.picture.endswith(_PLOT)}
    return {README: readme, PAGE: page, **plots_}


_PLOT = ".svg"
_STYLE = """<style>
svg { background: #fff; font: 13px system-ui, sans-serif }
text { fill: #333 } .tick { fill: #777; font-size: 12px } .name { font-weight: 600 }
.grid { stroke: #e4e4e4 } .axis { stroke: #777 } .whisker { stroke: #1f4e9c; stroke-width: 2 } .dot { fill: #1f4e9c }
.s1 .whisker { stroke: #b4531f } .s1 .dot { fill: #b4531f }
</style>"""


def _with_plot(name: str, table: Table) -> Table:
    """Tables that hold ours against a rival's are drawn as well."""
    return replace(table, picture=f"{name}{_PLOT}") if name.endswith("_rival") else table


def plot(table: Table) -> str:
    """Size against quality as an SVG file, each point with its speed: rows that have a size in MB and a KLD."""
    points = []
    for row in table.rows:
        size, kld, decode = (row.values.get(name) for name in ("size", "KLD", "decode"))
        if size and kld and kld.low is not None and kld.high is not None:
            speed = f" · {table.columns['decode'].text(decode.value)}" if decode else ""
            points.append(
                plots.Point(
                    name=f"{row.name}{speed}", size=int(size.value * 1e6), kld=kld.value, low=kld.low, high=kld.high
                )
            )
    head, body = plots.size_against_quality(points).split(">", 1)
    return f'{head} xmlns="http://www.w3.org/2000/svg">{_STYLE}{body}\n'


def headline(table: Table) -> list[str]:
    """README's table."""
    return [f"{table.title}. {table.about}", "", *tables.markdown(table), "", *tables.origins(table)]


def times(table: Table) -> list[str]:
    """How long README's two commands take, in minutes; the table has seconds."""
    told = []
    for row in table.rows:
        cells = [f"{value.value / 60:.1f} minutes {name}" for name, value in row.values.items()]
        told.append(f"- {row.name}: {', '.join(cells)}.")
    return [*told, *(f"- {note}" for note in table.notes), "", *tables.origins(table)]


def _values(columns: Mapping[str, Column], numbers: Sequence[object]) -> dict[str, Value]:
    """A row's values from numbers, in the order of the columns; None where there is none."""
    values = {}
    for name, number in zip(columns, numbers, strict=True):
        if isinstance(number, Value):
            values[name] = number
        elif number is not None:
            values[name] = Value(value=float(str(number)))
    return values


def _within(of: Mapping[str, float], factor: float = 1) -> Value:
    """A figure with its interval, as the judge writes them."""
    return Value(value=of["value"] * factor, low=of["low"] * factor, high=of["high"] * factor)


def shipped(report: Mapping[str, Any]) -> dict[str, Table]:
    """The shipped model's files, from verify's report: sizes, quality and speed; and fp32 over its shapes."""
    measured = Measured(
        date=report["date"],
        command="`make`",
        machine=f"{report['machine']['cores']} cores ({report['machine']['processor']})",
        versions=f"torch {report['tools']['torch']}, transformers {report['tools']['transformers']}, "
        f"LiteRT {report['tools']['ai-edge-litert']}",
    )
    columns = {
        "size": Column(unit="MB", digits=".2f"),
        "of fp32": Column(digits=".3f"),
        "KLD": Column(unit="nats", digits=".1e"),
        "top-1": Column(unit="%", digits=".2f"),
        "perplexity": Column(digits=".2f"),
        "integer products": Column(unit="%", digits=".1f"),
        "S = 1": Column(unit="ms", digits=".2f"),
        "S = 128": Column(unit="ms", digits=".1f"),
        "S = 1,024": Column(unit="ms", digits=".0f"),
    }
    rows = []
    for name in report["order"]:
        variant, latency = report["variants"][name], report["speed"][name]["xnnpack"]["latency"]
        scores, share = variant["against_fp32"] or variant["against_reference"], variant["integer_share"]
        numbers = [variant["size"] / 1e6, variant["size_ratio"], _within(scores["kld"]), 100 * scores["top1"]["value"]]
        numbers += [scores["perplexity"], 100 * share if share else None]
        numbers += [1000 * latency[length] for length in ("1", "128", "1024")]
        rows.append(Row(name=NAMES.get(name, name), values=_values(columns, numbers)))
    files = Table(
        title="The shipped model's files",
        about=f"{report['parameters']:,} parameters, {report['positions']:,} held-out positions. fp32 is held against "
        "Hugging Face, the others against our fp32 file. S is the length of the step in tokens.",
        place=2,
        columns=columns,
        measured=measured,
        rows=tuple(rows),
        notes=(
            "The full-integer file costs time on a processor without VNNI; it is for accelerators that take nothing "
            "else.",
        ),
    )
    return {"shipped_files": files, "shipped_shapes": _shapes(report["variants"]["fp32"], measured)}


def _shapes(fp32: Mapping[str, Any], measured: Measured) -> Table:
    columns = {
        "shapes": Column(digits=".0f"),
        "worst logits NMSE": Column(digits=".1e"),
        "worst top-1": Column(unit="%", digits=".0f"),
    }
    rows = [
        Row(name=kernels, values=_values(columns, [grid["cases"], grid["nmse"], 100 * grid["top1"]]))
        for kernels, grid in fp32["grid"].items()
    ]
    return Table(
        title="The shipped model's fp32 step graph over many shapes",
        about="Against Hugging Face in fp32; a shape is a batch, a sequence and a padding. XNNPACK is LiteRT's "
        f"default, builtin its plain kernels. The file has {fp32['size_per_parameter']:.3f} bytes per parameter.",
        place=3,
        columns=columns,
        measured=measured,
        rows=tuple(rows),
    )


def wide(bench: Mapping[str, Any]) -> dict[str, Table]:
    """The larger random model of `make bench`: int8 against fp32, time and memory of the stages."""
    measured = Measured(
        date=bench["date"],
        command=f"`{bench['command']}`",
        machine=f"{bench['machine']['threads']} threads ({bench['machine']['cpu']})",
    )
    about = f"A random Gemma 3n with E2B's layer widths, {bench['layers']} layers, {bench['parameters'] / 1e6:.0f} M "
    columns = {f"S = {length}": Column(unit="ms", digits=".1f") for length in bench["latency_ms"]}
    rows = [
        Row(name=name, values=_values(columns, [taken[name] for taken in bench["latency_ms"].values()]))
        for name in ("fp32", "int8")
    ]
    speed = Table(
        title="Speed of int8 against fp32 at E2B's layer widths",
        about=f"{about}parameters; one step of S tokens, both files timed in turns.",
        place=4,
        columns=columns,
        measured=measured,
        rows=tuple(rows),
        ratios=(("int8", "fp32"),),
    )
    columns = {
        "time": Column(unit="s", digits=".0f"),
        "of processor": Column(unit="s", digits=".0f"),
        "peak anonymous memory": Column(unit="GiB", digits=".2f"),
    }
    stages = Table(
        title="The stages at E2B's layer widths",
        about=f"{about}parameters.",
        place=5,
        columns=columns,
        measured=measured,
        rows=tuple(
            Row(name=name, values=_values(columns, [*(stage[key] for key in SECONDS), stage["peak_anonymous"] / 2**30]))
            for name, stage in bench["stages"].items()
        ),
    )
    return {"wide_speed": speed, "wide_stages": stages} | bundles(bench, measured)


SECONDS = ("seconds", "processor_seconds")
BUNDLE_COLUMNS = {
    "size": ("size", 1e-6, Column(unit="MB", digits=".1f")),
    "prefill": ("prefill_tokens_per_s", 1.0, Column(unit="tok/s", digits=".0f")),
    "decode": ("decode_tokens_per_s", 1.0, Column(unit="tok/s", digits=".1f")),
    "first token": ("first_token_s", 1.0, Column(unit="s", digits=".2f")),
    "load": ("load_s", 1.0, Column(unit="s", digits=".2f")),
    "peak anonymous": ("peak_anonymous", 2**-30, Column(unit="GiB", digits=".2f")),
}
"""Of what is measured of a bundle: its name in `make bench`'s results, factor, and how it is written."""
BUILD_COLUMNS = {
    "build": ("seconds", 1.0, Column(unit="s", digits=".0f")),
    "build, processor": ("processor_seconds", 1.0, Column(unit="s", digits=".0f")),
    "build, peak anonymous": ("peak_anonymous", 2**-30, Column(unit="GiB", digits=".2f")),
    "build, peak resident": ("peak_resident", 2**-30, Column(unit="GiB", digits=".2f")),
}
"""The same of building it."""
WHO = {"ours": "this project", "stock": "litert-torch `export_hf`"}


def bundles(bench: Mapping[str, Any], measured: Measured) -> dict[str, Table]:
    """A real model's int8 bundle in LiteRT-LM, beside the stock exporter's; nothing where it was not measured."""
    found = bench.get("bundle")
    if not found:
        return {}
    model = REAL_MODELS[found["model"]]
    columns = {name: column for name, (_, _, column) in (BUNDLE_COLUMNS | BUILD_COLUMNS).items()}
    rows = []
    for name, row in found["bundles"].items():
        build = found["builds"][name]
        numbers = [row[key] * factor for key, factor, _ in BUNDLE_COLUMNS.values()]
        numbers += [build[key] * factor for key, factor, _ in BUILD_COLUMNS.values()]
        rows.append(Row(name=WHO[name], values=_values(columns, numbers)))
    table = Table(
        title=f"{model.title}'s int8 bundle beside the stock exporter's",
        about=f"{found['parameters'] / 1e6:.0f} M parameters; {found['prompt_tokens']} tokens in, "
        f"{found['decode_tokens']} out, cache of {found['cache']:,}; medians of {found['rounds']} rounds in turns. "
        f"Both are built with the same signatures, a prefill of {found['prompt_tokens']} tokens and decode, "
        f"{found['built']} {'time' if found['built'] == 1 else 'times'} in turns; ours counts the calibration run that "
        "GPTQ needs, and not int8's ladder, golden and verify: the stock exporter judges nothing.",
        place=6,
        columns=columns,
        measured=replace(measured, versions=f"LiteRT-LM {found['runtime']}"),
        rows=tuple(rows),
        ratios=((WHO["ours"], WHO["stock"]),) if "stock" in found["bundles"] else (),
    )
    return {f"{model.tables}_stock": table}


def prefill(found: Mapping[str, Any], command: str) -> dict[str, Table]:
    """Time to the first token by the length of the prompt, for bundles with other prefill signatures."""
    model, prompts = REAL_MODELS[found["model"]], found["prompts"]
    columns = {f"{tokens:,} tokens": Column(unit="s", digits=".2f") for tokens in prompts}
    columns |= {f"{tokens:,}, processor": Column(unit="s", digits=".2f") for tokens in prompts}
    columns |= {name: BUNDLE_COLUMNS[name][2] for name in ("load", "peak anonymous", "size")}
    rows = []
    for ladder, row in found["ladders"].items():
        numbers = [row[f"{key} {tokens}"] for key in ("first_token_s", "processor_s") for tokens in prompts]
        numbers += [row["load_s"], row["peak_anonymous"] / 2**30, row["size"] / 1e6]
        rows.append(Row(name=f"[{ladder.replace(',', ', ')}]", values=_values(columns, numbers)))
    first = rows[0].name
    table = Table(
        title=f"{model.title}: time to the first token by its prefill signatures",
        about=f"int8 in LiteRT-LM, a cache of {found['cache']:,} tokens for all; prompts of so many tokens, and what "
        f"the processor's cores took for them together; medians of {found['rounds']} rounds in turns.",
        place=6,
        columns=columns,
        measured=Measured(
            date=found["date"],
            command=f"`{command}`",
            machine=f"{found['threads']} threads ({found['cpu']}), load {found['load_average']:.0f} at the start",
            versions=f"LiteRT-LM {found['runtime']}",
        ),
        rows=tuple(rows),
        ratios=tuple((row.name, first) for row in rows[1:]),
    )
    return {"prefill": table}


def decode(found: Mapping[str, Any], command: str) -> dict[str, Table]:
    """What decoding reads, and what the machine's memory gives, by precision and context."""
    gigabytes, share = Column(unit="GB/s", digits=".1f"), Column(digits=".2f")
    columns = {
        "weights": Column(unit="MB", digits=".1f"),
        "cache": Column(unit="MB", digits=".1f"),
        "decode": BUNDLE_COLUMNS["decode"][2],
        "memory gives": gigabytes,
        "weights read": gigabytes,
        "weights / memory": share,
        "weights and cache / memory": share,
    }
    rows, names = [], {key: f"{row['precision']}, {row['context']:,} tokens" for key, row in found["rows"].items()}
    for key, row in found["rows"].items():
        rate, given = row["decode_tokens_per_s"], row["bandwidth"]
        read = [rate * row["weights"], rate * (row["weights"] + row["cache"])]
        numbers = [row["weights"] / 1e6, row["cache"] / 1e6, rate, given / 1e9, read[0] / 1e9]
        rows.append(Row(name=names[key], values=_values(columns, [*numbers, *(each / given for each in read)])))
    base = next(key for key, row in found["rows"].items() if row["precision"] == "int8")
    others = [key for key, row in found["rows"].items() if key != base and row["precision"] != "fp32"]
    table = Table(
        title=f"{TIMED[found['model']].title}: decoding beside what memory gives",
        about=f"LiteRT-LM, {found['decoded']} tokens in and as many out, with a cache for so many; a token reads all "
        f"weights and all of the cache. Memory: what {found['threads']} threads read, measured before each; medians of "
        f"{found['rounds']} {'round' if found['rounds'] == 1 else 'rounds in turns'}.",
        place=6,
        columns=columns,
        measured=Measured(
            date=found["date"],
            command=f"`{command}`",
            machine=f"{found['threads']} threads ({found['cpu']}), load {found['load_average']:.0f} at the start",
            versions=f"LiteRT-LM {found['runtime']}",
        ),
        rows=tuple(rows),
        ratios=tuple((names[key], names[base]) for key in others),
    )
    return {"decode" if found["model"] == DEFAULT else f"{TIMED[found['model']].tables}_decode": table}


PEERS = {"int8": "Q8_0", "int4": "Q4_0"}
"""llama.cpp's type by our precision that is held against it. Its K-quants want rows in multiples of 256 weights."""


def rival_name(model: str, precision: str) -> str:
    """The name of the table that holds a real model's bundle against llama.cpp's file."""
    return f"{REAL_MODELS[model].tables}{'' if precision == 'int8' else f'_{precision}'}_rival"


def rival(found: Mapping[str, Any]) -> dict[str, Table]:
    """A real model's bundle beside llama.cpp's file of the same checkpoint in as many bits."""
    ours, model, precision = found["files"]["ours"], REAL_MODELS[found["model"]], found["precision"]
    names = {"ours": f"this project, {precision}", "llama.cpp": f"llama.cpp, {PEERS[precision]}"}
    given = [] if found["model"] == DEFAULT else [found["model"]]
    given += [] if precision == "int8" else ["--precision", precision]
    said = " ".join(["nox -s rival", *(["--", *given] if given else [])])
    columns = {
        "size": Column(unit="MB", digits=".1f"),
        "KLD": Column(unit="nats", digits=".4f"),
        "top-1": Column(unit="%", digits=".1f"),
        "perplexity ratio": Column(digits=".4f"),
        "prefill": Column(unit="tok/s", digits=".0f"),
        "decode": Column(unit="tok/s", digits=".1f"),
    }
    rows = []
    for key, name in names.items():
        row = found["files"][key]
        numbers = [row["size"] / 1e6, _within(row["kld"]), _within(row["top1"], 100), _within(row["perplexity_ratio"])]
        numbers += [row["prefill_tokens_per_s"], row["decode_tokens_per_s"]]
        rows.append(Row(name=name, values=_values(columns, numbers)))
    table = Table(
        title=f"{model.title}'s {precision} bundle beside llama.cpp's {PEERS[precision]} of the same checkpoint",
        about=f"Quality against Hugging Face in fp32 on {ours['positions']:,} positions of {ours['blocks']} held-out "
        f"texts, with 95 % intervals; speed with {found['prompt_tokens']} tokens in, {found['decode_tokens']} out, "
        f"medians of {found['rounds']} rounds in turns.",
        place=1,
        columns=columns,
        measured=Measured(
            date=found["date"],
            command=f"`{said}`",
            machine=f"{found['threads']} threads ({found['cpu']})",
            versions=f"llama.cpp's source in llama-cpp-python {found['bindings']}, built for this processor",
        ),
        rows=tuple(rows),
        ratios=((names["ours"], names["llama.cpp"]),),
    )
    return {rival_name(found["model"], precision): table}


def large(found: Mapping[str, Any]) -> dict[str, Table]:
    """Gemma 3n and Gemma 4 at true size: what each run took."""
    columns = {
        "time": Column(unit="min", digits=".1f"),
        "of processor": Column(unit="min", digits=".1f"),
        "peak memory": Column(unit="GiB", digits=".2f"),
        "written to disk": Column(unit="GB", digits=".1f"),
        "result": Column(unit="GB", digits=".1f"),
    }
    measured = Measured(
        date=found["date"],
        command=f"`{found['command']}`",
        machine=f"{found['machine']['threads']} threads ({found['machine']['cpu']})",
    )
    rows = []
    for name, stages in found["runs"].items():
        took = together(stages)
        size = sum(taken["size"] for stage, taken in stages.items() if stage != "fetch")
        numbers = [took["seconds"] / 60, took["processor_seconds"] / 60, took["peak_anonymous"] / 2**30]
        numbers += [took["written"] / 1e9, size / 1e9]
        own = None if found["dates"][name] == found["date"] else replace(measured, date=found["dates"][name])
        rows.append(Row(name=f"{name} ({', '.join(stages)})", values=_values(columns, numbers), measured=own))
    table = Table(
        title="Gemma 3n and Gemma 4 at true size",
        about="Random weights of true size, bf16. Each stage is a process of its own; memory is anonymous, of the "
        "largest. The picture is memory over time, stage by stage.",
        place=7,
        columns=columns,
        measured=measured,
        rows=tuple(rows),
        picture="large.png",
    )
    return {"large": table}


def image(found: Mapping[str, Any], lock: str = "cpu") -> dict[str, Table]:
    """The container image of a lock: how large it is, and the CPU's, how long it takes to build and to work in.

    CUDA's is built of 4 GB of downloads, which say more of a network than of an image.
    """
    columns = {
        "size": Column(unit="GB", digits=".2f"),
        "built in": Column(unit="s", digits=".0f"),
        "the main job in it, offline": Column(unit="min", digits=".1f"),
    }
    numbers = [found["size"] / 1e9, found["build"], found["job"] / 60]
    values, cpu = _values(columns, numbers), lock == "cpu"
    table = Table(
        title="The container image",
        about="The image, and `docker run IMAGE all` on the shipped model: on a CPU, offline, on a read-only root.",
        place=8,
        columns=columns,
        measured=Measured(
            date=found["date"],
            command=f"`nox -s {'image' if cpu else 'image_cuda'}`",
            machine=f"{found['cores']} cores",
        ),
        rows=(Row(name=f"{lock.upper()} image", values=values if cpu else {"size": values["size"]}),),
    )
    return {"image": table}


def main(argv: Sequence[str] | None = None) -> int:
    """Write the documents."""
    parser = argparse.ArgumentParser(prog="python -m tools.figures", description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument(
        "--report", type=Path, help="verify's report.json of the shipped model, to take its tables from"
    )
    arguments = parser.parse_args(argv)
    if arguments.report:
        tables.write_all(shipped(json.loads(arguments.report.read_text(encoding="utf-8"))))
    for file, text in documents(tables.read_all(), README.read_text(encoding="utf-8")).items():
        file.write_text(text, encoding="utf-8")
        log.line(f"written: {file.relative_to(PROJECT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
